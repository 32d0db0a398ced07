"""What the corpus is made of: records as read, documents as kept, and what was set aside, each with its reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

import xxhash


class Record(NamedTuple):
    """One text as a reader gives it: whole, normalized, not yet judged.

    Attributes:
        text: its text.
        position: where it begins in its file: a byte offset (of the uncompressed stream) or a row; unique in the file.
        place: what counts its place for people: "line", "row", "record", "document", "part" or "" (the whole file).
        number: which of these, from 1 on, counted from where the reading began.
        source: the source that the record itself names, or "" (then it is the file).
        url: where it was published, or "".
        key: the record's own id, or "".
    """

    text: str
    position: int
    place: str = ""
    number: int = 0
    source: str = ""
    url: str = ""
    key: str = ""


@dataclass(frozen=True, slots=True)
class Document:
    """One text of the corpus.

    Attributes:
        id: 32 hex digits, made of its text (copies: of their number too): the same wherever the text came from.
        text: its text.
        source: the file it came from, as the user named it, or the source that its record names.
        language: the detector's code, such as "en" ("" before the language filter).
        split: "train" or "validation".
        url: where it was published, or "".
        score: the quality classifier's score, or None.
    """

    id: str
    text: str
    source: str
    language: str = ""
    split: str = "train"
    url: str = ""
    score: float | None = None


class Reason(StrEnum):
    """Why a record or a file is not among the documents. Quality rules have names of their own beside these."""

    UNREADABLE = "unreadable"
    LINK = "link outside"
    DAMAGED = "damaged file"
    CUT_OFF = "cut off"
    BINARY = "binary file"
    INVALID_UTF8 = "invalid UTF-8"
    INVALID_JSON = "invalid JSON"
    INVALID_CSV = "invalid CSV"
    NO_TEXT = "no text field"
    TOO_LONG = "too long"
    NUL = "NUL characters"
    GARBLED = "garbled characters"
    NO_CONTENT = "no content extracted"
    TIMEOUT = "extraction timeout"
    CRASH = "extraction crash"
    EMPTY = "empty"
    NOT_TEXT = "not a text record"
    SHORT = "short"
    LANGUAGE = "language"
    PREDICATE = "predicate"
    CLASSIFIER = "classifier"
    TOXIC = "toxic words"
    DUPLICATE = "duplicate"
    NEAR_DUPLICATE = "near-duplicate"
    REPEATED_PARTS = "repeated parts"
    CONTAMINATED = "contaminated"
    MIX = "mix"


_FAULTS = frozenset(
    {
        Reason.UNREADABLE, Reason.LINK, Reason.DAMAGED, Reason.CUT_OFF, Reason.BINARY, Reason.INVALID_UTF8,
        Reason.INVALID_JSON, Reason.INVALID_CSV, Reason.NO_TEXT, Reason.TOO_LONG, Reason.NUL, Reason.GARBLED,
        Reason.TIMEOUT, Reason.CRASH,
    }
)  # fmt: skip


def is_fault(reason: str) -> bool:
    """Whether the input is broken, not merely unwanted."""
    return reason in _FAULTS


@dataclass(frozen=True, slots=True)
class SetAside:
    """One record, or a whole file, that was left out.

    Attributes:
        source: the file.
        place, number, position: as in `Record`; `place` is "" for the whole file.
        reason: why, as a word that is counted.
        detail: why, in this case.
        excerpt: how its text begins.
        size_bytes: how much was left out, as far as it was read.
    """

    source: str
    place: str
    number: int
    reason: str
    detail: str
    excerpt: str = ""
    size_bytes: int = 0
    position: int = 0

    @property
    def record(self) -> str:
        """Where in the file: "line 12", "part 3"; "" for the whole file."""
        return f"{self.place} {self.number}".strip() if self.place else ""

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


def text_id(text: str) -> str:
    """128-bit xxh3 of a text, in hex: the id of the document that has it."""
    return xxhash.xxh3_128_hexdigest(text.encode())


def derived_id(document_id: str, what: str) -> str:
    """The id of a copy or a part of a document: 128-bit xxh3 of its id and `what`, in hex."""
    return xxhash.xxh3_128_hexdigest(f"{document_id}\0{what}".encode())
