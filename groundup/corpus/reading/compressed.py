"""Compressed files as streams of what they hold: gzip, Zstandard, bzip2 and xz, in bounded memory, to the last byte.

A stream ends only where its file ends and every member of it is whole. Otherwise it raises `DamagedStreamError`
instead of looking finished: cut off before the end, a checksum that does not fit, bytes of something else behind the
data, or a bomb. What was read before the fault has been handed out by then. (Python's own readers of bzip2 and xz take
whatever follows the data for its end, that of `zstandard` a cut.)
"""

from __future__ import annotations

import bz2
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from typing import IO, TYPE_CHECKING, Any

from groundup.corpus.document import Reason

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

PACKINGS = (".gz", ".zst", ".bz2", ".xz")
BLOCK_BYTES = 1 << 20
CHUNK_BYTES = 1 << 18
BOMB_BYTES = 1 << 30
BOMB_RATIO = 1000
"""A stream that has grown past both, in bytes and in bytes a stored byte, is no text but an attack."""

_XZ_MEMORY_BYTES = 256 << 20  # what the largest dictionary of the xz tool's own levels takes, four times
_ZSTD_PIECE_BYTES = (64, 2048)  # 4 bytes may be a block of 128 KiB


class DamagedStreamError(Exception):
    """A file, or the body of an archived response, does not hold what its format promises.

    Attributes:
        reason: `Reason.CUT_OFF` or `Reason.DAMAGED`; of a body also `Reason.TOO_LONG`.
        detail: what is wrong.
    """

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


def open_uncompressed(stored: IO[bytes], packing: str) -> io.BufferedReader:
    """What a compressed file holds, as a stream that can be read forward.

    Args:
        stored: the file; closed with the stream.
        packing: one of `PACKINGS`.

    Raises (while reading):
        DamagedStreamError: the file is cut off or damaged.
    """
    return io.BufferedReader(_UncompressedStream(stored, packing), CHUNK_BYTES)


class _UncompressedStream(io.RawIOBase):
    def __init__(self, stored: IO[bytes], packing: str) -> None:
        self._stored = stored
        self._n_stored = self._n_read = 0
        self._chunks = _unpacked(self._next_stored, packing)
        self._left = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        target = memoryview(buffer).cast("B")
        while not self._left:
            try:
                self._left = memoryview(next(self._chunks))
            except StopIteration:
                return 0
            except EOFError as error:
                what = f"cut off before its end: its {self._n_stored:,} bytes hold {self._n_read:,} bytes of text"
                raise DamagedStreamError(Reason.CUT_OFF, what) from error
        n_bytes = min(len(target), len(self._left))
        target[:n_bytes] = self._left[:n_bytes]
        self._left = self._left[n_bytes:]
        self._n_read += n_bytes
        if self._n_read > BOMB_BYTES and self._n_read > BOMB_RATIO * self._n_stored:
            detail = f"a decompression bomb: {self._n_stored:,} bytes have grown to {self._n_read:,} so far"
            raise DamagedStreamError(Reason.DAMAGED, detail)
        return n_bytes

    def close(self) -> None:
        if not self.closed:
            self._stored.close()
        super().close()

    def _next_stored(self) -> bytes:
        block = self._stored.read(CHUNK_BYTES)
        self._n_stored += len(block)
        return block


class _Zstandard:
    """A frame, with the interface of zlib's; its library has no limit for what comes out, only for what goes in."""

    def __init__(self) -> None:
        import zstandard

        self._inflater = zstandard.ZstdDecompressor().decompressobj()
        self.eof, self.unconsumed_tail, self.unused_data = False, memoryview(b""), b""
        self._piece = _ZSTD_PIECE_BYTES[0]

    def decompress(self, data: bytes | memoryview, max_length: int) -> bytes:
        view = memoryview(data)
        chunk = self._inflater.decompress(view[: self._piece])
        self.eof, self.unconsumed_tail = self._inflater.eof, view[self._piece :]
        least, most = _ZSTD_PIECE_BYTES
        self._piece = min(2 * self._piece, most) if len(chunk) <= max_length else least
        if self.eof:
            self.unused_data = self._inflater.unused_data + self.unconsumed_tail
        return chunk


_FORMATS: dict[str, tuple[str, tuple[bytes, ...], Callable[[], Any]]] = {
    ".gz": ("gzip", (b"\x1f\x8b",), lambda: zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)),
    ".bz2": ("bzip2", (b"BZh",), bz2.BZ2Decompressor),
    ".xz": ("xz", (b"\xfd7zXZ\0",), lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY_BYTES)),
    ".zst": (
        "Zstandard",
        (b"\x28\xb5\x2f\xfd", *(bytes([kind]) + b"\x2a\x4d\x18" for kind in range(0x50, 0x60))),  # and frames to skip
        _Zstandard,
    ),
}
"""The name of each format, what a member begins with, and what unpacks one."""


def _unpacked(read: Callable[[], bytes], packing: str) -> Iterator[bytes]:
    """What the members hold, in pieces.

    Raises:
        EOFError: the file ends within a member.
        DamagedStreamError: it is damaged.
    """
    name, beginnings, make = _FORMATS[packing]
    padding = b"\0" if packing in (".gz", ".xz") else b""  # behind a member, as their own tools take it
    data, begins = read(), True
    while data:
        while len(data) < len(beginnings[0]) and (block := read()):
            data += block
        if not data.startswith(beginnings):
            if any(beginning.startswith(data) for beginning in beginnings):
                raise EOFError
            what = f"not a {name} file" if begins else f"something else follows the {name} data"
            raise DamagedStreamError(Reason.DAMAGED, what)
        inflater = make()
        while not inflater.eof:
            try:
                chunk = inflater.decompress(data, CHUNK_BYTES)
            except Exception as error:  # "Error -3 while decompressing data: incorrect data check"
                what = f"damaged {name} data: {str(error).split(': ')[-1]}"
                raise DamagedStreamError(Reason.DAMAGED, what) from error
            data = getattr(inflater, "unconsumed_tail", b"")  # the others keep what they have not used
            if chunk:
                yield chunk
            elif not data and not inflater.eof and not (data := read()):
                raise EOFError
        data, begins = inflater.unused_data.lstrip(padding), False
        while not data and (block := read()):
            data = block.lstrip(padding)
