"""The part of the text that is held out for validation.

By document: a document is held out if the 64-bit hash of its id is below `share`·2⁶⁴. An id is made of the
text, so that depends on nothing else: not on a file, a place or the other documents. Where so few documents
fall that way that one part would be empty, the one with the nearest hash changes sides.
By tail: the last `share` of every document is held out, cut at a paragraph, a line or a word near there.

Several processes can look at different documents; what they saw is merged before any divides.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import xxhash

from groundup.corpus.document import Document, derived_id
from groundup.errors import DataError
from groundup.recipe import CorpusSettings

AUTO_DOCUMENTS = 20
HASH_SEED = 20  # the ids themselves order and partition the documents: a split by them would not be independent


class Holdout:
    """Sees every kept document's id once (`see`), then says where each belongs (`split_of`, `divide`)."""

    def __init__(self, settings: CorpusSettings) -> None:
        self._settings = settings
        self._bound = int(settings.validation_share * 2**64)
        self._n_seen = 0
        self._lowest = 2**64
        self._highest = -1

    def see(self, document_id: str) -> None:
        """Take note of one kept document; copies that mixing made are not seen again."""
        value = _hash(document_id)
        self._n_seen += 1
        self._lowest = min(self._lowest, value)
        self._highest = max(self._highest, value)

    def merge(self, other: Holdout) -> None:
        """Take note of what another process saw, in any order."""
        self._n_seen += other._n_seen
        self._lowest = min(self._lowest, other._lowest)
        self._highest = max(self._highest, other._highest)

    @property
    def by(self) -> str:
        """ "document" or "tail". DataError: the former was asked for, but there are not two different documents."""
        asked = self._settings.validation_by
        distinct = self._lowest < self._highest
        if asked == "document" and not distinct:
            raise DataError(
                "[corpus] validation_by = 'document': there are not two different documents to divide.",
                "Set [corpus] validation_by = 'tail' to hold out the end of each document.",
            )
        if asked == "auto":
            return "document" if distinct and self._n_seen >= AUTO_DOCUMENTS else "tail"
        return asked

    @property
    def moved(self) -> str | None:
        """What was done lest a part be empty, in words."""
        if self.by == "tail" or self._lowest < self._bound <= self._highest:
            return None
        part = "validation" if self._lowest >= self._bound else "training"
        return f"no document's hash falls to {part}; the one that comes nearest was put there"

    def divide(self, document: Document) -> list[Document]:
        """By tail: a document's training part and its validation part."""
        return _cut_tail(document, self._settings.validation_share)

    def split_of(self, document_id: str) -> Literal["train", "validation"]:
        """Where a whole document belongs, by the id that was seen of it: "train" or "validation"."""
        bound = min(max(self._bound, self._lowest + 1), self._highest)
        return "validation" if _hash(document_id) < bound else "train"


def _hash(document_id: str) -> int:
    return xxhash.xxh3_64_intdigest(document_id.encode(), seed=HASH_SEED)


def _cut_tail(document: Document, share: float) -> list[Document]:
    text = document.text
    cut = _border_near(text, round(len(text) * (1 - share)))
    head, tail = text[:cut].rstrip(), text[cut:].strip("\n")
    if not head or not tail.strip():
        return [dataclasses.replace(document, split="train")]
    tail_id = derived_id(document.id, "validation")
    return [
        dataclasses.replace(document, text=head, split="train"),
        dataclasses.replace(document, id=tail_id, text=tail, split="validation"),
    ]


def _border_near(text: str, cut: int) -> int:
    """The last end of a paragraph, line or word up to `cut`, at most a quarter of the tail before it."""
    cut = min(max(cut, 1), len(text) - 1)
    earliest = max(1, cut - max(1, (len(text) - cut) // 4))
    for border in ("\n\n", "\n", " "):
        found = text.rfind(border, earliest, cut)
        if found >= 0:
            return found + len(border)
    return cut
