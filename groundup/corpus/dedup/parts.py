"""Paragraphs or lines that another document has already.

In: the texts of the documents that stay. Out: for each unit what is to be cut. A part is compared by the 128-bit
xxh3 digest of its text, runs of white space being one space. It stays where it stands first in the document with
the smallest id, and goes everywhere else, also where that document repeats it. Left alone is what has no letter or
digit (a code block's fence), and what is shorter than asked for (`MIN_CHARACTERS`): a paragraph of one word is a
heading, which says too little to be a copy; a line of one word stands in a menu.

Source: the paragraphs of Soldaini et al., Dolma (2024), section 4.1.4, exactly instead of by a Bloom filter; the
lines of Wenzek et al., CCNet (2020), section 3.1, which has no least length either.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import xxhash

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
    KeyStore,
    RangeFile,
    UnitKeys,
    is_new,
    key_store,
    n_ranges,
    range_of,
    read_range,
)
from groundup.corpus.engine import Engine

Within = Literal["paragraphs", "lines"]

MIN_CHARACTERS: dict[Within, int] = {"paragraphs": 20, "lines": 1}
"""What is compared unless a recipe says otherwise."""

_SEPARATORS = {"paragraphs": re.compile(r"\n(?:[^\S\n]*\n)+"), "lines": re.compile(r"\n+")}
_PART = np.dtype([("digest", "<u8", 2), ("id", "<u8", 2), ("number", "<i8"), ("begin", "<i8"), ("end", "<i8")])
_CHARACTERS_A_PART = 64
"""For the number of ranges: text that has more parts than one in so many characters takes some more memory."""


def repeated_parts(
    units: Sequence[UnitKeys],
    kept: Sequence[np.ndarray],
    within: Within,
    folder: Path,
    engine: Engine,
    memory_bytes: int,
    min_characters: int | None = None,
    texts: TextReader = stored_texts,
) -> list[Cuts]:
    """Find the paragraphs or lines that stand somewhere else too; all but one of each are to be cut.

    Args:
        units: the documents' keys, in an order that does not depend on how the input was cut.
        kept: (n,) bool for each unit: who takes part.
        within: "paragraphs" (between blank lines) or "lines".
        folder: for files in between; it is emptied first and removed in the end.
        engine: who does the work. The result does not depend on it, on `memory_bytes` or on where units begin.
        memory_bytes: what a task may use.
        min_characters: shorter ones are left alone (None: `MIN_CHARACTERS`).
        texts: reads the texts of a unit's folder.

    Returns:
        For every unit what to cut: a part with the white space behind it.
    """
    with key_store(folder, units, kept) as store:
        if not store.n:
            return [Cuts.none() for _ in units]
        ranges = n_ranges(characters_of(store) // _CHARACTERS_A_PART, _PART.itemsize, memory_bytes)
        least = MIN_CHARACTERS[within] if min_characters is None else min_characters
        split = partial(_split_parts, store.folder, ranges, within, least, memory_bytes, texts)
        files = [file for found in engine.map(split, range(len(units))) for file in found]
        if not files:
            return [Cuts.none() for _ in units]
        spans = list(engine.map(partial(_equal_parts, store.folder, files), range(ranges)))
        return cuts_of(store, spans, engine)


def part_spans(text: str, within: Within) -> Iterator[tuple[int, int, int]]:
    """Begin, end, and end of the white space behind it, of every paragraph or line."""
    begin = 0
    for separator in _SEPARATORS[within].finditer(text):
        yield begin, separator.start(), separator.end()
        begin = separator.end()
    yield begin, len(text), len(text)


def _split_parts(
    folder: Path, n: int, within: Within, min_characters: int, memory_bytes: int, texts: TextReader, unit: int
) -> list[RangeFile]:
    store = KeyStore(folder)
    spill = Spill(folder / f"parts-{unit}", n, memory_bytes)
    for batch in texts_of(store, unit, texts):
        digests: list[bytes] = []
        places: list[tuple[int, int, int]] = []
        for number, text in batch:
            for begin, end, behind in part_spans(text, within):
                part = " ".join(text[begin:end].split())
                if len(part) >= min_characters and any(map(str.isalnum, part)):
                    digests.append(xxhash.xxh3_128_digest(part.encode()))
                    places.append((number, begin, behind))
        if not places:
            continue
        records = np.empty(len(places), dtype=_PART)
        records["digest"] = np.frombuffer(b"".join(digests), dtype=">u8").reshape(-1, 2)
        records["number"], records["begin"], records["end"] = np.array(places, dtype=np.int64).T
        numbers, which = np.unique(records["number"], return_inverse=True)
        records["id"] = store.take("ids", numbers)[which]
        spill.add(records, range_of(records["digest"][:, 0], n))
    return spill.finish()


def _equal_parts(folder: Path, files: Sequence[RangeFile], number: int) -> RangeFile:
    """The stretches of all parts that stand elsewhere, cut by unit."""
    records = read_range(files, number)
    digest, ident = records["digest"], records["id"]
    order = np.lexsort((records["begin"], records["number"], ident[:, 1], ident[:, 0], digest[:, 1], digest[:, 0]))
    records = records[order]
    return write_spans(KeyStore(folder), f"repeated-{number}.npy", records[~is_new(records["digest"])])
