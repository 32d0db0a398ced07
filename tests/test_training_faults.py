"""Killed at every file operation, a full disk, damaged and hostile checkpoints: at most the interval is lost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from faulty_disk import FaultyDisk, Outcome
from hypothesis import given
from hypothesis import strategies as st
from lengths import IS_LONG
from safetensors.torch import load_file
from test_training_loop import QUIET, interrupted_at, make_job, weights

from groundup.console import Console
from groundup.distributed import current_world
from groundup.errors import GroundupError, Interrupted
from groundup.files import file_digest, own_folder, remove_partials, value_digest, write_json
from groundup.training import TrainingJob, train
from groundup.training.checkpoint import complete_checkpoints, load_checkpoint
from groundup.training.metrics import read_log

needs_a_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("cc", "gcc", "clang"))) or not Path("/proc/self/fd").exists(),
    reason="needs a C compiler and /proc to make a disk that fails",
)
SMALL = {"n_steps": 3, "eval_every": 2, "keep_best": True, "ema": 0.9, "keep_checkpoints": 1}


class Listening(Console):
    """A console that keeps what it is warned of."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultyDisk]:
    with FaultyDisk(tmp_path_factory.mktemp("disk")) as disk:
        yield disk


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.name != ".groundup-folder"}


def bits(folder: Path) -> dict[str, object]:
    """Everything that a run left which recipe and seed decide."""
    found: dict[str, object] = {}
    for name in sorted(files(folder)):
        path = folder / name
        if path.name == "state.json":
            found[name] = {k: v for k, v in json.loads(path.read_text()).items() if k not in ("seconds", "digest")}
        elif path.is_file() and path.name != "timings.jsonl":
            found[name] = file_digest(path)
    return found


# --- Killed at every file operation


def check_what_was_saved(folder: Path, outcome: Outcome) -> None:
    """What `save` told is there, or what it was about to write is; nothing else."""
    remove_partials(folder)
    assert not [name for name in files(folder) if "partial" in name or ".tmp" in name]
    console = Listening()
    found = load_checkpoint(folder / "checkpoints", "print", {"weights"}, console)
    assert not console.warnings
    for path in complete_checkpoints(folder / "checkpoints"):
        assert files(path) == {"weights.safetensors", "config.json", "state.json"}
    saved, logged = outcome.all("saved"), outcome.all("logged")
    if found is None:
        assert not saved
    else:
        progress, parts = found
        assert progress.step in {*saved[-1:], *logged[-1:]}
        assert (parts["weights"]["w"] == progress.step).all()
        assert progress.shift in (0, 7)
        assert progress.shift == 7 or len(saved) < 3
        assert [line["step"] for line in read_log(folder / "metrics.jsonl")][: progress.step] == list(
            range(1, progress.step + 1)
        )
    if outcome.all("best"):
        assert (folder / "best").is_dir()
    if (folder / "best").is_dir():
        step = json.loads((folder / "best" / "state.json").read_text())["step"]
        assert step in {*outcome.all("best")[-1:], *saved[-1:]}
        assert (load_file(folder / "best" / "weights.safetensors")["w"] == step).all()
        assert files(folder / "best") == {"weights.safetensors", "config.json", "state.json"}


STRIDE = 1 if IS_LONG else 7
"""Between the file operations that are tried."""


@needs_a_compiler
def test_killed_at_every_file_operation_of_a_write_the_checkpoint_before_or_the_new_one_is_there(
    tmp_path: Path, disk: FaultyDisk
) -> None:
    whole = disk.do("save", tmp_path / "whole")
    assert whole.error is None
    assert whole.all("saved") == [1, 2, 2]
    check_what_was_saved(tmp_path / "whole", whole)
    assert [path.name for path in complete_checkpoints(tmp_path / "whole" / "checkpoints")] == ["step-00000002"]
    assert whole.operations > 100
    for at in range(0, whole.operations, STRIDE):
        folder = tmp_path / f"killed-{at}"
        outcome = disk.do("save", folder, "kill", at)
        assert outcome.status == -9, at
        check_what_was_saved(folder, outcome)


