"""What every loader has: batches by number, a state to resume from, and an error when that state does not fit."""

from __future__ import annotations

import abc
from collections.abc import Iterator, Mapping
from typing import Any, Generic, TypeVar

from groundup.errors import ArtifactError

BatchType = TypeVar("BatchType")


class StepLoader(abc.ABC, Generic[BatchType]):
    """Batch number `step` is a pure function of what `identity` names and of `step`.

    Attributes:
        batch_size: rows in a batch, over all processes.
        step: the next batch that iterating gives.
    """

    batch_size: int
    step: int = 0

    @abc.abstractmethod
    def batch(self, step: int, rows: slice | None = None) -> BatchType:
        """Batch number `step` (0, 1, …), or some of its rows (a process's share)."""

    @abc.abstractmethod
    def identity(self) -> dict[str, int | str]:
        """All that decides which batch stands at which step."""

    def __iter__(self) -> Iterator[BatchType]:
        """Whole batches from `step` on, for ever."""
        while True:
            batch = self.batch(self.step)
            self.step += 1
            yield batch

    def state_dict(self) -> dict[str, int | str]:
        """The next step, and what the batches depend on."""
        return {"step": self.step, **self.identity()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state.

        Raises:
            ArtifactError: the state is of another text, sequence length, batch size or seed.
        """
        differences = [
            f"{name} was {state.get(name)}, is {value}"
            for name, value in self.identity().items()
            if state.get(name) != value
        ]
        if differences:
            raise ArtifactError(
                f"the loader's state does not fit ({'; '.join(differences)}): going on from it would show some "
                "tokens twice and others never.",
                "Restore the settings and the text, or run this stage again with --from.",
            )
        self.step = int(state["step"])
