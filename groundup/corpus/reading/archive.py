"""WARC, WET and ARC archives cut into records, every byte of them in a record or in a counted loss.

In: an archive, gzip in members (a record each, as WARC files are), or plain, or packed otherwise. Out: `RawRecord`s and
what is set aside, in the order of the file. Formats: ISO 28500 (WARC 0.18 to 1.1), the Internet Archive's ARC 1 and 2.

Reading stops at borders (a gzip member that begins a record) and at faults (bytes that are lost), so that a record with
a wrong length cannot swallow the next one, and a damaged member costs no other. The cutting is our own because the
libraries end without a word where a file is cut off (FastWARC 2.0.1 and warcio 1.8.1: 265 of 500 records, no error) and
give up at the first damage.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace

from groundup.corpus.document import Reason, SetAside, excerpt_of
from groundup.corpus.reading.compressed import BLOCK_BYTES, BOMB_BYTES, BOMB_RATIO, DamagedStreamError
from groundup.corpus.reading.intake import READ_ERRORS
from groundup.corpus.reading.sources import InputFile

PLACE = "record"
HEAD_BYTES = 1 << 16
"""A record's header that is longer is damage."""

_SHOWN_BYTES = 4096
_SWALLOWED = re.compile(rb"\r?\n\r?\n(WARC/\d+\.\d+\r?\n)")
_ARC_FIELDS = {b"1": 4, b"2": 9}  # behind the address, by version
WARC_RECORD = re.compile(rb"WARC/\d+\.\d+[ \t]*(\r|\n|$)")
ARC_RECORD = re.compile(rb"[A-Za-z][A-Za-z0-9+.-]*:\S[^\n]* \d{8,} \S+ ")
MEMBER_MAGIC = b"\x1f\x8b\x08"

_BLANKS = re.compile(rb"[\r\n]+")
_STORED_BLOCK_BYTES = 1 << 18
_PEEK_BYTES = 4096  # of a member, to see whether it begins a record


@dataclass(frozen=True, slots=True)
class StreamFault:
    """Bytes that are lost.

    Attributes:
        reason: `Reason.CUT_OFF`, `Reason.DAMAGED` or `Reason.UNREADABLE`.
        detail: in words.
        size_bytes: how much of the file as stored.
        is_within: whether bytes of the same gzip member were handed out before: they are not to be trusted either.
    """

    reason: Reason
    detail: str
    size_bytes: int = 0
    is_within: bool = False


@dataclass(frozen=True, slots=True)
class RawRecord:
    """One record of an archive.

    Attributes:
        position: where it begins in the uncompressed file.
        number: which record of the file, from 1 on; a loss counts as one.
        fields: its header, names in lower case.
        block: its content, at most the reader's limit and one byte of it; only its beginning where its length is wrong.
        fault: why the content is not whole, or None.
    """

    position: int
    number: int
    fields: dict[str, str]
    block: bytes
    fault: StreamFault | None = None

    @property
    def kind(self) -> str:
        """Its WARC-Type, such as "response"; an ARC record is one of these kinds too."""
        return self.fields.get("warc-type", "").lower()

    @property
    def size_bytes(self) -> int:
        """How long the content is by its header."""
        return int(self.fields["content-length"])


def read_records(source: InputFile, limit_bytes: int) -> Iterator[RawRecord | SetAside]:
    """All records of an archive, whatever state it is in, and the bytes of it that belong to none that can be read.

    Args:
        source: the file.
        limit_bytes: of a longer content only so much and one byte is kept.
    """
    stream = ArchiveStream(source)
    number = 0
    begins: re.Pattern[bytes] | None = None
    arc_version = b"1"
    while not stream.at_end():
        if fault := stream.go_on():
            number += 1
            yield SetAside(
                source.label, PLACE, number, fault.reason, fault.detail, "", fault.size_bytes, stream.position
            )
            continue
        stream.skip_blanks()
        line = stream.line(HEAD_BYTES)
        if not line:
            continue  # a border or a fault comes first
        number += 1
        position = stream.position
        if begins is None:
            begins = next((kind for kind in (ARC_RECORD, WARC_RECORD) if kind.match(line)), None)
        stream.skip(len(line))
        head = _arc_head(line, arc_version) if begins is ARC_RECORD else _warc_head(line, stream)
        if isinstance(head, dict):
            record = _content(stream, head, position, number, limit_bytes, begins or WARC_RECORD)
            if begins is ARC_RECORD and record.kind == "warcinfo" and (version := record.block[:1]) in _ARC_FIELDS:
                arc_version = version
            yield record
            continue
        _skip_to_record(stream, begins or WARC_RECORD)
        n_lost = stream.position - position
        if fault := stream.go_on(is_within=True):
            reason, detail = fault.reason, f"{head}: {fault.detail}"
        else:
            follows = "the file's end" if stream.at_end() else "the next record"
            reason, detail = Reason.DAMAGED, f"{head}; {n_lost:,} bytes up to {follows} are lost"
        yield SetAside(source.label, PLACE, number, reason, detail, excerpt_of(line), n_lost, position)