@needs_a_compiler
def test_a_disk_full_at_every_file_operation_is_named_and_the_former_checkpoint_stays(
    tmp_path: Path, disk: FaultyDisk
) -> None:
    n_operations = disk.do("save", tmp_path / "whole").operations
    refused = 0
    for at in range(2, n_operations, STRIDE):
        folder = tmp_path / f"full-{at}"
        outcome = disk.do("save", folder, "full", at)
        if outcome.status == 0:  # what was left to do needed no space
            continue
        refused += 1
        assert outcome.status == 1, (at, outcome.error)
        assert outcome.error is not None
        named, _, rest = outcome.error.partition(": the disk is full")
        assert rest
        assert named.startswith(str(folder))
        assert "partial" not in named
        if (folder / "checkpoints").is_dir() and outcome.all("saved"):
            assert not [name for name in files(folder) if ".tmp" in name]
        check_what_was_saved(folder, outcome)
    assert refused > n_operations / STRIDE / 2


@needs_a_compiler
def test_a_disk_that_says_only_once_and_late_that_it_is_full_is_heard(tmp_path: Path, disk: FaultyDisk) -> None:
    """Some systems take what is written and refuse when it is flushed, and do not repeat it."""
    kinds = disk.do("save", tmp_path / "whole").kinds
    assert set(kinds) == set("owtsmru")
    for at in [place for place, kind in enumerate(kinds) if kind == "s"][:: 1 if IS_LONG else 3]:
        outcome = disk.do("save", tmp_path / f"full-{at}", "full once", at)
        assert ": the disk is full" in str(outcome.error), at
        check_what_was_saved(tmp_path / f"full-{at}", outcome)


def killed_and_gone_on_with(
    disk: FaultyDisk, folder: Path, expected: dict[str, object], mode: str, at: int, **options: object
) -> Outcome:
    """Train on a disk that fails at this operation, then once more on one that does not: the same bits, little twice.

    One step after the other is computed and a checkpoint written after each: only the step that was not yet in one when
    the first process ended is computed again (or two, where checkpoints are written beside training).
    """
    first = disk.do("train", folder, mode, at, **SMALL, **options)
    second = disk.do("train", folder, **SMALL, **options)
    assert second.status == 0, second.error
    n_steps, n_twice = SMALL["n_steps"], 2 if options else 1
    assert n_steps <= len(first.all("step")) + len(second.all("step")) <= n_steps + n_twice, at
    # Killed right behind the last checkpoint, the one before it is still there: it goes with the next that is written.
    newest, *older = complete_checkpoints(folder / "checkpoints")
    assert newest.name == f"step-{n_steps:08d}"
    if older:
        assert [path.name for path in older] == [f"step-{n_steps - 1:08d}"]
        assert not second.all("step")
        shutil.rmtree(older[0])
    assert bits(folder) == expected, at
    return first


