"""Numbers that are not finite, in one place of the model: caught in their step, and the place is named."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_training_faults import Listening
from test_training_loop import QUIET, make_job, weights
from test_training_stops import in_pass
from torch.optim.optimizer import register_optimizer_step_post_hook

from groundup.distributed import current_world
from groundup.errors import GroundupError
from groundup.training import TrainingJob, train
from groundup.training.metrics import read_log


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
@pytest.mark.parametrize("on_spike", ["stop", "ignore"])
def test_what_is_not_finite_is_caught_in_its_step_and_its_place_is_named(
    tmp_path: Path, spoil: Callable[..., str], layer: int, value: float, on_spike: str
) -> None:
    job = make_job(tmp_path / "run", on_spike=on_spike)
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
    calm = make_job(tmp_path / "calm", on_spike="skip", activation_checkpointing=activation_checkpointing)
    train(calm, current_world(), QUIET)
    n_hooks = [len(module._forward_hooks) for module in calm.model.modules()]
    job = make_job(tmp_path / "run", on_spike="skip", activation_checkpointing=activation_checkpointing)
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
    job = make_job(tmp_path / "run", on_spike="skip")
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
    job = make_job(tmp_path / "run", on_spike="rollback", checkpoint_seconds=1e9)
    where, console = spoil(job, 1, 7, math.nan), Listening()
    summary = train(job, current_world(), console)
    assert (summary["rollbacks"], summary["steps"]) == (1, 12)
    assert where in console.warnings[0]
    assert "Back to step 5; the 3 batches since then are passed over." in console.warnings[0]
    assert all(value.isfinite().all() for value in weights(job).values())


def test_weights_that_stay_bad_are_given_up_by_whoever_skips(tmp_path: Path) -> None:
    job = make_job(tmp_path / "run", on_spike="skip", n_steps=30, eval_every=30, checkpoint_seconds=1e9)
    where = bad_weight(job, 0, 3, math.nan)
    with pytest.raises(GroundupError, match="10 steps before it were skipped") as raised:
        train(job, current_world(), QUIET)
    assert where in raised.value.message


@pytest.mark.parametrize(
    ("on_spike", "at"), [("stop", 6), ("skip", 6), ("rollback", 6), ("ignore", 6), ("stop", 11), ("rollback", 11)]
)
def test_weights_that_an_update_spoils_are_never_saved(tmp_path: Path, on_spike: str, at: int) -> None:
    """Whether in the midst of the run or by its very last update."""
    job = make_job(tmp_path / "run", on_spike=on_spike)
    updates = itertools.count()

    def spoil(optimizer: torch.optim.Optimizer, *rest: object) -> None:
        if isinstance(optimizer, torch.optim.AdamW) and next(updates) == at:
            job.model.embed_tokens.weight.data[0, 0] = math.inf

    handle, console = register_optimizer_step_post_hook(spoil), Listening()
    said = "weights of embed_tokens.weight are not finite, so no checkpoint is made of them"
    try:
        if on_spike == "rollback":
            assert train(job, current_world(), console)["rollbacks"] == 1
            assert said in console.warnings[0]
        else:
            with pytest.raises(GroundupError, match=rf"{said}, at step {at + 1}\."):
                train(job, current_world(), console)
    finally:
        handle.remove()
    again = make_job(tmp_path / "run", on_spike=on_spike)
    train(again, current_world(), QUIET)
    assert all(value.isfinite().all() for value in weights(again).values())


def test_float16_does_not_skip_for_ever_what_no_scale_can_mend(tmp_path: Path) -> None:
    options = {"precision": "float16", "on_spike": "stop", "eval_every": 30, "checkpoint_seconds": 1e9}
    job = make_job(tmp_path / "run", **options)
    where = bad_weight(job, 1, 4, math.nan)
    with pytest.raises(GroundupError, match="at step 5") as raised:
        train(job, current_world(), QUIET)
    assert where in raised.value.message


def test_float16_lowers_its_scale_before_the_guard_is_asked(tmp_path: Path) -> None:
    job = make_job(tmp_path / "run", precision="float16", on_spike="stop", n_steps=30)
    job.model.layers[0].mlp.down_proj.weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(GroundupError, match="at step 17"):  # 2^16 can be halved sixteen times
        train(job, current_world(), QUIET)
