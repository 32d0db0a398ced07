"""A text too long to be one document, cut into parts between paragraphs, else between lines, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from groundup.corpus.document import excerpt_of
from groundup.corpus.reading.compressed import BLOCK_BYTES


class Lines(Protocol):
    """All that is asked of a stream here."""

    def readline(self, size: int = -1, /) -> bytes:
        """The next line, at most `size` bytes of it."""


@dataclass(frozen=True)
class TooLong:
    """A line longer than a document may be, which was passed over."""

    size_bytes: int
    excerpt: str


def split_long(handle: Lines, limit: int) -> Iterator[tuple[int, bytes | TooLong]]:
    """Cut text into parts of at most `limit` bytes (its last line end not counted), each with the byte it begins at.

    Each part ends with the last empty line that lets it fit, else with the last line. At most twice `limit`
    bytes are held at a time.
    """
    part = bytearray()
    position = 0
    border = 0  # the end of the part's last empty line
    while line := handle.readline(limit + 1):
        if is_too_long(line, limit):
            if part:
                yield position, bytes(part)
            position += len(part)
            part.clear()
            passed = TooLong(len(line) + skip_line(handle), excerpt_of(line))
            yield position, passed
            position += passed.size_bytes
            border = 0
            continue
        while part and len(part) + len(line) > limit:
            end = border or len(part)
            yield position, bytes(part[:end])
            position += end
            del part[:end]
            border = 0
        part += line
        if line.isspace():
            border = len(part)
    if part:
        yield position, bytes(part)


def is_too_long(line: bytes, limit: int) -> bool:
    """Whether `readline(limit + 1)` gave only the beginning of a line."""
    return len(line) > limit and not line.endswith(b"\n")


def skip_line(handle: Lines, most: int | None = None) -> int:
    """Read on to the end of the line, or over `most` bytes, without keeping them; returns the bytes passed."""
    n_skipped = 0
    while most is None or n_skipped < most:
        block = handle.readline(BLOCK_BYTES if most is None else min(BLOCK_BYTES, most - n_skipped))
        n_skipped += len(block)
        if not block or block.endswith(b"\n"):
            break
    return n_skipped