def _warc_head(line: bytes, stream: ArchiveStream) -> dict[str, str] | str:
    """The header that begins with this line, names in lower case; or what is wrong with it."""
    if not WARC_RECORD.match(line):
        return "not the beginning of a record"
    fields: dict[str, str] = {}
    name = ""
    left = HEAD_BYTES
    while left > 0:
        line = stream.line(left)
        if (not line.endswith(b"\n") and len(line) < left) or WARC_RECORD.match(line):
            return "a record's header without an end"
        left -= stream.skip(len(line))
        if line in (b"\r\n", b"\n"):
            return _with_length(fields)
        text = line.decode("utf-8", "replace").strip()
        if line[:1] in b" \t" and name:
            fields[name] = f"{fields[name]} {text}"
        else:
            name, _, value = text.partition(":")
            name = name.strip().lower()
            fields.setdefault(name, value.strip())
    return f"a record's header beyond {HEAD_BYTES:,} bytes"


def _arc_head(line: bytes, version: bytes) -> dict[str, str] | str:
    """The header that this line of an ARC file is, as that of a WARC record; or what is wrong with it."""
    text = line.decode("utf-8", "replace").strip()
    parts = text.rsplit(" ", _ARC_FIELDS[version])
    if not ARC_RECORD.match(line) or len(parts) <= _ARC_FIELDS[version]:
        return "not the beginning of a record"
    fields = {"warc-target-uri": parts[0], "content-type": parts[3], "content-length": parts[-1]}
    fields["warc-type"] = "warcinfo" if parts[0].startswith("filedesc:") else "response"
    return _with_length(fields)


def _with_length(fields: dict[str, str]) -> dict[str, str] | str:
    length = fields.get("content-length", "")
    if length.isascii() and length.isdigit() and len(length) <= 18:
        return fields
    return f"a record whose length is {length!r}" if length else "a record without a length"


def _content(
    stream: ArchiveStream, fields: dict[str, str], position: int, number: int, limit_bytes: int,
    begins: re.Pattern[bytes],
) -> RawRecord:  # fmt: skip
    """The record whose content comes next, with what follows it as far as that shows whether its length is right."""
    size = int(fields["content-length"])
    n_kept = min(size, limit_bytes + 1)
    n_there = min(stream.fill(n_kept), n_kept)
    is_longer = n_there == n_kept < size
    block = b""
    if is_longer:
        block = bytes(stream.data[stream.at : stream.at + n_there])
        n_there = stream.skip(size)
    n_left = 0 if is_longer else n_there  # of the content, not passed yet
    follows = stream.line(HEAD_BYTES, n_left) if n_there == size else b""
    is_right = n_there == size and (not follows or follows in (b"\r\n", b"\n", b"\r") or begins.match(follows))
    if not is_longer:  # of a wrong one just enough to recognize it: it may claim all that follows, again and again
        block = bytes(stream.data[stream.at : stream.at + (n_there if is_right else min(n_there, _SHOWN_BYTES))])
    record = RawRecord(position, number, fields, block)
    if is_right:
        stream.skip(n_left)
        stream.skip_blanks()
        # The member's checksum comes after the content; the fault that it shows is this record's.
        fault = stream.go_on(is_within=True)
        return replace(record, fault=fault) if fault else record
    says = f"its length says {size:,} bytes"
    seen = stream.at + n_left + len(follows)
    swallowed = None if is_longer else _SWALLOWED.search(stream.data, stream.at, seen)
    if swallowed:
        n_before = swallowed.start(1) - stream.at
        stream.skip(n_before)
        return replace(
            record, fault=StreamFault(Reason.DAMAGED, f"{says}, but the next record begins after {n_before:,}")
        )  # fmt: skip
    stream.skip(n_left)
    if n_there < size:
        says = f"{says}, of which {n_there:,} are there"
        fault = stream.go_on()
        if fault is None and stream.at_end():
            return replace(record, fault=StreamFault(Reason.CUT_OFF, f"{says}: the file ends there"))
    else:
        n_more = stream.skip(len(follows)) + _skip_to_record(stream, begins)
        says = f"{says}, but {n_more:,} more follow that belong to no record"
        fault = stream.go_on(is_within=True)
    if fault:
        return replace(record, fault=replace(fault, detail=f"{says}: {fault.detail}"))
    return replace(record, fault=StreamFault(Reason.DAMAGED, says))


