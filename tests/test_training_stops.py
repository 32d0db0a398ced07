"""Asked to stop at the worst moments: what is stopped is saved, and resumed to the same bits."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch
from shards_bytes import opened
from test_training_faults import bits, steps_computed
from test_training_loop import QUIET, interrupted_at, make_job, weights
from training_rows import RandomRows

from groundup.distributed import current_world
from groundup.errors import Interrupted
from groundup.model import Transformer, preset
from groundup.shards import TokenShards
from groundup.training import Batch, ShardBatches, TrainingJob, checkpoint, train
from groundup.training.metrics import read_log

STOPS = [signal.SIGINT, signal.SIGTERM]


def ask_to_stop(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> TrainingJob:
    """A run that nobody stopped, with the settings that are nobody's in particular."""
    job = make_job(tmp_path_factory.mktemp("whole") / "run")
    train(job, current_world(), QUIET)
    return job


def assert_same_run(whole: TrainingJob, parts: TrainingJob) -> None:
    assert all(torch.equal(weights(whole)[name], value) for name, value in weights(parts).items())
    assert bits(whole.folder) == bits(parts.folder)


# --- Resumed, everything is as in the uninterrupted run

EVERYTHING = {
    "muon and all": {
        "ema": 0.9, "batch_warmup_from": 1, "batch_warmup_share": 0.5, "keep_best": True, "on_spike": "skip",
        "spike_z": 3.0,
    },
    "adamw in float16": {"optimizer": "adamw", "precision": "float16", "micro_batch_size": 2, "ema": 0.5},
    "rolled back": {"on_spike": "rollback", "z_loss": 1e-4, "label_smoothing": 0.1, "schedule": "cosine"},
}  # fmt: skip


@pytest.mark.parametrize("options", EVERYTHING.values(), ids=EVERYTHING)
def test_stopped_again_and_again_everything_ends_as_in_one_go(tmp_path: Path, options: dict[str, object]) -> None:
    """The last checkpoint holds optimizers, average, guard and scaler, the model has dropout: all is compared."""
    whole = make_job(tmp_path / "whole", **options)
    train(whole, current_world(), QUIET)
    n_steps, done = whole.n_steps, 0
    for stop_at in (0, 3, 4, 9, n_steps - 1):
        part = make_job(tmp_path / "parts", **options)
        passes = 4 // int(options.get("micro_batch_size", 4))
        with pytest.raises(Interrupted, match=f"stopped at step {stop_at + 1} of {n_steps}"):
            train(interrupted_at(passes * (stop_at - done), part), current_world(), QUIET)
        done = stop_at + 1
    last = make_job(tmp_path / "parts", **options)
    computed = steps_computed(last)
    train(last, current_world(), QUIET)
    assert len(computed) == 0  # only the last validation was left to do
    assert_same_run(whole, last)
    state = json.loads((tmp_path / "parts" / "checkpoints" / f"step-{n_steps:08d}" / "state.json").read_text())
    assert len(state["spikes"]["losses"]) == n_steps
    assert bool(state["scaler"]) == ("precision" in options)


@pytest.mark.parametrize("stop_at", [1, 4, 5, 9])
def test_stopped_in_any_epoch_of_real_shards_it_goes_on_at_its_place(tmp_path: Path, stop_at: int) -> None:
    """Twelve batches of four rows are nearly five passes over the text, each in another order."""
    texts = ["one two three four five " * 3 + name for name in ("six", "seven")]
    opened(tmp_path / "shards", texts, validation=["held out" * 9])
    shards = [TokenShards.open(tmp_path / "shards", split) for split in ("train", "validation")]

    def job(name: str) -> TrainingJob:
        made = make_job(tmp_path / name, source=ShardBatches(*shards, 16, 4, seed=3))
        made.modules["model"] = Transformer(preset("ground-nano", vocab_size=257, context_length=16, dropout=0.1))
        return made

    whole, parts = job("whole"), job("parts")
    assert whole.source.loader.n_windows == 10
    train(whole, current_world(), QUIET)
    with pytest.raises(Interrupted):
        train(interrupted_at(stop_at, parts), current_world(), QUIET)
    parts = job("parts")
    computed = steps_computed(parts)
    train(parts, current_world(), QUIET)
    assert len(computed) == 11 - stop_at
    assert_same_run(whole, parts)