@needs_a_compiler
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("mode", ["kill", "full"])
def test_a_run_whose_disk_failed_is_gone_on_with_to_the_same_bits(tmp_path: Path, disk: FaultyDisk, mode: str) -> None:
    n_operations = disk.do("train", tmp_path / "whole", **SMALL).operations
    expected = bits(tmp_path / "whole")
    ends = set()
    for at in range(0, n_operations, 1 if IS_LONG else n_operations // 3):
        folder = tmp_path / f"at-{at}"
        first = killed_and_gone_on_with(disk, folder, expected, mode, at)
        ends.add(first.status)
        if first.status == 1:
            assert ": the disk is full" in str(first.error)
        shutil.rmtree(folder)
    assert ends == ({-9} if mode == "kill" else {1})  # to close the logs, at the end, needs space too


@needs_a_compiler
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_while_checkpoints_are_written_beside_training_the_run_goes_on_to_the_same_bits(
    tmp_path: Path, disk: FaultyDisk
) -> None:
    n_operations = disk.do("train", tmp_path / "whole", **SMALL, checkpoint_beside=True).operations
    expected = bits(tmp_path / "whole")
    for at in range(3, n_operations, 11 if IS_LONG else n_operations // 4):
        killed_and_gone_on_with(disk, tmp_path / f"at-{at}", expected, "kill", at, checkpoint_beside=True)


# --- Damaged checkpoints


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> TrainingJob:
    """A run that was stopped after step 3, with the checkpoints of steps 2 and 3."""
    job = make_job(tmp_path_factory.mktemp("two") / "run", ema=0.9)
    with pytest.raises(Interrupted):
        train(interrupted_at(2, job), current_world(), QUIET)
    return job


def newest_of_a_copy(job: TrainingJob, folder: Path) -> Path:
    copy = shutil.copytree(job.folder / "checkpoints", folder / "checkpoints")
    newest = complete_checkpoints(copy)[0]
    assert newest.name == "step-00000003"
    return newest


CHECKPOINT_FILES = (
    "average.safetensors", "config.json", "optimizer.safetensors", "state.json", "weights.safetensors"
)  # fmt: skip


def assert_named_and_passed_over(job: TrainingJob, newest: Path, *what: str) -> None:
    console = Listening()
    found = load_checkpoint(newest.parent, job.fingerprint, {"weights", "optimizer", "average"}, console)
    assert found is not None
    assert found[0].step == 2
    (warning,) = console.warnings
    assert str(newest) in warning
    assert all(one in warning for one in what), warning
    assert warning.endswith("Going back to the checkpoint before it.")


def test_a_checkpoint_holds_these_files_and_no_others(two_checkpoints: TrainingJob, tmp_path: Path) -> None:
    assert files(newest_of_a_copy(two_checkpoints, tmp_path)) == set(CHECKPOINT_FILES)


@given(name=st.sampled_from(CHECKPOINT_FILES), place=st.floats(0, 1, exclude_max=True), change=st.integers(1, 255))
def test_one_byte_of_any_file_changed_is_named_and_passed_over(
    two_checkpoints: TrainingJob, tmp_path_factory: pytest.TempPathFactory, name: str, place: float, change: int
) -> None:
    newest = newest_of_a_copy(two_checkpoints, tmp_path_factory.mktemp("flip"))
    content = bytearray((newest / name).read_bytes())
    before = bytes(content)
    content[int(place * len(content))] ^= change
    (newest / name).write_bytes(content)
    if name == "state.json" and _says_the_same(before, bytes(content)):
        return  # one white space for another
    assert_named_and_passed_over(two_checkpoints, newest, name)


def _says_the_same(one: bytes, other: bytes) -> bool:
    try:
        return bool(json.loads(one) == json.loads(other))
    except ValueError:
        return False


@given(name=st.sampled_from(CHECKPOINT_FILES), share=st.floats(0, 1, exclude_max=True))
def test_any_file_cut_short_anywhere_is_named_and_passed_over(
    two_checkpoints: TrainingJob, tmp_path_factory: pytest.TempPathFactory, name: str, share: float
) -> None:
    newest = newest_of_a_copy(two_checkpoints, tmp_path_factory.mktemp("cut"))
    content = (newest / name).read_bytes()
    (newest / name).write_bytes(content[: int(share * (len(content) - 1))])
    assert_named_and_passed_over(two_checkpoints, newest, name)


@pytest.mark.parametrize("name", CHECKPOINT_FILES)
def test_a_missing_file_is_named(two_checkpoints: TrainingJob, tmp_path: Path, name: str) -> None:
    newest = newest_of_a_copy(two_checkpoints, tmp_path)
    (newest / name).unlink()
    assert_named_and_passed_over(two_checkpoints, newest, name, "not found")


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"null", b"[]", b"7", b"\xff\xfe", b"[" * 100_000, b"{}", b'{"step": 3}', b'{"a": NaN}', b"\0" * 4096],
)
def test_a_state_that_is_none_is_named(two_checkpoints: TrainingJob, tmp_path: Path, content: bytes) -> None:
    newest = newest_of_a_copy(two_checkpoints, tmp_path)
    (newest / "state.json").write_bytes(content)
    assert_named_and_passed_over(two_checkpoints, newest, "state.json")


