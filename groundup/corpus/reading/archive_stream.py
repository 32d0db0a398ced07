"""An archive's bytes as one stream that knows where it was cut, damaged, or begins anew.

In: a file, gzip in members (a record each, as WARC files are), or plain, or packed otherwise. Out: its uncompressed
bytes by number and by line. Reading stops at borders (a gzip member that begins a record) and at faults (bytes that
are lost), so that a record with a wrong length cannot swallow the next one, and a damaged member costs no other.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace

from groundup.corpus.document import Reason
from groundup.corpus.reading.compressed import BLOCK_BYTES, BOMB_BYTES, BOMB_RATIO, DamagedStreamError
from groundup.corpus.reading.intake import READ_ERRORS
from groundup.corpus.reading.sources import InputFile

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
                inflated = _Inflated(lambda: stored.read(_STORED_BLOCK_BYTES), beginning)
                yield from inflated.pieces()
                expected = source.size_bytes()
                if expected > inflated.n_stored and not inflated.is_given_up:
                    detail = f"the file has {expected:,} bytes, of which only {inflated.n_stored:,} could be read"
                    yield StreamFault(Reason.CUT_OFF, detail, expected - inflated.n_stored)
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
        self.is_given_up = False

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
                self.is_given_up = True
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
