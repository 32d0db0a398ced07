"""torch.compile: tried where it may pay, remembered, given up in one line, and never in the way."""

import functools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_training_loop import interrupted_at, make_job, weights

from groundup.alignment.lora import LoraSettings, add_adapters
from groundup.console import Console
from groundup.distributed import current_world
from groundup.errors import Interrupted
from groundup.measured import fastest, machine, measured_once, recall, remember
from groundup.model import Transformer, preset
from groundup.training import compilation, train
from groundup.training.checkpoint import complete_checkpoints
from groundup.training.compilation import (
    TRIED_FROM_FLOPS,
    CompiledBlocks,
    choose_by_trial,
    choose_without_trial,
    find_compiler,
    remove_truncated,
)

CPU = torch.device("cpu")
needs_a_compiler = pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler for torch.compile")


def tiny_model() -> Transformer:
    return Transformer(preset("ground-nano", n_layers=1, vocab_size=64, context_length=16))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # so that what the code sets is taken back
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")


def test_a_measurement_is_taken_once_for_each_key_and_machine():
    taken = []

    def measure():
        taken.append(1)
        return {"value": len(taken)}

    for key, expected in (({"a": (1, 2)}, 1), ({"a": (1, 2)}, 1), ({"a": (1, 3)}, 2)):
        assert measured_once("thing", key, CPU, measure) == {"value": expected}
    torch.set_num_threads(before := torch.get_num_threads())
    try:
        torch.set_num_threads(before + 1)
        assert recall("thing", {"a": (1, 2)}, CPU) is None
        assert machine(CPU)["threads"] == before + 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("garbage", ["", "{", "[]", '{"key": 1}', "\x00"])
def test_a_damaged_measurement_is_taken_anew(tmp_path, garbage):
    remember("thing", {}, CPU, {"value": 1})
    (file,) = (tmp_path / "cache").rglob("thing-*.json")
    file.write_text(garbage, encoding="utf-8")
    assert measured_once("thing", {}, CPU, lambda: {"value": 2}) == {"value": 2}
    assert recall("thing", {}, CPU) == {"value": 2}


def test_what_was_disturbed_or_is_old_is_measured_again(tmp_path):
    values = iter(range(4))

    def measure():
        value = next(values)
        return {"value": value, "spread": 3.0 if value == 0 else 1.01}

    found = [measured_once("thing", {}, CPU, measure)["value"] for _ in range(3)]
    assert found == [0, 1, 1]
    (file,) = (tmp_path / "cache").rglob("thing-*.json")
    kept = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**kept, "time": kept["time"] - 31 * 86_400}), encoding="utf-8")
    assert measured_once("thing", {}, CPU, measure)["value"] == 2


def test_ways_are_timed_in_turns():
    calls = []
    seconds, spread = fastest(
        {"short": lambda: calls.append("s"), "long": lambda: (calls.append("l"), time.sleep(0.02))}
    )
    assert calls[:6] == ["s", "l"] * 3
    assert seconds["short"] < 0.02 <= seconds["long"]
    assert spread >= 1


