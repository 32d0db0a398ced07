"""CSV and TSV (RFC 4180) to values: a row a record, its cells as strings; quoted cells may hold line ends.

Between cells stand commas or (TSV) tabs; or, where the first line names the column that is asked for only so,
semicolons, tabs or bars.

A row that breaks the rules of quoting, or is longer than `max_document_mib`, is set aside, and reading goes on with the
next line.
"""

from __future__ import annotations

import codecs
import csv
from collections.abc import Generator
from typing import IO

from groundup.corpus.document import OnSetAside, Reason, SetAside
from groundup.corpus.reading.intake import limit_bytes, refuse_binary, unread
from groundup.corpus.reading.jsonl import Value, is_too_long, skip_line
from groundup.corpus.reading.refusal import READ_ERRORS, RefusedError
from groundup.corpus.reading.sources import InputFile
from groundup.recipe import CorpusSettings

PLACE = "row"
_DELIMITERS = ",;\t|"


def read_rows(source: InputFile, settings: CorpusSettings, set_aside: OnSetAside) -> Generator[Value, None, int]:
    """The rows of a file, the line with the names of its columns too; returns how many there are."""
    csv.field_size_limit(1 << 30)  # `_Lines` sets a narrower one for the whole row
    number = begins = 0
    try:
        with source.open() as handle:
            lines = _Lines(handle, limit_bytes(settings))
            if refuse_binary(source, lines.head, set_aside):
                return 0
            delimiter = _delimiter(source, lines.head, settings.text_field)
            rows = csv.reader(lines, delimiter=delimiter, strict=True)
            while True:
                begins = lines.begins = lines.position
                lines.row = ""
                try:
                    row = next(rows, None)
                except (csv.Error, RefusedError) as error:
                    number += 1
                    refused = error if isinstance(error, RefusedError) else RefusedError(Reason.INVALID_CSV, str(error))
                    size = lines.position - begins
                    set_aside(Value(None, begins, PLACE, number, size, lines.row).aside(source, refused))
                    rows = csv.reader(lines, delimiter=delimiter, strict=True)
                    continue
                if row is None:
                    break
                if any(row):
                    number += 1
                    yield Value(row, begins, PLACE, number, lines.position - begins, lines.row)
            if not number:
                set_aside(SetAside(source.label, "", 0, Reason.EMPTY, "no row in the file"))
    except READ_ERRORS as error:
        set_aside(unread(source, error, begins, PLACE, number))
    return number


def _delimiter(source: InputFile, head: bytes, field: str) -> str:
    """What stands between cells: what the ending says, unless only another gives the first line the column `field`."""
    usual = "\t" if source.ending == ".tsv" else ","
    header = head.removeprefix(codecs.BOM_UTF8).decode(errors="replace").splitlines()[:1]
    fitting = (one for one in (usual, *_DELIMITERS) if field in next(csv.reader(header, delimiter=one), []))
    return next(fitting, usual) if field else usual


class _Lines:
    """The lines of a file as a CSV reader takes them; bytes that are not UTF-8 stand for themselves.

    Attributes:
        position: of the next line.
        begins: where the row that is being read begins.
        row: its first line.
        head: the file's first line, until it has been handed out.
    """

    def __init__(self, handle: IO[bytes], limit: int) -> None:
        self._handle, self._limit, self.row = handle, limit, ""
        self.begins = self.position = 0
        self.head = handle.readline(limit + 1)

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line, self.head = self.head or self._handle.readline(self._limit + 1), b""
        if not line:
            raise StopIteration
        if not self.position:
            line = line.removeprefix(codecs.BOM_UTF8)
        self.position += len(line)
        if is_too_long(line, self._limit):
            self.position += skip_line(self._handle)
        text = line.decode("utf-8", errors="surrogateescape")
        self.row = self.row or text[:400]
        if self.position - self.begins > self._limit:
            raise RefusedError(Reason.TOO_LONG, f"a row of more than {self._limit:,} bytes: see max_document_mib")
        return text
