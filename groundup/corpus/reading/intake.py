"""From raw text to a record: one normal form, and a reason for whatever cannot be a document.

Every reader (plain text, JSONL, tables, pages) gives its texts to `make_record` and its faults to `unread`, so that the
same text becomes the same record and the same fault the same message in every format.
"""

from __future__ import annotations

import codecs
import functools
import re
import unicodedata
from typing import Any, Literal

import numpy as np

from groundup.corpus.document import OnSetAside, Reason, Record, SetAside, excerpt_of
from groundup.corpus.reading.compressed import DamagedStreamError
from groundup.corpus.reading.sources import InputFile
from groundup.recipe import CorpusSettings

READ_ERRORS = (OSError, DamagedStreamError)
"""What a stream of an `InputFile` raises while it is read."""
MOST_GARBLED, MOST_GARBLED_SHARE = 3, 0.001
"""A text with more garbled characters than the sum of both (the second times its length) was misread."""
_MOST_MARKS = 30
_LONG = 2_000  # in a shorter text the square of a run of marks is a millisecond
_BEYOND_MARKS = 0x1F000  # no combining mark has a higher code
_NO_CONTROLS = bytes(code for code in range(256) if code >= 32 or code in b"\n\t\f")
_C1 = re.compile(rb"\xc2[\x80-\x84\x86-\x9f]")  # but for U+0085, a line end


def normalize(text: str, form: Literal["NFC", "NFKC", "none"]) -> str:
    """One form for every text: `\\n` line ends, Unicode form ("NFC", "NFKC", "none"), no blank ends."""
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    if form != "none" and not text.isascii():
        text = unicodedata.normalize(form, limit_marks(text) if len(text) > _LONG else text)
    return text.strip("\n").rstrip()


def limit_marks(text: str) -> str:
    """The text in Unicode's stream-safe format: U+034F behind every 30 combining marks that follow each other.

    Without it, normalizing takes time in the square of such a run: minutes for 0.8 MB of marks out of order.
    https://www.unicode.org/reports/tr15/#Stream_Safe_Text_Format
    """
    is_mark, run = _marks()
    for step, longest in ((10, _MOST_MARKS // 10), (1, _MOST_MARKS + 1)):  # first every tenth character
        codes = np.frombuffer(text[::step].encode("utf-32-le", "surrogatepass"), "<u4")
        if b"\1" * longest not in is_mark[np.minimum(codes, len(is_mark) - 1)].tobytes():
            return text
    return run.sub("\\1\u034f", text)


@functools.cache
def _marks() -> tuple[Any, re.Pattern[str]]:
    """Which characters are nothing but combining marks, by their code; and a run of the most that may stay together."""
    decomposed = [unicodedata.normalize("NFKD", chr(code)) for code in range(_BEYOND_MARKS)]
    is_mark = np.array([all(map(unicodedata.combining, characters)) for characters in decomposed])
    marks = re.escape("".join(map(chr, np.flatnonzero(is_mark))))
    return is_mark, re.compile(f"([{marks}]{{{_MOST_MARKS}}})(?=[{marks}])")


def n_garbled(text: str) -> int:
    """How many of its characters no writer meant: U+FFFD, where bytes could not be decoded, and control characters."""
    n_replaced = 0 if text.isascii() else text.count("\ufffd")
    if text.isprintable():  # short texts of one line are: the rest takes as long as all else that is done with them
        return n_replaced
    data = text.encode()
    controls = data.translate(None, _NO_CONTROLS)
    if b"\x1b" in controls and b"\x1b$" in data:  # ISO-2022 changes to another alphabet so: all behind it is garbled
        return len(text)
    return n_replaced + len(controls) + (len(_C1.findall(data)) if b"\xc2" in data else 0)


def make_record(
    file: InputFile,
    text: str,
    settings: CorpusSettings,
    set_aside: OnSetAside,
    position: int = 0,
    place: str = "",
    number: int = 0,
    source: str = "",
    url: str = "",
    key: str = "",
) -> Record | None:
    """The record of a text, normalized, or None if there is no text in it (then it was set aside).

    Args:
        file: where it was read.
        text: as it was read; encodable as UTF-8.
        settings: for the normal form.
        set_aside: called with the reason why there is no record.
        position, place, number, source, url, key: as in `Record`.
    """
    normal = normalize(text.removeprefix("\ufeff"), settings.unicode)
    garbled = n_garbled(normal)
    few = MOST_GARBLED + MOST_GARBLED_SHARE * len(normal)
    if normal and (not garbled or (garbled <= few and "\0" not in normal)):
        return Record(normal, position, place, number, source, url, key)
    if normal and "\0" not in normal:
        reason = Reason.GARBLED
        detail = f"{garbled:,} of {len(normal):,} characters are U+FFFD or control characters: a wrong encoding?"
    elif normal:
        reason, detail = Reason.NUL, f"at character {normal.find(chr(0))}: a binary or a UTF-16 file?"
    else:
        reason, detail = Reason.EMPTY, "no text but blanks" if text.removeprefix("\ufeff") else "no text"
    size = len(text.encode())
    excerpt = excerpt_of(normal.replace("\0", "␀"))
    set_aside(SetAside(file.label, place, number, reason, detail, excerpt, size, position))
    return None


def too_long(
    file: InputFile, what: str, size: int, excerpt: str, settings: CorpusSettings,
    position: int = 0, place: str = "", number: int = 0,
) -> SetAside:  # fmt: skip
    """The record of a text beyond `max_document_mib`; `what` names it, such as "a line of ", or is ""."""
    detail = f"{what}{size:,} bytes; the limit is {settings.max_document_mib:g} MiB"
    return SetAside(file.label, place, number, Reason.TOO_LONG, detail, excerpt, size, position)


def limit_bytes(settings: CorpusSettings) -> int:
    """The longest that a document may be."""
    return int(settings.max_document_mib * 2**20)


def unread(
    file: InputFile, error: BaseException, position: int = 0, place: str = "", number: int = 0, so_far: str = ""
) -> SetAside:
    """The record of a file that could not be read to its end.

    Args:
        file: the file.
        error: one of `READ_ERRORS`, or UnicodeDecodeError with the place of the fault.
        position: of the first byte or row that was not read.
        place: as in `Record`.
        number: of the first line, row or record that was not read.
        so_far: what was used before the fault, such as "12 records before it are used".
    """
    reason, excerpt = Reason.UNREADABLE, ""
    if isinstance(error, UnicodeDecodeError):
        reason = Reason.INVALID_UTF8
        detail, excerpt = invalid_utf8(error)
    elif isinstance(error, DamagedStreamError):
        reason, detail = error.reason, error.detail
    else:
        detail = getattr(error, "strerror", None) or str(error) or type(error).__name__
    if so_far:
        detail += f"; {so_far}"
    return SetAside(file.label, place, number, reason, detail, excerpt, 0 if so_far else file.size_bytes(), position)


def invalid_utf8(error: UnicodeDecodeError) -> tuple[str, str]:
    """What is wrong with these bytes, and how they look there."""
    detail = f"byte {error.start} ({error.reason})"
    if error.object[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        detail += ": this is UTF-16; save it as UTF-8"
    return detail, excerpt_of(error.object[max(0, error.start - 20) : error.start + 20])
