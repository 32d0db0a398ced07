"""How long a sweep takes on this machine: a few real training steps of each of its models, and the rest is counted.

In: runs of a sweep. Out: seconds for each, or the budgets that fit into a time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import torch

from groundup.distributed import current_world
from groundup.errors import DataError
from groundup.model import Transformer
from groundup.recipe import Recipe
from groundup.training.memory import keep_freed_memory
from groundup.training.objective import head_loss
from groundup.training.optimizers import Optimizers, clip_gradients
from groundup.training.precision import choose_precision
from groundup.training.scaling.grid import MOST_EPOCHS, SweepRun, halved, sweep_runs

PROBE_SECONDS = 1.0
_FIRST_GUESS = 1_000_000
_VALIDATION_PASSES = 2
_FEWEST_STEPS = 20


def seconds_of(runs: Sequence[SweepRun]) -> list[float]:
    """Seconds that each run takes here, about: training, and validation before and after it."""
    speeds = _speeds(runs)
    return [(run.tokens + _validation_cost(run)) / speed for run, speed in zip(runs, speeds, strict=True)]


def tokens_for(
    minutes: float, recipe: Recipe, sizes: Sequence[int | str], vocab_size: int, train_tokens: int
) -> list[int]:
    """Budgets with which a sweep of these sizes takes so many minutes here, at most four passes over the text.

    Raises:
        DataError: in that time the smallest budget would be no training.
    """
    most = float(_FIRST_GUESS)
    for _ in range(2):  # again with the batches that the budgets found first have
        runs, _ = sweep_runs(recipe, sizes, halved(most), vocab_size)
        speeds = _speeds(runs)
        training = sum(run.tokens / speed for run, speed in zip(runs, speeds, strict=True))
        validation = sum(_validation_cost(run) / speed for run, speed in zip(runs, speeds, strict=True))
        most *= max(0.0, 60 * minutes - validation) / training
        smallest, step = halved(most)[0], max(run.settings.batch_size * run.sequence_length for run in runs)
        if smallest < _FEWEST_STEPS * step:
            raise DataError(
                f"--minutes {minutes:g}: the smallest budget would be {smallest:,} tokens, under {_FEWEST_STEPS} "
                f"steps; validation alone takes {validation / 60:.1f} minutes.",
                "Give more minutes, or smaller --sizes.",
            )
    return halved(min(most, MOST_EPOCHS * train_tokens))


def training_speed(run: SweepRun) -> float:
    """Tokens per second of a run's training steps, optimizer included."""
    device = current_world().device
    settings, config = run.settings, run.config
    if device.type == "cpu":
        keep_freed_memory()
    model = Transformer(config).to(device)
    model.compute_dtype, _ = choose_precision(settings.precision, device.type)
    optimizers = Optimizers(model, settings, model.compute_dtype)
    shape = (settings.batch_size, run.sequence_length)
    ids = torch.randint(0, config.vocab_size, shape, generator=torch.Generator().manual_seed(0)).to(device)

    def step() -> None:
        (model(ids, head=head_loss(ids)).objective / ids.numel()).backward()
        float(clip_gradients(optimizers.parameters(), settings.clip, lambda values: values))
        optimizers.step(1.0)

    step()
    best, end = math.inf, time.perf_counter() + PROBE_SECONDS
    while best == math.inf or time.perf_counter() < end:
        start = time.perf_counter()
        step()
        best = min(best, time.perf_counter() - start)
    return ids.numel() / best


def _speeds(runs: Sequence[SweepRun]) -> list[float]:
    """Tokens per second of each run; runs of one model and batch are measured once."""
    keys = [(run.n_parameters, run.settings.batch_size) for run in runs]
    measured = {key: training_speed(run) for key, run in dict(zip(keys, runs, strict=True)).items()}
    return [measured[key] for key in keys]


def _validation_cost(run: SweepRun) -> float:
    """Validation's tokens as so many of training: forward alone is a third."""
    return _VALIDATION_PASSES * (run.settings.eval_tokens or 50_000) / 3
