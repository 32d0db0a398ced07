"""JSON lines to records: a whole file, or the lines whose first byte lies in a range of bytes.

Every line stands for itself: one that is broken is set aside and the next is read. A file read in pieces gives the
records and the faults of the file read whole, at the same positions. Memory is bounded by `max_document_mib`.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Generator
from typing import IO, Any

import orjson

from groundup.corpus.document import OnSetAside, Reason, Record, SetAside, excerpt_of
from groundup.corpus.reading.compressed import BLOCK_BYTES
from groundup.corpus.reading.intake import READ_ERRORS, limit_bytes, make_record, too_long, unread
from groundup.corpus.reading.parts import is_too_long, skip_line
from groundup.corpus.reading.sources import InputFile
from groundup.recipe import CorpusSettings

PLACE = "line"
_UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def read_lines(
    source: InputFile, start: int, stop: int | None, settings: CorpusSettings, set_aside: OnSetAside
) -> Generator[Record, None, int]:
    """The records of the lines that begin at `start` or behind it and before `stop`.

    Returns:
        How many lines these were, blank ones included.
    """
    limit = limit_bytes(settings)
    number = n_records = 0
    position = start
    try:
        with source.open() as handle:
            if start:
                position = _first_line(handle, start, stop)
            while stop is None or position < stop:
                line = handle.readline(limit + 1)
                if not line:
                    break
                if not position and line.startswith(_UTF16_MARKS):
                    _set_aside_utf16(source, line, set_aside)
                    return 0
                is_long = is_too_long(line, limit)
                n_skipped = skip_line(handle) if is_long else 0
                number += 1
                begins, position = position, position + len(line) + n_skipped
                if not begins:
                    line = line.removeprefix(codecs.BOM_UTF8)
                if is_long:
                    n_records += 1
                    size = len(line) + n_skipped
                    set_aside(too_long(source, "", size, excerpt_of(line), settings, begins, PLACE, number))
                elif line and not line.isspace():
                    n_records += 1
                    record = _record(source, line, settings, set_aside, begins, number)
                    if record is not None:
                        yield record
            if not start and not n_records and _only_blanks_follow(handle):
                set_aside(SetAside(source.label, "", 0, Reason.EMPTY, "no record in the file"))
    except READ_ERRORS as error:
        so_far = f"the {n_records:,} records before it are read" if n_records else ""
        set_aside(unread(source, error, position, PLACE if number else "", number + 1 if number else 0, so_far))
    return number


def _first_line(handle: IO[bytes], start: int, stop: int | None) -> int:
    """Go to the first line that begins at `start` or behind it; returns where.

    If none begins before `stop`, that is `stop` or a place behind it.
    """
    if handle.read(2) in _UTF16_MARKS:
        # Such a file has no lines as we count them; the unit with its beginning reports it.
        handle.seek(0, 2)
        return handle.tell()
    handle.seek(start - 1)
    return start - 1 + skip_line(handle, None if stop is None else stop - start + 1)


def _set_aside_utf16(source: InputFile, line: bytes, set_aside: OnSetAside) -> None:
    detail = "the file is UTF-16; save it as UTF-8"
    excerpt = excerpt_of(line[:400].decode("utf-16", errors="replace"))
    set_aside(SetAside(source.label, "", 0, Reason.INVALID_UTF8, detail, excerpt, source.size_bytes()))


def _only_blanks_follow(handle: IO[bytes]) -> bool:
    while block := handle.read(BLOCK_BYTES):
        if not block.isspace():
            return False
    return True


class _RefusedLineError(Exception):
    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


def _record(
    source: InputFile, line: bytes, settings: CorpusSettings, set_aside: OnSetAside, position: int, number: int
) -> Record | None:
    try:
        try:
            fields, is_strict = orjson.loads(line), True
        except orjson.JSONDecodeError as error:
            fields, is_strict = _parse_leniently(line, error), False
        text = _text_of(fields, settings.text_field, is_strict)
    except _RefusedLineError as refused:
        excerpt = excerpt_of(line)
        set_aside(
            SetAside(
                source.label, PLACE, number, refused.reason, refused.detail, excerpt, len(line), position
            )
        )  # fmt: skip
        return None
    url = fields.get("url")
    if url is None and type(metadata := fields.get("metadata")) is dict:
        url = metadata.get("url")
    named = fields.get(settings.source_field) if settings.source_field else None
    if not is_strict:
        named, url, key = (_encodable(value) for value in (named, url, fields.get("id")))
    else:
        key = fields.get("id")
    return make_record(
        source, text, settings, set_aside, position, PLACE, number, label_of(named), label_of(url), label_of(key)
    )


def _encodable(value: object) -> object:
    """The value; of a string with half a surrogate pair in it, one that can be written as UTF-8."""
    return value.encode(errors="replace").decode() if isinstance(value, str) else value


def label_of(value: object) -> str:
    """A record's id, address or source as text; "" for what cannot be one."""
    if isinstance(value, str):
        return value
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else ""


def _text_of(fields: Any, field: str, is_strict: bool) -> str:
    """The text of a record.

    Raises:
        _RefusedLineError: there is none.
    """
    if not isinstance(fields, dict):
        raise _RefusedLineError(Reason.INVALID_JSON, f"not an object but {_json_type(fields)}")
    if field not in fields:
        raise _RefusedLineError(Reason.NO_TEXT, f"no field {field!r}, only {_listed(fields)}")
    text = fields[field]
    if not isinstance(text, str):
        raise _RefusedLineError(Reason.NO_TEXT, f"field {field!r} is {_json_type(text)}, not a string")
    if not is_strict:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            escape = f"\\u{ord(text[error.start]):04x}"
            detail = f"character {error.start} is half a surrogate pair ({escape})"
            raise _RefusedLineError(Reason.INVALID_UTF8, detail) from error
    return text


def _parse_leniently(line: bytes, strict: orjson.JSONDecodeError) -> Any:
    """What the standard parser makes of it: it takes NaN and halves of surrogate pairs, which do no harm in general.

    Raises:
        _RefusedLineError: neither does it understand the line.
    """
    try:
        return json.loads(line.decode())
    except UnicodeDecodeError as error:
        detail = f"byte {error.start} of the line ({error.reason})"
        raise _RefusedLineError(Reason.INVALID_UTF8, detail) from error
    except (ValueError, RecursionError) as error:
        detail = f"{strict.msg} at character {strict.pos}"
        raise _RefusedLineError(Reason.INVALID_JSON, detail) from error


def _json_type(value: object) -> str:
    if isinstance(value, bool):
        return "true or false"
    names = {dict: "an object", list: "a list", str: "a string", int: "a number", float: "a number"}
    return names.get(type(value), "null")


def _listed(fields: dict[str, Any]) -> str:
    names = ", ".join(repr(excerpt_of(name)) for name in list(fields)[:8])
    return names or "an empty object"
