"""Plain text to records: a file is one document, or several with a separator between them.

`[corpus] separator` (`<|endoftext|>`, as in TinyStories) is looked for in every text file. A file without it is one
document, used whole or set aside whole; what stands between separators is a document for itself, as a line of JSON is,
so that a long file can be read in pieces. Documents beyond `max_document_mib` are split at paragraphs or lines.
"""

from __future__ import annotations

import codecs
from collections.abc import Generator, Iterator
from typing import IO

from groundup.corpus.document import OnSetAside, Reason, Record, SetAside
from groundup.corpus.reading.compressed import BLOCK_BYTES
from groundup.corpus.reading.intake import READ_ERRORS, invalid_utf8, limit_bytes, make_record, too_long, unread
from groundup.corpus.reading.parts import TooLong, split_long
from groundup.corpus.reading.sources import InputFile
from groundup.recipe import CorpusSettings

DOCUMENT = "document"


def read_text(
    source: InputFile, start: int, stop: int | None, settings: CorpusSettings, set_aside: OnSetAside
) -> Generator[Record, None, int]:
    """The records of the documents that begin at `start` or behind it and before `stop`.

    A file without a separator is read whole, whatever `stop` is.

    Returns:
        How many documents (of a file without a separator: parts) these were, empty ones included.
    """
    limit, separator = limit_bytes(settings), settings.separator.encode()
    number = position = 0
    try:
        if not start:
            with source.open() as handle:
                data = handle.read(limit + 1)
            has_separator = bool(separator) and separator in data
            if len(data) <= limit and not has_separator:
                record = make_record(source, data.decode(), settings, set_aside)
                if record is not None:
                    yield record
                return 1
            del data
            if not has_separator and not _holds(source, separator):
                return (yield from _read_parts(source, settings, set_aside))
        with source.open() as handle:
            documents = _Documents(handle, separator)
            documents.go_to(start, stop)
            while not documents.at_end and (stop is None or documents.position < stop):
                first = position = documents.position
                for offset, part in documents.parts(limit):
                    is_blank = isinstance(part, bytes) and not part.strip()
                    if is_blank and first and not offset and documents.at_end:
                        continue  # the line end behind the last separator
                    number += 1
                    record = _record(source, part, settings, set_aside, first + offset, DOCUMENT, number)
                    if record is not None:
                        yield record
                documents.pass_separator()
    except (*READ_ERRORS, UnicodeDecodeError) as error:
        if number:
            so_far = f"the {number:,} documents before it are read"
            set_aside(unread(source, error, position, DOCUMENT, number + 1, so_far))
        else:
            set_aside(unread(source, error))
    return number


def _read_parts(source: InputFile, settings: CorpusSettings, set_aside: OnSetAside) -> Generator[Record, None, int]:
    """One long text, which has been read through before."""
    number = 0
    with source.open() as handle:
        for number, (position, part) in enumerate(split_long(handle, limit_bytes(settings)), start=1):
            record = _record(source, part, settings, set_aside, position, "part", number)
            if record is not None:
                yield record
    return number


def can_be_cut(separator: str) -> bool:
    """Whether any occurrence of a separator can be told from its surroundings alone.

    Not so where its end is its beginning too: in `=====`, which of the `==` is a separator depends on the file's start.
    """
    return bool(separator) and not any(separator.endswith(separator[:n]) for n in range(1, len(separator)))


def _record(
    source: InputFile, part: bytes | TooLong, settings: CorpusSettings, set_aside: OnSetAside,
    position: int, place: str, number: int,
) -> Record | None:  # fmt: skip
    if isinstance(part, TooLong):
        set_aside(too_long(source, "a line of ", part.size_bytes, part.excerpt, settings, position, place, number))
        return None
    try:
        return make_record(source, part.decode(), settings, set_aside, position, place, number)
    except UnicodeDecodeError as error:
        detail, excerpt = invalid_utf8(error)
        set_aside(SetAside(source.label, place, number, Reason.INVALID_UTF8, detail, excerpt, len(part), position))
        return None