def test_where_nothing_can_be_written_it_is_measured_every_time(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    values = iter((1, 2))
    assert [measured_once("thing", {}, CPU, lambda: {"value": next(values)})["value"] for _ in range(2)] == [1, 2]


def test_what_needs_no_trial(monkeypatch):
    long = 10 * TRIED_FROM_FLOPS["cpu"]
    for setting in (True, False):
        choice = choose_without_trial(setting, "cpu", 0.0, 4, rows_are_alike=False)
        assert choice is not None
        assert choice.compiled is setting
    for arguments, alike, word in (
        (("auto", "mps", long, 1), True, "mps"),
        (("auto", "cpu", long, 1), False, "length"),
        (("auto", "cpu", 1e9, 1), True, "short"),
        (("auto", "cpu", long, 2), True, "processes"),
    ):
        choice = choose_without_trial(*arguments, rows_are_alike=alike)
        assert choice is not None
        assert not choice.compiled
        assert word in choice.reason
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    choice = choose_without_trial("auto", "cpu", long, 1, rows_are_alike=True)
    assert choice is not None
    assert "compiler" in choice.reason


@pytest.mark.parametrize("pays", [True, False])
def test_a_remembered_trial_is_not_tried_again(pays):
    found = {"pays": pays, "eager_seconds": 2.0, "compiled_seconds": 1.0 if pays else 2.0, "compile_seconds": 9.0}
    remember("compile", {"model": 1}, CPU, {**found, "failure": None})
    model = tiny_model()

    def run():
        raise AssertionError("it was tried")

    choice = choose_by_trial(model, run, {"model": 1}, CPU, Console(quiet=True))
    assert choice.compiled is pays
    assert all((block.compute == block.eager) is not pays for block in model.blocks)


def test_a_short_run_is_neither_compiled_nor_tried(tmp_path):
    job = make_job(tmp_path, n_steps=2)
    summary = train(job, current_world(), Console(quiet=True))
    assert (summary["compiled"], summary["compiled_reason"]) == (False, "rows differ in length")
    job = make_job(tmp_path / "again", n_steps=2)
    job.row_length = 12
    summary = train(job, current_world(), Console(quiet=True))
    assert (summary["compiled"], summary["compiled_reason"]) == (False, "the run is too short for it to pay")


def test_a_resumed_run_does_as_it_did_before(tmp_path, capsys, monkeypatch):
    """What was decided is in the checkpoint; the trial of another day does not count."""
    monkeypatch.setitem(TRIED_FROM_FLOPS, "cpu", 0.0)
    decided = []

    def choose(model, run, key, device, console):
        run()
        decided.append(key)
        return compilation.Choice(False, "tried")

    monkeypatch.setattr(compilation, "choose_by_trial", choose)
    job = interrupted_at(4, make_job(tmp_path, n_steps=6))  # the trial's pass counts
    job.row_length = 12
    with pytest.raises(Interrupted):
        train(job, current_world(), Console())
    assert "to repeat it on any machine: compile = false" in capsys.readouterr().err
    (newest, *_) = complete_checkpoints(tmp_path / "checkpoints")
    assert json.loads((newest / "state.json").read_text(encoding="utf-8"))["compiled"] is False
    job = make_job(tmp_path, n_steps=6)
    job.row_length = 12
    summary = train(job, current_world(), Console(quiet=True))
    assert summary["compiled_reason"] == "as before it was interrupted"
    assert len(decided) == 1


def test_a_trial_leaves_no_trace(tmp_path, monkeypatch):
    """The trained weights are those of a run without it."""
    runs = []
    for tried in (False, True):
        monkeypatch.setitem(TRIED_FROM_FLOPS, "cpu", 0.0 if tried else 1e30)
        monkeypatch.setattr(
            compilation,
            "choose_by_trial",
            lambda model, run, *rest: (run(), run(), compilation.Choice(False, "tried"))[-1],
        )
        job = make_job(tmp_path / str(tried), n_steps=4)
        job.row_length = 12
        train(job, current_world(), Console(quiet=True))
        runs.append(weights(job))
    assert all(torch.equal(value, runs[1][name]) for name, value in runs[0].items())


@needs_a_compiler
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.long)])
def test_a_trial_compiles_where_it_pays_and_is_kept(tmp_path, capsys, monkeypatch, backend):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    model = tiny_model()
    ids = torch.randint(0, model.config.vocab_size, (2, 16), generator=torch.Generator().manual_seed(0))

    def run():
        model(ids).square().mean().backward()
        model.zero_grad(set_to_none=True)

    model.train()
    choice = choose_by_trial(model, run, {"tiny": True}, CPU, Console())
    assert "Trying torch.compile" in capsys.readouterr().err
    found = recall("compile", {"tiny": True}, CPU)
    assert found is not None
    assert found["failure"] is None
    assert found["compile_seconds"] > 0
    assert choice.compiled is found["pays"] is (found["eager_seconds"] / found["compiled_seconds"] >= 1.03)
    objects = list((tmp_path / "cache" / "groundup" / "compiled").rglob("*.so"))
    assert bool(objects) is (backend == "inductor")


