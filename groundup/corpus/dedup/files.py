"""What every kind of deduplication stands on: the units' keys, files cut by key range, and what is handed back.

A document is known by its number: its place among all documents of all units, in the order of the units. Numbers
are only used within one call; what goes out are rows of a unit and ids. A step writes, for every piece of the
documents, files with the records of one key range after the other; the next step reads one range of all files.
So a range fits in memory whatever the corpus is, every file is read once from begin to end, and no text and no
key travels between processes.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from groundup.errors import ArtifactError
from groundup.files import own_folder, read_json, remove_folder, write_json

COPIES = 4
"""How many times a task's records stand in memory while they are sorted."""
_UNITS, _KEPT = "units.json", "kept.npy"
_MIN_TASK_DOCUMENTS = 20_000
"""Fewer documents than this are not worth another task."""
_OPEN_MAPS = 200
"""Files that a `KeyStore` holds open: systems commonly allow a process 1,024, and a large corpus has more units."""


@dataclass(frozen=True)
class UnitKeys:
    """What is known of one unit's documents, in files that are mapped into memory.

    Attributes:
        folder: holds `ids.npy` (n, 2) uint64, `digests.npy` (n, 2) uint64 (xxh3-128 of the text), `lengths.npy` (n,)
            int64 (characters) and, for near-duplicates, `signatures.npy` (n, bands * rows) uint32; none of them
            if n is 0. The texts are the column `text` of its `documents.parquet`.
        n: documents.
    """

    folder: Path
    n: int


@dataclass(frozen=True)
class Removed:
    """One unit's duplicates.

    Attributes:
        rows: (m,) int64, rising: the documents removed.
        survivors: (m, 2) uint64: the id of the document that stays in the place of each.
    """

    rows: np.ndarray
    survivors: np.ndarray


