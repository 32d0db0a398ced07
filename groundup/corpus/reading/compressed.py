"""Compressed files as streams of what they hold: gzip, Zstandard and bzip2, in bounded memory, to the last byte.

A stream ends only where its file ends and every member of it is whole. Otherwise it raises `DamagedStreamError`
instead of looking finished: cut off before the end, a checksum that does not fit, bytes of something else behind the
data, or a bomb. What was read before the fault has been handed out by then. Formats: RFC 1952 (gzip), RFC 8878
(Zstandard, read block by block, so that no input makes more than 128 KiB at once).
"""

from __future__ import annotations

import bz2
import io
import zlib
from collections.abc import Callable, Iterator
from typing import IO, TYPE_CHECKING

from groundup.corpus.document import Reason

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

PACKINGS = (".gz", ".zst", ".bz2")
BLOCK_BYTES = 1 << 20
CHUNK_BYTES = 1 << 18
BOMB_BYTES = 1 << 30
BOMB_RATIO = 1000
"""A stream that has grown past both, in bytes and in bytes a stored byte, is no text but an attack."""

_GZIP_MAGIC = b"\x1f\x8b"
_BZIP2_MAGIC = b"BZh"
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_ZSTD_PREFIX_BYTES = 5  # magic and frame descriptor, from which the header's length follows
_ZSTD_BLOCK_BYTES = 1 << 17
_ZSTD_RLE, _ZSTD_RESERVED = 1, 3


