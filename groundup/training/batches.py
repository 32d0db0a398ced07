"""Batches for the loop: rows of token shards, of one folder or of several by weight, and rows padded to one width."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch

from groundup.files import value_digest
from groundup.shards import Batch as ShardRows
from groundup.shards import MixtureLoader, PackedBatch, PackedLoader, TokenShards, WindowLoader, validation_windows
from groundup.shards.packing import document_borders
from groundup.training.objective import IGNORED, Batch

Row = Mapping[str, np.ndarray]
"""Arrays of one row by name, each (seq,) int64: `ids`, `targets`, and `documents` and `positions` where it has them."""


class ShardBatches:
    """The loop's batches from a training and a validation split of token shards.

    Args:
        train: shards to learn from.
        validation: shards to be tested on.
        sequence_length: tokens in a row.
        batch_size: rows in a batch, over all processes.
        seed: of the order.
        mixture: other shards to learn from, each with its weight; that of `train` is 1.
        document_mask: rows say where their documents are, so that no token attends to another document.

    Attributes:
        note: what the user should know, or None.

    Raises:
        ArtifactError: shards of the mixture are another tokenizer's.
        DataError: too little text, or documents that cannot be told apart.
    """

    def __init__(
        self, train: TokenShards, validation: TokenShards, sequence_length: int, batch_size: int, seed: int,
        *, mixture: Sequence[tuple[TokenShards, float]] = (), document_mask: bool = False,
    ) -> None:  # fmt: skip
        loader: WindowLoader | MixtureLoader
        if mixture:
            loader, self.note = MixtureLoader([(train, 1.0), *mixture], sequence_length, batch_size, seed), None
        else:
            loader = WindowLoader(train, sequence_length, batch_size, seed)
            self.note = loader.note
        self.loader: WindowLoader | MixtureLoader | PackedLoader = PackedLoader(loader) if document_mask else loader
        self._validation = validation
        self._end_of_text_id = loader.end_of_text_id if document_mask else None
        others = [[shards.fingerprint, weight] for shards, weight in mixture]
        self.fingerprint = value_digest(
            [train.fingerprint, validation.fingerprint, sequence_length, batch_size, seed, others, document_mask]
        )

    def rows(self, first: int, last: int) -> Batch:
        """Rows `first` … `last` − 1 of the endless order."""
        return {name: torch.from_numpy(part) for name, part in _named(self.loader.rows(np.arange(first, last))).items()}

    def validation(self, batch_size: int, limit_tokens: int | None) -> Iterator[Batch]:
        """Validation batches of `batch_size` rows; the last is filled up with rows that carry no target."""
        windows = validation_windows(self._validation, self.loader.sequence_length, limit_tokens)
        if self._end_of_text_id is not None:
            windows = (PackedBatch(w.ids, w.targets, *document_borders(w.ids, self._end_of_text_id)) for w in windows)
        yield from batched_rows(({name: part[0] for name, part in _named(w).items()} for w in windows), batch_size)


def _named(rows: ShardRows) -> dict[str, np.ndarray]:
    named = {"ids": rows.ids, "targets": rows.targets}
    if isinstance(rows, PackedBatch):
        named |= {"documents": rows.document_ids.astype(np.int64), "positions": rows.positions.astype(np.int64)}
    return named


def batched_rows(rows: Iterable[Row], batch_size: int) -> Iterator[Batch]:
    """Batches of exactly `batch_size` rows."""
    remaining = iter(rows)
    while group := list(itertools.islice(remaining, batch_size)):
        yield pad_rows(group, batch_size)


def pad_rows(rows: Sequence[Row], n_rows: int) -> Batch:
    """Rows of several lengths as one batch: padded on the right, with empty rows up to `n_rows`.

    Causal attention keeps what stands on the right out of everything before it, so the pads change nothing.
    """
    width = max(len(row["ids"]) for row in rows)
    batch = {name: torch.full((n_rows, width), IGNORED if name == "targets" else 0) for name in rows[0]}
    for index, row in enumerate(rows):
        for name, values in row.items():
            batch[name][index, : len(values)] = torch.from_numpy(np.asarray(values, dtype=np.int64))
    return batch
