"""Files to documents: .txt and .md whole (split at paragraphs when very long), .jsonl a record a line.

What cannot be read is set aside with its reason and the reading goes on. Memory is bounded by
`max_document_mib`: no line, paragraph or file longer than that is ever held. A plain text file is used whole
or set aside whole; in a JSONL file every line stands for itself.
"""

from __future__ import annotations

import codecs
import gzip
import json
import unicodedata
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import orjson

from groundup.corpus.document import Document, OnSetAside, Reason, SetAside, document_id, excerpt_of
from groundup.corpus.parts import TooLong, is_too_long, skip_line, split_long
from groundup.corpus.sources import BLOCK_BYTES, Source, Sources, find_sources
from groundup.recipe import CorpusSettings

READ_ERRORS = (OSError, EOFError, zlib.error)


def read(
    *inputs: str | Path, settings: CorpusSettings | None = None, on_set_aside: OnSetAside | None = None
) -> Iterator[Document]:
    """Read documents, normalized, in a stable order: inputs as given, files by name, records as they stand.

    Args:
        inputs: files, folders, globs or `groundup:` names; without any, those of `settings`.
        settings: which field, normalization form and size limit (default: those of `CorpusSettings`).
        on_set_aside: called with everything left out; without it, a warning at the end counts them.

    Raises:
        DataError: an input that is not there, or holds no file that groundup reads.
    """
    settings = settings or CorpusSettings()
    sources = find_sources(inputs or settings.inputs)
    if on_set_aside is not None:
        return (document for document, _ in read_sources(sources, settings, on_set_aside))
    return _read_and_warn(sources, settings)


def read_sources(sources: Sources, settings: CorpusSettings, set_aside: OnSetAside) -> Iterator[tuple[Document, str]]:
    """Read from files found before, as `read`; each document with its place in its file, such as "line 12"."""
    for name, why in sources.unreadable:
        set_aside(SetAside(name, "", Reason.UNREADABLE, f"the folder cannot be listed ({why})"))
    for source in sources.files:
        records = _read_jsonl if source.is_jsonl else _read_plain
        yield from records(source, settings, set_aside)


def normalize(text: str, form: Literal["NFC", "NFKC", "none"]) -> str:
    """One form for every text: `\\n` line ends, Unicode form ("NFC", "NFKC", "none"), no blank ends."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if form != "none":
        text = unicodedata.normalize(form, text)
    return text.strip("\n").rstrip()


def _read_and_warn(sources: Sources, settings: CorpusSettings) -> Iterator[Document]:
    counts: Counter[str] = Counter()
    first: list[SetAside] = []

    def note(record: SetAside) -> None:
        counts[record.reason] += 1
        if not first:
            first.append(record)

    for document, _ in read_sources(sources, settings, note):
        yield document
    if first:
        listed = ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()))
        warnings.warn(f"set aside while reading: {listed}; the first: {first[0]}", stacklevel=2)


def _read_plain(source: Source, settings: CorpusSettings, set_aside: OnSetAside) -> Iterator[tuple[Document, str]]:
    limit = int(settings.max_document_mib * 2**20)
    try:
        with source.open() as handle:
            data = handle.read(limit + 1)
        if len(data) <= limit:
            yield from _document(source, "", data.decode(), settings, set_aside)
            return
        del data
        _check_whole(source)
        with source.open() as handle:
            for number, part in enumerate(split_long(handle, limit), start=1):
                record = f"part {number}"
                if isinstance(part, TooLong):
                    detail = f"a line of {part.size_bytes:,} bytes; the limit is {settings.max_document_mib:g} MiB"
                    set_aside(SetAside(source.label, record, Reason.TOO_LONG, detail, part.excerpt, part.size_bytes))
                else:
                    yield from _document(source, record, part.decode(), settings, set_aside)
    except (*READ_ERRORS, UnicodeDecodeError) as error:
        set_aside(_damaged(source, "", error))


def _check_whole(source: Source) -> None:
    """Read a long file through once, to learn that it is whole and UTF-8 before any of it is used.

    Raises:
        UnicodeDecodeError: with `start` counted from the file's beginning.
        OSError, EOFError, zlib.error: it cannot be read to its end.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    n_read = 0
    with source.open() as handle:
        while True:
            block = handle.read(BLOCK_BYTES)
            begins = n_read - len(decoder.getstate()[0])
            try:
                decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                start = begins + error.start
                raise UnicodeDecodeError("utf-8", b"", start, start + 1, error.reason) from error
            if not block:
                return
            n_read += len(block)


