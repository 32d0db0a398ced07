"""Files to records: one way in for every format, the same text whatever the packing, in pieces that workers share.

Files are cut in `Unit`s, so that one of 100 GB keeps every worker busy: JSON lines and texts with separators in byte
ranges (a line belongs to the unit in which its first byte lies), tables in ranges of row groups. All else is read
whole: packed streams have no places to begin at. A `Unit` goes in, `Record`s come out, normalized; what cannot be read
is set aside with its reason and the reading goes on. Nothing longer than `max_document_mib` is ever held. A plain text
or a page is used whole or set aside whole; a line, a row, a record, or a text between two separators stands for itself.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from groundup.corpus.document import Document, OnSetAside, Reason, Record, SetAside, excerpt_of, text_id
from groundup.corpus.reading.compressed import BLOCK_BYTES
from groundup.corpus.reading.extract import Extractor
from groundup.corpus.reading.intake import limit_bytes, make_record, refuse_binary, too_long, unread
from groundup.corpus.reading.refusal import READ_ERRORS, RefusedError
from groundup.corpus.reading.sources import InputFile, InputFiles, find_sources
from groundup.corpus.reading.text import DOCUMENT, can_be_cut, read_text, separated_in_words
from groundup.corpus.reading.values import read_values, record_of
from groundup.recipe import CorpusSettings


def read(
    *inputs: str | Path, settings: CorpusSettings | None = None, on_set_aside: OnSetAside | None = None
) -> Iterator[Document]:
    """Read documents, normalized, in a stable order: files by name, records as they stand.

    Args:
        inputs: files, folders, globs, addresses or `groundup:` names; without any, those of `settings`.
        settings: which field, normalization form and size limit (default: those of `CorpusSettings`).
        on_set_aside: called with everything left out; without it, a warning at the end counts them.

    Returns:
        Documents whose ids are made of their texts: of two equal texts both have the same.

    Raises:
        DataError: an input that is not there, or a folder without a file that groundup reads.
    """
    settings = settings or CorpusSettings()
    sources = find_sources(inputs or settings.inputs, follow_links=settings.follow_links)
    if on_set_aside is None and sources.unknown:
        warnings.warn(sources.in_words(), stacklevel=2)
    return _documents(sources, settings, on_set_aside)


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


class UnitReader:
    """The records of a file or a part of one, to be iterated over once.

    Args:
        unit: what to read.
        settings: which fields, normalization form, size limit, extractor.
        set_aside: called with everything left out.
        extractor: shared by the readers of many units; without it, this one has its own.

    Attributes:
        n_records: lines of a JSONL unit (blank ones too), rows of a table, parts or records of other files: known
            when all is read. A record's number plus those of the units before it counts from the file's beginning.
        kinds: what an archive holds: records by their type, those without a text too.
    """

    def __init__(
        self, unit: Unit, settings: CorpusSettings, set_aside: OnSetAside, extractor: Extractor | None = None
    ) -> None:
        self._unit, self._settings, self._set_aside = unit, settings, set_aside
        self._extractor = extractor
        self.n_records = 0
        self.kinds: Counter[str] = Counter()

    def __iter__(self) -> Iterator[Record]:
        unit, source = self._unit, self._unit.source
        if source.kind == "text":
            self.n_records = yield from read_text(source, unit.start, unit.stop, self._settings, self._set_aside)
        elif source.kind in ("lines", "json", "separated", "table"):
            values = read_values(source, self._settings, self._set_aside, unit.start, unit.stop)
            try:
                while True:
                    yield from record_of(source, next(values), self._settings, self._set_aside)
            except StopIteration as end:
                self.n_records = end.value
        elif self._extractor is not None:
            yield from self._read_pages(self._extractor)
        else:
            with Extractor(self._settings.extractor, self._settings.extract_seconds) as extractor:
                yield from self._read_pages(extractor)

    def _read_pages(self, extractor: Extractor) -> Iterator[Record]:
        source = self._unit.source
        n_aside = 0

        def set_aside(record: SetAside) -> None:
            nonlocal n_aside
            n_aside += 1
            self._set_aside(record)

        if source.kind == "page":
            records: Iterator[Record] = _read_page(source, self._settings, set_aside, extractor)
        else:
            from groundup.corpus.reading.warc import read_warc  # loads FastWARC

            records = read_warc(source, self._settings, set_aside, extractor.extract, self.kinds)
        for record in records:
            self.n_records += 1
            yield record
        if not self.n_records and not n_aside:  # every file ends in records or a reason
            held = ", ".join(f"{count} {kind}" for kind, count in sorted(self.kinds.items()))
            detail = f"no page in the file, only records of other types ({held})"
            self._set_aside(SetAside(source.label, "", 0, Reason.EMPTY, detail, "", source.size_bytes()))


def _documents(sources: InputFiles, settings: CorpusSettings, on_set_aside: OnSetAside | None) -> Iterator[Document]:
    counts, first, n_separated = Counter[str](), list[SetAside](), 0

    def note(record: SetAside) -> None:
        counts[record.reason] += 1
        first.extend([] if first else [record])

    set_aside = on_set_aside or note
    for item in sources.aside:
        set_aside(item)
    with Extractor(settings.extractor, settings.extract_seconds) as extractor:
        for file in sources.files:
            for record in UnitReader(Unit(file), settings, set_aside, extractor):
                n_separated += record.place == DOCUMENT
                yield Document(text_id(record.text), record.text, record.source or file.label, url=record.url)
    if n_separated:
        warnings.warn(separated_in_words(n_separated, settings.separator), stacklevel=2)
    if first:
        listed = ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()))
        warnings.warn(f"set aside while reading: {listed}; the first: {first[0]}", stacklevel=2)


def _read_page(
    source: InputFile, settings: CorpusSettings, set_aside: OnSetAside, extractor: Extractor
) -> Iterator[Record]:
    limit = limit_bytes(settings)
    try:
        with source.open() as handle:
            html = handle.read(limit + 1)
            size = len(html) + sum(map(len, iter(lambda: handle.read(BLOCK_BYTES), b"")))
    except READ_ERRORS as error:
        set_aside(unread(source, error))
        return
    if refuse_binary(source, html, set_aside):
        return
    if size > limit:
        set_aside(too_long(source, "", size, excerpt_of(html), settings))
        return
    try:
        text = extractor.extract(html) if html.strip() else ""
    except RefusedError as refused:
        set_aside(refused.of(source.label, "", 0, excerpt_of(html), size))
        return
    yield from make_record(source, text, settings, set_aside)