def test_an_empty_folder_and_a_file_in_a_checkpoint_s_place_are_passed_over(
    two_checkpoints: TrainingJob, tmp_path: Path
) -> None:
    newest = newest_of_a_copy(two_checkpoints, tmp_path)
    shutil.rmtree(newest)
    newest.mkdir()
    (newest.parent / "step-00000009").write_text("no folder")
    assert_named_and_passed_over(two_checkpoints, newest, "state.json", "not found")


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"digests": {"../outside": "0"}}, "not in the folder"),
        ({"digests": {"/etc/hostname": "0"}}, "not in the folder"),
        ({"digests": {"link.safetensors": "0"}}, "leads out"),
        ({"digests": {"..": "0"}}, "not in the folder"),
        ({"digests": ["weights.safetensors"]}, "cannot be read"),
        ({"digests": None}, "cannot be read"),
        ({"digests": {}}, "lacks average, optimizer, weights"),
        ({"step": "three"}, ", step: Input should be a valid integer"),
        ({"step": 4}, "not the one of its name"),
        ({"guard": 7}, ", guard: Unexpected"),
        ({"more": 1}, ", more: Unexpected"),
    ],
)
def test_a_state_that_somebody_made_up_leads_nowhere(
    two_checkpoints: TrainingJob, tmp_path: Path, change: dict[str, object], what: str
) -> None:
    newest = newest_of_a_copy(two_checkpoints, tmp_path)
    (newest.parent / "outside").write_text("secret")
    (newest / "link.safetensors").symlink_to(newest.parent / "outside")
    state = json.loads((newest / "state.json").read_text())
    state = {name: value for name, value in state.items() if name != "digest"} | change
    write_json(newest / "state.json", {**state, "digest": value_digest(state)})
    assert_named_and_passed_over(two_checkpoints, newest, what)


def test_where_all_are_damaged_the_run_says_so_and_begins_anew(tmp_path: Path) -> None:
    whole = make_job(tmp_path / "whole", n_steps=4)
    train(whole, current_world(), QUIET)
    with pytest.raises(Interrupted):
        train(interrupted_at(2, make_job(tmp_path / "parts", n_steps=4)), current_world(), QUIET)
    for path in complete_checkpoints(tmp_path / "parts" / "checkpoints"):
        (path / "weights.safetensors").write_bytes(b"")
    parts, console = make_job(tmp_path / "parts", n_steps=4), Listening()
    computed = steps_computed(parts)
    train(parts, current_world(), console)
    assert len(computed) == 4
    assert [warning.rpartition(": damaged")[0].rsplit("/", 2)[1] for warning in console.warnings] == [
        "step-00000003", "step-00000002"
    ]  # fmt: skip
    assert console.warnings[-1].endswith("Training begins anew.")
    assert all(torch.equal(weights(whole)[name], value) for name, value in weights(parts).items())


def steps_computed(job: TrainingJob) -> list[int]:
    """A list that grows by one with every training pass of the job."""
    passes: list[int] = []

    def count(model: torch.nn.Module, arguments: object) -> None:
        if model.training:
            passes.append(len(passes))

    job.model.register_forward_pre_hook(count)
    return passes


@pytest.mark.parametrize("what", ["damaged", "of other settings"])
def test_what_was_passed_over_does_not_push_out_what_is_written_next(tmp_path: Path, what: str) -> None:
    """Three checkpoints of which none can be used, and then a kill: only the step after the last save is done again."""
    options = {"n_steps": 6, "keep_checkpoints": 3}
    others = {**options, "lr": 1e-4} if what == "of other settings" else options
    with pytest.raises(Interrupted):
        train(interrupted_at(3, make_job(tmp_path / "run", **others)), current_world(), QUIET)
    if what == "damaged":
        for path in complete_checkpoints(tmp_path / "run" / "checkpoints"):
            (path / "state.json").write_text("{}")
    options["keep_checkpoints"] = 1
    console = Listening()
    with pytest.raises(Interrupted, match="stopped at step 2 of 6"):
        train(interrupted_at(1, make_job(tmp_path / "run", **options)), current_world(), console)
    assert len(console.warnings) == 3
    assert what in console.warnings[0]
    assert [path.name for path in complete_checkpoints(tmp_path / "run" / "checkpoints")] == ["step-00000002"]
    last, console = make_job(tmp_path / "run", **options), Listening()
    computed = steps_computed(last)
    train(last, current_world(), console)
    assert not console.warnings
    assert len(computed) == 4
    whole = make_job(tmp_path / "whole", **options)
    train(whole, current_world(), QUIET)
    assert all(torch.equal(weights(whole)[name], value) for name, value in weights(last).items())


def test_a_checkpoint_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    job = make_job(tmp_path / "run", n_steps=2)
    own_folder(tmp_path / "run")
    (tmp_path / "run" / "checkpoints").write_text("in the way")
    with pytest.raises(GroundupError, match=r"run/checkpoints"):
        train(job, current_world(), QUIET)
