"""All that changes while a run trains, and how it goes into a checkpoint and comes back."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from groundup.console import Console
from groundup.model import Transformer
from groundup.training.averaging import WeightAverage
from groundup.training.checkpoint import Progress, Stateful, load_checkpoint, load_weights, weights_of
from groundup.training.guard import Guard
from groundup.training.loss_scaling import LossScaler
from groundup.training.optimizers import Optimizers


@dataclass
class TrainingState:
    """What a step changes.

    Attributes:
        model: weights.
        optimizers: their moments.
        guard: the losses it remembers.
        scaler: float16's, or None.
        average: of the weights, or None.
    """

    model: Transformer
    optimizers: Optimizers
    guard: Guard
    scaler: LossScaler | None = None
    average: WeightAverage | None = None

    def parts(self) -> Stateful:
        """The checkpoint's files of tensors."""
        parts = {"weights": lambda: weights_of(self.model), "optimizer": self.optimizers.state_dict}
        return parts if self.average is None else {**parts, "average": self.average.state_dict}

    def remembered(self, progress: Progress) -> Progress:
        """`progress` with what is no tensor."""
        scaler = {} if self.scaler is None else self.scaler.state_dict()
        return replace(progress, guard=self.guard.state_dict(), scaler=scaler)

    def restore(self, folder: Path, fingerprint: str, console: Console) -> Progress | None:
        """Take back the newest undamaged checkpoint of this fingerprint; None if there is none.

        Raises:
            ArtifactError: it is of another model or other optimizers.
        """
        found = load_checkpoint(folder, fingerprint, self.parts().keys(), console)
        if found is None:
            return None
        progress, parts = found
        load_weights(self.model, parts["weights"])
        self.optimizers.load_state_dict(parts["optimizer"])
        self.guard.load_state_dict(progress.guard)
        if self.scaler is not None:
            self.scaler.load_state_dict(progress.scaler)
        if self.average is not None:
            self.average.load_state_dict(parts["average"])
        return progress
