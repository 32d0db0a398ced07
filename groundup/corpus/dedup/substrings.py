"""Runs of many words that stand elsewhere too: copied passages, licences, boilerplate inside of other text.

In: the texts of the documents that stay. Out: for each unit what is to be cut. Every window of n words is hashed;
a window that occurs more than once stays where it stands first in the document with the smallest id and goes
elsewhere (in that document itself too, if it does not overlap the first). Windows that overlap are cut as one, so
a copied passage of any length goes whole.

The texts are read twice, so that little is kept of the many windows that occur once: first 8 bytes of each are
sorted, and the repeated ones are marked in a bit field of fixed size; then only windows that are marked are
compared, by 128 bits of two hashes.

Source: the exact substrings of Lee et al., Deduplicating Training Data Makes Language Models Better (2022),
section 4.1, over words instead of tokens and by hashing instead of a suffix array, so that it needs no memory in
the order of the corpus.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from groundup.corpus.dedup.cuts import (
    Cuts,
    Spill,
    TextReader,
    characters_of,
    cuts_of,
    stored_texts,
    texts_of,
    write_spans,
)
from groundup.corpus.dedup.files import (
    COPIES,
    KeyStore,
    RangeFile,
    UnitKeys,
    first_places,
    is_new,
    key_store,
    load,
    n_ranges,
    range_of,
    read_range,
    save,
)
from groundup.corpus.engine import Engine
from groundup.corpus.words import Words, run_hashes, words_of

_WINDOW = np.dtype(
    [
        ("hashes", "<u8", 2), ("id", "<u8", 2), ("number", "<i8"), ("word", "<i8"), ("begin", "<i8"), ("end", "<i8"),
    ]
)  # fmt: skip
_MARKS = "marks.npy"
_HASH_BYTES = 8
_BITS_A_HASH = 16
"""Bits in the field for each repeated hash: one window in so many is compared for nothing."""
_CHARACTERS_A_WORD = 4
_TIMES_REPEATED = 4
"""For the number of ranges: how often a repeated window may occur before a range takes more memory."""
_ANOTHER = np.uint64(0x9FB21C651E98DF25)


def repeated_substrings(
    units: Sequence[UnitKeys],
    kept: Sequence[np.ndarray],
    n_words: int,
    folder: Path,
    engine: Engine,
    memory_bytes: int,
    texts: TextReader = stored_texts,
) -> list[Cuts]:
    """Find the runs of `n_words` words and more that stand somewhere else too; all but one of each are to be cut.

    Args:
        units: the documents' keys, in an order that does not depend on how the input was cut.
        kept: (n,) bool for each unit: who takes part.
        n_words: length of the shortest run (words as in `words.py`); 50 is usual.
        folder: for files in between; it is emptied first and removed in the end.
        engine: who does the work. The result does not depend on it, on `memory_bytes` or on where units begin.
        memory_bytes: what a task may use.
        texts: reads the texts of a unit's folder.

    Returns:
        For every unit what to cut: from the first character of a run to the last.
    """
    with key_store(folder, units, kept) as store:
        ranges = n_ranges(characters_of(store) // _CHARACTERS_A_WORD, _HASH_BYTES, memory_bytes)
        split = partial(_split_hashes, store.folder, ranges, n_words, memory_bytes, texts)
        files = [file for found in engine.map(split, range(len(units))) for file in found]
        repeated = list(engine.map(partial(_repeated_hashes, store.folder, files), range(ranges)))
        n_repeated = sum(len(load(path)) for path in repeated)
        if not n_repeated:
            return [Cuts.none() for _ in units]
        _mark(store, repeated, n_repeated, memory_bytes)
        ranges = n_ranges(_TIMES_REPEATED * n_repeated, _WINDOW.itemsize, memory_bytes)
        split = partial(_split_windows, store.folder, ranges, n_words, memory_bytes, texts)
        files = [file for found in engine.map(split, range(len(units))) for file in found]
        spans = list(engine.map(partial(_equal_windows, store.folder, files, n_words), range(ranges)))
        return cuts_of(store, spans, engine)


def _split_hashes(
    folder: Path, n: int, n_words: int, memory_bytes: int, texts: TextReader, unit: int
) -> list[RangeFile]:
    spill = Spill(folder / f"hashes-{unit}", n, memory_bytes)
    for batch in texts_of(KeyStore(folder), unit, texts):
        words = words_of([text for _, text in batch])
        hashes = run_hashes(words.hashes, n_words)[_windows(words, n_words)[0]]
        spill.add(hashes, range_of(hashes, n))
    return spill.finish()


def _windows(words: Words, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The first word of every window, and the text it is in: two (n_windows,) int64."""
    counts = np.maximum(words.counts - (n - 1), 0)
    text = np.repeat(np.arange(words.n_texts), counts)
    before = np.concatenate([[0], np.cumsum(counts)[:-1]])
    return np.arange(len(text)) + (words.starts[:-1] - before)[text], text