class DamagedStreamError(Exception):
    """A file does not hold what its format promises.

    Attributes:
        reason: `Reason.CUT_OFF` or `Reason.DAMAGED`.
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
    return io.BufferedReader(_UncompressedStream(stored, _DECODERS[packing]), CHUNK_BYTES)


class _UncompressedStream(io.RawIOBase):
    def __init__(self, stored: IO[bytes], decode: Callable[[Callable[[], bytes]], Iterator[bytes]]) -> None:
        self._stored = stored
        self._n_stored = self._n_read = 0
        self._chunks = decode(self._next_stored)
        self._left = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        target = memoryview(buffer).cast("B")
        while not self._left:
            try:
                chunk = next(self._chunks, None)
            except _CutOffError as error:
                raise DamagedStreamError(
                    Reason.CUT_OFF,
                    f"cut off before its end: its {self._n_stored:,} bytes hold {self._n_read:,} bytes of text",
                ) from error
            if chunk is None:
                return 0
            self._left = memoryview(chunk)
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


class _CutOffError(Exception):
    """The file ends within a member."""


def _gunzip(read: Callable[[], bytes]) -> Iterator[bytes]:
    data = read()
    begins = True
    while data:
        data = _expect(_GZIP_MAGIC, data, read, "gzip", begins)
        inflater = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
        while not inflater.eof:
            data = data or read()
            try:
                chunk = inflater.decompress(data, CHUNK_BYTES)
            except zlib.error as error:
                # "Error -3 while decompressing data: incorrect data check"
                raise DamagedStreamError(Reason.DAMAGED, f"damaged gzip data: {str(error).split(': ')[-1]}") from error
            if not data and not chunk and not inflater.eof:
                raise _CutOffError
            data = inflater.unconsumed_tail
            yield chunk
        # Zeros behind a member are padding (as gzip itself takes them).
        data, begins = inflater.unused_data.lstrip(b"\0"), False
        while not data and (block := read()):
            data = block.lstrip(b"\0")


def _bunzip2(read: Callable[[], bytes]) -> Iterator[bytes]:
    data = read()
    begins = True
    while data:
        data = _expect(_BZIP2_MAGIC, data, read, "bzip2", begins)
        inflater = bz2.BZ2Decompressor()
        while not inflater.eof:
            if inflater.needs_input:
                data = data or read()
                if not data:
                    raise _CutOffError
            try:
                chunk = inflater.decompress(data, CHUNK_BYTES)
            except OSError as error:
                raise DamagedStreamError(Reason.DAMAGED, f"damaged bzip2 data: {error}") from error
            data = b""  # the inflater keeps what it has not used
            yield chunk
        data, begins = inflater.unused_data or read(), False


def _unzstd(read: Callable[[], bytes]) -> Iterator[bytes]:
    import zstandard

    stored = _Stored(read)
    begins = True
    while not stored.at_end():
        prefix = stored.up_to(_ZSTD_PREFIX_BYTES)
        if prefix[1:4] == b"\x2a\x4d\x18" and prefix[0] & 0xF0 == 0x50:  # a frame to skip
            size = prefix[4:] + stored.take(8 - len(prefix))
            stored.skip(int.from_bytes(size, "little"))
            continue
        _expect(_ZSTD_MAGIC, prefix, lambda: b"", "Zstandard", begins)
        begins = False
        try:
            yield from _zstd_frame(prefix + stored.take(_ZSTD_PREFIX_BYTES - len(prefix)), stored)
        except zstandard.ZstdError as error:
            detail = f"damaged Zstandard data: {str(error).split(': ')[-1]}"
            raise DamagedStreamError(Reason.DAMAGED, detail) from error


def _zstd_frame(header: bytes, stored: _Stored) -> Iterator[bytes]:
    """One frame (RFC 8878, 3.1.1), a block at a time."""
    import zstandard

    header += stored.take(zstandard.frame_header_size(header) - len(header))
    inflater = zstandard.ZstdDecompressor().decompressobj()
    inflater.decompress(header)
    is_last = False
    while not is_last:
        head = stored.take(3)
        fields = int.from_bytes(head, "little")
        is_last, kind, size = bool(fields & 1), fields >> 1 & 3, fields >> 3
        if kind == _ZSTD_RESERVED or size > _ZSTD_BLOCK_BYTES:
            raise DamagedStreamError(Reason.DAMAGED, "damaged Zstandard data: a block that cannot be")
        yield inflater.decompress(head + stored.take(1 if kind == _ZSTD_RLE else size))
    if zstandard.get_frame_parameters(header).has_checksum:
        yield inflater.decompress(stored.take(4))


class _Stored:
    """A file's bytes by number instead of by block."""

    def __init__(self, read: Callable[[], bytes]) -> None:
        self._read = read
        self._block = memoryview(b"")

    def at_end(self) -> bool:
        if not self._block:
            self._block = memoryview(self._read())
        return not self._block

    def up_to(self, n_bytes: int) -> bytes:
        """So many bytes, or those that are left."""
        found = bytes(self._block[:n_bytes])
        self._block = self._block[n_bytes:]
        while len(found) < n_bytes and not self.at_end():
            missing = n_bytes - len(found)
            found += self._block[:missing]
            self._block = self._block[missing:]
        return found

    def take(self, n_bytes: int) -> bytes:
        found = self.up_to(n_bytes)
        if len(found) < n_bytes:
            raise _CutOffError
        return found

    def skip(self, n_bytes: int) -> None:
        while n_bytes:
            n_bytes -= len(self.take(min(n_bytes, BLOCK_BYTES)))


def _expect(magic: bytes, data: bytes, read: Callable[[], bytes], name: str, begins: bool) -> bytes:
    """The data, long enough to show the format's first bytes.

    Raises:
        DamagedStreamError: it does not begin with them.
        _CutOffError: it ends within them.
    """
    while len(data) < len(magic) and magic.startswith(data):
        block = read()
        if not block:
            raise _CutOffError
        data += block
    if not data.startswith(magic):
        detail = f"not a {name} file" if begins else f"something else follows the {name} data"
        raise DamagedStreamError(Reason.DAMAGED, detail)
    return data


_DECODERS = {".gz": _gunzip, ".bz2": _bunzip2, ".zst": _unzstd}
