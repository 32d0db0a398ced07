"""From raw text to a record: one normal form, and a reason for whatever cannot be a document.

Every reader (plain text, JSONL, tables, pages) gives its texts to `make_record` and its faults to `unread`, so that the
same text becomes the same record and the same fault the same message in every format.
"""

from __future__ import annotations

import codecs
import re
import unicodedata
from typing import Literal

import numpy as np

from groundup.corpus.document import OnSetAside, Reason, Record, SetAside, excerpt_of
from groundup.corpus.reading.refusal import RefusedError, fault_of
from groundup.corpus.reading.sources import InputFile
from groundup.corpus.words import CharacterTable
from groundup.recipe import CorpusSettings

MOST_GARBLED, MOST_GARBLED_SHARE = 3, 0.001
"""A text with more garbled characters than the sum of both (the second times its length) was misread."""
# What two characters of ASCII begin with, if not a byte order mark (RFC 4627, section 3).
_WIDE = re.compile(
    rb"(\xff\xfe\0\0|\0\0\xfe\xff|[^\0]\0\0\0|\0\0\0[^\0])|(\xff\xfe|\xfe\xff|[^\0]\0[^\0]\0|\0[^\0]\0[^\0])"
)  # fmt: skip
_CONVERT, _RENAME, _LEAVE = "save its text as a text file first", "give it the ending {}", "leave it out"
_BINARY: dict[bytes, tuple[str, str]] = {
    b"%PDF-": ("a PDF", _CONVERT),
    b"%!PS-": ("PostScript", _CONVERT),
    b"{\\rtf": ("rich text (RTF)", _CONVERT),
    b"PK\3\4": ("a zip archive, as .docx, .xlsx, .odt and .epub are too", "unpack it, or " + _CONVERT),
    b"\xd0\xcf\x11\xe0": ("a document of Office before 2007", _CONVERT),
    b"7z\xbc\xaf": ("a 7z archive", "unpack it"),
    b"Rar!\x1a\7": ("a RAR archive", "unpack it"),
    b"\x1f\x8b\x08": ("gzip", _RENAME.format(".gz")),
    b"\x28\xb5\x2f\xfd": ("Zstandard", _RENAME.format(".zst")),
    b"BZh91AY&SY": ("bzip2", _RENAME.format(".bz2")),
    b"\xfd7zXZ\0": ("xz", _RENAME.format(".xz")),
    b"PAR1\x15": ("a Parquet table", _RENAME.format(".parquet")),
    b"ARROW1\0": ("an Arrow table", "save it as Parquet"),
    b"SQLite format 3\0": ("an SQLite database", "export its texts as CSV"),
    b"\x93NUMPY": ("an array of numpy", _LEAVE),
    b"\x7fELF": ("a program", _LEAVE),
    **dict.fromkeys((b"\x89PNG\r", b"\xff\xd8\xff", b"GIF89a"), ("a picture", _LEAVE)),
    **dict.fromkeys((b"OggS\0", b"ID3\3", b"ID3\4"), ("sound", _LEAVE)),
    b"\x89HDF\r": ("HDF5", _CONVERT),
}
"""What such files begin with, what they are, and the way out."""
_MOST_MARKS = 30
_LONG = 2_000  # in a shorter text the square of a run of marks is a millisecond
_UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
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
    for step, longest in ((10, _MOST_MARKS // 10), (1, _MOST_MARKS + 1)):  # first every tenth character
        codes = np.frombuffer(text[::step].encode("utf-32-le", "surrogatepass"), "<u4")
        is_mark = _IS_MARK[codes]
        if b"\1" * longest not in is_mark.tobytes():
            return text
    marks = re.escape("".join(map(chr, set(codes[is_mark > 0].tolist()))))
    return re.sub(f"([{marks}]{{{_MOST_MARKS}}})(?=[{marks}])", "\\1\u034f", text)


_IS_MARK = CharacterTable(lambda one: all(map(unicodedata.combining, unicodedata.normalize("NFKD", one))))
"""Characters that are nothing but combining marks."""


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


def refuse_binary(file: InputFile, head: bytes, set_aside: OnSetAside | None) -> bool:
    """Whether a file that begins with `head` (20 bytes suffice) is of a kind that is neither text in UTF-8 nor a page.

    Args:
        file: the file.
        head: its uncompressed beginning.
        set_aside: called with the file, its kind and the way out; None: somebody else has been told.
    """
    kind, fix = next((_BINARY[magic] for magic in _BINARY if head.startswith(magic)), ("", ""))
    reason, excerpt = Reason.BINARY, ""
    if not kind:
        wide = None if file.kind == "page" else _WIDE.match(head)  # a page may be in UTF-16
        if wide is None:
            return False
        reason, width = Reason.INVALID_UTF8, 32 if wide.lastindex == 1 else 16
        kind, fix = f"UTF-{width}", "save it as UTF-8"
        order = "" if head[:2] in _UTF16_MARKS or head[2:4] in _UTF16_MARKS else "-be" if head[0] == 0 else "-le"
        excerpt = excerpt_of(head[:400].decode(f"utf-{width}{order}", errors="replace"))
    if set_aside is not None:
        set_aside(SetAside(file.label, "", 0, reason, f"the file is {kind}: {fix}", excerpt, file.size_bytes()))
    return True


def make_record(
    file: InputFile, text: str, settings: CorpusSettings, set_aside: OnSetAside,
    position: int = 0, place: str = "", number: int = 0, source: str = "", url: str = "", key: str = "",
) -> tuple[Record, ...]:  # fmt: skip
    """The record of a text, normalized, or none if there is no text in it (then it was set aside).

    Args:
        file: where it was read.
        text: as it was read; encodable as UTF-8.
        settings: for the normal form.
        set_aside: called with the reason why there is no record.
        position, place, number, source, url, key: as in `Record`.
    """
    most = settings.max_document_mib * 2**20
    if 4 * len(text) > most and (size := len(text.strip("\r\n").encode())) > most:
        set_aside(too_long(file, "", size, excerpt_of(text), settings, position, place, number))
        return ()
    normal = normalize(text.removeprefix("\ufeff"), settings.unicode)
    garbled = n_garbled(normal)
    few = MOST_GARBLED + MOST_GARBLED_SHARE * len(normal)
    if normal and (not garbled or (garbled <= few and "\0" not in normal)):
        return (Record(normal, position, place, number, source, url, key),)
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
    return ()


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
    file: InputFile, error: Exception, position: int = 0, place: str = "", n_before: int = 0, so_far: str = ""
) -> SetAside:
    """The record of a file that could not be read to its end.

    Args:
        file: the file.
        error: one of `READ_ERRORS`, or UnicodeDecodeError with the place of the fault.
        position: of the first byte or row that was not read.
        place: as in `Record`.
        n_before: lines, rows or records before the fault.
        so_far: what becomes of the file's other parts, where it is not that these are read and nothing else.
    """
    if n_before and not so_far:
        so_far = f"the {n_before:,} {place}s before it are read"
    fault, excerpt = fault_of(error), excerpt_of(getattr(error, "object", b""))
    if not so_far:
        return fault.of(file.label, "", 0, excerpt, file.size_bytes(), position)
    return RefusedError(fault.reason, f"{fault.detail}; {so_far}").of(
        file.label, place, n_before + 1, excerpt, 0, position
    )
