"""What is trained, on what, and what is watched while it is: all that the training loop is told."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from jaxtyping import Int
from torch import Tensor

from groundup.files import value_digest
from groundup.model import Transformer
from groundup.recipe import OptimizerSettings
from groundup.training.schedule import BatchPlan

Rows = tuple[Int[Tensor, "rows seq"], Int[Tensor, "rows seq"]]
"""Token ids and targets (-100: not predicted), int64."""


class BatchSource(Protocol):
    """Where a stage's rows come from; each a pure function of its place."""

    fingerprint: str

    def rows(self, first: int, last: int) -> Rows:
        """Rows `first` … `last` − 1 of the endless order."""
        ...

    def validation(self, batch_size: int, limit_tokens: int | None) -> Iterator[Rows]:
        """Validation batches of exactly `batch_size` rows, always the same, each target once."""
        ...


@dataclass
class TrainingJob:
    """What is trained, on what, and what is watched.

    Attributes:
        name: the stage, as shown on the console.
        model: trained in place.
        source: batches.
        settings: optimizer, schedule, precision, intervals.
        n_rows: rows to see, at least; the last batch is whole.
        folder: where logs and checkpoints go.
        seed: of dropout.
        start: what stands for the weights it begins with; "fresh": those that its seed draws.
        expected_initial_loss: what the first step's loss should be, in nats, for a model that knows nothing.
        bytes_per_token: turns validation loss into bits per byte, where the targets are plain text.
        train_bytes_per_token: the same for the loss of training; the mean over all of the text, not a step's own.
        samples: prompts to continue at each validation pass, and what continues them.
        row_length: tokens in every row, where all are alike.
        micro_rows: rows in one forward pass on one device; found by `train` (`planning/fit.py`).
    """

    name: str
    model: Transformer
    source: BatchSource
    settings: OptimizerSettings
    n_rows: int
    folder: Path
    seed: int = 1
    start: str = "fresh"
    expected_initial_loss: float | None = None
    bytes_per_token: float | None = None
    train_bytes_per_token: float | None = None
    samples: tuple[str, ...] = ()
    continue_text: Callable[[Transformer, str], str] | None = None
    row_length: int | None = None
    micro_rows: int = field(default=1, init=False)

    @functools.cached_property
    def plan(self) -> BatchPlan:
        """Which rows each step takes."""
        settings = self.settings
        return BatchPlan(settings.batch_size, self.n_rows, settings.batch_warmup_from, settings.batch_warmup_share)

    @property
    def n_steps(self) -> int:
        """Optimizer steps."""
        return self.plan.n_steps

    @property
    def fingerprint(self) -> str:
        """Digest of everything that decides the weights: a checkpoint of another one is not resumed."""
        return value_digest(
            {
                "model": self.model.config.to_dict(),
                "source": self.source.fingerprint,
                "settings": self.settings.fingerprint_values(),
                "steps": self.n_steps,
                "seed": self.seed,
                "start": self.start,
            }
        )
