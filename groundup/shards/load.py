"""Token shards to batches: shuffled for training, in order for validation, every token a target exactly once.

The stream of n tokens is cut into rows of `sequence_length` targets; a row's input is the same tokens one place
earlier, so neighbouring rows overlap by one token, and the first token follows the stream's last, an
`<|endoftext|>`. If the last row has too few targets left, it is moved back to full length and the targets already
seen are masked (−100). Every epoch cuts at other places. Which row stands where is a pure function of (seed, epoch,
index); an epoch's last batch runs on into the next.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import xxhash

from groundup.errors import ArtifactError, DataError
from groundup.shards.order import Permutation
from groundup.shards.read import TokenShards

IGNORED = -100
PLACES_AT_ONCE = 1024
"""So many places of the order are computed together: numpy's cost is per call, not per index."""
ROWS_AT_ONCE = 16
"""So many rows are read together where they are given one by one."""


@dataclass(frozen=True)
class Batch:
    """Rows to learn from or to be scored on.

    Attributes:
        ids: (rows, seq) int64, what the model sees.
        targets: (rows, seq) int64, the next token of each; −100 where there is nothing to learn.
    """

    ids: np.ndarray
    targets: np.ndarray


BatchType = TypeVar("BatchType")


class StepLoader(abc.ABC, Generic[BatchType]):
    """An endless order of rows, batches of them by number, and a state to resume from.

    Attributes:
        sequence_length: tokens in a row, as they really are.
        batch_size: rows in a batch, over all processes.
        end_of_text_id: of `<|endoftext|>`; None if the shards have none.
        step: the next batch that iterating gives.
    """

    def __init__(self, sequence_length: int, batch_size: int, seed: int, end_of_text_id: int | None) -> None:
        self.sequence_length = sequence_length
        self.batch_size = batch_size
        self.seed = seed
        self.end_of_text_id = end_of_text_id
        self.step = 0

    @abc.abstractmethod
    def rows(self, places: np.ndarray) -> BatchType:
        """The rows at any places (n,) of the endless order of rows."""

    @abc.abstractmethod
    def source(self) -> dict[str, str]:
        """A name and a digest of what the rows are cut from."""

    def batch(self, step: int, rows: slice | None = None) -> BatchType:
        """Batch number `step` (0, 1, …) without the ones before it, or some of its rows (a process's share)."""
        return self.rows(np.arange(step * self.batch_size, (step + 1) * self.batch_size)[rows or slice(None)])

    def identity(self) -> dict[str, int | str]:
        """All that decides which batch stands at which step."""
        sizes = {"sequence_length": self.sequence_length, "batch_size": self.batch_size}
        return {"seed": self.seed, **sizes, **self.source()}

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
        """Go on from a state; ArtifactError: it is of another text, sequence length, batch size or seed."""
        own = self.identity().items()
        differences = [f"{name} was {state.get(name)}, is {value}" for name, value in own if state.get(name) != value]
        if differences:
            raise ArtifactError(
                f"the loader's state does not fit ({'; '.join(differences)}): going on from it would show some "
                "tokens twice and others never.",
                "Restore the settings and the text, or run this stage again with --from.",
            )
        self.step = int(state["step"])


