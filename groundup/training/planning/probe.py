"""How long the pieces of a run take, measured with real steps of the real model on this machine, and so a whole run.

Forward and backward pass, update, validation, one token of a sample and a checkpoint are timed each for itself, as
medians. A model that is too large for the time is probed with fewer rows of a batch, then at two depths, then with
shorter rows; what is extrapolated is said. Nothing stays but the figures.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from groundup.distributed import World
from groundup.generation.cache import KVCache
from groundup.model import ModelConfig, Transformer, count_parameters
from groundup.model.cost import optimizer_bytes, training_flops, weight_bytes
from groundup.recipe import OptimizerSettings
from groundup.training.checkpoint import CheckpointWriter, Progress, weights_of
from groundup.training.compilation import set_checkpointing
from groundup.training.objective import head_loss
from groundup.training.optimizers import Optimizers, clip_gradients, frozen_groups
from groundup.training.planning.memory import Step, Workload
from groundup.training.process import keep_freed_memory
from groundup.training.schedule import BatchPlan
from groundup.training.throughput import peak_matmul_flops, product_seconds, timed
from groundup.training.validation import EVAL_TOKENS, validation_interval

PROBE_SECONDS = 20.0
ASSUMED_MFU = 0.35
"""Of the peak matmul FLOP/s: to choose what to probe, and for the timings of what cannot be probed."""
_MOST_REPEATS = 30
_TIMED_SECONDS, _BRIEF_SECONDS = 8.0, 0.5
"""Of training steps; of what else is timed."""
_SHORTEST = 64
_LARGEST_SAVED = 1 << 30
_DISK, _MEMORY = 5e8, 1e10
"""Bytes/s of a disk and a memory that are not tried."""
_SECONDS_TO_DRAW = 2.5e-8
"""One initial weight."""


def measured_timings(
    work: Workload, step: Step, world: World, *, seconds: float = PROBE_SECONDS, folder: Path | None = None
) -> Timings:
    """Measure how long the pieces of a run take on this machine.

    Args:
        work: the model and its settings.
        step: what this device does.
        world: the device.
        seconds: at most about so long.
        folder: where checkpoints would go, whose disk is tried (default: the system's temporary folder).
    """
    config = work.config
    if world.device.type == "cpu":
        keep_freed_memory()
    until = time.perf_counter() + seconds
    # FLOP/s of matrix products at this moment, beside whatever else runs here.
    products = product_seconds(1024, getattr(torch, step.dtype), world.device, _BRIEF_SECONDS)
    rate = ASSUMED_MFU * 2 * 1024**3 / statistics.fmean(products)
    chosen = _affordable(work, step, rate, 0.75 * seconds)
    if chosen is None:
        return assumed_timings(config, step, world)
    measured = [_measure(part, step, world, until, len(chosen) - index, folder) for index, part in enumerate(chosen)]
    part, times = chosen[-1], measured[-1]
    if len(chosen) == 2:
        # Carried on in a line. A deeper model is never faster: where the two cannot be told apart, the second times
        # half the distance is a bound, for all is in the blocks.
        first, second = (one.config.n_layers for one in chosen)
        distance = (config.n_layers - first) / (second - first)
        pairs = {name: (measured[0][name], two) for name, two in times.items()}
        times = {
            name: one + (two - one) * distance if two > one else two * distance / 2
            for name, (one, two) in pairs.items()
        }
    flops = training_flops(config, step.length)
    for name in ("row", "eval_row"):
        times[name] *= flops / training_flops(config, part.length) / part.settings.batch_size / step.n_devices
    return Timings(**times, flops=flops / times["row"], how=_told(chosen, work, step), is_measured=True)


def assumed_timings(config: ModelConfig, step: Step, world: World) -> Timings:
    """Timings without a probe, or of a model that is too large for one: from the peak matmul FLOP/s."""
    rate = ASSUMED_MFU * peak_matmul_flops(getattr(torch, step.dtype), world.device)
    row = training_flops(config, step.length) / rate / step.n_devices
    weights = weight_bytes(config)
    return Timings(
        row=row,
        update=7 * weights / _MEMORY,
        eval_row=row / 3,
        sample_token=weights / _MEMORY,
        save=3 * weights / _DISK,
        begin=_SECONDS_TO_DRAW * count_parameters(config),
        flops=rate * step.n_devices,
        how=f"not probed: {ASSUMED_MFU:.0%} of the peak matmul FLOP/s assumed",
        is_measured=False,
    )


def _part(work: Workload, n_layers: int, rows: int, length: int) -> Workload:
    """What of a run stands for the whole; patterns of groups would miss the blocks that it lacks."""
    config = ModelConfig(**{**work.config.to_dict(), "n_layers": n_layers})
    update: dict[str, Any] = {"batch_size": rows, "micro_batch_size": None}
    if n_layers < work.config.n_layers:
        update["groups"] = ()
    settings = work.settings.model_copy(update=update)
    return replace(work, config=config, settings=settings, length=length, n_devices=1)


def _affordable(work: Workload, step: Step, rate: float, seconds: float) -> list[Workload] | None:
    """The most faithful parts that stand for the whole, of those that fit into time and memory."""
    n_layers = work.config.n_layers
    rows = [step.micro >> power for power in range(step.micro.bit_length())]
    shorter = (step.length >> power for power in range(1, step.length.bit_length()))
    lengths = [step.length, *(length for length in shorter if length >= _SHORTEST)]
    depths = [(n_layers,)] if n_layers <= 2 else [(1, 2)] if n_layers <= 4 else [(2, 4), (1, 2)]
    ways = [[(n_layers, count, step.length)] for count in rows]
    ways += [[(depth, 1, length) for depth in pair] for length in lengths for pair in depths]
    for way in ways:
        parts = [_part(work, *part) for part in way]
        # To build it, for one step to warm up, two more, and some validation.
        flops = sum(4 * part.settings.batch_size * training_flops(part.config, part.length) for part in parts)
        taken = flops / rate + _SECONDS_TO_DRAW * sum(count_parameters(part.config) for part in parts)
        if taken <= seconds and all(part.fits(part.settings.batch_size) for part in parts):
            return parts
    return None


def _measure(
    work: Workload, step: Step, world: World, until: float, n_left: int, folder: Path | None
) -> dict[str, float]:
    """Seconds of the pieces for one part, all its rows together; `n_left` of them share what is left of the time."""
    start = time.perf_counter()
    share = start + min(_TIMED_SECONDS, (until - start) / n_left * 0.7)
    config, settings = work.config, work.settings
    model = Transformer(config).to(world.device)
    model.compute_dtype = getattr(torch, step.dtype)
    set_checkpointing(model, settings.activation_checkpointing)
    build = time.perf_counter() - start
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, config.vocab_size, (settings.batch_size, work.length), generator=generator).to(world.device)
    with frozen_groups(model, settings):
        optimizers = Optimizers(model, settings, model.compute_dtype)
        both, update = medians(step_pieces(model, optimizers, settings, ids), world, share)
        with torch.no_grad():
            model.eval()
            brief = time.perf_counter() + _BRIEF_SECONDS
            (forward,) = medians((lambda: model(ids, head=head_loss(ids)),), world, brief)
            token = _token_seconds(model, ids, world)
    saved = weight_bytes(config) + optimizer_bytes(config, settings.optimizer)
    save = saved / _DISK if saved > _LARGEST_SAVED else _save_seconds(model, optimizers, world, folder)
    if world.device.type == "cuda":
        save = 0.0  # written beside training
    return {
        "row": both, "update": update, "eval_row": forward, "sample_token": token, "save": save, "begin": build,
    }  # fmt: skip


def step_pieces(
    model: Transformer, optimizers: Optimizers, settings: OptimizerSettings, ids: torch.Tensor
) -> tuple[Callable[[], None], Callable[[], None]]:
    """What a training step on (rows, tokens) ids does, to be timed: forward and backward pass; clipping and update."""

    def both() -> None:
        model.train()
        loss = model(ids, head=head_loss(ids)).objective
        balance = model.balance_loss()
        ((loss if balance is None else loss + balance) / ids.numel()).backward()

    def update() -> None:
        clip_gradients(optimizers.parameters(), settings.max_grad_norm)
        optimizers.step(1.0)

    return both, update


def medians(pieces: tuple[Callable[[], object], ...], world: World, until: float) -> tuple[float, ...]:
    """Medians of pieces that are done in turn: once at least after a first time, then until a time."""
    taken: list[list[float]] = [[] for _ in pieces]
    for repeat in range(_MOST_REPEATS + 1):
        for piece, seconds in zip(pieces, taken, strict=True):
            seconds.append(timed(piece, world.device))
        if repeat and time.perf_counter() + sum(seconds[-1] for seconds in taken) > until:
            break
    return tuple(statistics.median(seconds[1:]) for seconds in taken)


def _token_seconds(model: Transformer, ids: torch.Tensor, world: World) -> float:
    """One more token of one text, with a cache."""
    n_before = min(16, ids.shape[1] - 1)
    cache = KVCache(model.config, 1, n_before + 1, model.compute_dtype, world.device)
    model(ids[:1, :n_before], cache=cache)
    last = torch.tensor([[n_before]], device=world.device)

    def next_token() -> None:
        model(ids[:1, n_before : n_before + 1], positions=last, cache=cache)

    return medians((next_token,), world, time.perf_counter() + _BRIEF_SECONDS)[0]


def _save_seconds(model: Transformer, optimizers: Optimizers, world: World, folder: Path | None) -> float:
    """Writing one checkpoint."""
    existing = folder and next(place for place in (folder, *folder.absolute().parents) if place.is_dir())
    with tempfile.TemporaryDirectory(dir=existing, prefix=".probe-") as place:
        writer = CheckpointWriter(Path(place), world, model.config, 1, beside=False)
        parts = {"weights": lambda: weights_of(model), "optimizer": optimizers.state_dict}
        seconds = timed(lambda: writer.save(parts, Progress(0, 0, 0.0, "", 1, 1), at_once=True), world.device)
        writer.close()
    return seconds


def _told(chosen: list[Workload], work: Workload, step: Step) -> str:
    part, depths = chosen[-1], [one.config.n_layers for one in chosen]
    carried = []
    if len(chosen) == 2:
        carried.append(f"from {depths[0]} and {depths[1]} of {work.config.n_layers} blocks")
    for name, one, whole in (("rows", part.settings.batch_size, step.micro), ("tokens", part.length, step.length)):
        if one < whole:
            carried.append(f"from {one} of {whole} {name}")
    return f"probe, extrapolated {', '.join(carried)}" if carried else "probe: steps of the whole model"


@dataclass(frozen=True)
class Timings:
    """Seconds of each piece of a run, for all devices together."""

    row: float  # forward and backward pass of one row of the batch
    update: float  # clipping and the optimizer's step
    eval_row: float  # forward pass of one row
    sample_token: float  # one more token of a sample
    save: float  # one checkpoint, as long as training waits for it
    begin: float  # building the model
    flops: float  # of training, a second, updates left out
    how: str  # where these come from, for people
    is_measured: bool  # from a probe


@dataclass(frozen=True)
class ValidationPass:
    """What a run does beside training, each time."""

    validation_rows: int  # filled up to whole batches
    n_samples: int = 0  # prompts that are continued
    sample_tokens: int = 0  # of each


def validation_pass(settings: OptimizerSettings, length: int, validation_tokens: int | None) -> ValidationPass:
    """What happens at each validation pass, of a text with so many tokens for it (None: unknown)."""
    n_tokens = settings.eval_tokens or EVAL_TOKENS
    if validation_tokens is not None:
        n_tokens = min(n_tokens, validation_tokens)
    n_batches = math.ceil(n_tokens / length / settings.batch_size)
    sample_tokens = getattr(settings, "sample_tokens", 0)
    n_samples = len(getattr(settings, "samples", ())) if sample_tokens else 0
    return ValidationPass(n_batches * settings.batch_size, n_samples, sample_tokens)


def count_passes(settings: OptimizerSettings, n_steps: int) -> int:
    """Validation passes of a run: before the first step, at every interval, after the last."""
    every = validation_interval(settings, n_steps)
    return 1 + n_steps // every + (n_steps % every > 0)


def run_seconds(
    timings: Timings, settings: OptimizerSettings, n_rows: int, validation: ValidationPass
) -> dict[str, float]:
    """Seconds of a run that sees at least so many rows, by part."""
    plan = BatchPlan(settings.batch_size, n_rows, settings.batch_warmup_from, settings.batch_warmup_share)
    seen = plan.rows(plan.n_steps - 1)[1] if plan.n_steps else 0
    training = seen * timings.row + plan.n_steps * timings.update
    passes = count_passes(settings, plan.n_steps)
    interval = max(settings.checkpoint_seconds, timings.row * settings.batch_size + timings.update)
    saves = max(passes - 1, training / interval if interval else 0.0)
    return {
        "begin": timings.begin,
        "training": training,
        "validation": passes * validation.validation_rows * timings.eval_row,
        "samples": passes * validation.n_samples * validation.sample_tokens * timings.sample_token,
        "checkpoints": saves * timings.save,
    }


def rows_within(seconds: float, timings: Timings, settings: OptimizerSettings, validation: ValidationPass) -> int:
    """The most rows that a run can see in so many seconds, whole batches; 0 if not one."""
    most = int(seconds / max(timings.row, 1e-12) / settings.batch_size) + 1
    fits, too_many = 0, most + 1
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        taken = sum(run_seconds(timings, settings, middle * settings.batch_size, validation).values())
        fits, too_many = (middle, too_many) if taken <= seconds else (fits, middle)
    return fits * settings.batch_size
