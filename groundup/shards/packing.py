"""Rows that say where their documents are, so that no token attends to another document.

Nothing is dropped and nothing is padded: the rows are a loader's own, and every token stays a target exactly once an
epoch. A document is read from the `<|endoftext|>` before it, which is the input whose target is its first token: a
document of tokens t₁ … tₙ has inputs `<|endoftext|>` t₁ … tₙ and targets t₁ … tₙ `<|endoftext|>`. Within a row each
document (or the part of one that begins the row) has a number, 0, 1, …, and positions that restart at 0.

Three forms of the same borders: `document_ids` for masks, `positions` for rotary embeddings, `cu_seqlens` for
attention kernels of variable length (the sums of lengths that FlashAttention's varlen functions take).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from groundup.errors import DataError
from groundup.shards.load import Batch, WindowLoader
from groundup.shards.mixture import MixtureLoader
from groundup.shards.steps import StepLoader


@dataclass(frozen=True)
class PackedBatch(Batch):
    """Rows with their documents.

    Attributes:
        ids: (rows, seq) int64, what the model sees.
        targets: (rows, seq) int64, the next token of each; −100 where there is nothing to learn.
        document_ids: (rows, seq) int32, the number of each position's document in its row.
        positions: (rows, seq) int32, the place of each position in its document.
    """

    document_ids: np.ndarray
    positions: np.ndarray

    @property
    def cu_seqlens(self) -> np.ndarray:
        """Where documents begin in the batch read row after row, and its size at the end: (documents + 1,) int32."""
        begins = np.flatnonzero(self.positions.ravel() == 0)
        return np.append(begins, self.positions.size).astype(np.int32)


class PackedLoader(StepLoader[PackedBatch]):
    """A loader's batches with the borders of their documents.

    Args:
        loader: where the rows come from.

    Attributes:
        batch_size: rows in a batch.
        sequence_length: tokens in a row.
        step: the next batch that iterating gives.

    Raises:
        DataError: the shards have no `<|endoftext|>` between documents.
    """

    def __init__(self, loader: WindowLoader | MixtureLoader) -> None:
        if loader.end_of_text_id is None:
            raise DataError(
                "these shards were converted without an end-of-text id: documents cannot be told apart in a row.",
                "Import them again with --end-of-text-id.",
            )
        self._loader = loader
        self._end_of_text_id = loader.end_of_text_id
        self.batch_size = loader.batch_size
        self.sequence_length = loader.sequence_length
        self.step = loader.step

    def batch(self, step: int, rows: slice | None = None) -> PackedBatch:
        """Batch number `step` (0, 1, …), or some of its rows (a process's share)."""
        return self._with_borders(self._loader.batch(step, rows))

    def rows(self, places: np.ndarray) -> PackedBatch:
        """The rows at any places (n,) of the endless order of rows."""
        return self._with_borders(self._loader.rows(places))

    def identity(self) -> dict[str, int | str]:
        """All that decides which batch stands at which step."""
        return self._loader.identity()

    def _with_borders(self, batch: Batch) -> PackedBatch:
        return PackedBatch(batch.ids, batch.targets, *document_borders(batch.ids, self._end_of_text_id))


def document_borders(ids: np.ndarray, end_of_text_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Number and place of each input's document.

    Args:
        ids: (rows, seq) inputs.
        end_of_text_id: the input that begins a document.

    Returns:
        document_ids and positions, (rows, seq) int32 each.
    """
    rows, seq = ids.shape
    is_begin = ids == end_of_text_id
    is_begin[:, :1] = True
    begins = np.flatnonzero(is_begin)  # in the batch read row after row
    lengths = np.diff(begins, append=ids.size)
    first_of_row = np.searchsorted(begins, np.arange(rows) * seq)
    numbers = np.arange(len(begins)) - first_of_row[begins // seq]
    document_ids = np.repeat(numbers.astype(np.int32), lengths)
    positions = np.arange(ids.size, dtype=np.int32) - np.repeat(begins.astype(np.int32), lengths)
    return document_ids.reshape(rows, seq), positions.reshape(rows, seq)
