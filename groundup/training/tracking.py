"""Metrics to where people look at them: TensorBoard, Weights & Biases, trackio. None is imported unless asked for.

`metrics.jsonl` stays the record; these are copies. A run that goes on writes into the same board and takes back what
comes after its checkpoint, where the board can.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from groundup.errors import GroundupError

TrackerName = Literal["tensorboard", "wandb", "trackio"]


class Tracker(Protocol):
    """Where figures go."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Note the figures of a step."""
        ...

    def close(self) -> None:
        """Write what is left."""
        ...


class Trackers:
    """All that a recipe asks for, as one.

    Args:
        names: of the trackers.
        folder: the stage's folder; TensorBoard's files go into `tensorboard/` in it.
        project: the run's name.
        stage: the stage's name.
        step: the step that the run goes on from.
        config: settings, shown beside the curves.

    Raises:
        GroundupError: a tracker is not installed or refuses to start.
    """

    def __init__(
        self, names: Sequence[TrackerName], folder: Path, project: str, stage: str, step: int, config: Mapping[str, Any]
    ) -> None:
        self._all: list[Tracker] = []
        for name in names:
            try:
                if name == "tensorboard":
                    self._all.append(_TensorBoard(folder / "tensorboard", step))
                else:
                    self._all.append(_Remote(name, project, stage, step, config))
            except ImportError as error:
                raise GroundupError(
                    f"[{stage}] track = {name!r}: not installed.", f"Run: pip install {name}, or leave it out."
                ) from error

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Note the numbers among the figures of a step."""
        numbers = {
            name: float(value)
            for name, value in values.items()
            if name not in ("step", "tokens") and isinstance(value, (int, float))
        }
        for tracker in self._all if numbers else ():
            tracker.log(step, numbers)

    def close(self) -> None:
        """Write what is left."""
        for tracker in self._all:
            tracker.close()


class _TensorBoard:
    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # What a killed run wrote beyond its checkpoint is hidden.
        self._writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Remote:
    """Weights & Biases, or trackio, which has the same interface."""

    def __init__(self, name: str, project: str, stage: str, step: int, config: Mapping[str, Any]) -> None:
        import importlib

        self._module: Any = importlib.import_module(name)
        options = {"resume": "allow"} if name == "wandb" else {}
        self._module.init(project=project, name=stage, config=dict(config), **options)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._module.log(dict(values), step=step)

    def close(self) -> None:
        self._module.finish()
