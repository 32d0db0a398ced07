"""Whether torch.compile pays for a run: tried once on its first micro-batch, and remembered for the machine.

A run that is over before a compiler is done is not compiled, nor one whose rows differ in length, for which the
compiler would begin again and again. What was decided is part of a run's checkpoints, as compiled arithmetic rounds
otherwise: a resumed run does as it did before.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from groundup.console import Console
from groundup.distributed import World
from groundup.model import ModelConfig, Transformer
from groundup.model.cost import training_flops
from groundup.training.compilation import CompiledBlocks, find_compiler
from groundup.training.job import TrainingJob
from groundup.training.measured import recall, remember
from groundup.training.objective import head_loss
from groundup.training.state import TrainingState

TRIED_FROM_FLOPS = {"cpu": 1e13, "cuda": 3e16}
"""Of a whole run: about a minute, on two cores or on one large GPU."""
LEAST_GAIN = 1.03
"""Times as fast, for the forward and backward pass."""
_REPEATS = 3


@dataclass(frozen=True)
class Choice:
    """Whether a run is compiled.

    Attributes:
        compiled: or not.
        reason: for the console and the manifest.
    """

    compiled: bool
    reason: str


def choose_compilation(
    job: TrainingJob, state: TrainingState, decided: bool | None, world: World, console: Console
) -> Choice:
    """Whether a run's blocks are compiled; if so, they are when this returns.

    Args:
        job: what is trained.
        state: of it, its model not compiled yet.
        decided: what its checkpoint says.
        world: the processes.
        console: is told what a trial found.
    """
    settings, model, config = job.settings, state.model, state.model.config
    if decided is not None:
        choice: Choice | None = Choice(decided, "as before it was interrupted")
    else:
        n_flops = job.n_rows * training_flops(config, job.row_length or config.context_length)
        choice = choose_without_trial(
            settings.compile, world.device.type, n_flops, world.size, rows_are_alike=job.row_length is not None
        )
    if choice is not None:
        if choice.compiled:
            CompiledBlocks(model, console)
        return choice
    ids, targets = (part.to(world.device) for part in job.source.rows(0, job.micro_rows))

    def run() -> None:
        model(ids, head=head_loss(targets)).objective.backward()
        state.optimizers.forget_gradients()

    dtype = str(model.compute_dtype).removeprefix("torch.")
    key = trial_key(config, ids.shape, dtype, settings.activation_checkpointing)
    model.train()
    choice = choose_by_trial(model, run, key, world.device, console)
    console.note(f"{job.name}: {'compiled' if choice.compiled else 'not compiled'} ({choice.reason})")
    return choice


def choose_without_trial(
    setting: bool | Literal["auto"], device_type: str, n_flops: float, n_processes: int, *, rows_are_alike: bool
) -> Choice | None:
    """What needs no trial; None: try.

    Args:
        setting: the recipe's.
        device_type: "cpu" or "cuda".
        n_flops: of the whole run, all processes together.
        n_processes: that share it.
        rows_are_alike: every row has the same length.
    """
    if setting != "auto":
        return Choice(setting, "as the recipe says")
    if device_type not in TRIED_FROM_FLOPS:
        return Choice(False, f"not tried on {device_type}")
    if not rows_are_alike:
        return Choice(False, "rows differ in length")
    if n_flops < TRIED_FROM_FLOPS[device_type]:
        return Choice(False, "the run is too short for it to pay")
    if n_processes > 1:
        return Choice(False, "with several processes only as the recipe says: compile = true")
    if device_type == "cpu" and find_compiler() is None:
        return Choice(False, "no C++ compiler here")
    return None


def trial_key(config: ModelConfig, shape: Sequence[int], dtype: str, recomputed: str) -> dict[str, Any]:
    """What decides how long a forward and backward pass takes, as `choose_by_trial` remembers it.

    Args:
        config: the model.
        shape: (rows, tokens) of a micro-batch.
        dtype: of the arithmetic, by name.
        recomputed: the kind of activation checkpointing.
    """
    return {"model": config.to_dict(), "shape": list(shape), "precision": dtype, "recomputed": recomputed}


def choose_by_trial(
    model: Transformer, run: Callable[[], None], key: Mapping[str, Any], device: torch.device, console: Console
) -> Choice:
    """What was found on this machine, now or before. If compiling pays, the blocks are compiled when this returns.

    Args:
        model: not compiled yet.
        run: forward and backward of one micro-batch; leaves no trace.
        key: plain values that decide how long that takes.
        device: where.
        console: is told before the compiler begins.
    """
    found = recall("compile", key, device)
    if found is None:
        console.note("Trying torch.compile on the first batch (once on this machine for a model of this shape) …")
        found = _tried(model, run, device, console)
        if found["failure"] is None:  # a compiler may be there tomorrow
            remember("compile", key, device, found)
    elif found["pays"]:
        CompiledBlocks(model, console)
    if found["failure"] is not None:
        return Choice(False, f"the compiler failed: {found['failure']:.80}")
    gain = found["eager_seconds"] / found["compiled_seconds"]
    times = f"forward and backward {gain:.2f}× as fast, measured here"
    return Choice(found["pays"], times if found["pays"] else f"{times}: not worth it")


def _tried(model: Transformer, run: Callable[[], None], device: torch.device, console: Console) -> dict[str, Any]:
    run()  # kernels and buffers of the first time
    eager = min(_seconds(run, device) for _ in range(_REPEATS))
    blocks = CompiledBlocks(model, console)
    first = _seconds(run, device)
    compiled = min(_seconds(run, device) for _ in range(_REPEATS))
    pays = blocks.failure is None and eager / compiled >= LEAST_GAIN
    if not pays:
        blocks.undo()
    return {
        "pays": pays,
        "eager_seconds": eager,
        "compiled_seconds": compiled,
        "compile_seconds": first - compiled,
        "failure": blocks.failure,
    }


def _seconds(run: Callable[[], None], device: torch.device) -> float:
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
