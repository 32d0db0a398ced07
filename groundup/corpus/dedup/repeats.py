"""What stands elsewhere too: equal texts, and equal paragraphs, lines and runs of words inside of other texts.

In: the units' keys, their texts, and who takes part. Out: which documents go (`exact_duplicates`), or what is to be
cut out of those that stay (`repeated_parts`, `repeated_substrings`). All three are one search over records of (128-bit
key, id, document, stretch of characters): of equal keys the one stays that stands first in the document with the
smallest id (of equal ids, in the first document), and all others go, in that document itself too.

Texts and parts are compared by their xxh3 digest, a run of words by two 64-bit hashes. Among n different ones two are
equal with probability about n²/2¹²⁹: never, in practice.

Sources: the paragraphs of Soldaini et al., Dolma (2024), section 4.1.4, exactly instead of by a Bloom filter; the
lines of Wenzek et al., CCNet (2020), section 3.1; the exact substrings of Lee et al., Deduplicating Training Data Makes
Language Models Better (2022), section 4.1, over words instead of tokens and by hashing instead of a suffix array, so
that it needs no memory in the order of the corpus.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import xxhash

from groundup.batches import batches
from groundup.corpus.dedup.files import (
    COPIES,
    KeyStore,
    RangeFile,
    Removed,
    UnitKeys,
    first_places,
    is_new,
    key_store,
    load,
    n_ranges,
    range_of,
    read_range,
    save,
    write_ranges,
)  # fmt: skip
from groundup.corpus.engine import Engine
from groundup.corpus.words import Words, has_bits, run_hashes, set_bits, words_of

Within = Literal["paragraphs", "lines"]

MIN_CHARACTERS: dict[Within, int] = {"paragraphs": 20, "lines": 1}
"""Shorter parts are left alone unless a recipe says otherwise: a paragraph of one word is a heading, which says too
little to be a copy; a line of one word stands in a menu."""

SPAN = np.dtype([("document", "<i8"), ("begin", "<i8"), ("end", "<i8")])
"""A stretch of characters that is to be cut; handed back, `document` is the row in its unit."""

_RECORD = np.dtype([("key", "<u8", 2), ("id", "<u8", 2), *((name, SPAN[name]) for name in SPAN.names or ())])
_SEPARATORS = {"paragraphs": re.compile(r"\n(?:[^\S\n]*\n)+"), "lines": re.compile(r"\n+")}
_BATCH_CHARACTERS = 1 << 20
_CHARACTERS_A_PART, _CHARACTERS_A_WORD, _TIMES_REPEATED = 64, 4, 4
"""For the number of ranges: where there are more parts or words, or more often repeated ones, they take more memory."""
_MARKS = "marks.npy"
_BITS_A_HASH = 16
"""Bits in the field for each repeated hash: one window in so many is compared for nothing."""
_ANOTHER = np.uint64(0x9FB21C651E98DF25)


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
        slices = store.slices(_RECORD.itemsize, memory_bytes, engine.n_workers)
        ranges = n_ranges(int(store.kept.sum()), _RECORD.itemsize, memory_bytes) if slices else 0
        files = list(engine.map(partial(_split_documents, folder, ranges), slices))
        return store.removed(list(map(load, engine.map(partial(_equal_documents, folder, files), range(ranges)))))


def repeated_parts(
    units: Sequence[UnitKeys],
    kept: Sequence[np.ndarray],
    within: Within,
    folder: Path,
    engine: Engine,
    memory_bytes: int,
    min_characters: int | None = None,
) -> list[np.ndarray]:
    """Find the paragraphs or lines that stand somewhere else too; all but one of each are to be cut.

    Runs of white space count as one space. What has no letter or digit (a code block's fence) is left alone.

    Paragraphs stand between blank lines. Parts of fewer than `min_characters` (None: `MIN_CHARACTERS`) are left alone;
    all else as in `exact_duplicates`.

    Returns:
        For every unit what to cut, `SPAN` records that are sorted and do not touch: a part with the white space
        behind it.
    """
    with key_store(folder, units, kept) as store:
        ranges = n_ranges(_characters(store) // _CHARACTERS_A_PART, _RECORD.itemsize, memory_bytes)
        least = MIN_CHARACTERS[within] if min_characters is None else min_characters
        files = _each_unit(engine, partial(_split_parts, folder, ranges, within, least, memory_bytes), store)
        return _cuts(store, files, ranges, engine)


def repeated_substrings(
    units: Sequence[UnitKeys], kept: Sequence[np.ndarray], n_words: int, folder: Path, engine: Engine, memory_bytes: int
) -> list[np.ndarray]:
    """Find the runs of `n_words` words and more that stand somewhere else too; all but one of each are to be cut.

    Every window of n words is hashed. Windows that overlap are cut as one, so a copied passage of any length goes
    whole; a window that overlaps its own first occurrence stays. The texts are read twice, so that little is kept of
    the many windows that occur once: first 8 bytes of each are sorted, and the repeated ones are marked in a bit field
    of fixed size; then only windows that are marked are compared.

    Returns:
        For every unit what to cut, as for `repeated_parts`: from the first character of a run to the last.
    """
    with key_store(folder, units, kept) as store:
        ranges = n_ranges(_characters(store) // _CHARACTERS_A_WORD, np.dtype(np.uint64).itemsize, memory_bytes)
        files = _each_unit(engine, partial(_split_hashes, folder, ranges, n_words, memory_bytes), store)
        repeated = list(engine.map(partial(_repeated_hashes, folder, files), range(ranges if files else 0)))
        n_repeated = sum(len(load(path)) for path in repeated)
        n_bits = (_BITS_A_HASH * n_repeated - 1).bit_length() if n_repeated else 0
        most_bits = (8 * memory_bytes // COPIES).bit_length() - 1
        marks = np.zeros(1 << (max(10, min(n_bits, most_bits)) - 3), dtype=np.uint8)
        for path in repeated:
            set_bits(marks, load(path))
        save(folder / _MARKS, marks)
        ranges = n_ranges(_TIMES_REPEATED * n_repeated, _RECORD.itemsize, memory_bytes)
        files = _each_unit(engine, partial(_split_windows, folder, ranges, n_words, memory_bytes), store)
        return _cuts(store, files, ranges, engine)


def cut_spans(text: str, spans: Sequence[tuple[int, int]]) -> str:
    """The text without these stretches of characters, which may overlap.

    Spaces that would stand double are cut too, and so is white space left over at the end.
    """
    united: list[tuple[int, int]] = []
    for begin, end in sorted(spans):
        if united and begin <= united[-1][1]:
            united[-1] = (united[-1][0], max(united[-1][1], end))
        elif end > begin:
            united.append((begin, end))
    kept, place = [], 0
    for begin, end in united:
        kept.append(text[place:begin])
        if (begin == 0 or text[begin - 1].isspace()) and not text[end - 1].isspace():
            while end < len(text) and text[end] in " \t":
                end += 1
        place = end
    kept.append(text[place:])
    rest = "".join(kept)
    return rest.rstrip() if kept[1:] and place >= len(text) else rest


def part_spans(text: str, within: Within) -> Iterator[tuple[int, int, int]]:
    """Begin, end, and end of the white space behind it, of every paragraph or line."""
    begin = 0
    for separator in _SEPARATORS[within].finditer(text):
        yield begin, separator.start(), separator.end()
        begin = separator.end()
    yield begin, len(text), len(text)


def _characters(store: KeyStore) -> int:
    """Characters of all documents that take part."""
    wholes = itertools.pairwise(store.offsets.tolist())
    numbers = (store.numbers(begin, end) for begin, end in wholes)
    return sum(int(store.take("lengths", some).sum()) for some in numbers if len(some))


def _split_documents(folder: Path, n: int, piece: tuple[int, int]) -> RangeFile:
    store = KeyStore(folder)
    records = _records(store, store.numbers(*piece))
    records["key"], records["begin"], records["end"] = store.take("digests", records["document"]), 0, 1
    return write_ranges(folder / f"digests-{piece[0]}.npy", records, range_of(records["key"][:, 0], n), n)


def _split_parts(
    folder: Path, n: int, within: Within, min_characters: int, memory_bytes: int, unit: int
) -> list[RangeFile]:
    store = KeyStore(folder)
    spill = _Spill(folder / f"parts-{unit}", n, memory_bytes)
    for numbers, texts in _texts(store, unit):
        digests: list[bytes] = []
        places: list[tuple[int, int, int]] = []
        for number, text in zip(numbers.tolist(), texts, strict=True):
            for begin, end, behind in part_spans(text, within):
                part = " ".join(text[begin:end].split())
                if len(part) >= min_characters and any(map(str.isalnum, part)):
                    digests.append(xxhash.xxh3_128_digest(part.encode()))
                    places.append((number, begin, behind))
        if places:
            documents, begins, ends = np.array(places, dtype=np.int64).T
            records = _records(store, documents)
            records["key"] = np.frombuffer(b"".join(digests), dtype=">u8").reshape(-1, 2)
            records["begin"], records["end"] = begins, ends
            spill.add(records, range_of(records["key"][:, 0], n))
    return spill.finish()


def _split_hashes(folder: Path, n: int, n_words: int, memory_bytes: int, unit: int) -> list[RangeFile]:
    spill = _Spill(folder / f"hashes-{unit}", n, memory_bytes)
    for _, texts in _texts(KeyStore(folder), unit):
        words = words_of(texts)
        hashes = run_hashes(words.hashes, n_words)[_windows(words, n_words)[0]]
        spill.add(hashes, range_of(hashes, n))
    return spill.finish()


def _repeated_hashes(folder: Path, files: Sequence[RangeFile], number: int) -> Path:
    hashes = np.sort(read_range(files, number))
    return save(folder / f"twice-{number}.npy", np.unique(hashes[~is_new(hashes)]))


def _split_windows(folder: Path, n: int, n_words: int, memory_bytes: int, unit: int) -> list[RangeFile]:
    store = KeyStore(folder)
    spill = _Spill(folder / f"windows-{unit}", n, memory_bytes)
    marks = load(folder / _MARKS)
    for numbers, texts in _texts(store, unit):
        words = words_of(texts)
        first, text = _windows(words, n_words)
        hashes = run_hashes(words.hashes, n_words)[first]
        is_marked = has_bits(marks, hashes)
        first, text = first[is_marked], text[is_marked]
        if len(first):
            records = _records(store, numbers[text])
            records["key"][:, 0] = hashes[is_marked]
            records["key"][:, 1] = run_hashes((words.hashes ^ _ANOTHER) * _ANOTHER, n_words)[first]
            records["begin"], records["end"] = words.word_begin[first], words.word_end[first + n_words - 1]
            spill.add(records, range_of(records["key"][:, 0], n))
    return spill.finish()


def _windows(words: Words, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The first word of every window, and the text it is in: two (n_windows,) int64."""
    counts = np.maximum(words.counts - (n - 1), 0)
    text = np.repeat(np.arange(words.n_texts), counts)
    before = np.concatenate([[0], np.cumsum(counts)[:-1]])
    return np.arange(len(text)) + (words.starts[:-1] - before)[text], text


def _records(store: KeyStore, documents: np.ndarray) -> np.ndarray:
    """Records of these documents (rising numbers), with their ids."""
    records = np.empty(len(documents), dtype=_RECORD)
    first = is_new(documents)
    records["document"], records["id"] = documents, store.take("ids", documents[first])[np.cumsum(first) - 1]
    return records


def _texts(store: KeyStore, unit: int) -> Iterator[tuple[np.ndarray, list[str]]]:
    """The texts of a unit that take part, with their numbers, in batches of about a million characters."""
    import pyarrow.parquet as pq

    begin, end = store.offsets[unit : unit + 2].tolist()
    numbers, done = store.numbers(begin, end), 0
    with pq.ParquetFile(store.folders[unit] / "documents.parquet") as table:
        rows = table.iter_batches(batch_size=256, columns=["text"])
        texts = (text for some in rows for text in some.column(0).to_pylist())
        for batch in batches(itertools.compress(texts, store.kept[begin:end]), _BATCH_CHARACTERS):
            yield numbers[done : done + len(batch)], batch
            done += len(batch)


class _Spill:
    """Records of one task, written to another file whenever they fill their share of the memory."""

    def __init__(self, path: Path, n_ranges: int, memory_bytes: int) -> None:
        self._path, self._n_ranges, self._most_bytes = path, n_ranges, memory_bytes // COPIES
        self._files: list[RangeFile] = []
        self._waiting: list[tuple[np.ndarray, np.ndarray]] = []
        self._bytes = 0

    def add(self, records: np.ndarray, ranges: np.ndarray) -> None:
        self._waiting.append((records, ranges))
        self._bytes += records.nbytes
        if self._bytes > self._most_bytes:
            self.finish()

    def finish(self) -> list[RangeFile]:
        """Write what is left."""
        if self._bytes:
            path = self._path.with_name(f"{self._path.name}-{len(self._files)}.npy")
            records, ranges = map(np.concatenate, zip(*self._waiting, strict=True))
            self._files.append(write_ranges(path, records, ranges, self._n_ranges))
            self._waiting, self._bytes = [], 0
        return self._files


def _each_unit(engine: Engine, split: partial[list[RangeFile]], store: KeyStore) -> list[RangeFile]:
    units = [unit for unit, (begin, end) in enumerate(itertools.pairwise(store.offsets)) if store.kept[begin:end].any()]
    return [file for found in engine.map(split, units) for file in found]


def _elsewhere(files: Sequence[RangeFile], number: int) -> tuple[np.ndarray, np.ndarray]:
    """The records of a range that go, and for each the one that stays."""
    records = read_range(files, number)
    key, ident = records["key"], records["id"]
    # Records come in the order of documents and places, and the sort is stable; its last key sorts first.
    order = np.lexsort((ident[:, 1], ident[:, 0], key[:, 1], key[:, 0]))
    key = key[order]
    again = ~is_new(key)
    found, owner = records[order[again]], records[order[first_places(key)[again]]]
    # In its own document a run of words goes where it comes again, but not where it overlaps itself.
    goes = (found["document"] != owner["document"]) | (found["begin"] >= owner["end"])
    return found[goes], owner[goes]


def _equal_documents(folder: Path, files: Sequence[RangeFile], number: int) -> Path:
    """(m, 2) int64 in a file: the document removed, the one kept."""
    records, owner = _elsewhere(files, number)
    return save(folder / f"equal-{number}.npy", np.stack([records["document"], owner["document"]], axis=1))


def _cuts(store: KeyStore, files: Sequence[RangeFile], ranges: int, engine: Engine) -> list[np.ndarray]:
    """For every unit the union of the stretches that stand elsewhere."""
    if not files:
        return [np.empty(0, dtype=SPAN) for _ in store.folders]
    found = list(engine.map(partial(_repeated_spans, store.folder, files), range(ranges)))
    united = engine.map(partial(_united_spans, store.folder, found), range(len(store.folders)))
    cuts = [np.array(load(path)) for path in united]  # copied one by one: there may be more units than open files
    for first, spans in zip(store.offsets[:-1], cuts, strict=True):
        spans["document"] -= first
    return cuts


def _repeated_spans(folder: Path, files: Sequence[RangeFile], number: int) -> RangeFile:
    """The stretches of a range that go, cut by unit."""
    offsets = KeyStore(folder).offsets
    spans = _elsewhere(files, number)[0][list(SPAN.names or ())].astype(SPAN)
    units = np.searchsorted(offsets, spans["document"], side="right") - 1
    return write_ranges(folder / f"repeated-{number}.npy", spans, units, len(offsets) - 1)


def _united_spans(folder: Path, files: Sequence[RangeFile], unit: int) -> Path:
    spans = read_range(files, unit)
    return save(folder / f"cuts-{unit}.npy", union(spans[np.lexsort((spans["begin"], spans["document"]))]))


def union(spans: np.ndarray) -> np.ndarray:
    """Unite stretches of the same document that overlap or touch; they come, and go, sorted."""
    if not len(spans):
        return spans
    # Shifted apart by document, all stretches lie on one line, where the furthest end so far says what is new.
    document = np.cumsum(is_new(spans["document"])) * (int(spans["end"].max()) + 1)
    furthest = np.maximum.accumulate(document + spans["end"])
    is_first = np.append(True, (document + spans["begin"])[1:] > furthest[:-1])
    united = spans[is_first].copy()
    lasts = np.append(np.flatnonzero(is_first)[1:], len(spans)) - 1
    united["end"] = (furthest - document)[lasts]
    return united
