"""Exact duplicates: texts that are equal after normalization, found by their 128-bit xxh3 digest."""

from __future__ import annotations

import xxhash


class ExactDuplicates:
    """Remembers every text it has seen, 16 bytes for its digest and 16 for its document.

    Among n different texts two share a digest with probability about n²/2¹²⁹: never, in practice.
    """

    def __init__(self) -> None:
        self._first: dict[bytes, bytes] = {}

    def first(self, text: str, document_id: str) -> str | None:
        """The id of the earlier document with this text, or None if it is new (it is then remembered)."""
        digest = xxhash.xxh3_128_digest(text.encode())
        earlier = self._first.setdefault(digest, bytes.fromhex(document_id))
        return earlier.hex() if earlier.hex() != document_id else None
