"""Batches for the loop: windows of token shards in shuffled order, and rows padded to one width."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch

from groundup.files import value_digest
from groundup.shards import TokenShards, WindowLoader, validation_windows
from groundup.training.job import Rows
from groundup.training.objective import IGNORED

Row = tuple[np.ndarray, np.ndarray]
"""Token ids and targets of one row, each (seq,) int64."""


class ShardBatches:
    """The loop's batches from a training and a validation split of token shards.

    Args:
        train: shards to learn from.
        validation: shards to be tested on.
        sequence_length: tokens in a row.
        batch_size: rows in a batch, over all processes.
        seed: of the order.
    """

    def __init__(
        self, train: TokenShards, validation: TokenShards, sequence_length: int, batch_size: int, seed: int
    ) -> None:
        self.loader = WindowLoader(train, sequence_length, batch_size, seed)
        self._validation = validation
        self.fingerprint = value_digest([train.fingerprint, validation.fingerprint, sequence_length, batch_size, seed])

    def rows(self, first: int, last: int) -> Rows:
        """Rows `first` … `last` − 1 of the endless order."""
        batch = self.loader.rows(np.arange(first, last))
        return torch.from_numpy(batch.ids), torch.from_numpy(batch.targets)

    def validation(self, batch_size: int, limit_tokens: int | None) -> Iterator[Rows]:
        """Validation batches of `batch_size` rows; the last is filled up with rows that carry no target."""
        windows = validation_windows(self._validation, self.loader.sequence_length, limit_tokens)
        rows = ((ids, targets) for window in windows for ids, targets in zip(window.ids, window.targets, strict=True))
        yield from batched_rows(rows, batch_size)


def batched_rows(rows: Iterable[Row], batch_size: int) -> Iterator[Rows]:
    """Batches of exactly `batch_size` rows."""
    group: list[Row] = []
    for row in rows:
        group.append(row)
        if len(group) == batch_size:
            yield pad_rows(group, batch_size)
            group = []
    if group:
        yield pad_rows(group, batch_size)


def pad_rows(rows: Sequence[Row], n_rows: int, pad_id: int = 0) -> Rows:
    """Rows of several lengths as one batch: padded on the right, with empty rows up to `n_rows`.

    Causal attention keeps what stands on the right out of everything before it, so the pads change nothing.
    """
    width = max(len(ids) for ids, _ in rows)
    ids = torch.full((n_rows, width), pad_id, dtype=torch.int64)
    targets = torch.full((n_rows, width), IGNORED, dtype=torch.int64)
    for index, (row_ids, row_targets) in enumerate(rows):
        ids[index, : len(row_ids)] = torch.from_numpy(np.asarray(row_ids, dtype=np.int64))
        targets[index, : len(row_targets)] = torch.from_numpy(np.asarray(row_targets, dtype=np.int64))
    return ids, targets