def _skip_to_record(stream: ArchiveStream, begins: re.Pattern[bytes]) -> int:
    """Pass over what is no record; returns how many bytes."""
    n_bytes = 0
    begins_line = True
    while line := stream.line(HEAD_BYTES):
        if begins_line and begins.match(line):
            break
        begins_line = line.endswith(b"\n")
        n_bytes += stream.skip(len(line))
    return n_bytes


_BORDER = StreamFault(Reason.EMPTY, "the next gzip member begins a record")
_END = StreamFault(Reason.EMPTY, "the file's end")


class ArchiveStream:
    """The uncompressed bytes of an archive, read forward up to the next stop: a border, a fault, the file's end.

    Args:
        source: the file; its first bytes, not its name, say whether it is gzip.

    Attributes:
        position: offset of the next byte.
        data: bytes that have been read, from `at` on not yet passed.
        at: where in them the next byte is.
    """

    def __init__(self, source: InputFile) -> None:
        self.position = self.at = 0
        self.data = bytearray()
        self._stop: StreamFault | None = None  # what comes behind the data
        self._pieces = _pieces_of(source)

    def fill(self, n_bytes: int) -> int:
        """Have so many bytes in `data`, or those before the stop; returns how many there are, which may be more."""
        while len(self.data) - self.at < n_bytes and self._stop is None:
            piece = next(self._pieces, _END)
            if isinstance(piece, bytes):
                del self.data[: self.at]
                self.at = 0
                self.data += piece
            elif piece is not _BORDER or self.position or self.data:
                self._stop = piece
        return len(self.data) - self.at

    def at_end(self) -> bool:
        """Whether nothing is left: no byte, no border, no fault."""
        return not self.fill(1) and self._stop is _END

    def go_on(self, is_within: bool = False) -> StreamFault | None:
        """Pass the border or the fault, if reading has stopped at one; returns the fault.

        Args:
            is_within: only a fault that makes what was read last doubtful.
        """
        stop = None if self.fill(1) else self._stop
        if stop is None or stop is _END or (is_within and not stop.is_within):
            return None
        self._stop = None
        return None if stop is _BORDER else stop

    def line(self, limit: int, offset: int = 0) -> bytes:
        """What begins `offset` bytes from here, up to and with the line feed, at most `limit` bytes. None is passed."""
        n_bytes = len(self.data) - self.at
        while True:
            start = self.at + offset
            end = self.data.find(b"\n", start, start + limit) + 1
            if end or n_bytes >= offset + limit or n_bytes == (n_bytes := self.fill(n_bytes + 1)):
                return bytes(self.data[start : end or start + limit])

    def skip(self, n_bytes: int) -> int:
        """Pass over so many bytes, or those before the stop; returns how many."""
        left = n_bytes
        while left and (there := len(self.data) - self.at or self.fill(1)):
            passed = min(left, there)
            self.at += passed
            self.position += passed
            left -= passed
        return n_bytes - left

    def skip_blanks(self) -> None:
        """Pass over line ends."""
        while self.fill(1) and (blanks := _BLANKS.match(self.data, self.at)):
            self.skip(blanks.end() - self.at)


def _pieces_of(source: InputFile) -> Iterator[bytes | StreamFault]:
    try:
        if source.packing not in ("", ".gz"):
            with source.open() as unpacked:
                while block := unpacked.read(BLOCK_BYTES):
                    yield block
            return
        with source.open_stored() as stored:
            beginning = stored.read(_STORED_BLOCK_BYTES)
            if beginning.startswith(MEMBER_MAGIC) or (source.packing == ".gz" and not _begins_record(beginning)):
                yield from _Inflated(lambda: stored.read(_STORED_BLOCK_BYTES), beginning).pieces()
                return
            yield beginning
            while block := stored.read(BLOCK_BYTES):
                yield block
    except DamagedStreamError as error:
        yield StreamFault(error.reason, error.detail)
    except READ_ERRORS as error:
        yield StreamFault(Reason.UNREADABLE, getattr(error, "strerror", None) or str(error) or type(error).__name__)


