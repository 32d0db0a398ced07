"""What is trained, on what, towards what: all that the training loop is told.

A job trains named modules and may hold frozen ones; its objective says which model passes it makes; its source gives
batches of named tensors. A fixed data set is read ahead; an on-policy source asks the model as it is now for a buffer
of rows, from which the next steps take theirs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

from jaxtyping import Int
from torch import Tensor, nn

from groundup.distributed import World
from groundup.errors import GroundupError
from groundup.files import value_digest
from groundup.model import Transformer
from groundup.recipe import OptimizerSettings
from groundup.training.objective import Batch, Objective
from groundup.training.schedule import BatchPlan


class Source(Protocol):
    """A fixed data set: each row is a pure function of its place, so rows may be read ahead.

    Attributes:
        fingerprint: digest of all that decides the rows.
    """

    fingerprint: str

    def rows(self, first: int, last: int) -> Batch:
        """Rows `first` … `last` − 1 of the endless order."""
        ...

    def validation(self, batch_size: int, limit_tokens: int | None) -> Iterator[Batch]:
        """Held-out batches of exactly `batch_size` rows, always the same; there may be none."""
        ...


@runtime_checkable
class OnPolicySource(Protocol):
    """Rows that the model itself makes, a buffer of them at a time, and which of them each step takes.

    A place is the number of a batch in the order of the run: the step, and after a rollback the batches passed over.

    Attributes:
        fingerprint: digest of all that decides the rows, the weights apart.
        buffer_rows: rows of a buffer, over all processes.
    """

    fingerprint: str
    buffer_rows: int

    def is_due(self, place: int) -> bool:
        """Whether a new buffer is made before the batch of this place; the first always is."""
        ...

    def collect(self, modules: Mapping[str, nn.Module], place: int, rows: slice, last: Batch) -> tuple[Batch, float]:
        """Make these rows of a new buffer, and say how many FLOPs it took.

        Samples are seeded by (seed, place, row), so that the buffer is the same whatever process makes which row.
        Tensors have the same width in every process. Where modules are sharded every process must make the same
        passes. Called without gradient and dropout.

        Args:
            modules: all of the job, the frozen ones too.
            place: of the batch that comes next.
            rows: this process's share.
            last: the buffer before, all of its rows; empty for the first. What a method adapts from buffer to buffer
                stands there, and so in the checkpoint.
        """
        ...

    def minibatch(self, place: int, n_rows: int) -> Int[Tensor, " n_rows"]:
        """Which rows of the buffer the batch of a place takes: a pure function of the place."""
        ...

    def validation(self, batch_size: int, limit_tokens: int | None) -> Iterator[Batch]:
        """Held-out batches of exactly `batch_size` rows, always the same; there may be none."""
        ...


@dataclass
class TrainingJob:
    """What is trained, on what, and what is looked at meanwhile."""

    name: str  # the stage, as shown on the console
    # Trained in place. The first is the model. With several, parameters are called `NAME.parameter` by optimizers,
    # groups and checkpoints
    modules: dict[str, Transformer | nn.Module]
    objective: Objective  # which passes are made and what is minimized
    source: Source | OnPolicySource  # batches
    settings: OptimizerSettings  # optimizer, schedule, precision, intervals
    n_rows: int  # rows to see, at least; the last batch is whole
    folder: Path  # where logs and checkpoints go
    # Modules that the objective needs and nothing trains; they are in no checkpoint
    frozen: dict[str, nn.Module] = field(default_factory=dict)
    seed: int = 1  # of dropout
    # What stands for the weights it begins with, frozen ones too; "fresh": those that its seed draws
    start: str = "fresh"
    axes: frozenset[str] = frozenset({"replicate", "shard"})  # `[parallel]` axes over which it can be trained
    # What the first step's loss should be, in nats, for a model that knows nothing
    expected_initial_loss: float | None = None
    bytes_per_token: float | None = None  # turns validation loss into bits per byte, where the targets are plain text
    # The same for the loss of training; the mean over all of the text, not a step's own
    train_bytes_per_token: float | None = None
    samples: tuple[str, ...] = ()  # prompts to continue at each validation pass, and what continues them
    continue_text: Callable[[Transformer, str], str] | None = None
    # Figures of one of `settings.evaluate.tasks`, by their names in metrics.jsonl
    score: Callable[[Transformer, str], dict[str, float]] | None = None
    row_length: int | None = None  # tokens in every row, where all are alike
    row_sequences: int = 1  # sequences in a row, each of that length: two where a row is a pair
    unit: str = "tokens"  # what the objective's first term counts, in the plural, for people
    # Settings by which memory is estimated, where they are not its own: what is frozen in other ways
    sized: OptimizerSettings | None = None
    # Rows in one forward pass on one device; found by `train` (`planning/memory.py`)
    micro_rows: int = field(default=1, init=False)

    @property
    def model(self) -> Transformer:
        """The first of the modules."""
        model = next(iter(self.modules.values()))
        assert isinstance(model, Transformer), "the first module of a job is its model"
        return model

    @property
    def trained(self) -> nn.Module:
        """All modules that are trained as one, whose parameters have the names that checkpoints know."""
        return self.model if len(self.modules) == 1 else nn.ModuleDict(self.modules)

    @property
    def all_modules(self) -> dict[str, nn.Module]:
        """Those that are trained, and the frozen ones: what the objective is given."""
        return {**self.modules, **self.frozen}

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
                "modules": [sorted(self.modules), sorted(self.frozen), type(self.objective).__name__],
                "source": self.source.fingerprint,
                "settings": self.settings.fingerprint_values(),
                "steps": self.n_steps,
                "seed": self.seed,
                "start": self.start,
            }
        )

    def check_axes(self, world: World) -> None:
        """Hold that it can be trained over the axes that the processes use.

        Raises:
            GroundupError: it cannot, over one of them.
        """
        refused = sorted(world.axes - self.axes)
        if refused:
            raise GroundupError(
                f"{self.name}: cannot be trained over the [parallel] axes {', '.join(refused)}.",
                f"Use {', '.join(sorted(self.axes))} only." if self.axes else "Train it in one process.",
            )
