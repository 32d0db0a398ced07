"""Asked to stop at the worst moments, and numbers that are not finite in one place of the model.

What is stopped is saved and resumed to the same bits; what is not finite is caught in its step, and its place is named.
"""

from __future__ import annotations

import itertools
import json
import math
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
from test_training_faults import Listening, bits, steps_computed
from test_training_loop import QUIET, interrupted_at, make_job, weights
from torch.optim.optimizer import register_optimizer_step_post_hook
from training_rows import RandomRows

from groundup.distributed import current_world
from groundup.errors import GroundupError, Interrupted
from groundup.training import TrainingJob, checkpoint, train
from groundup.training.job import Rows
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
        "ema": 0.9, "ramp_from": 1, "ramp_share": 0.5, "keep_best": True, "on_trouble": "skip", "spike_z": 3.0
    },
    "adamw in float16": {"optimizer": "adamw", "precision": "float16", "micro_batch_size": 2, "ema": 0.5},
    "rolled back": {"on_trouble": "rollback", "z_loss": 1e-4, "label_smoothing": 0.1, "schedule": "cosine"},
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
    assert len(state["guard"]["losses"]) == n_steps
    assert bool(state["scaler"]) == ("precision" in options)


# --- Asked to stop


class LongValidation(RandomRows):
    """Rows with a validation pass of many batches, in one of which the process is asked to stop."""

    def __init__(self, number: int, at: int | None) -> None:
        super().__init__()
        self.number, self.at = number, at
        self.given = 0

    def validation(self, batch_size: int, limit_tokens: int | None) -> Iterator[Rows]:
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
job.model = Transformer(preset("ground-nano", n_layers=1, vocab_size=64, context_length=16))
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


@pytest.mark.slow
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


# --- Not finite, in one place


def in_pass(job: TrainingJob, at: int, act: Callable[[], object]) -> None:
    """Do something right before one of the job's training passes."""
    passes = itertools.count()

    def hook(model: torch.nn.Module, arguments: object) -> None:
        if model.training and next(passes) == at:
            act()

    job.model.register_forward_pre_hook(hook)


def bad_weight(job: TrainingJob, layer: int, at: int, value: float) -> str:
    """From a pass on, one weight is no number."""
    weight = job.model.layers[layer].self_attn.v_proj.weight
    in_pass(job, at, lambda: weight.data.view(-1)[5].fill_(value))
    return f"weights of layers.{layer}.self_attn.v_proj.weight are not finite"


def bad_output(job: TrainingJob, layer: int, at: int, value: float) -> str:
    """From a pass on, one output of one part is no number."""
    passes = itertools.count()

    def spoil(module: torch.nn.Module, arguments: object, output: torch.Tensor) -> torch.Tensor | None:
        if not module.training or next(passes) < at:
            return None
        output = output.clone()
        output.view(-1)[3] = value
        return output

    job.model.layers[layer].mlp.up_proj.register_forward_hook(spoil)
    return f"the output of layers.{layer}.mlp.up_proj is the first that is not finite, though all weights are"


def bad_gradient(job: TrainingJob, layer: int, at: int, value: float) -> str:
    """In a pass, one number on the way back is none."""
    passes = itertools.count()

    def spoil(module: torch.nn.Module, arguments: object, output: torch.Tensor) -> None:
        if module.training and output.requires_grad and next(passes) == at:
            output.register_hook(lambda gradient: gradient * value)

    job.model.layers[layer].self_attn.register_forward_hook(spoil)
    return f"the gradient of layers.{layer}.self_attn.o_proj.weight is the first that is not finite on the way back"


@pytest.mark.parametrize("spoil", [bad_weight, bad_output, bad_gradient])
@pytest.mark.parametrize(("layer", "value"), [(0, math.nan), (1, math.inf)])
@pytest.mark.parametrize("on_trouble", ["stop", "ignore"])
def test_what_is_not_finite_is_caught_in_its_step_and_its_place_is_named(
    tmp_path: Path, spoil: Callable[..., str], layer: int, value: float, on_trouble: str
) -> None:
    job = make_job(tmp_path / "run", on_trouble=on_trouble)
    where = spoil(job, layer, 6, value)
    with pytest.raises(GroundupError) as raised:
        train(job, current_world(), QUIET)
    assert where in raised.value.message
    assert "at step 7" in raised.value.message
    assert "learning rate too high" in (raised.value.fix or "")
    losses = [line["loss"] for line in read_log(tmp_path / "run" / "metrics.jsonl") if "loss" in line]
    assert len(losses) == 6
    assert all(map(math.isfinite, losses))