CHILD = """
import sys
import time
from pathlib import Path
from groundup.console import Console
from groundup.distributed import current_world
from groundup.training import train
from test_training_loop import make_job
job = make_job(Path(sys.argv[1]), n_steps=3, compile=True)
summary = train(job, current_world(), Console())
print(summary["final_loss"], summary["val_loss"])
"""


def child(folder: Path, **environment: str) -> tuple[str, str]:
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(folder)], capture_output=True, text=True, timeout=500,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent), **environment}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


@needs_a_compiler
@pytest.mark.long
@pytest.mark.timeout(600)
def test_truncated_objects_in_the_cache_are_removed_and_compiled_anew(tmp_path):
    losses, err = child(tmp_path / "whole")
    assert "failed" not in err
    objects = {path: path.stat().st_size for path in (tmp_path / "cache").rglob("*.so")}
    assert objects
    for number, (path, size) in enumerate(objects.items()):  # nothing, the head, half, all but a byte
        os.truncate(path, (0, 100, size // 2, size - 1)[number % 4])
    again, err = child(tmp_path / "again")
    assert "failed" not in err
    assert f"{len(objects)} truncated objects" in err
    assert again == losses


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_compiler_that_fails_costs_one_line(tmp_path):
    losses, err = child(tmp_path / "broken", CXX="false")
    assert err.count("torch.compile failed") == 1
    assert losses


def test_whole_objects_and_other_files_are_left_alone(tmp_path):
    import _ctypes  # some shared object that is whole

    whole = Path(_ctypes.__file__).read_bytes()
    for name, content in (("a.so", whole), ("b.so", b"text" * 40), ("c.txt", b""), ("d.so", whole[:-1]), ("e.so", b"")):
        (tmp_path / name).write_bytes(content)
    assert {path.name for path in remove_truncated(tmp_path)} == {"d.so", "e.so"}
    assert {path.name for path in tmp_path.glob("*.*")} == {"a.so", "b.so", "c.txt"}


def test_only_training_is_compiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))  # what is caught counts
    model = tiny_model()
    ids = torch.zeros(1, 8, dtype=torch.long)
    CompiledBlocks(model, Console(quiet=True))
    before = torch._dynamo.utils.counters["frames"]["total"]
    with torch.no_grad():
        for length in range(1, 6):
            model(ids[:, :length])
    assert torch._dynamo.utils.counters["frames"]["total"] == before
    model(ids).sum().backward()
    assert torch._dynamo.utils.counters["frames"]["total"] > before


@needs_a_compiler
@pytest.mark.parametrize("bits", [None, 8])
def test_blocks_with_adapters_are_compiled_in_one_piece(monkeypatch, bits):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager", fullgraph=True))
    found = []
    for is_compiled in (False, True):
        torch.manual_seed(0)
        model = tiny_model()
        add_adapters(model, LoraSettings(rank=4, base_bits=bits))
        blocks = CompiledBlocks(model, Console(quiet=True)) if is_compiled else None
        model(torch.arange(32).view(2, 16)).square().sum().backward()
        assert blocks is None or blocks.failure is None
        found.append([parameter.grad for parameter in model.parameters() if parameter.requires_grad])
    assert len(found[0]) > 0
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@needs_a_compiler
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.long)])
def test_packed_rows_are_compiled_once_whatever_their_documents(monkeypatch, backend):
    """Loss and gradients of uncompiled rows, and of one text each; other lengths compile nothing anew."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    plain, compiled = tiny_model(), tiny_model()
    blocks = CompiledBlocks(compiled, Console(quiet=True))
    for lengths in ([5, 1, 10], [16], [2] * 8, [3, 13]):
        ids = torch.randint(0, 64, (1, 16), generator=torch.Generator().manual_seed(lengths[0]))
        documents = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[None]
        positions = torch.cat([torch.arange(length) for length in lengths])[None]
        with torch._dynamo.config.patch(error_on_recompile=lengths[0] != 5):
            compiled(ids, documents=documents, positions=positions).square().sum().backward()
        assert blocks.failure is None
        for text in ids[0].split(lengths):
            plain(text[None]).square().sum().backward()
        for one, other in zip(plain.parameters(), compiled.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-5)