def _repeated_hashes(folder: Path, files: Sequence[RangeFile], number: int) -> Path:
    hashes = np.sort(read_range(files, number)) if files else np.empty(0, dtype=np.uint64)
    return save(folder / f"twice-{number}.npy", np.unique(hashes[~is_new(hashes)]))


def _mark(store: KeyStore, repeated: Sequence[Path], n_repeated: int, memory_bytes: int) -> None:
    """Set a bit for each repeated hash, named by the hash's highest bits."""
    wanted = max(10, (_BITS_A_HASH * n_repeated - 1).bit_length())
    n_bits = min(wanted, max(10, (8 * memory_bytes // COPIES).bit_length() - 1))
    marks = np.zeros(1 << (n_bits - 3), dtype=np.uint8)
    for path in repeated:
        bits = load(path) >> np.uint64(64 - n_bits)
        np.bitwise_or.at(marks, bits >> np.uint64(3), np.uint8(1) << (bits & np.uint64(7)).astype(np.uint8))
    save(store.folder / _MARKS, marks)


def _split_windows(
    folder: Path, n: int, n_words: int, memory_bytes: int, texts: TextReader, unit: int
) -> list[RangeFile]:
    store = KeyStore(folder)
    spill = Spill(folder / f"windows-{unit}", n, memory_bytes)
    marks = load(store.folder / _MARKS)
    shift = np.uint64(64 - (len(marks).bit_length() - 1 + 3))
    for batch in texts_of(store, unit, texts):
        numbers = np.array([number for number, _ in batch], dtype=np.int64)
        words = words_of([text for _, text in batch])
        first, text = _windows(words, n_words)
        hashes = run_hashes(words.hashes, n_words)[first]
        bits = hashes >> shift
        is_marked = (marks[bits >> np.uint64(3)] >> (bits & np.uint64(7)).astype(np.uint8)) & 1 == 1
        first, text = first[is_marked], text[is_marked]
        if not len(first):
            continue
        records = np.empty(len(first), dtype=_WINDOW)
        records["hashes"][:, 0] = hashes[is_marked]
        records["hashes"][:, 1] = run_hashes((words.hashes ^ _ANOTHER) * _ANOTHER, n_words)[first]
        records["id"] = store.take("ids", numbers)[text]
        records["number"] = numbers[text]
        records["word"] = first - words.starts[text]
        records["begin"] = words.word_begin[first]
        records["end"] = words.word_end[first + n_words - 1]
        spill.add(records, range_of(records["hashes"][:, 0], n))
    return spill.finish()


def _equal_windows(folder: Path, files: Sequence[RangeFile], n_words: int, number: int) -> RangeFile:
    """The stretches of all windows that stand elsewhere, cut by unit."""
    records = read_range(files, number)
    hashes, ident = records["hashes"], records["id"]
    order = np.lexsort((records["word"], records["number"], ident[:, 1], ident[:, 0], hashes[:, 1], hashes[:, 0]))
    records = records[order]
    owner = records[first_places(records["hashes"])]
    # In its own document a window is cut where it comes again, but not where it overlaps itself.
    stays = (records["number"] == owner["number"]) & (records["word"] < owner["word"] + n_words)
    return write_spans(KeyStore(folder), f"repeated-{number}.npy", records[~stays])