class WindowLoader(StepLoader[Batch]):
    """Training batches in shuffled order.

    Args:
        shards: what to learn from.
        sequence_length: tokens in a row; a shorter text makes shorter rows (then `note` says so).
        batch_size: rows in a batch.
        seed: of the order.

    Attributes:
        n_windows: rows in an epoch.
        tokens_per_epoch: targets in an epoch.
        note: a remark for the user, or None.

    Raises:
        DataError: fewer than two tokens.
    """

    def __init__(self, shards: TokenShards, sequence_length: int, batch_size: int, seed: int) -> None:
        if shards.n_tokens < 2:
            raise DataError(
                f"[corpus]: the training text has {shards.n_tokens} token; two are the least to learn from.",
                "Add text.",
            )
        super().__init__(min(sequence_length, shards.n_tokens), batch_size, seed, shards.end_of_text_id)
        self._shards = shards
        self._block: tuple[int, np.ndarray, np.ndarray] | None = None
        self.tokens_per_epoch = shards.n_tokens
        self.n_windows = -(-shards.n_tokens // self.sequence_length)
        self.note: str | None = None
        if self.sequence_length < sequence_length:
            self.note = (
                f"the training text has {shards.n_tokens} tokens, fewer than a row of {sequence_length}: "
                f"rows are {self.sequence_length} tokens long"
            )

    def rows(self, places: np.ndarray) -> Batch:
        """The rows at any places (n,) of the endless order of rows."""
        windows, offsets = self._windows_at(places)
        return _rows(self._shards, windows, self.sequence_length, self._shards.n_tokens, offsets)

    def source(self) -> dict[str, str]:
        """The shards."""
        return {"shards": self._shards.fingerprint}

    def _windows_at(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which windows stand at these places, and how far their epoch turns the stream; (n,) each."""
        if not len(places):
            return places, places
        first, last = int(places.min()), int(places.max())
        at_once = min(PLACES_AT_ONCE, 2 * self.n_windows)  # every epoch has a key of its own to be made
        if last - first >= at_once:
            return self._compute_windows(places)
        if self._block is None or not self._block[0] <= first <= last < self._block[0] + at_once:
            self._block = first, *self._compute_windows(np.arange(first, first + at_once))
        here = places - self._block[0]
        return self._block[1][here], self._block[2][here]

    def _compute_windows(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        epochs, indices = np.divmod(places, self.n_windows)
        windows, offsets = np.empty_like(indices), np.empty_like(indices)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            windows[here] = Permutation(self.n_windows, (self.seed, int(epoch)))(indices[here])
            offset = xxhash.xxh3_64_intdigest(f"offset {self.seed} {epoch}".encode()) % self.sequence_length
            offsets[here] = offset  # every epoch cuts the text at other places
        return windows, offsets


def validation_windows(shards: TokenShards, sequence_length: int, limit_tokens: int | None = None) -> Iterator[Batch]:
    """The stream in order, one row a batch, each of the first `limit_tokens` tokens a target exactly once.

    A text shorter than `sequence_length` makes one shorter row; without `limit_tokens` all of it is scored.
    """
    n_targets = shards.n_tokens if limit_tokens is None else min(limit_tokens, shards.n_tokens)
    length = min(sequence_length, n_targets)
    n_rows = -(-n_targets // length) if length else 0
    for begin in range(0, n_rows, ROWS_AT_ONCE):
        windows = np.arange(begin, min(n_rows, begin + ROWS_AT_ONCE))
        rows = _rows(shards, windows, length, n_targets, np.zeros_like(windows))
        for row in range(len(windows)):
            yield Batch(rows.ids[row : row + 1], rows.targets[row : row + 1])


def _rows(shards: TokenShards, windows: np.ndarray, length: int, n_targets: int, offsets: np.ndarray) -> Batch:
    """Rows: the targets of row i are the tokens `i·length` … of the first `n_targets`, its ids one earlier.

    Args:
        windows: (rows,) the numbers of the rows.
        offsets: (rows,) places by which the whole stream, closed to a ring, is turned.
    """
    first = windows * length
    begin = np.minimum(first, n_targets - length)  # before `first` in the last row only
    tokens = _ring(shards, begin + offsets - 1, length + 1)
    targets = tokens[:, 1:].copy()
    for row in np.flatnonzero(begin < first):
        targets[row, : first[row] - begin[row]] = IGNORED
    return Batch(np.ascontiguousarray(tokens[:, :-1]), targets)


def _ring(shards: TokenShards, starts: np.ndarray, length: int) -> np.ndarray:
    """(rows, length) tokens from each start on, on the stream closed to a ring: its last is an `<|endoftext|>`."""
    starts = starts % shards.n_tokens
    over = starts + length > shards.n_tokens
    if not over.any():
        return shards.windows(starts, length)
    out = np.empty((len(starts), length), dtype=np.int64)
    out[~over] = shards.windows(starts[~over], length)
    for row in np.flatnonzero(over):
        until_end = shards.n_tokens - int(starts[row])
        out[row, :until_end] = shards.window(int(starts[row]), until_end)
        out[row, until_end:] = shards.window(0, length - until_end)
    return out
