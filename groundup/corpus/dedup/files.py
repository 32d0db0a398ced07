"""What every kind of deduplication stands on: the units' keys, files cut by key range, and what is handed back.

A document is known by its number: its place among all documents of all units, in the order of the units. Numbers
are only used within one call; what goes out are rows of a unit and ids. A step writes, for every slice of the
documents, one file with the records of one key range after the other; the next step reads one range of all files.
So a range fits in memory whatever the corpus is, every file is read once from begin to end, and no text and no
key travels between processes. Counts are compared after every step: a file that is not whole is not used.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from groundup.errors import ArtifactError
from groundup.files import atomic_writer, own_folder, read_json, remove_folder, write_json

UNITS = "units.json"
KEPT = "kept.npy"
MIN_TASK_DOCUMENTS = 20_000
"""Fewer documents than this are not worth another task."""
COPIES = 4
"""How many times a task's records stand in memory while they are sorted."""
OPEN_MAPS = 200
"""Files that a `KeyStore` holds open: systems commonly allow a process 1,024, and a large corpus has more units."""


@dataclass(frozen=True)
class UnitKeys:
    """What is known of one unit's documents, in files that are mapped into memory.

    Attributes:
        name: the unit's name.
        folder: holds `ids.npy` (n, 2) uint64, `digests.npy` (n, 2) uint64 (xxh3-128 of the text), `lengths.npy` (n,)
            int64 (characters) and, for near-duplicates, `signatures.npy` (n, bands * rows) uint32; none of them
            if n is 0.
        n: documents.
    """

    name: str
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


@dataclass(frozen=True)
class RangeFile:
    """One file of records, cut by key range: range r is `offsets[r]` to `offsets[r + 1]`."""

    path: str
    offsets: tuple[int, ...]