class _Inflated:
    """gzip members (RFC 1952), one after the other; behind a damaged one, the next that begins a record."""

    def __init__(self, read: Callable[[], bytes], beginning: bytes) -> None:
        self._read_stored = read
        self._data = beginning
        self.n_stored = len(beginning)
        self._n_inflated = 0
        self._looked_at = 0  # so many bytes of the data are known to begin no other member

    def pieces(self) -> Iterator[bytes | StreamFault]:
        while self._data or self._more():
            self._data = self._data.lstrip(b"\0")  # padding, as gzip itself takes it
            while 0 < len(self._data) < len(MEMBER_MAGIC) and self._more():
                pass
            if not self._data:
                continue
            self._looked_at = 0
            fault: StreamFault | None = StreamFault(Reason.DAMAGED, "something else follows the gzip data")
            if self._data.startswith(MEMBER_MAGIC):
                fault = yield from self._member()
            if fault is None:
                continue
            if fault.reason == Reason.UNREADABLE:
                yield fault
                return
            n_lost = self._find_next()
            if self._data:  # a damaged member can look like one that never ends
                detail = f"{fault.detail}; {n_lost:,} bytes up to the next whole member are lost"
                fault = replace(fault, reason=Reason.DAMAGED, detail=detail)
            elif fault.reason == Reason.DAMAGED:
                fault = replace(fault, detail=f"{fault.detail}; {n_lost:,} bytes up to the file's end are lost")
            yield replace(fault, size_bytes=n_lost)

    def _member(self) -> Generator[bytes | StreamFault, None, StreamFault | None]:
        """One member; returns what is wrong with it."""
        inflater = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
        data, held, self._looked_at = self._data, b"", 1
        n_member = n_given = 0
        fault: StreamFault | None = None
        while fault is None and not inflater.eof:
            try:
                chunk = inflater.decompress(data, BLOCK_BYTES)
            except zlib.error as error:  # "Error -3 while decompressing data: incorrect data check"
                what = f"damaged gzip data: {str(error).split(': ')[-1]}"
                return StreamFault(Reason.DAMAGED, what, is_within=n_given > 0)
            n_member += len(chunk)
            self._n_inflated += len(chunk)
            if self._n_inflated > BOMB_BYTES and self._n_inflated > BOMB_RATIO * self.n_stored:
                detail = f"a decompression bomb: {self.n_stored:,} bytes have grown to {self._n_inflated:,} so far"
                return StreamFault(Reason.UNREADABLE, detail, is_within=True)
            held += chunk
            data = inflater.unconsumed_tail
            if not data and not inflater.eof and len(chunk) < BLOCK_BYTES:  # all that went in has come out
                before, self._data = self._data, b""
                if self._more():
                    data, self._looked_at = self._data, 0
                else:
                    self._data = before
                    detail = f"the file ends within a gzip member, of which {n_member:,} bytes could be unpacked"
                    fault = StreamFault(Reason.CUT_OFF, detail, is_within=n_member > 0)
            if held and (fault or inflater.eof or len(held) >= _PEEK_BYTES):
                if not n_given and _begins_record(held):
                    yield _BORDER
                yield held
                n_given, held = n_given + len(held), b""
        if fault is None:
            self._data = inflater.unused_data
        return fault

    def _more(self) -> bool:
        block = self._read_stored()
        self.n_stored += len(block)
        self._data += block
        return bool(block)

    def _find_next(self) -> int:
        """Go to the next member that begins a record; returns how many stored bytes were passed."""
        n_passed, at = 0, self._looked_at
        while (at := self._data.find(MEMBER_MAGIC, at)) >= 0 or self._data:
            if at >= 0:
                while len(self._data) - at < _PEEK_BYTES and self._more():
                    pass
                if _holds_record(self._data[at : at + _PEEK_BYTES]):
                    self._data = self._data[at:]
                    return n_passed + at
                at += 1
                continue
            at, n_kept = 0, min(len(self._data), len(MEMBER_MAGIC) - 1)
            n_passed += len(self._data) - n_kept
            self._data = self._data[-n_kept:]
            if not self._more():
                n_passed, self._data = n_passed + n_kept, b""
        return n_passed


def _begins_record(data: bytes) -> bool:
    return bool(WARC_RECORD.match(data) or ARC_RECORD.match(data))


def _holds_record(data: bytes) -> bool:
    try:
        return _begins_record(zlib.decompressobj(wbits=16 + zlib.MAX_WBITS).decompress(data, _PEEK_BYTES))
    except zlib.error:
        return False
