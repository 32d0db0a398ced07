"""Exact duplicates: documents whose final texts have the same 128-bit xxh3 digest.

In: the units' keys and who takes part. Out: which are removed, and which are kept instead: of equal texts the one with
the smallest id, and of equal ids the first in the order of the units.

Among n different texts two share a digest with probability about n²/2¹²⁹: never, in practice.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from groundup.corpus.dedup.files import (
    KeyStore,
    RangeFile,
    Removed,
    UnitKeys,
    check_count,
    first_places,
    is_new,
    key_store,
    n_ranges,
    range_of,
    read_range,
    save,
    write_ranges,
)
from groundup.corpus.engine import Engine

_RECORD = np.dtype([("digest", "<u8", 2), ("id", "<u8", 2), ("number", "<i8")])


def exact_duplicates(
    units: Sequence[UnitKeys], kept: Sequence[np.ndarray], folder: Path, engine: Engine, memory_bytes: int
) -> list[Removed]:
    """Find documents with equal texts; all but one of each are to go.

    Args:
        units: the documents' keys, in an order that does not depend on how the input was cut.
        kept: (n,) bool for each unit: who takes part.
        folder: for files in between; it is emptied first and removed in the end.
        engine: who does the work. The result does not depend on it, on `memory_bytes` or on where units begin.
        memory_bytes: what a task may use.

    Returns:
        For every unit its rows that go, each with the id of the document that stays.
    """
    with key_store(folder, units, kept) as store:
        if not store.n:
            return store.removed(np.empty((0, 2), dtype=np.int64))
        n_taking_part = int(store.kept.sum())
        ranges = n_ranges(n_taking_part, _RECORD.itemsize, memory_bytes)
        slices = store.slices(_RECORD.itemsize, memory_bytes, engine.n_workers)
        files = list(engine.map(partial(_split_digests, store.folder, ranges), slices))
        check_count("exact duplicates", n_taking_part, files)
        found = [np.load(path) for path in engine.map(partial(_equal_digests, store.folder, files), range(ranges))]
        return store.removed(np.concatenate(found))


def _split_digests(folder: Path, n: int, piece: tuple[int, int]) -> RangeFile:
    store = KeyStore(folder)
    numbers = store.numbers(*piece)
    records = np.empty(len(numbers), dtype=_RECORD)
    records["digest"] = store.take("digests", numbers)
    records["id"] = store.take("ids", numbers)
    records["number"] = numbers
    return write_ranges(folder / f"digests-{piece[0]}.npy", records, range_of(records["digest"][:, 0], n), n)


def _equal_digests(folder: Path, files: Sequence[RangeFile], number: int) -> Path:
    """(m, 2) int64 in a file: the document removed, the one kept."""
    records = read_range(files, number)
    digest, ident = records["digest"], records["id"]
    # The last key sorts first: by digest, then by which is to be kept.
    order = np.lexsort((records["number"], ident[:, 1], ident[:, 0], digest[:, 1], digest[:, 0]))
    digest, numbers = digest[order], records["number"][order]
    pairs = np.stack([numbers, numbers[first_places(digest)]], axis=1)
    return save(folder / f"equal-{number}.npy", pairs[~is_new(digest)])
