"""What a plan says, as one object: shown by `groundup plan`, or as plain values."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from groundup.model import ModelConfig, count_parameters
from groundup.model.cost import active_parameters, training_flops, vocabulary_parameters
from groundup.recipe import PretrainSettings
from groundup.training.planning.memory import DeviceMemory, Memory, Step, Suggestion, refuse_what_cannot_fit
from groundup.training.planning.probe import Timings


@dataclass(frozen=True)
class Hardware:
    """Where a run is to be.

    Attributes:
        device: its name.
        count: how many.
        available: memory of one.
        price: dollars an hour of one; None: unknown.
        precision: of the arithmetic.
        precision_why: the reason.
    """

    device: str
    count: int
    available: DeviceMemory
    price: float | None
    precision: str
    precision_why: str


@dataclass(frozen=True)
class Amount:
    """How much is trained.

    Attributes:
        tokens: target tokens to see, in whole batches.
        why: why so many.
        steps: optimizer steps.
        rows: that they see.
        epochs: how often the text is seen; None while it is not known how much there is.
    """

    tokens: int
    why: str
    steps: int
    rows: int
    epochs: float | None


@dataclass(frozen=True)
class Fit:
    """Memory on one device.

    Attributes:
        step: what the device does between two updates; its micro-batch is the one that will be used.
        micro_why: why its micro-batch has so many rows.
        largest_micro: the most rows that fit; None: not one.
        estimate: bytes.
        suggestions: what to change; empty if it fits.
    """

    step: Step
    micro_why: str
    largest_micro: int | None
    estimate: Memory
    suggestions: list[Suggestion]


@dataclass(frozen=True)
class Expected:
    """What a scaling law says of the run.

    Attributes:
        loss: validation loss in nats per token, or None.
        low: lower end of its 90 % interval, or None.
        high: upper end, or None.
        why: where it comes from and how far it is carried, or why there is none.
    """

    loss: float | None
    low: float | None
    high: float | None
    why: str


@dataclass(frozen=True)
class Candidate:
    """A size on the ladder and what a budget makes of it.

    Attributes:
        size: as for [model] size.
        parameters: exactly.
        tokens: that fit into the budget.
        loss: predicted, nats per token; None without a law.
        fits: in memory, one row at a time at least.
    """

    size: str
    parameters: int
    tokens: int
    loss: float | None
    fits: bool

    @property
    def tokens_per_parameter(self) -> float:
        """20 is compute-optimal."""
        return self.tokens / self.parameters


@dataclass(frozen=True)
class Plan:
    """A run before it runs.

    Attributes:
        recipe: its name.
        config: the model.
        settings: of the stage, with the tokens that the plan has.
        hardware: where.
        amount: how much is trained.
        fit: memory.
        timings: how fast one is there.
        seconds: of the stage, by part.
        expected: loss.
        best: of a budget: the size on the ladder that makes most of it.
        sizes: the same and its neighbours.
        notes: what else to know.
    """

    recipe: str
    config: ModelConfig
    settings: PretrainSettings
    hardware: Hardware
    amount: Amount
    fit: Fit
    timings: Timings
    seconds: dict[str, float]
    expected: Expected
    best: Candidate | None = None
    sizes: list[Candidate] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def parameters(self) -> dict[str, int]:
        """All, those in the blocks, and those that compute one token."""
        n = count_parameters(self.config)
        return {
            "all": n, "non_embedding": n - vocabulary_parameters(self.config), "active": active_parameters(self.config),
        }  # fmt: skip

    @property
    def flops(self) -> float:
        """Of training, forward and backward."""
        return float(self.amount.rows * training_flops(self.config, self.fit.step.length))

    @property
    def total_seconds(self) -> float:
        """Of the whole stage."""
        return sum(self.seconds.values())

    @property
    def tokens_per_second(self) -> float:
        """Of the training steps."""
        return self.amount.tokens / self.seconds["training"]

    @property
    def dollars(self) -> float | None:
        """Of all devices, where there is a price."""
        price = self.hardware.price
        return None if price is None else price * self.hardware.count * self.total_seconds / 3600

    @property
    def fits(self) -> bool:
        """Whether the memory that is expected is there."""
        return self.fit.estimate.total <= self.hardware.available.usable

    def check(self) -> None:
        """Hold that it can fit.

        Raises:
            GroundupError: it is certain that it cannot.
        """
        refuse_what_cannot_fit(
            self.config, self.settings, self.fit.step.length, self.hardware.available, self.hardware.count
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        fit, hardware, memory = self.fit, self.hardware, self.fit.estimate
        return {
            "recipe": self.recipe,
            "parameters": self.parameters,
            "device": {
                "name": hardware.device, "count": hardware.count,
                "memory": hardware.available.total, "of": hardware.available.what,
            },
            "precision": {"name": hardware.precision, "why": hardware.precision_why},
            "training": {
                **vars(self.amount), "batch_size": self.settings.batch_size, "sequence_length": fit.step.length,
                "flops": self.flops,
            },
            "memory": {
                "parts": memory.parts(), "total": memory.total, "usable": hardware.available.usable, "fits": self.fits,
                "fullest": memory.moment, "all_gradients": memory.all_gradients,
                "micro_batch_size": fit.step.micro, "micro_why": fit.micro_why,
                "largest_micro_batch": fit.largest_micro, "suggestions": [vars(one) for one in fit.suggestions],
            },
            "time": {
                "seconds": self.seconds, "total_seconds": self.total_seconds,
                "tokens_per_second": self.tokens_per_second, "flops_per_second": self.timings.flops,
                "how": self.timings.how, "is_measured": self.timings.is_measured,
            },
            "dollars": self.dollars,
            "expected_loss": vars(self.expected),
            "budget": None if not self.sizes else {
                "best": None if self.best is None else vars(self.best), "sizes": [vars(one) for one in self.sizes],
            },
            "notes": self.notes,
        }  # fmt: skip
