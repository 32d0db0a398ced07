"""Compressed files and bodies as what they hold: gzip, Zstandard, bzip2 and xz, in bounded memory, to the last byte.

A stream ends only where its file ends and every member of it is whole; otherwise it raises `RefusedError`, when
what was read before has been handed out: cut off, a checksum that does not fit, something else behind the data, a bomb.
(Python's own readers of bzip2 and xz take whatever follows the data for its end; pyarrow's streams know neither xz nor
gzip's padding of zeros, and say nothing of how far the stored bytes were read, which archives and bombs need.)
"""

from __future__ import annotations

import bz2
import contextlib
import io
import lzma
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any

from groundup.corpus.document import Reason
from groundup.corpus.reading.refusal import RefusedError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

PACKINGS = (".gz", ".zst", ".bz2", ".xz")
BLOCK_BYTES = 1 << 20
CHUNK_BYTES = 1 << 18
BOMB_BYTES, BOMB_RATIO = 1 << 30, 1000
"""A stream that has grown past both, in bytes and in bytes a stored byte, is no text but an attack."""
_XZ_MEMORY_BYTES = 256 << 20  # what the largest dictionary of the xz tool's own levels takes, four times
_PEEK_BYTES = 4096  # of a member as stored, from which it is told what it holds
_ZSTD_SKIPPED = [bytes([kind]) + b"\x2a\x4d\x18" for kind in range(0x50, 0x60)]  # frames to skip


_FORMATS: dict[str, tuple[str, tuple[bytes, ...], Callable[[], Any]]] = {
    ".gz": ("gzip", (b"\x1f\x8b\x08",), lambda: zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)),
    ".bz2": ("bzip2", (b"BZh",), bz2.BZ2Decompressor),
    ".xz": ("xz", (b"\xfd7zXZ\0",), lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY_BYTES)),
    ".zst": ("Zstandard", (b"\x28\xb5\x2f\xfd", *_ZSTD_SKIPPED), zstd.ZstdDecompressor),
    "zlib": ("deflate", (b"",), zlib.decompressobj),
    "deflate": ("deflate", (b"",), lambda: zlib.decompressobj(wbits=-zlib.MAX_WBITS)),
}
"""The name of each format, what a member begins with, and what unpacks one. The last two are of HTTP only."""


def packing_of(head: bytes) -> str:
    """What a file that begins so is packed with, whatever its name: one of `PACKINGS`, or ""."""
    return next((packing for packing in PACKINGS if head.startswith(_FORMATS[packing][1])), "")


def open_uncompressed(stored: IO[bytes], packing: str) -> io.BufferedReader:
    """What a compressed file holds, to be read forward. Reading raises `RefusedError` at cuts and damage."""
    return io.BufferedReader(Unpacker(stored, packing), CHUNK_BYTES)


class Unpacker(io.RawIOBase):
    """The members of a compressed file, in pieces or as a stream; `data` is what was read of the file already."""

    def __init__(self, stored: IO[bytes], packing: str, data: bytes = b"") -> None:
        self._stored, self._read, self._data, self._n_stored, self._n_read = stored, stored.read, data, len(data), 0
        self._name, self._beginnings, self._make = _FORMATS[packing]
        self._padding = b"\0" if packing in (".gz", ".xz") else b""  # behind a member, as their own tools take it
        self._stream, self._left = self.pieces(), memoryview(b"")

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, buffer: Any, /) -> int:
        """What comes next of `pieces()`, as much as fits."""
        self._left = self._left or memoryview(next(self._stream, b""))  # type: ignore[arg-type]  # faults are raised
        n_bytes = min(len(buffer), len(self._left))
        buffer[:n_bytes], self._left = self._left[:n_bytes], self._left[n_bytes:]
        return n_bytes

    def close(self) -> None:
        """Close the file too."""
        self._stored.close()
        super().close()

    def pieces(self, is_wanted: Callable[[bytes], object] | None = None) -> Iterator[bytes | RefusedError]:
        """What the members hold, in pieces. Raises `RefusedError` behind what was read before a fault.

        If `is_wanted`, told how a member begins, says so, b"" stands in front of it. With that, a fault is handed out
        like a piece, and reading goes on with the next member that is wanted.
        """
        is_behind = False
        while True:
            self._data = self._data.lstrip(self._padding)
            while len(self._data) < _PEEK_BYTES and (block := self._block()):
                self._data = (self._data + block).lstrip(self._padding)
            if not self._data:
                return
            fault, reason, is_within, searched = "", Reason.DAMAGED, False, 0
            is_torn = any(beginning.startswith(self._data) for beginning in self._beginnings)
            if is_torn or self._data.startswith(self._beginnings):
                inflater, data, searched = self._make(), self._data, 1
                while not fault and not inflater.eof:
                    try:
                        chunk = inflater.decompress(data, CHUNK_BYTES)
                    except Exception as error:  # "Error -3 while decompressing data: incorrect data check"
                        chunk, fault = b"", f"damaged {self._name} data: {str(error).split(': ')[-1]}"
                    data = getattr(inflater, "unconsumed_tail", b"")  # the others keep what they have not used
                    self._n_read += len(chunk)
                    if chunk and is_wanted and not is_within and is_wanted(chunk):
                        yield b""
                    if chunk:
                        yield chunk
                        is_within = True
                    elif not (data or fault or inflater.eof):
                        if data := self._block():
                            self._data, searched = data, 0
                        else:
                            reason, held = Reason.CUT_OFF, f"{self._n_read:,} bytes of text"
                            fault = f"cut off before its end: its {self._n_stored:,} bytes hold {held}"
                    if self._n_read > BOMB_BYTES and self._n_read > BOMB_RATIO * self._n_stored:
                        fault = f"a decompression bomb: {self._n_stored:,} bytes have grown to {self._n_read:,} so far"
                        self._data, self._read = b"", io.BytesIO().read
                if not fault:
                    self._data = inflater.unused_data
            else:
                fault = f"something else follows the {self._name} data" if is_behind else f"not a {self._name} file"
            is_behind = True
            if fault and not is_wanted:
                raise RefusedError(reason, fault, 0, is_within)
            if fault and is_wanted:
                n_lost = self._skip_to(is_wanted, searched)
                rest = "the next whole member" if self._data else "the file's end"
                reason = Reason.DAMAGED if self._data else reason  # a damaged member can look like one without an end
                yield RefusedError(reason, f"{fault}; {n_lost:,} bytes up to {rest} are lost", n_lost, is_within)

    def _skip_to(self, is_wanted: Callable[[bytes], object], at: int) -> int:
        """Go to the next member that is wanted, at `at` or behind it; returns how many stored bytes are passed."""
        n_passed, begins = 0, re.compile(b"|".join(map(re.escape, self._beginnings)))
        while (found := begins.search(self._data, at)) or (block := self._block()):
            if not found:
                at = max(at, len(self._data) - 5)  # where a mark may begin that the next block ends
                n_passed, self._data, at = n_passed + at, self._data[at:] + block, 0
                continue
            at = found.start()
            while len(self._data) - at < _PEEK_BYTES and (block := self._block()):
                self._data += block
            with contextlib.suppress(Exception):  # no member, whatever its library calls that
                if is_wanted(self._make().decompress(self._data[at : at + _PEEK_BYTES], _PEEK_BYTES)):
                    self._data = self._data[at:]
                    return n_passed + at
            at += 1
        n_passed, self._data = n_passed + len(self._data), b""
        return n_passed

    def _block(self) -> bytes:
        block = self._read(CHUNK_BYTES)
        self._n_stored += len(block)
        return block