@pytest.mark.parametrize("activation_checkpointing", ["none", "full"])
def test_the_search_leaves_the_model_as_it_was(tmp_path: Path, activation_checkpointing: str) -> None:
    calm = make_job(tmp_path / "calm", on_trouble="skip", activation_checkpointing=activation_checkpointing)
    train(calm, current_world(), QUIET)
    n_hooks = [len(module._forward_hooks) for module in calm.model.modules()]
    job = make_job(tmp_path / "run", on_trouble="skip", activation_checkpointing=activation_checkpointing)
    where, console = bad_gradient(job, 1, 6, math.nan), Listening()
    train(job, current_world(), console)
    (warning,) = console.warnings
    assert where in warning
    step = 7 if activation_checkpointing == "none" else 4  # a part that is computed twice has two passes a step
    assert warning.startswith(f"test, step {step}: ")
    assert sum(len(module._forward_hooks) for module in job.model.modules()) == sum(n_hooks) + 1
    lines = [[line["loss"] for line in read_log(tmp_path / name / "metrics.jsonl") if "loss" in line]
             for name in ("calm", "run")]  # fmt: skip
    assert lines[0][:step] == lines[1][:step]


def test_what_happens_only_once_is_said_to_be_so(tmp_path: Path) -> None:
    job = make_job(tmp_path / "run", on_trouble="skip")
    passes = itertools.count()
    job.model.layers[0].register_forward_hook(
        lambda module, arguments, output: output * math.nan if module.training and next(passes) == 4 else None
    )
    console = Listening()
    train(job, current_world(), console)
    # The output layer's gradient is made of the bad hidden states; the forward pass done again has no fault.
    assert "step 5: loss nan" in console.warnings[0]
    assert "finite" in console.warnings[0].partition("; ")[2]


@pytest.mark.parametrize("spoil", [bad_weight, bad_gradient])
def test_rolled_back_the_run_finishes_and_the_weights_are_sound(tmp_path: Path, spoil: Callable[..., str]) -> None:
    job = make_job(tmp_path / "run", on_trouble="rollback", checkpoint_seconds=1e9)
    where, console = spoil(job, 1, 7, math.nan), Listening()
    summary = train(job, current_world(), console)
    assert (summary["rollbacks"], summary["steps"]) == (1, 12)
    assert where in console.warnings[0]
    assert "Back to step 5; the 3 batches since then are passed over." in console.warnings[0]
    assert all(value.isfinite().all() for value in weights(job).values())


def test_weights_that_stay_bad_are_given_up_by_whoever_skips(tmp_path: Path) -> None:
    job = make_job(tmp_path / "run", on_trouble="skip", n_steps=30, eval_every=30, checkpoint_seconds=1e9)
    where = bad_weight(job, 0, 3, math.nan)
    with pytest.raises(GroundupError, match="10 steps before it were skipped") as raised:
        train(job, current_world(), QUIET)
    assert where in raised.value.message


@pytest.mark.parametrize(
    ("on_trouble", "at"), [("stop", 6), ("skip", 6), ("rollback", 6), ("ignore", 6), ("stop", 11), ("rollback", 11)]
)
def test_weights_that_an_update_spoils_are_never_saved(tmp_path: Path, on_trouble: str, at: int) -> None:
    """Whether in the midst of the run or by its very last update."""
    job = make_job(tmp_path / "run", on_trouble=on_trouble)
    updates = itertools.count()

    def spoil(optimizer: torch.optim.Optimizer, *rest: object) -> None:
        if isinstance(optimizer, torch.optim.AdamW) and next(updates) == at:
            job.model.embed_tokens.weight.data[0, 0] = math.inf

    handle, console = register_optimizer_step_post_hook(spoil), Listening()
    said = "weights of embed_tokens.weight are not finite, so no checkpoint is made of them"
    try:
        if on_trouble == "rollback":
            assert train(job, current_world(), console)["rollbacks"] == 1
            assert said in console.warnings[0]
        else:
            with pytest.raises(GroundupError, match=rf"{said}, at step {at + 1}\."):
                train(job, current_world(), console)
    finally:
        handle.remove()
    again = make_job(tmp_path / "run", on_trouble=on_trouble)
    train(again, current_world(), QUIET)
    assert all(value.isfinite().all() for value in weights(again).values())


def test_float16_does_not_skip_for_ever_what_no_scale_can_mend(tmp_path: Path) -> None:
    job = make_job(tmp_path / "run", precision="float16", on_trouble="stop")
    where = bad_weight(job, 1, 4, math.nan)
    with pytest.raises(GroundupError, match="at step 5") as raised:
        train(job, current_world(), QUIET)
    assert where in raised.value.message


def test_float16_lowers_its_scale_before_the_guard_is_asked(tmp_path: Path) -> None:
    job = make_job(tmp_path / "run", precision="float16", on_trouble="stop", n_steps=30)
    job.model.layers[0].mlp.down_proj.weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(GroundupError, match="at step 17"):  # 2^16 can be halved sixteen times
        train(job, current_world(), QUIET)


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
