"""What the corpus is made of: documents, and the records that were set aside, each with its reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

import xxhash


@dataclass(frozen=True, slots=True)
class Document:
    """One text.

    Attributes:
        id: 32 hex digits, from the source and the record's place in it: stable over runs, never used twice.
        text: its text.
        source: the file it came from, as the user named it.
        language: the detector's code, such as "en" ("" before the language filter).
        split: "train" or "validation".
    """

    id: str
    text: str
    source: str
    language: str = ""
    split: str = "train"


class Reason(StrEnum):
    """Why a record or a file is not among the documents."""

    UNREADABLE = "unreadable"
    DAMAGED_GZIP = "damaged gzip"
    INVALID_UTF8 = "invalid UTF-8"
    INVALID_JSON = "invalid JSON"
    NO_TEXT = "no text field"
    TOO_LONG = "too long"
    NUL = "NUL characters"
    EMPTY = "empty"
    SHORT = "short"
    LANGUAGE = "language"
    DUPLICATE = "duplicate"

    @property
    def is_fault(self) -> bool:
        """Whether the input is broken, not merely unwanted."""
        return self not in (Reason.EMPTY, Reason.SHORT, Reason.LANGUAGE, Reason.DUPLICATE)


@dataclass(frozen=True, slots=True)
class SetAside:
    """One record, or a whole file, that was left out.

    Attributes:
        source: the file.
        record: where in the file ("line 12", "part 3"; "" for the whole file).
        reason: why, as a word that is counted.
        detail: why, in this case.
        excerpt: how its text begins.
        size_bytes: how much was left out, as far as it was read.
    """

    source: str
    record: str
    reason: Reason
    detail: str
    excerpt: str = ""
    size_bytes: int = 0

    def __str__(self) -> str:
        where = f"{self.source}, {self.record}" if self.record else self.source
        return f"{where}: {self.reason}: {self.detail}" if self.detail else f"{where}: {self.reason}"


OnSetAside = Callable[[SetAside], None]

EXCERPT_CHARACTERS = 80


def excerpt_of(text: str | bytes) -> str:
    """The beginning of a text, on one line."""
    if isinstance(text, bytes):
        text = text[: 4 * EXCERPT_CHARACTERS].decode("utf-8", errors="replace")
    return " ".join(text[: 2 * EXCERPT_CHARACTERS].split())[:EXCERPT_CHARACTERS]


def document_id(source: str, record: str) -> str:
    """128-bit xxh3 of source and record, in hex."""
    return xxhash.xxh3_128_hexdigest(f"{source}\0{record}".encode())
