"""JSON to values: lines (all, or those whose first byte lies in a range of bytes), and files of one value.

Every line, and every element of a list, stands for itself: one that is broken is set aside and the next is read. Lines
read in pieces give the values and the faults of the file read whole, at the same positions. Memory is bounded by
`max_document_mib`.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Generator, Iterator
from typing import IO, Any, NamedTuple

import orjson

from groundup.corpus.document import OnSetAside, Reason, SetAside, excerpt_of
from groundup.corpus.reading.compressed import BLOCK_BYTES
from groundup.corpus.reading.intake import limit_bytes, refuse_binary, too_long, unread
from groundup.corpus.reading.refusal import READ_ERRORS, RefusedError
from groundup.corpus.reading.sources import InputFile
from groundup.recipe import CorpusSettings

PLACE, ELEMENT = "line", "record"
MOST_OBJECT_BYTES = 64 << 20
"""A `.json` file that is no list is held whole."""
_ESCAPE_CHARACTERS = 12
_HEAD_BYTES = 32
_BETWEEN = re.compile(r"[\s,]*")
_DECODER = json.JSONDecoder()


class Value(NamedTuple):
    """One record as its file has it: an object of JSON, a row of a table, the cells of a line.

    Attributes:
        data: what it holds.
        position, place, number: as in `Record`.
        size_bytes: how large it is in the file; 0 where that is unknown.
        raw: it, or its beginning, as it stands there.
        is_strict: whether its strings are known to be writable as UTF-8.
    """

    data: Any
    position: int
    place: str
    number: int
    size_bytes: int = 0
    raw: bytes | str = ""
    is_strict: bool = False

    def aside(self, source: InputFile, refused: RefusedError) -> SetAside:
        """What to list where it cannot be used."""
        raw = self.raw if isinstance(self.raw, bytes) else self.raw.encode(errors="replace")
        return refused.of(source.label, self.place, self.number, excerpt_of(raw), self.size_bytes, self.position)


def read_lines(
    source: InputFile, start: int, stop: int | None, settings: CorpusSettings, set_aside: OnSetAside
) -> Generator[Value, None, int]:
    """The values of the lines that begin at `start` or behind it and before `stop`; returns how many lines these are,
    blank ones included."""
    limit, field, name = limit_bytes(settings), settings.text_field, _quoted(settings.text_field)
    number = n_records = 0
    position = start
    try:
        with source.open() as handle:
            if start:
                position = _first_line(source, handle, start, stop)
            while stop is None or position < stop:
                line = handle.readline(limit + 1)
                if not line:
                    break
                if not position and refuse_binary(source, line, set_aside):
                    return 0
                is_long = len(line) > limit and is_too_long(line, limit)
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
                    try:
                        data, is_strict = parse_json(line, field, name)
                    except RefusedError as refused:
                        value = Value(None, begins, PLACE, number, len(line), line)
                        set_aside(value.aside(source, refused))
                    else:
                        yield Value(data, begins, PLACE, number, len(line), line, is_strict)
            rest = iter(lambda: handle.read(BLOCK_BYTES), b"")
            if not start and not n_records and all(block.isspace() for block in rest):
                set_aside(SetAside(source.label, "", 0, Reason.EMPTY, "no record in the file"))
    except READ_ERRORS as error:
        set_aside(unread(source, error, position, PLACE, number))
    return number


def read_json(source: InputFile, settings: CorpusSettings, set_aside: OnSetAside) -> Generator[Value, None, int]:
    """The values of a `.json` file: the elements of its list, its one object, or its lines (as C4 has them).

    An object that lacks the text's field and holds just one list is a frame, `{"version": 1, "data": [...]}`. Returns
    how many there are.
    """
    limit, field, number = limit_bytes(settings), settings.text_field, 0
    try:
        with source.open() as handle:
            head = _solid_line(handle, limit)
            begins = head.removeprefix(codecs.BOM_UTF8).lstrip()
            if refuse_binary(source, head, set_aside):
                return 0
            if begins.startswith(b"["):
                elements = _elements(handle, begins[1:], limit, field)
            elif is_too_long(head, limit) or (more := _solid_line(handle, limit)).lstrip()[:1] != begins[:1]:
                elements = _of_object(handle, begins if is_too_long(head, limit) else begins + more, field)
            else:
                return (yield from read_lines(source, 0, None, settings, set_aside))
            for data, raw, size in elements:
                number += 1
                value = Value(data, number - 1, ELEMENT, number, size, raw)
                if isinstance(data, RefusedError):
                    set_aside(value.aside(source, data))
                else:
                    yield value
            if not number:
                set_aside(SetAside(source.label, "", 0, Reason.EMPTY, "no record in the file"))
    except READ_ERRORS as error:
        set_aside(unread(source, error, number, ELEMENT, number))
    return number


def _solid_line(handle: IO[bytes], limit: int) -> bytes:
    """The next line that is not blank, or its beginning."""
    while (line := handle.readline(limit + 1)).isspace():
        pass
    return line


def _of_object(handle: IO[bytes], head: bytes, field: str) -> Iterator[tuple[Any, str, int]]:
    """What `_elements` gives: the one object of a file that begins with `head`, or the elements of the frame it is."""
    data = head + handle.read(max(0, MOST_OBJECT_BYTES + 1 - len(head)))
    if not data.strip():
        return
    try:
        if len(data) > MOST_OBJECT_BYTES:
            detail = f"one object of more than {MOST_OBJECT_BYTES:,} bytes: make it a list, or JSON lines"
            raise RefusedError(Reason.TOO_LONG, detail)
        value, _ = parse_json(data, field, _quoted(field))
    except RefusedError as refused:
        value = refused
    lists = [item for item in value.values() if isinstance(item, list)] if isinstance(value, dict) else []
    if len(lists) == 1 and field not in value:
        yield from ((item, "", 0) for item in lists[0])
    else:
        yield value, data[:400].decode(errors="replace"), len(data)


def _elements(handle: IO[bytes], head: bytes, limit: int, field: str) -> Iterator[tuple[Any, str, int]]:
    """The elements of a list whose bracket and `head` have been read: what each is (a `RefusedError`, if that cannot be
    used; the last one may say why nothing behind it can be read), how it begins, and its size."""
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    buffer, at = decoder.decode(head), 0
    name = _quoted(field).decode()
    while True:
        at = _BETWEEN.match(buffer, at).end()  # type: ignore[union-attr]
        if buffer[at : at + 1] == "]":
            if (buffer[at + 1 :] + decoder.decode(handle.read(1 << 10))).strip():
                yield RefusedError(Reason.INVALID_JSON, "something else follows the list, and is not read"), "", 0
            return
        if at < len(buffer):
            try:
                value, end = _DECODER.raw_decode(buffer, at)
            except (ValueError, RecursionError) as error:
                # The parser's complaint may be that the text is not all there.
                is_open = isinstance(error, json.JSONDecodeError) and (
                    error.msg.startswith("Unterminated string") or error.pos >= len(buffer) - _ESCAPE_CHARACTERS
                )
                if not is_open:
                    yield RefusedError(Reason.INVALID_JSON, f"{error}; from here on nothing of the list is read"), "", 0
                    return
                end = len(buffer)
            if end < len(buffer):  # a number at the buffer's end may go on
                if end - at > limit:
                    value = RefusedError(Reason.TOO_LONG, f"{end - at:,} characters; the limit is {limit:,} bytes")
                elif field and buffer.count(name, at, end) > 1 and _says_twice(buffer[at:end], field):
                    value = RefusedError(Reason.INVALID_JSON, f"the field {name} stands in it twice")
                yield value, buffer[at : min(end, at + 400)], end - at
                at = end
                continue
            if len(buffer) - at > 2 * limit:
                detail = f"an element of more than {2 * limit:,} characters; from here on nothing of the list is read"
                yield RefusedError(Reason.TOO_LONG, detail), "", 0
                return
        block = handle.read(max(BLOCK_BYTES, len(buffer) - at))
        if not block:
            yield RefusedError(Reason.CUT_OFF, "the list has no end; its last element is not read"), "", 0
            return
        buffer, at = buffer[at:] + decoder.decode(block), 0


def is_too_long(line: bytes, limit: int) -> bool:
    """Whether `readline(limit + 1)` gave only the beginning of a line."""
    return len(line) > limit and not line.endswith(b"\n")


def skip_line(handle: IO[bytes], most: int | None = None) -> int:
    """Read on to the end of the line, or over `most` bytes, without keeping them; returns the bytes passed."""
    n_skipped = 0
    while most is None or n_skipped < most:
        block = handle.readline(BLOCK_BYTES if most is None else min(BLOCK_BYTES, most - n_skipped))
        n_skipped += len(block)
        if not block or block.endswith(b"\n"):
            break
    return n_skipped


def _first_line(source: InputFile, handle: IO[bytes], start: int, stop: int | None) -> int:
    """Go to the first line that begins at `start` or behind it, or at least to `stop`; returns where."""
    if refuse_binary(source, handle.readline(_HEAD_BYTES), None):  # the unit with its beginning reports that
        return handle.seek(0, 2)
    handle.seek(start - 1)
    return start - 1 + skip_line(handle, None if stop is None else stop - start + 1)


def parse_json(data: bytes, field: str, name: bytes) -> tuple[Any, bool]:
    """A JSON value, and whether the strict parser took it: only then has no string in it half a surrogate pair.

    NaN and such halves do no harm, so what the standard parser makes of them is taken. Raises `RefusedError`: neither
    understands it, or `field` (`name` in JSON) stands in it twice.
    """
    try:
        value, is_strict = orjson.loads(data), True
    except orjson.JSONDecodeError as strict:
        try:
            value, is_strict = json.loads(data.decode()), False
        except UnicodeDecodeError as error:
            detail = f"byte {error.start} of the line ({error.reason})"
            raise RefusedError(Reason.INVALID_UTF8, detail) from error
        except (ValueError, RecursionError) as error:
            raise RefusedError(Reason.INVALID_JSON, f"{strict.msg} at character {strict.pos}") from error
    if field and data.count(name) > 1 and _says_twice(data, field):
        raise RefusedError(Reason.INVALID_JSON, f"the field {name.decode()} stands in it twice")
    return value, is_strict


def _says_twice(data: bytes | str, field: str) -> bool:
    try:
        pairs = json.loads(data, object_pairs_hook=tuple)
    except (ValueError, RecursionError):  # deeper, or a longer number, than this parser takes: nobody can say
        return True
    return isinstance(pairs, tuple) and sum(key == field for key, _ in pairs) > 1


def _quoted(field: str) -> bytes:
    return json.dumps(field).encode()


def label_of(value: object) -> str:
    """A record's id, address or source as text; "" for what cannot be one."""
    if value is None or isinstance(value, str):
        return value or ""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else ""
