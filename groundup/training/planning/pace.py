"""How fast a device works: seconds of the pieces that a run is made of, and what a run of so many rows takes.

In: a pace, from a probe (`probe.py`) or from a table (`device.py`), and a run's settings. Out: seconds by
part: training, validation, samples, checkpoints.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from groundup.recipe import OptimizerSettings
from groundup.training.schedule import BatchPlan

EVAL_TOKENS = 50_000
"""Validation tokens of a pass, unless the settings say otherwise."""
PASSES = 20
"""Validation passes of a run, unless the settings say otherwise."""


@dataclass(frozen=True)
class Pace:
    """Seconds of each piece of a run, for all devices together.

    Attributes:
        row: forward and backward pass of one row of the batch.
        update: clipping and the optimizer's step.
        eval_row: forward pass of one row.
        sample_token: one more token of a sample.
        save: one checkpoint, as long as training waits for it.
        begin: building the model.
        flops: training FLOPs per second, updates left out.
        how: where these come from, for people.
        is_measured: from a probe.
    """

    row: float
    update: float
    eval_row: float
    sample_token: float
    save: float
    begin: float
    flops: float
    how: str
    is_measured: bool


@dataclass(frozen=True)
class Watching:
    """What a run does beside training.

    Attributes:
        validation_rows: of a pass, filled up to whole batches.
        n_samples: prompts that are continued at a pass.
        sample_tokens: of each.
    """

    validation_rows: int
    n_samples: int = 0
    sample_tokens: int = 0


def watching(settings: OptimizerSettings, length: int, validation_tokens: int | None) -> Watching:
    """What happens at each validation pass.

    Args:
        settings: of the stage.
        length: tokens in a row.
        validation_tokens: how many there are, if that is known.
    """
    n_tokens = settings.eval_tokens or EVAL_TOKENS
    if validation_tokens is not None:
        n_tokens = min(n_tokens, validation_tokens)
    n_batches = math.ceil(n_tokens / length / settings.batch_size)
    sample_tokens = getattr(settings, "sample_tokens", 0)
    n_samples = len(getattr(settings, "samples", ())) if sample_tokens else 0
    return Watching(n_batches * settings.batch_size, n_samples, sample_tokens)


def count_passes(settings: OptimizerSettings, n_steps: int) -> int:
    """Validation passes of a run: before the first step, at every interval, after the last."""
    every = settings.eval_every or max(1, math.ceil(n_steps / PASSES))
    return 1 + n_steps // every + (n_steps % every > 0)


def run_seconds(pace: Pace, settings: OptimizerSettings, n_rows: int, watch: Watching) -> dict[str, float]:
    """Seconds of a run that sees at least so many rows, by part."""
    plan = BatchPlan(settings.batch_size, n_rows, settings.ramp_from, settings.ramp_share)
    seen = plan.rows(plan.n_steps - 1)[1] if plan.n_steps else 0
    training = seen * pace.row + plan.n_steps * pace.update
    passes = count_passes(settings, plan.n_steps)
    interval = max(settings.checkpoint_seconds, pace.row * settings.batch_size + pace.update)
    saves = max(passes - 1, training / interval if interval else 0.0)
    return {
        "begin": pace.begin,
        "training": training,
        "validation": passes * watch.validation_rows * pace.eval_row,
        "samples": passes * watch.n_samples * watch.sample_tokens * pace.sample_token,
        "checkpoints": saves * pace.save,
    }


def rows_within(seconds: float, pace: Pace, settings: OptimizerSettings, watch: Watching) -> int:
    """The most rows that a run can see in so many seconds, whole batches; 0 if not one."""
    most = int(seconds / max(pace.row, 1e-12) / settings.batch_size) + 1
    fits, too_many = 0, most + 1
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        taken = sum(run_seconds(pace, settings, middle * settings.batch_size, watch).values())
        fits, too_many = (middle, too_many) if taken <= seconds else (fits, middle)
    return fits * settings.batch_size
