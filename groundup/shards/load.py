"""Token shards to batches: shuffled for training, in order for validation, every token a target exactly once.

The stream of n tokens is cut into rows of `sequence_length` targets; a row's input is the same tokens one place
earlier, so neighbouring rows overlap by one token, and the first token follows the stream's last, an
`<|endoftext|>`. If the last row has too few targets left, it is moved back to full length and the targets already
seen are masked (−100). Every epoch cuts at other places. Which row stands where is a pure function of (seed, epoch,
index); an epoch's last batch runs on into the next.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash

from groundup.errors import ArtifactError, DataError
from groundup.shards.order import Permutation
from groundup.shards.read import TokenShards

IGNORED = -100


@dataclass(frozen=True)
class Batch:
    """Rows to learn from or to be scored on.

    Attributes:
        ids: (rows, seq) int64, what the model sees.
        targets: (rows, seq) int64, the next token of each; −100 where there is nothing to learn.
    """

    ids: np.ndarray
    targets: np.ndarray


class WindowLoader:
    """Training batches in shuffled order; batch number `step` at once, without the ones before it.

    Args:
        shards: what to learn from.
        sequence_length: tokens in a row; a shorter text makes shorter rows (then `note` says so).
        batch_size: rows in a batch.
        seed: of the order.

    Attributes:
        sequence_length: tokens in a row, as they really are.
        n_windows: rows in an epoch.
        tokens_per_epoch: targets in an epoch.
        step: the next batch that iterating gives.
        note: what the user should know, or None.

    Raises:
        DataError: fewer than two tokens.
    """

    def __init__(self, shards: TokenShards, sequence_length: int, batch_size: int, seed: int) -> None:
        if shards.n_tokens < 2:
            raise DataError(
                f"[corpus]: the training text has {shards.n_tokens} token; two are the least to learn from.",
                "Add text.",
            )
        self._shards = shards
        self.sequence_length = min(sequence_length, shards.n_tokens)
        self.batch_size = batch_size
        self.seed = seed
        self.tokens_per_epoch = shards.n_tokens
        self.n_windows = -(-shards.n_tokens // self.sequence_length)
        self.step = 0
        self.note: str | None = None
        if self.sequence_length < sequence_length:
            self.note = (
                f"the training text has {shards.n_tokens} tokens, fewer than a row of {sequence_length}: "
                f"rows are {self.sequence_length} tokens long"
            )

    def batch(self, step: int, rows: slice | None = None) -> Batch:
        """Batch number `step` (0, 1, …), or some of its rows (a process's share)."""
        places = np.arange(step * self.batch_size, (step + 1) * self.batch_size)[rows or slice(None)]
        n_targets = self._shards.n_tokens
        windows = [
            _row(self._shards, window, self.sequence_length, n_targets, self._offset(epoch))
            for epoch, window in self._windows_at(places)
        ]
        ids, targets = np.empty((2, len(windows), self.sequence_length), dtype=np.int64)
        for number, row in enumerate(windows):
            ids[number], targets[number] = row
        return Batch(ids, targets)

    def __iter__(self) -> Iterator[Batch]:
        """Whole batches from `step` on, for ever."""
        while True:
            batch = self.batch(self.step)
            self.step += 1
            yield batch

    def state_dict(self) -> dict[str, int | str]:
        """Where it stands, and what that place depends on."""
        return {"step": self.step, **self._identity()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state.

        Raises:
            ArtifactError: the state is of another text, sequence length, batch size or seed.
        """
        differences = [
            f"{name} was {state.get(name)}, is {value}"
            for name, value in self._identity().items()
            if state.get(name) != value
        ]
        if differences:
            raise ArtifactError(
                f"the loader's state does not fit ({'; '.join(differences)}): going on from it would show some "
                "tokens twice and others never.",
                "Put the settings and the text back, or start this stage afresh with --from.",
            )
        self.step = int(state["step"])

    def _identity(self) -> dict[str, int | str]:
        return {
            "seed": self.seed,
            "sequence_length": self.sequence_length,
            "batch_size": self.batch_size,
            "shards": self._shards.fingerprint,
        }

    def _offset(self, epoch: int) -> int:
        """How far the stream is turned: every epoch cuts the text at other places."""
        return xxhash.xxh3_64_intdigest(f"offset {self.seed} {epoch}".encode()) % self.sequence_length

    def _windows_at(self, places: np.ndarray) -> list[tuple[int, int]]:
        """Which windows of which epochs stand at these places of the endless order."""
        epochs, indices = np.divmod(places, self.n_windows)
        windows = np.empty_like(indices)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            windows[here] = Permutation(self.n_windows, (self.seed, int(epoch)))(indices[here])
        return list(zip(epochs.tolist(), windows.tolist(), strict=True))


def validation_windows(shards: TokenShards, sequence_length: int, limit_tokens: int | None = None) -> Iterator[Batch]:
    """The stream in order, one row a batch, each of the first `limit_tokens` tokens a target exactly once.

    Args:
        shards: what to score on.
        sequence_length: tokens in a row; a shorter text makes one shorter row.
        limit_tokens: how many tokens to score (default: all).
    """
    n_targets = shards.n_tokens if limit_tokens is None else min(limit_tokens, shards.n_tokens)
    length = min(sequence_length, n_targets)
    for index in range(-(-n_targets // length) if length else 0):
        ids, targets = _row(shards, index, length, n_targets)
        yield Batch(ids[None], targets[None])


def _row(
    shards: TokenShards, index: int, length: int, n_targets: int, offset: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Row `index`: its targets are the tokens `index·length` … of the first `n_targets`, its ids one earlier.

    Args:
        offset: places by which the whole stream, closed to a ring, is turned.

    Returns:
        ids and targets, (length,) int64 each.
    """
    first = index * length
    end = min(first + length, n_targets)
    begin = end - length  # before `first` in the last row only
    tokens = _ring(shards, begin + offset - 1, length + 1)
    targets = tokens[1:].copy()
    targets[: first - begin] = IGNORED
    return tokens[:-1], targets


def _ring(shards: TokenShards, start: int, length: int) -> np.ndarray:
    """`length` tokens from `start` on the stream closed to a ring: its last token is an `<|endoftext|>`."""
    start %= shards.n_tokens
    until_end = shards.n_tokens - start
    if length <= until_end:
        return shards.window(start, length)
    return np.concatenate([shards.window(start, until_end), shards.window(0, length - until_end)])
