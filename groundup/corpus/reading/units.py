"""Pieces of the input that workers read on their own: whole files, and ranges of the large ones.

In: `InputFiles`. Out: `Unit`s in the order of the files. JSON lines are cut in byte ranges (a line belongs to the unit
in which its first byte lies), and so are texts at their separators; tables in ranges of row groups, so that one file of
100 GB keeps every worker busy. All else is read whole: compressed streams have no places to begin at, and archives none
that a reader could be sure of.
"""

from __future__ import annotations

from dataclasses import dataclass

from groundup.corpus.reading.sources import InputFile, InputFiles
from groundup.corpus.reading.text import can_be_cut


@dataclass(frozen=True)
class Unit:
    """A file or a part of it.

    Attributes:
        source: the file.
        start: first byte (JSON lines, texts) or row group (tables); 0 otherwise.
        stop: the one after the last, or None: to the end of the file.
    """

    source: InputFile
    start: int = 0
    stop: int | None = None


def units_of(sources: InputFiles, split_bytes: int, separator: str = "") -> list[Unit]:
    """Cut the files into pieces of about `split_bytes`, text files where `separator` may be told apart.

    The borders depend on the file and `split_bytes` alone, and a file that has grown keeps those it had.
    """
    cut = {"lines", "text"} if can_be_cut(separator) else {"lines"}
    return [unit for source in sources.files for unit in _split(source, max(1, split_bytes), cut)]


def _split(source: InputFile, split_bytes: int, cut: set[str]) -> list[Unit]:
    size = source.size_bytes()
    borders = [0]
    if size > split_bytes and source.can_seek:
        if source.kind in cut:
            borders = list(range(0, size, split_bytes))
        elif source.kind == "table":
            from groundup.corpus.reading.tables import row_group_borders  # loads pyarrow

            borders = row_group_borders(source, split_bytes)
    # The last unit is open at its end: a file that grows meanwhile is read whole, or not at all.
    return [Unit(source, start, stop) for start, stop in zip(borders, [*borders[1:], None], strict=True)]