class KeyStore:
    """The keys of all units, as a worker sees them, from the folder where `key_store` has put the list of units."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        units = read_json(folder / _UNITS)
        self.folders = [Path(place) for place, _ in units]
        self.offsets = np.cumsum([0, *(n for _, n in units)], dtype=np.int64)
        self.kept = load(folder / _KEPT)
        """(n,) bool by document number: who takes part."""
        self._map = functools.lru_cache(_OPEN_MAPS)(_rows)  # no method: a circle would keep the files open

    def numbers(self, begin: int, end: int) -> np.ndarray:
        """The documents from `begin` to `end` that take part."""
        return np.flatnonzero(self.kept[begin:end]) + begin

    def slices(self, bytes_per_document: int, memory_bytes: int, n_workers: int) -> list[tuple[int, int]]:
        """Ranges of numbers, each small enough for a task; those in which nobody takes part are left out."""
        n = len(self.kept)
        fits = max(memory_bytes // (COPIES * bytes_per_document), 1)
        size = min(fits, max(_MIN_TASK_DOCUMENTS, -(-n // n_workers)))
        ranges = ((begin, min(begin + size, n)) for begin in range(0, n, size))
        return [(begin, end) for begin, end in ranges if self.kept[begin:end].any()]

    def take(self, name: str, numbers: np.ndarray) -> np.ndarray:
        """Rows of "ids", "digests", "lengths" or "signatures", of documents by number, rising, at least one.

        Raises:
            ArtifactError: a unit's file is missing or has not a row for every document.
        """
        places = np.searchsorted(numbers, self.offsets)
        parts = [
            self._map(self.folders[unit] / f"{name}.npy", int(self.offsets[unit + 1] - self.offsets[unit]))[
                numbers[places[unit] : places[unit + 1]] - self.offsets[unit]
            ]
            for unit in np.flatnonzero(np.diff(places)).tolist()
        ]
        return np.concatenate(parts)

    def removed(self, pairs: Sequence[np.ndarray]) -> list[Removed]:
        """What is handed back, given (m, 2) int64 numbers of documents removed and of those kept instead."""
        found = np.concatenate([*pairs, np.empty((0, 2), dtype=np.int64)])
        found = found[np.argsort(found[:, 0], kind="stable")]
        assert (np.diff(found[:, 0]) > 0).all(), "a document was removed twice"
        assert self.kept[found.reshape(-1)].all(), "a document was removed that did not take part"
        assert not np.isin(found[:, 1], found[:, 0]).any(), "a survivor was removed"
        wanted, which = np.unique(found[:, 1], return_inverse=True)
        survivors = self.take("ids", wanted)[which] if len(found) else np.empty((0, 2), dtype=np.uint64)
        places = np.searchsorted(found[:, 0], self.offsets)
        return [
            Removed(found[begin:end, 0] - first, survivors[begin:end])
            for first, begin, end in zip(self.offsets[:-1], places[:-1], places[1:], strict=True)
        ]


def _rows(path: Path, n: int) -> np.ndarray:
    rows = load(path)
    if len(rows) != n:
        raise ArtifactError(f"{path}: {len(rows):,} rows for {n:,} documents.", "Make it again with --from corpus.")
    return rows


@contextmanager
def key_store(folder: Path, units: Sequence[UnitKeys], kept: Sequence[np.ndarray]) -> Iterator[KeyStore]:
    """A `KeyStore` in a new folder, which is gone in the end with all that tasks write there.

    What a killed process left there is not used. `kept`: (n,) bool for each unit, who takes part.
    """
    remove_folder(folder)
    own_folder(folder)
    try:
        for unit, mask in zip(units, kept, strict=True):
            assert mask.shape == (unit.n,), f"{unit.folder}: {mask.shape} flags for {unit.n} documents"
        write_json(folder / _UNITS, [[str(unit.folder.resolve()), unit.n] for unit in units])
        save(folder / _KEPT, np.concatenate([np.empty(0, dtype=bool), *kept]))
        yield KeyStore(folder)
    finally:
        remove_folder(folder)


@dataclass(frozen=True)
class RangeFile:
    """One file of records, cut by key range: range r is `offsets[r]` to `offsets[r + 1]`."""

    path: Path
    offsets: tuple[int, ...]


def n_ranges(n_records: int, record_bytes: int, memory_bytes: int) -> int:
    """How many key ranges make each one fit in memory, with room for an uneven share."""
    return max(1, -(-n_records * record_bytes * COPIES * 5 // (4 * memory_bytes)))


def range_of(keys: np.ndarray, n: int) -> np.ndarray:
    """In which of n equal ranges of the 64-bit numbers each key lies: int64."""
    return ((keys >> np.uint64(32)) * np.uint64(n) >> np.uint64(32)).astype(np.int64)


def write_ranges(path: Path, records: np.ndarray, ranges: np.ndarray, n: int) -> RangeFile:
    """Write records sorted by their range (of n), in their order within it."""
    save(path, records[np.argsort(ranges, kind="stable")])
    return RangeFile(path, (0, *np.cumsum(np.bincount(ranges, minlength=n)).tolist()))


def read_range(files: Sequence[RangeFile], number: int) -> np.ndarray:
    """One range of all files (at least one), one file's records after the other's."""
    # Copied one by one, so that only one file is open at a time.
    return np.concatenate(
        [np.array(load(file.path)[file.offsets[number] : file.offsets[number + 1]]) for file in files]
    )


def is_new(keys: np.ndarray) -> np.ndarray:
    """(n,) bool: which of these sorted keys differ from the one before: (n,) or (n, width)."""
    differs = keys[1:] != keys[:-1]
    return np.concatenate([np.ones(min(1, len(keys)), dtype=bool), differs.any(axis=1) if keys.ndim > 1 else differs])


def first_places(keys: np.ndarray) -> np.ndarray:
    """(n,) int64: for each of these sorted keys the place of the first that is equal."""
    new = is_new(keys)
    return np.flatnonzero(new)[np.cumsum(new) - 1]


def save(path: Path, array: np.ndarray) -> Path:
    """Write a `.npy` file; it lies in a folder that a killed process's successor empties, so nothing flushes it."""
    np.save(path, array)
    return path


def load(path: Path) -> np.ndarray:
    """Map a `.npy` file into memory. ArtifactError: it is missing or damaged."""
    try:
        return np.load(path, mmap_mode="r")
    except FileNotFoundError as error:
        raise ArtifactError(f"{path}: not found.", "Make it again with --from corpus.") from error
    except (ValueError, EOFError) as error:
        raise ArtifactError(f"{path}: damaged ({error}).", "Make it again with --from corpus.") from error
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error.strerror or error}).") from error