class KeyStore:
    """The keys of all units, as a worker sees them.

    Args:
        folder: where `create` has put the list of units.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        units = read_json(self.folder / UNITS)
        self.folders = [Path(place) for place, _ in units]
        self.offsets = np.concatenate([[0], np.cumsum([n for _, n in units], dtype=np.int64)]).astype(np.int64)
        self._maps: dict[tuple[int, str], np.ndarray] = {}

    @classmethod
    def create(cls, folder: Path, units: Sequence[UnitKeys], kept: Sequence[np.ndarray]) -> KeyStore:
        """Begin a call in a new folder.

        Args:
            folder: made again if it is ours: what a killed process left is not used.
            units: in an order that does not depend on how the input was cut.
            kept: (n,) bool for each unit: who takes part.

        Raises:
            RunError: the folder is not ours.
        """
        remove_folder(folder)
        own_folder(folder)
        assert len(units) == len(kept), "a mask for every unit"
        for unit, mask in zip(units, kept, strict=True):
            assert mask.shape == (unit.n,), f"unit {unit.name}: {mask.shape} flags for {unit.n} documents"
        write_json(folder / UNITS, [[str(unit.folder.resolve()), unit.n] for unit in units])
        save(folder / KEPT, np.concatenate([np.empty(0, dtype=bool), *kept]))
        return cls(folder)

    @property
    def n(self) -> int:
        """Documents in all units."""
        return int(self.offsets[-1])

    @functools.cached_property
    def kept(self) -> np.ndarray:
        """(n,) bool by document number: who takes part."""
        return np.load(self.folder / KEPT, mmap_mode="r")

    def numbers(self, begin: int, end: int) -> np.ndarray:
        """The documents from `begin` to `end` that take part."""
        return np.flatnonzero(self.kept[begin:end]) + begin

    def slices(self, bytes_per_document: int, memory_bytes: int, n_workers: int) -> list[tuple[int, int]]:
        """Cut the documents into ranges of numbers, each small enough for a task."""
        fits = max(memory_bytes // (COPIES * bytes_per_document), 1)
        size = max(1, min(fits, max(MIN_TASK_DOCUMENTS, -(-self.n // n_workers))))
        return [(begin, min(begin + size, self.n)) for begin in range(0, self.n, size)]

    def take(self, name: str, numbers: np.ndarray) -> np.ndarray:
        """Rows of an array of the units.

        Args:
            name: "ids", "digests", "lengths" or "signatures".
            numbers: (m,) int64 document numbers, rising.

        Raises:
            ArtifactError: a unit's file is missing or has not a row for every document.
        """
        first, last = (np.searchsorted(self.offsets, numbers[[0, -1]], side="right") - 1) if len(numbers) else (0, -1)
        places = np.searchsorted(numbers, self.offsets[first : last + 2])
        parts = []
        for unit in range(first, last + 1):
            mine = numbers[places[unit - first] : places[unit - first + 1]]
            if len(mine):
                parts.append(self._map(unit, name)[mine - self.offsets[unit]])
        return np.concatenate(parts) if parts else _nothing(name)

    def removed(self, found: np.ndarray) -> list[Removed]:
        """What is handed back.

        Args:
            found: (m, 2) int64: numbers of the documents removed and of those kept instead.
        """
        found = found[np.argsort(found[:, 0], kind="stable")]
        assert (np.diff(found[:, 0]) > 0).all(), "a document was removed twice"
        assert self.kept[found.reshape(-1)].all(), "a document was removed that did not take part"
        assert not np.isin(found[:, 1], found[:, 0]).any(), "a survivor was removed"
        wanted, which = np.unique(found[:, 1], return_inverse=True)
        survivors = self.take("ids", wanted)[which]
        places = np.searchsorted(found[:, 0], self.offsets)
        return [
            Removed(found[begin:end, 0] - first, survivors[begin:end])
            for first, begin, end in zip(self.offsets[:-1], places[:-1], places[1:], strict=True)
        ]

    def _map(self, unit: int, name: str) -> np.ndarray:
        known = self._maps.get((unit, name))
        if known is None:
            n = int(self.offsets[unit + 1] - self.offsets[unit])
            path = self.folders[unit] / f"{name}.npy"
            known = load(path)
            if len(known) != n:
                raise ArtifactError(
                    f"{path}: {len(known):,} rows for {n:,} documents.", "Make it again with --from corpus."
                )
            if len(self._maps) >= OPEN_MAPS:
                del self._maps[next(iter(self._maps))]  # the one opened first: documents are asked for in their order
            self._maps[unit, name] = known
        return known


@contextmanager
def key_store(folder: Path, units: Sequence[UnitKeys], kept: Sequence[np.ndarray]) -> Iterator[KeyStore]:
    """A `KeyStore` whose folder, with all that tasks write there, is gone in the end."""
    try:
        yield KeyStore.create(Path(folder), units, kept)
    finally:
        remove_folder(Path(folder))


def n_ranges(n_records: int, record_bytes: int, memory_bytes: int) -> int:
    """How many key ranges make each one fit in memory, with room for an uneven share."""
    return max(1, -(-n_records * record_bytes * COPIES * 5 // (4 * memory_bytes)))


def range_of(keys: np.ndarray, n: int) -> np.ndarray:
    """In which of n equal ranges of the 64-bit numbers each key lies: int64."""
    return ((keys >> np.uint64(32)) * np.uint64(n) >> np.uint64(32)).astype(np.int64)


def write_ranges(path: Path, records: np.ndarray, ranges: np.ndarray, n: int) -> RangeFile:
    """Write records sorted by range, in their order within it.

    Args:
        path: the file.
        records: (m, ...) anything.
        ranges: (m,) int64, below n.
        n: ranges.
    """
    order = np.argsort(ranges, kind="stable")
    save(path, records[order])
    offsets = np.concatenate([[0], np.cumsum(np.bincount(ranges, minlength=n))])
    return RangeFile(str(path), tuple(offsets.tolist()))


def read_range(files: Sequence[RangeFile], number: int) -> np.ndarray:
    """One range of all files, one file's records after the other's.

    Raises:
        ArtifactError: a file is missing or not whole.
    """
    size = sum(file.offsets[number + 1] - file.offsets[number] for file in files)
    found, at = None, 0
    for file in files:  # copied one by one, so that only one is open at a time
        records = load(Path(file.path))
        if len(records) != file.offsets[-1]:
            raise ArtifactError(
                f"{file.path}: {len(records):,} records of {file.offsets[-1]:,}.", "Give the same command again."
            )
        part = records[file.offsets[number] : file.offsets[number + 1]]
        if found is None:
            found = np.empty((size, *records.shape[1:]), dtype=records.dtype)
        found[at : at + len(part)] = part
        at += len(part)
    assert found is not None, "a range of no file"
    return found


def is_new(keys: np.ndarray) -> np.ndarray:
    """(n,) bool: which of these sorted keys differ from the one before: (n,) or (n, width)."""
    differs = keys[1:] != keys[:-1]
    return np.concatenate([np.ones(min(1, len(keys)), dtype=bool), differs.any(axis=1) if keys.ndim > 1 else differs])


def first_places(keys: np.ndarray) -> np.ndarray:
    """(n,) int64: for each of these sorted keys the place of the first that is equal."""
    new = is_new(keys)
    return np.flatnonzero(new)[np.cumsum(new) - 1]


def check_count(step: str, n_in: int, files: Sequence[RangeFile]) -> None:
    """Records that went into a step must be those that came out of it."""
    n_out = sum(file.offsets[-1] for file in files)
    assert n_in == n_out, f"{step}: {n_in:,} records in, {n_out:,} out"


def save(path: Path, array: np.ndarray) -> Path:
    """Write a `.npy` file whole."""
    with atomic_writer(path, binary=True) as handle:
        np.save(handle, array)
    return path


def load(path: Path) -> np.ndarray:
    """Map a `.npy` file into memory.

    Raises:
        ArtifactError: it is missing or damaged.
    """
    try:
        return np.load(path, mmap_mode="r")
    except FileNotFoundError as error:
        raise ArtifactError(f"{path}: not found.", "Make it again with --from corpus.") from error
    except (ValueError, EOFError) as error:
        raise ArtifactError(f"{path}: damaged ({error}).", "Make it again with --from corpus.") from error
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error.strerror or error}).") from error


def _nothing(name: str) -> np.ndarray:
    return np.empty((0,), dtype=np.int64) if name == "lengths" else np.empty((0, 2), dtype=np.uint64)
