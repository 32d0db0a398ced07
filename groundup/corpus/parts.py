"""A text too long to be one document, cut into parts between paragraphs, else between lines, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

from groundup.corpus.document import excerpt_of
from groundup.corpus.sources import BLOCK_BYTES


@dataclass(frozen=True)
class TooLong:
    """A line longer than a document may be, which was passed over."""

    size_bytes: int
    excerpt: str


def split_long(handle: IO[bytes], limit: int) -> Iterator[bytes | TooLong]:
    """Cut text into parts of at most `limit` bytes (its last line end not counted).

    Each part ends with the last empty line that lets it fit, else with the last line. At most twice `limit`
    bytes are held at a time.
    """
    part: list[bytes] = []
    size = 0
    border = 0  # how many lines of the part there are up to its last empty one
    while line := handle.readline(limit + 1):
        if is_too_long(line, limit):
            if part:
                yield b"".join(part)
            part, size, border = [], 0, 0
            yield TooLong(len(line) + skip_line(handle), excerpt_of(line))
            continue
        while part and size + len(line) > limit:
            end = border or len(part)
            yield b"".join(part[:end])
            part, border = part[end:], 0
            size = sum(map(len, part))
        part.append(line)
        size += len(line)
        if not line.strip():
            border = len(part)
    if part:
        yield b"".join(part)


def is_too_long(line: bytes, limit: int) -> bool:
    """Whether `readline(limit + 1)` gave only the beginning of a line."""
    return len(line) > limit and not line.endswith(b"\n")


def skip_line(handle: IO[bytes]) -> int:
    """Read on to the end of the line without keeping it; returns the bytes passed."""
    n_skipped = 0
    while block := handle.readline(BLOCK_BYTES):
        n_skipped += len(block)
        if block.endswith(b"\n"):
            break
    return n_skipped
