"""Bytes as printable letters, GPT-2's way: a vocabulary of bytes that can be written in JSON and read by people.

Printable Latin-1 stands for itself; the other bytes stand for U+0100 and on: a space is `Ġ`, a line end `Ċ`.
"""

from __future__ import annotations

_PRINTABLE = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
_HIDDEN = [value for value in range(256) if value not in set(_PRINTABLE)]

LETTER_OF_BYTE = {value: chr(value) for value in _PRINTABLE} | {
    value: chr(256 + place) for place, value in enumerate(_HIDDEN)
}
"""The letter of each byte."""

BYTE_OF_LETTER = {letter: value for value, letter in LETTER_OF_BYTE.items()}
"""The byte of each letter."""

LETTERS = sorted(BYTE_OF_LETTER)
"""All 256 letters, in the order in which trainers give them ids."""


def spelled(token: bytes) -> str:
    """Bytes in letters."""
    return "".join(LETTER_OF_BYTE[value] for value in token)


def unspelled(token: str) -> bytes:
    """Letters in bytes.

    Raises:
        KeyError: a character that stands for no byte.
    """
    return bytes(BYTE_OF_LETTER[letter] for letter in token)
