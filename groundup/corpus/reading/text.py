"""Plain text to records: a file is one document, or several with a separator between them.

`[corpus] separator` is looked for in every text file. Texts mention `<|endoftext|>` too, so this one counts where it
stands alone on its line, as in TinyStories; in a file whose first MiB has none such, but three or more of which most
touch text or a line end on both sides, wherever it stands. Any other separator counts wherever it stands.

A file without one is one document, used whole or set aside whole; what stands between separators is a document for
itself, as a line of JSON is, so that a long file can be read in pieces. Documents beyond `max_document_mib` are split
at paragraphs or lines.
"""

from __future__ import annotations

import codecs
import itertools
import re
from collections.abc import Generator, Iterator
from typing import IO

from groundup.corpus.document import OnSetAside, Record, excerpt_of
from groundup.corpus.reading.compressed import BLOCK_BYTES
from groundup.corpus.reading.intake import limit_bytes, make_record, refuse_binary, too_long, unread
from groundup.corpus.reading.refusal import READ_ERRORS, fault_of
from groundup.corpus.reading.sources import InputFile
from groundup.recipe import CorpusSettings

DOCUMENT = "document"
EXCERPT_BYTES = 400
HEAD_BYTES = 1 << 20
_MENTIONED = b"<|endoftext|>"
_BETWEEN_TEXTS = re.compile(rb"(?<![ \t\"'`(\[{<])<\|endoftext\|>(?![ \t\"'`)\]}>,.;:])")
_LEAST_BETWEEN_TEXTS = 3
_AHEAD = 2  # bytes that show whether a line ends here


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
    place = DOCUMENT
    try:
        with source.open() as handle:
            data = handle.read(HEAD_BYTES if start else max(HEAD_BYTES, limit + 1))
        if refuse_binary(source, data, None if start else set_aside):
            return 0
        is_alone = separator == _MENTIONED and not _stands_between(data[:HEAD_BYTES])
        if not start:
            has_separator = _has(data, separator, is_alone)
            if len(data) <= limit and not has_separator:
                yield from make_record(source, data.decode(), settings, set_aside)
                return 1
            del data
            if not has_separator and not _holds(source, separator, is_alone):
                place, separator, stop = "part", b"", None
        with source.open() as handle:
            documents = _Documents(handle, separator, is_alone)
            documents.go_to(start, stop)
            while not documents.at_end and (stop is None or documents.position < stop):
                first = documents.position
                for position, part, size in documents.parts(limit):
                    # Nothing in front of the first separator or behind the last one is no document.
                    is_blank = position == first and (not part or part.isspace())
                    if is_blank and (documents.at_end if first else documents.goes_on(limit)):
                        continue
                    number += 1
                    if size > len(part):
                        beginning = excerpt_of(part)
                        set_aside(too_long(source, "a line of ", size, beginning, settings, position, place, number))
                        continue
                    try:
                        yield from make_record(source, part.decode(), settings, set_aside, position, place, number)
                    except UnicodeDecodeError as error:
                        set_aside(fault_of(error).of(source.label, place, number, excerpt_of(part), size, position))
                documents.pass_separator()
    except (*READ_ERRORS, UnicodeDecodeError) as error:
        set_aside(unread(source, error, position if number else 0, place, number))
    return number


def can_be_cut(separator: str) -> bool:
    """Whether any occurrence of a separator can be told from its surroundings alone.

    Not so where its end is its beginning too: in `=====`, which of the `==` is a separator depends on the file's start.
    """
    return bool(separator) and not any(separator.endswith(separator[:n]) for n in range(1, len(separator)))


def separated_in_words(n_documents: int, separator: str) -> str:
    """What to say of text files in which a separator stands."""
    return f"{n_documents:,} documents were cut out of text files at {separator!r} (separator)"


def _stands_between(head: bytes) -> bool:
    """Whether `<|endoftext|>` separates texts within lines, in a file that begins so."""
    count = head.count(_MENTIONED)
    if count < _LEAST_BETWEEN_TEXTS or _has(head, _MENTIONED, True):
        return False
    n_between = len(_BETWEEN_TEXTS.findall(head))
    return n_between >= _LEAST_BETWEEN_TEXTS and 2 * n_between > count


def _has(data: bytes, separator: bytes, is_alone: bool) -> bool:
    if not separator or separator not in data:
        return False
    return not is_alone or re.search(rb"(?:\A|\n)" + re.escape(separator) + rb"(?:\r?\n|\Z)", data) is not None


def _holds(source: InputFile, separator: bytes, is_alone: bool) -> bool:
    """Whether a long file has a separator; if not, it was read through, and is whole and UTF-8.

    Raises:
        UnicodeDecodeError: with `start` counted from the file's beginning.
        OSError, RefusedError: it cannot be read to its end.
    """
    fault: UnicodeDecodeError | None = None
    decoder = codecs.getincrementaldecoder("utf-8")()
    with source.open() as handle:
        documents = _Documents(handle, separator, is_alone)
        for piece in itertools.chain(documents.scan(), [b""]):
            start = documents.position - len(piece) - len(decoder.getstate()[0])
            try:
                decoder.decode(piece if fault is None else b"", final=not piece and documents.at_end)
            except UnicodeDecodeError as error:
                fault = UnicodeDecodeError("utf-8", b"", start + error.start, start + error.start + 1, error.reason)
                decoder.reset()
        if fault is not None and documents.at_end:
            raise fault
        return not documents.at_end