def in_pass(job: TrainingJob, at: int, act: Callable[[], object]) -> None:
    """Do something right before one of the job's training passes."""
    passes = itertools.count()

    def hook(model: torch.nn.Module, arguments: object) -> None:
        if model.training and next(passes) == at:
            act()

    job.model.register_forward_pre_hook(hook)


# --- Asked to stop


class LongValidation(RandomRows):
    """Rows with a validation pass of many batches, in one of which the process is asked to stop."""

    def __init__(self, number: int, at: int | None) -> None:
        super().__init__()
        self.number, self.at = number, at
        self.given = 0

    def validation(self, batch_size: int, limit_tokens: int | None) -> Iterator[Batch]:
        for batch in range(20):
            if self.given == self.at:
                ask_to_stop(self.number)
            self.given += 1
            yield self.rows(1_000_000 + batch * batch_size, 1_000_000 + (batch + 1) * batch_size)


@pytest.mark.parametrize(
    ("number", "batch", "step"),
    [(signal.SIGTERM, 3, 0), (signal.SIGINT, 20, 5), (signal.SIGTERM, 59, 10), (signal.SIGINT, 65, 12)],
)
def test_asked_to_stop_during_validation_it_leaves_at_once_and_does_it_again(
    tmp_path: Path, number: int, batch: int, step: int
) -> None:
    options = {"ema": 0.9, "keep_best": True}  # the average is in the weights' place meanwhile
    whole = make_job(tmp_path / "whole", source=LongValidation(number, None), **options)
    train(whole, current_world(), QUIET)
    source = LongValidation(number, batch)
    with pytest.raises(Interrupted, match=f"stopped at step {step} of 12; everything is saved"):
        train(make_job(tmp_path / "parts", source=source, **options), current_world(), QUIET)
    assert source.given == batch + 1
    assert all(line["step"] < step for line in read_log(tmp_path / "parts" / "metrics.jsonl") if "val_loss" in line)
    parts = make_job(tmp_path / "parts", source=LongValidation(number, None), **options)
    computed = steps_computed(parts)
    train(parts, current_world(), QUIET)
    assert len(computed) == 12 - step
    assert_same_run(whole, parts)


@pytest.mark.parametrize(("number", "beside"), [(signal.SIGINT, False), (signal.SIGTERM, True)])
def test_asked_to_stop_during_a_checkpoint_it_is_written_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: TrainingJob, number: int, beside: bool
) -> None:
    write, calls = checkpoint.write_tensors, itertools.count()

    def asked_meanwhile(path: Path, tensors: object) -> None:
        if next(calls) == 7:  # the second file of the fourth checkpoint
            ask_to_stop(number)
        write(path, tensors)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_tensors", asked_meanwhile)
        with pytest.raises(Interrupted, match=r"stopped at step [45] of 12; everything is saved"):
            train(make_job(tmp_path / "parts", checkpoint_beside=beside), current_world(), QUIET)
    parts = make_job(tmp_path / "parts")
    computed = steps_computed(parts)
    train(parts, current_world(), QUIET)
    assert len(computed) in (7, 8)
    assert_same_run(whole, parts)


class AsksWhenLookedAt(RandomRows):
    """Rows whose fingerprint is asked for at the start, which asks to stop."""

    number = 0

    @property
    def fingerprint(self) -> str:
        number, self.number = self.number, 0
        if number:
            ask_to_stop(number)
        return "the same"

    @fingerprint.setter
    def fingerprint(self, value: str) -> None: ...


@pytest.mark.parametrize(("number", "done"), [(signal.SIGTERM, 0), (signal.SIGINT, 3)])
def test_asked_to_stop_during_the_start_nothing_is_begun_or_lost(tmp_path: Path, number: int, done: int) -> None:
    whole = make_job(tmp_path / "whole", source=AsksWhenLookedAt())
    train(whole, current_world(), QUIET)
    if done:
        with pytest.raises(Interrupted):
            train(
                interrupted_at(done - 1, make_job(tmp_path / "parts", source=AsksWhenLookedAt())),
                current_world(), QUIET,
            )  # fmt: skip
    source = AsksWhenLookedAt()
    source.number = number
    stopped = make_job(tmp_path / "parts", source=source)
    computed = steps_computed(stopped)
    with pytest.raises(Interrupted, match=f"stopped at step {done} of 12"):
        train(stopped, current_world(), QUIET)
    assert len(computed) == 0
    parts = make_job(tmp_path / "parts", source=AsksWhenLookedAt())
    train(parts, current_world(), QUIET)
    assert_same_run(whole, parts)