def _holds(source: InputFile, separator: bytes) -> bool:
    """Whether a long file has a separator; if not, it was read through, and is whole and UTF-8.

    Raises:
        UnicodeDecodeError: with `start` counted from the file's beginning.
        OSError, DamagedStreamError: it cannot be read to its end.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    fault: UnicodeDecodeError | None = None
    n_read, tail = 0, b""
    with source.open() as handle:
        while True:
            block = handle.read(BLOCK_BYTES)
            if separator:
                if separator in block or separator in tail + block[: len(separator)]:
                    return True
                tail = (tail + block[-len(separator) :])[-len(separator) :]
            begins = n_read - len(decoder.getstate()[0])
            try:
                if fault is None:
                    decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                start = begins + error.start
                fault = UnicodeDecodeError("utf-8", b"", start, start + 1, error.reason)
            if not block:
                break
            n_read += len(block)
    if fault is not None:
        raise fault
    return False


class _Documents:
    """A stream whose `readline` ends at a separator as it would at the file's end.

    Attributes:
        position: of the next byte.
        at_end: whether the file's end has been reached, and nothing is left.
    """

    def __init__(self, handle: IO[bytes], separator: bytes) -> None:
        self._handle, self._separator = handle, separator
        self._buffer = bytearray()
        self._is_read = False
        self._found = self._searched = -1  # where the next separator is, and up to where there is none
        self.position = 0

    @property
    def at_end(self) -> bool:
        while not self._buffer and not self._is_read:
            self._fill()
        return not self._buffer

    def go_to(self, start: int, stop: int | None) -> None:
        """Go to the first document that begins at `start` or behind it, or at least to `stop`."""
        if not start:
            return
        self.position = max(0, start - len(self._separator))
        self._handle.seek(self.position)
        while (at := self._next_separator()) < 0:
            self._take(len(self._buffer) if self._is_read else max(0, len(self._buffer) - len(self._separator) + 1))
            if self._is_read or (stop is not None and self.position >= stop):
                return
            self._fill()
        self._take(at + len(self._separator))

    def parts(self, limit: int) -> Iterator[tuple[int, bytes | TooLong]]:
        """The next document; if it is longer than `limit`, in parts, each with its place in it."""
        while (at := self._next_separator()) < 0 and not self._is_read and len(self._buffer) <= limit:
            self._fill()
        size = len(self._buffer) if at < 0 else at
        if size > limit:
            yield from split_long(self, limit)
        else:
            yield 0, self._take(size)

    def readline(self, size: int = -1, /) -> bytes:
        """The next line, at most `size` bytes of it; nothing where a separator or the file's end comes next."""
        while True:
            at = self._next_separator()
            # What is certain not to begin a separator.
            most = at if at >= 0 else len(self._buffer) - (0 if self._is_read else max(0, len(self._separator) - 1))
            newline = self._buffer.find(b"\n", 0, max(0, min(size, most)))
            if newline >= 0:
                return self._take(newline + 1)
            if most >= size or at >= 0 or self._is_read:
                return self._take(min(size, most))
            self._fill()

    def pass_separator(self) -> None:
        """Go on behind the separator at which reading has ended."""
        self._take(len(self._separator))

    def _next_separator(self) -> int:
        """Where in the buffer the next separator begins, or -1; each byte is looked at once."""
        if self._found < self.position:
            begin = max(0, self._searched - self.position)
            at = self._buffer.find(self._separator, begin)
            self._found = self.position + at if at >= 0 else -1
            looked = at + 1 if at >= 0 else len(self._buffer) - len(self._separator) + 1
            self._searched = self.position + max(begin, looked)
        return self._found - self.position if self._found >= 0 else -1

    def _fill(self) -> None:
        block = self._handle.read(BLOCK_BYTES)
        self._is_read = not block
        self._buffer += block

    def _take(self, n_bytes: int) -> bytes:
        taken = bytes(self._buffer[:n_bytes])
        del self._buffer[:n_bytes]
        self.position += len(taken)
        return taken
