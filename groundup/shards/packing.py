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
from groundup.shards.load import Batch, StepLoader, WindowLoader
from groundup.shards.mixture import MixtureLoader


@dataclass(frozen=True)
class PackedBatch(Batch):
    """Rows with their documents.

    Attributes:
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
    """A loader's batches with the borders of their documents; DataError: the shards have no `<|endoftext|>` there."""

    def __init__(self, loader: WindowLoader | MixtureLoader) -> None:
        if loader.end_of_text_id is None:
            raise DataError(
                "these shards were converted without an end-of-text id: documents cannot be told apart in a row.",
                "Import them again with --end-of-text-id.",
            )
        super().__init__(loader.sequence_length, loader.batch_size, loader.seed, loader.end_of_text_id)
        self.step = loader.step
        self._loader, self._border = loader, loader.end_of_text_id

    def rows(self, places: np.ndarray) -> PackedBatch:
        """The rows at any places (n,) of the endless order of rows."""
        batch = self._loader.rows(places)
        return PackedBatch(batch.ids, batch.targets, *document_borders(batch.ids, self._border))

    def source(self) -> dict[str, str]:
        """What the rows of the loader are cut from."""
        return self._loader.source()


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