def test_the_handlers_of_before_are_back_after_a_stop(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in STOPS]
    with pytest.raises(Interrupted):
        train(interrupted_at(1, make_job(tmp_path / "run")), current_world(), QUIET)
    assert [signal.getsignal(number) for number in STOPS] == before


def test_a_second_ctrl_c_stops_in_the_midst_of_a_step_and_the_run_goes_on_with_the_same_bits(
    tmp_path: Path, whole: TrainingJob
) -> None:
    job = make_job(tmp_path / "parts")
    in_pass(job, 4, lambda: [ask_to_stop(signal.SIGINT) for _ in range(2)])
    with pytest.raises(KeyboardInterrupt):
        train(job, current_world(), QUIET)
    parts = make_job(tmp_path / "parts")
    train(parts, current_world(), QUIET)
    assert_same_run(whole, parts)


COMPILING = """
import os, signal, sys
from pathlib import Path
import torch
from test_training_loop import QUIET, make_job
from groundup.console import Console
from groundup.distributed import current_world
from groundup.errors import Interrupted
from groundup.model import Transformer, preset
from groundup.training import train
torch.set_num_threads(1)
folder, how = Path(sys.argv[1]), sys.argv[2]
if how == "itself":
    from torch._dynamo.callback import callback_handler
    callback_handler.register_start_callback(lambda arguments: os.kill(os.getpid(), signal.SIGTERM))
job = make_job(folder, n_steps=3, eval_every=3, compile=True)
job.modules["model"] = Transformer(preset("ground-nano", n_layers=1, vocab_size=64, context_length=16))
try:
    train(job, current_world(), Console(quiet=True))
except Interrupted as stop:
    print(stop.message)
    sys.exit(stop.exit_code)
"""


def compiling(folder: Path, how: str, cache: Path) -> subprocess.Popen[str]:
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent), "XDG_CACHE_HOME": str(cache),
    }  # fmt: skip
    environment.pop("TORCHINDUCTOR_CACHE_DIR", None)
    return subprocess.Popen(
        [sys.executable, "-c", COMPILING, str(folder), how], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment, start_new_session=True,
    )  # fmt: skip


def is_compiling(process: subprocess.Popen[str]) -> bool:
    try:
        children = psutil.Process(process.pid).children(recursive=True)
        return any(child.name() in ("cc1plus", "clang++", "clang") for child in children)
    except psutil.Error:
        return False


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("how", ["itself", "a terminal"])
def test_asked_to_stop_while_it_compiles_it_is_saved_and_goes_on_with_the_same_bits(tmp_path: Path, how: str) -> None:
    """From a terminal, Ctrl-C reaches the compiler's processes as well."""
    with compiling(tmp_path / "whole", "", tmp_path / "cache-1") as process:
        _, err = process.communicate()
    assert process.returncode == 0, err[-3000:]
    if "torch.compile failed" in err:
        pytest.skip("no C++ compiler for torch.compile")
    with compiling(tmp_path / "parts", how, tmp_path / "cache-2") as process:
        if how == "a terminal":
            while not is_compiling(process):
                assert process.poll() is None, process.communicate()
                time.sleep(0.005)
            os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate()
    assert process.returncode == 130, err[-3000:]
    assert "test: stopped at step" in out
    assert "Traceback" not in err
    with compiling(tmp_path / "parts", "", tmp_path / "cache-2") as process:
        _, err = process.communicate()
    assert process.returncode == 0, err[-3000:]
    assert "torch.compile failed" not in err
    assert bits(tmp_path / "whole") == bits(tmp_path / "parts")


def test_training_in_another_thread_needs_no_signals(tmp_path: Path) -> None:
    """Signals reach the main thread only, so that a run elsewhere must not set handlers."""
    job, failed = make_job(tmp_path / "run", n_steps=2), []

    def work() -> None:
        try:
            train(job, current_world(), QUIET)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failed
