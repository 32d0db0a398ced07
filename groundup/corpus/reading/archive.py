"""WARC, WET and ARC archives cut into records, every byte of them in a record or in a counted loss.

ISO 28500 (WARC 0.18 to 1.1), the Internet Archive's ARC 1 and 2; plain or packed, most often in members, a record each.
Reading stops at borders (a member that begins a record) and at faults, so that a record with a wrong length cannot
swallow the next one, and a damaged member costs no other. The cutting is our own because the libraries end without a
word where a file is cut off (FastWARC 2.0.1 and warcio 1.8.1: 265 of 500 records) and give up at the first damage.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from groundup.corpus.document import Reason, SetAside, excerpt_of
from groundup.corpus.reading.compressed import BLOCK_BYTES, CHUNK_BYTES, Unpacker, packing_of
from groundup.corpus.reading.refusal import READ_ERRORS, RefusedError, fault_of
from groundup.corpus.reading.sources import InputFile

PLACE = "record"
HEAD_BYTES = 1 << 16  # a record's header that is longer is damage
_SHOWN_BYTES = 4096
_WARC = re.compile(rb"WARC/\d+\.\d+[ \t]*(?:[\r\n]|\Z)")
_ARC = re.compile(rb"[A-Za-z][A-Za-z0-9+.-]*:\S[^\n]* \d{8,} \S+ ")
_RECORD = re.compile(b"|".join([_WARC.pattern, _ARC.pattern]))
_HEAD_END = re.compile(rb"\n(?:\r?\n|WARC/\d+\.\d)")
_BORDER = RefusedError(Reason.EMPTY, "a member begins a record")
_END = RefusedError(Reason.EMPTY, "the file's end")


class RawRecord(NamedTuple):
    """One record of an archive; `position` and `number` as in `Record`, where a loss counts as a record too."""

    position: int
    number: int
    fields: dict[str, str]  # its header, names in lower case; that of an ARC record is given the names of WARC
    kind: str  # its WARC-Type, such as "response"
    size_bytes: int  # how long its content is, by its header
    block: bytes  # its content, as far as the reader's limit and one byte; only its beginning where its length is wrong
    fault: RefusedError | None  # why the content is not whole


def read_records(source: InputFile, limit_bytes: int) -> Iterator[RawRecord | SetAside]:
    """All records of an archive, whatever state it is in, and the bytes of it that belong to none that can be read."""
    stream, number, begins = _Stream(source), 0, _RECORD
    while (fault := stream.take_fault(is_within=False)) or stream.fill(HEAD_BYTES):
        number, position = number + 1, stream.position
        if fault:
            yield fault.of(source.label, PLACE, number, "", fault.size_bytes, position)
            continue
        if begins is _RECORD:
            begins = next((kind for kind in (_ARC, _WARC) if kind.match(stream.data, stream.at)), _RECORD)
        try:
            fields, n_head, size = _head(stream.data, stream.at, begins)
        except ValueError as error:
            head = bytes(stream.data[stream.at : stream.at + _SHOWN_BYTES])
            stream.skip(1)
            fault = _lost(stream, begins, position, str(error))
            yield fault.of(source.label, PLACE, number, excerpt_of(head), stream.position - position, position)
            continue
        stream.skip(n_head)
        kind = fields.get("warc-type", "").lower()
        yield RawRecord(position, number, fields, kind, size, *_content(stream, size, limit_bytes + 1, begins))
    if not number:
        yield SetAside(source.label, "", 0, Reason.EMPTY, "no record in the file")


def _head(data: bytearray, at: int, begins: re.Pattern[bytes]) -> tuple[dict[str, str], int, int]:
    """The header that begins at `at`, names in lower case, its length, and that of the content."""
    fields: dict[str, str] = {}
    end = data.find(b"\n", at, at + HEAD_BYTES) + 1 or len(data)
    if not begins.match(data, at):
        raise ValueError("not the beginning of a record")
    if begins is _ARC:  # a line: address, IP, date, media type, in version 2 some more, length
        parts = data[at:end].decode("utf-8", "replace").strip().split(" ")
        dates = [place for place, part in enumerate(parts[:-2]) if part.isdigit() and len(part) >= 8]
        date = next((place for place in dates if place > 1), 0)
        kind = "warcinfo" if data.startswith(b"filedesc:", at) else "response"
        fields = {"warc-type": kind, "warc-target-uri": " ".join(parts[: date - 1]), "content-type": parts[date + 1]}
        fields["content-length"] = parts[-1] if date else ""
    else:
        found = _HEAD_END.search(data, at, at + HEAD_BYTES)
        if found is None or b"W" in found.group():
            raise ValueError("a record's header without an end")
        end = found.end()
        for line in re.sub(r"\r?\n[ \t]+", " ", data[at:end].decode("utf-8", "replace")).split("\n")[1:]:
            name, _, value = line.partition(":")
            fields.setdefault(name.strip().lower(), value.strip())
    length = fields.get("content-length", "")
    if not re.fullmatch(r"[0-9]{1,18}", length):
        raise ValueError(f"a record of length {length!r}")
    return fields, end - at, int(length)


def _content(stream: _Stream, size: int, most: int, begins: re.Pattern[bytes]) -> tuple[bytes, RefusedError | None]:
    """The content that comes next, and what is wrong with it: what follows it shows whether its length is right."""
    position, n_kept = stream.position, min(size, most)
    n_there, at, end = stream.fill(n_kept + HEAD_BYTES), stream.at, stream.at + size
    follows = stream.data[end : end + 1] if n_there >= size else b"?"
    is_long = n_there >= n_kept < size
    is_right = is_long or follows in b"\r\n" or begins.match(stream.data, end) is not None
    # Of a wrong one just enough to recognize it: it may claim all that follows, again and again.
    block = bytes(stream.data[at : at + n_kept if is_right else min(end, at + _SHOWN_BYTES)])
    n_there = stream.skip(size) if is_right else n_there
    if is_right and n_there == size:
        return block, stream.take_fault()  # the checksum of its member comes behind it; what that shows is its fault
    return block, _lost(stream, begins, position, f"its length says {size:,} bytes", is_short=n_there < size)


def _lost(stream: _Stream, begins: re.Pattern[bytes], start: int, what: str, is_short: bool = False) -> RefusedError:
    """Pass over what is no record; returns why all from `start` on is lost."""
    stream.skip_to(begins)
    if fault := stream.take_fault(is_within=not is_short):
        return RefusedError(fault.reason, f"{what}: {fault.detail}")
    is_end = not stream.fill(1)
    rest = "the file's end" if is_end else "the next record"
    reason = Reason.CUT_OFF if is_short and is_end else Reason.DAMAGED
    return RefusedError(reason, f"{what}; {stream.position - start:,} bytes up to {rest} are lost")


class _Stream:
    """The uncompressed bytes of an archive, read forward up to the next stop: a border, a fault, the file's end.

    The next byte is at `at` in `data`, and at `position` in the file.
    """

    def __init__(self, source: InputFile) -> None:
        self.position = self.at = 0
        self.data = bytearray()
        self._pieces = _pieces_of(source)
        self._stop: RefusedError | None = None  # what comes behind the data, if known

    def fill(self, n_bytes: int) -> int:
        """Have so many bytes in `data`, or those before the stop; returns how many there are, which may be more."""
        while len(self.data) - self.at < n_bytes and self._stop is None:
            piece = next(self._pieces, _END)
            if isinstance(piece, RefusedError):
                self._stop = piece
            elif piece:
                del self.data[: self.at]
                self.at = 0
                self.data += piece
            elif self.position or self.data:
                self._stop = _BORDER
        return len(self.data) - self.at

    def take_fault(self, is_within: bool = True) -> RefusedError | None:
        """Pass over line ends, borders, and a fault (if `is_within`, one that makes what was read last doubtful)."""
        while self.fill(1) or self._stop is _BORDER:
            if not self.fill(1):
                self._stop = None
            elif self.data[self.at] in b"\r\n":
                self.skip(1)
            else:
                return None
        if self._stop is None or self._stop is _END or (is_within and not self._stop.is_within):
            return None
        fault, self._stop = self._stop, None
        return fault

    def skip(self, n_bytes: int) -> int:
        """Pass over so many bytes, or those before the stop; returns how many."""
        begins = self.position
        while (left := begins + n_bytes - self.position) and (there := self.fill(1)):
            self.at += min(left, there)
            self.position += min(left, there)
        return self.position - begins

    def skip_to(self, begins: re.Pattern[bytes]) -> None:
        """Pass over all before the next line that begins a record, or the next stop."""
        begins_line = re.compile(rb"(?m)^(?:" + begins.pattern + b")")
        while there := self.fill(2 * HEAD_BYTES):
            if found := begins_line.search(self.data, self.at):
                self.skip(found.start() - self.at)
                return
            self.skip(there if self._stop else there - HEAD_BYTES)


def _pieces_of(source: InputFile) -> Iterator[bytes | RefusedError]:
    """What the file holds, uncompressed; b"" in front of a member that begins a record."""
    try:
        with source.open_stored() as stored:
            block = stored.read(CHUNK_BYTES)
            packing = packing_of(block) or ("" if _RECORD.match(block) else source.packing)
            if packing:
                yield from Unpacker(stored, packing, block).pieces(_RECORD.match)
            while block and not packing:
                yield block
                block = stored.read(BLOCK_BYTES)
    except READ_ERRORS as error:
        yield fault_of(error)