def _read_jsonl(source: Source, settings: CorpusSettings, set_aside: OnSetAside) -> Iterator[tuple[Document, str]]:
    limit = int(settings.max_document_mib * 2**20)
    number = n_records = 0
    try:
        with source.open() as handle:
            while line := handle.readline(limit + 1):
                number += 1
                record = f"line {number}"
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
                if is_too_long(line, limit):
                    n_records += 1
                    size = len(line) + skip_line(handle)
                    detail = f"{size:,} bytes; the limit is {settings.max_document_mib:g} MiB"
                    set_aside(SetAside(source.label, record, Reason.TOO_LONG, detail, excerpt_of(line), size))
                elif line.strip():
                    n_records += 1
                    try:
                        text = _text_of(line, settings.text_field)
                    except _RefusedRecord as refused:
                        excerpt = excerpt_of(line)
                        set_aside(SetAside(source.label, record, refused.reason, refused.detail, excerpt, len(line)))
                    else:
                        yield from _document(source, record, text, settings, set_aside)
        if not n_records:
            set_aside(SetAside(source.label, "", Reason.EMPTY, "no record in the file"))
    except READ_ERRORS as error:
        set_aside(_damaged(source, f"after line {number}" if number else "", error))


class _RefusedRecord(Exception):
    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


def _text_of(line: bytes, field: str) -> str:
    """The text of one JSONL record; raises `_RefusedRecord`."""
    record = _parse(line)
    if not isinstance(record, dict):
        raise _RefusedRecord(Reason.INVALID_JSON, f"not an object but {_json_type(record)}")
    if field not in record:
        raise _RefusedRecord(Reason.NO_TEXT, f"no field {field!r}, only {_listed(record)}")
    text = record[field]
    if not isinstance(text, str):
        raise _RefusedRecord(Reason.NO_TEXT, f"field {field!r} is {_json_type(text)}, not a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        escape = f"\\u{ord(text[error.start]):04x}"
        raise _RefusedRecord(
            Reason.INVALID_UTF8, f"character {error.start} is half a surrogate pair ({escape})"
        ) from error
    return text


def _parse(line: bytes) -> Any:
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError as strict:
        # The standard parser takes what a record may hold beside its text: NaN, halves of surrogate pairs.
        try:
            return json.loads(line.decode())
        except UnicodeDecodeError as error:
            detail = f"byte {error.start} of the line ({error.reason})"
            raise _RefusedRecord(Reason.INVALID_UTF8, detail) from error
        except (ValueError, RecursionError):
            detail = f"{strict.msg} at character {strict.pos}"
            raise _RefusedRecord(Reason.INVALID_JSON, detail) from strict


def _json_type(value: object) -> str:
    if isinstance(value, bool):
        return "true or false"
    names = {dict: "an object", list: "a list", str: "a string", int: "a number", float: "a number"}
    return names.get(type(value), "null")


def _listed(record: dict[str, Any]) -> str:
    names = ", ".join(repr(excerpt_of(name)) for name in list(record)[:8])
    return names or "an empty object"


def _document(
    source: Source, record: str, text: str, settings: CorpusSettings, set_aside: OnSetAside
) -> Iterator[tuple[Document, str]]:
    """The document of one record, or none (then it was set aside)."""
    text = normalize(text.removeprefix("\ufeff"), settings.unicode)
    nul = text.find("\0")
    if nul >= 0:
        reason, detail = Reason.NUL, f"at character {nul}: a binary or a UTF-16 file?"
    elif not text.strip():
        reason, detail = Reason.EMPTY, "no text but blanks" if text else "no text"
    else:
        yield Document(document_id(source.label, record), text, source.label), record
        return
    set_aside(SetAside(source.label, record, reason, detail, excerpt_of(text.replace("\0", "␀")), len(text.encode())))


def _damaged(source: Source, record: str, error: BaseException) -> SetAside:
    """What to say of a file that could not be read to its end."""
    excerpt = ""
    if isinstance(error, UnicodeDecodeError):
        reason, detail = Reason.INVALID_UTF8, f"byte {error.start} ({error.reason})"
        if error.object[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            detail += ": this is UTF-16; save it as UTF-8"
        excerpt = excerpt_of(error.object[max(0, error.start - 20) : error.start + 20])
    elif isinstance(error, EOFError):
        reason, detail = Reason.DAMAGED_GZIP, "cut off before its end"
    elif isinstance(error, zlib.error | gzip.BadGzipFile):
        reason, detail = Reason.DAMAGED_GZIP, str(error)
    else:
        reason, detail = Reason.UNREADABLE, getattr(error, "strerror", None) or str(error)
    return SetAside(source.label, record, reason, detail, excerpt, source.size_bytes())