class _Documents:
    """The documents of a file, one after the other: what stands between separators; all of it, if there is none.

    Attributes:
        position: of the next byte.
        at_end: whether the file's end has been reached, and nothing is left.
    """

    def __init__(self, handle: IO[bytes], separator: bytes, is_alone: bool) -> None:
        self._handle, self._separator, self._is_alone = handle, separator, is_alone
        self._reach = len(separator) - 1 + _AHEAD  # so many bytes at the buffer's end may yet become a separator
        self._last = b"\n"  # the byte in front of the buffer
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
        if self.position:
            self._handle.seek(self.position - 1)
            self._last = self._handle.read(1)
        for _ in self.scan():
            if stop is not None and self.position >= stop:
                return
        if not self.at_end:
            self._take(self._next_separator() + len(self._separator))

    def scan(self) -> Iterator[bytes]:
        """Pass over what is certain to stand before the next separator, in pieces."""
        while self._next_separator() < 0 and not self.at_end:
            yield self._take(len(self._buffer) if self._is_read else max(0, len(self._buffer) - self._reach))
            if not self._is_read:
                self._fill()

    def parts(self, limit: int) -> Iterator[tuple[int, bytes, int]]:
        """The next document, where it begins and its size; if it is longer than `limit`, in parts.

        Each part (its last line end not counted) ends with the last empty line that lets it fit, else with the last
        line. A longer line is passed over: of it only the beginning is given, with its whole size.
        """
        is_first, enough = True, limit + self._reach + 1  # behind a separator that begins within the limit
        while True:
            while (at := self._next_separator()) < 0 and not self._is_read and len(self._buffer) <= enough:
                self._fill()
            begins, size = self.position, len(self._buffer) if at < 0 else at
            if size <= limit:
                if size or is_first:
                    yield begins, self._take(size), size
                return
            end = _border(self._buffer, limit)
            if end:
                yield begins, self._take(end), end
            else:
                beginning = bytes(self._buffer[: min(limit, EXCERPT_BYTES)])
                self._pass_line()
                yield begins, beginning, self.position - begins
            is_first = False

    def _pass_line(self) -> None:
        while True:
            at = self._next_separator()
            # What is certain not to begin a separator.
            most = at if at >= 0 else len(self._buffer) - (0 if self._is_read else self._reach)
            newline = self._buffer.find(b"\n", 0, max(0, most))
            self._take(newline + 1 or max(0, most))
            if newline >= 0 or at >= 0 or self._is_read:
                return
            self._fill()

    def pass_separator(self) -> None:
        """Go on behind the separator at which reading has ended."""
        self._take(len(self._separator))

    def goes_on(self, most: int) -> bool:
        """Whether a separator comes here, and behind it, as far as `most` bytes show, something that is not blank."""
        n_bytes = len(self._separator)
        while not (solid := self._buffer[n_bytes:].strip()) and not self._is_read and len(self._buffer) < most:
            self._fill()
        return bool(self._separator and solid)

    def _next_separator(self) -> int:
        """Where in the buffer the next separator begins, or -1; each byte is looked at once."""
        if self._separator and self._found < self.position:
            begin = max(0, self._searched - self.position)
            stop = max(0, len(self._buffer) - (0 if self._is_read else _AHEAD))
            while (
                (at := self._buffer.find(self._separator, begin, stop)) >= 0 and self._is_alone and not self._counts(at)
            ):
                begin = at + 1
            self._found = self.position + at if at >= 0 else -1
            self._searched = self.position + (at + 1 if at >= 0 else max(begin, stop - len(self._separator) + 1))
        return self._found - self.position if self._found >= 0 else -1

    def _counts(self, at: int) -> bool:
        """Whether a separator stands alone on its line."""
        end = at + len(self._separator)
        before, behind = self._buffer[at - 1 : at] if at else self._last, self._buffer[end : end + _AHEAD]
        return before == b"\n" and (behind == b"\r\n" or behind[:1] in b"\n")

    def _fill(self) -> None:
        block = self._handle.read(BLOCK_BYTES)
        self._is_read = not block
        self._buffer += block

    def _take(self, n_bytes: int) -> bytes:
        with memoryview(self._buffer) as view:  # no copy of a copy
            taken = bytes(view[:n_bytes])
        self._last = taken[-1:] or self._last
        del self._buffer[:n_bytes]
        self.position += len(taken)
        return taken


def _border(text: bytearray, limit: int) -> int:
    """Where a part of at most `limit` bytes ends: behind its last empty line, else its last line; 0: there is none."""
    last = line_end = text.rfind(b"\n", 0, limit) + 1
    while line_end:
        begins = text.rfind(b"\n", 0, line_end - 1) + 1
        if text[begins:line_end].isspace():
            return line_end
        line_end = begins
    return last or (limit + 1 if text[limit : limit + 1] == b"\n" else 0)
