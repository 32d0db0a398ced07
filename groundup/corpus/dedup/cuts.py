"""Cutting repeated text out of documents that stay: what the searches for it hand back, and what they share.

In: from a search, (document, begin, end) records in files. Out: `Cuts` for every unit, stretches of characters in
the texts as they were searched, so that several searches can be applied at once: `cut_spans` takes their union.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from groundup.corpus.dedup.files import COPIES, KeyStore, RangeFile, read_range, save, write_ranges
from groundup.corpus.engine import Engine

TextReader = Callable[[Path], Iterator[str]]
"""All texts of a unit's folder, in the order of its rows. A module-level function, so that workers can be sent it."""

SPAN = np.dtype([("number", "<i8"), ("begin", "<i8"), ("end", "<i8")])
BATCH_CHARACTERS = 1 << 20


@dataclass(frozen=True)
class Cuts:
    """What is to be cut out of one unit's texts.

    Attributes:
        rows: (m,) int64, rising: a document for each stretch.
        begins: (m,) int64: its first character.
        ends: (m,) int64: behind its last character. Stretches of a row are in order and do not touch.
    """

    rows: np.ndarray
    begins: np.ndarray
    ends: np.ndarray

    @classmethod
    def none(cls) -> Cuts:
        """Nothing to cut."""
        nothing = np.empty(0, dtype=np.int64)
        return cls(nothing, nothing, nothing)

    def by_row(self) -> dict[int, list[tuple[int, int]]]:
        """The stretches of each row that has any."""
        found: dict[int, list[tuple[int, int]]] = {}
        for row, begin, end in zip(self.rows.tolist(), self.begins.tolist(), self.ends.tolist(), strict=True):
            found.setdefault(row, []).append((begin, end))
        return found


def cut_spans(text: str, spans: Sequence[tuple[int, int]]) -> str:
    """The text without these stretches of characters, which may overlap.

    Spaces that would stand double are cut too, and so is white space left over at the end.
    """
    kept, place = [], 0
    for begin, end in _united(spans):
        kept.append(text[place:begin])
        if (begin == 0 or text[begin - 1].isspace()) and not text[end - 1].isspace():
            while end < len(text) and text[end] in " \t":
                end += 1
        place = end
    kept.append(text[place:])
    rest = "".join(kept)
    return rest.rstrip() if kept[1:] and place >= len(text) else rest


def _united(spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for begin, end in sorted(spans):
        if found and begin <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        elif end > begin:
            found.append((begin, end))
    return found


def stored_texts(folder: Path) -> Iterator[str]:
    """The texts of an annotated unit: the column `text` of `documents.parquet`."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(folder / "documents.parquet") as table:
        for batch in table.iter_batches(batch_size=256, columns=["text"]):
            yield from batch.column(0).to_pylist()


def texts_of(store: KeyStore, unit: int, reader: TextReader) -> Iterator[list[tuple[int, str]]]:
    """The texts of a unit that take part, with their numbers, in batches of about a million characters."""
    begin, end = store.offsets[unit : unit + 2].tolist()
    kept = store.kept[begin:end]
    if not kept.any():
        return
    batch: list[tuple[int, str]] = []
    size = 0
    for row, text in enumerate(reader(store.folders[unit])):
        if not kept[row]:
            continue
        batch.append((begin + row, text))
        size += len(text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


@dataclass
class Spill:
    """Records of one task, written to another file whenever they fill their share of the memory.

    Attributes:
        path: how the files' names begin.
        n_ranges: key ranges.
        memory_bytes: what the task may use.
    """

    path: Path
    n_ranges: int
    memory_bytes: int
    files: list[RangeFile] = field(default_factory=list)
    _records: list[np.ndarray] = field(default_factory=list)
    _ranges: list[np.ndarray] = field(default_factory=list)
    _bytes: int = 0

    def add(self, records: np.ndarray, ranges: np.ndarray) -> None:
        """Keep records, and the range of each."""
        self._records.append(records)
        self._ranges.append(ranges)
        self._bytes += records.nbytes
        if self._bytes > self.memory_bytes // COPIES:
            self._write()

    def finish(self) -> list[RangeFile]:
        """Write what is left."""
        if self._bytes:
            self._write()
        return self.files

    def _write(self) -> None:
        path = self.path.with_name(f"{self.path.name}-{len(self.files)}.npy")
        records, ranges = np.concatenate(self._records), np.concatenate(self._ranges)
        self.files.append(write_ranges(path, records, ranges, self.n_ranges))
        self._records, self._ranges, self._bytes = [], [], 0


def cuts_of(store: KeyStore, files: Sequence[RangeFile], engine: Engine) -> list[Cuts]:
    """Unite the stretches of every document, and sort them by unit.

    Args:
        store: the call's store.
        files: `SPAN` records, cut by unit.
        engine: who does the work.
    """
    units = range(len(store.folders) if files else 0)
    merged = [np.load(path) for path in engine.map(partial(_merge_spans, store.folder, files), units)]
    merged = merged or [np.empty(0, dtype=SPAN)] * len(store.folders)
    return [
        Cuts(spans["number"] - first, spans["begin"].copy(), spans["end"].copy())
        for first, spans in zip(store.offsets[:-1], merged, strict=True)
    ]


def write_spans(store: KeyStore, file_name: str, records: np.ndarray) -> RangeFile:
    """Write number, begin and end of records, cut by unit."""
    spans = np.empty(len(records), dtype=SPAN)
    for name in ("number", "begin", "end"):
        spans[name] = records[name]
    units = np.searchsorted(store.offsets, spans["number"], side="right") - 1
    return write_ranges(store.folder / file_name, spans, units, len(store.folders))


def characters_of(store: KeyStore) -> int:
    """Characters of all documents that take part."""
    return sum(
        int(store.take("lengths", np.flatnonzero(store.kept[begin:end]) + begin).sum())
        for begin, end in zip(store.offsets[:-1].tolist(), store.offsets[1:].tolist(), strict=True)
    )


def _merge_spans(folder: Path, files: Sequence[RangeFile], number: int) -> Path:
    spans = read_range(files, number)
    return save(folder / f"cuts-{number}.npy", union(spans[np.lexsort((spans["begin"], spans["number"]))]))


def union(spans: np.ndarray) -> np.ndarray:
    """Unite stretches of the same document that overlap or touch; they come, and go, sorted."""
    if not len(spans):
        return spans
    # Shifted apart by document, all stretches lie on one line, where the furthest end so far says what is new.
    step = int(spans["end"].max()) + 1
    document = np.cumsum(np.concatenate([[0], spans["number"][1:] != spans["number"][:-1]])) * step
    furthest = np.maximum.accumulate(document + spans["end"])
    is_first = np.ones(len(spans), dtype=bool)
    is_first[1:] = (document + spans["begin"])[1:] > furthest[:-1]
    firsts = np.flatnonzero(is_first)
    united = spans[firsts].copy()
    lasts = np.append(firsts[1:], len(spans)) - 1
    united["end"] = (furthest - document)[lasts]
    return united
