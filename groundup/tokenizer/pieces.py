"""How a text is cut, shown safely: each token's text with whatever could upset a terminal or a page spelled out."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.text import Text

from groundup.tokenizer.tokenizer import Tokenizer

COLOURS = ("on #264653", "on #6a3d2e", "on #3b5d38", "on #57406b", "on #7a5c1e")
"""Backgrounds that take turns, all dark enough for white text."""

_NAMED = {"\n": "↵", "\t": "⇥", "\r": "␍"}
_HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


@dataclass(frozen=True)
class Piece:
    """One token of a text.

    Attributes:
        id: its id.
        shown: its text, safe to show; bytes that are only a part of a character as `⟨e2 82⟩`.
        bytes: its bytes, in hex.
    """

    id: int
    shown: str
    bytes: str


def cut(tokenizer: Tokenizer, text: str) -> list[Piece]:
    """The tokens of a text, in order."""
    return [piece_of(tokenizer, index) for index in tokenizer.encode(text)]


def piece_of(tokenizer: Tokenizer, index: int) -> Piece:
    """One token by its id."""
    value = tokenizer.token_bytes(index)
    if index in tokenizer.special_ids:
        return Piece(index, tokenizer.decode([index], skip_special=False), "")
    try:
        shown = readable(value.decode())
    except UnicodeDecodeError:
        shown = f"⟨{value.hex(' ')}⟩"
    return Piece(index, shown, value.hex(" "))


def readable(text: str) -> str:
    """A text whose every character can be seen: no control character, no invisible or direction mark."""
    return "".join(_shown(character) for character in text)


def in_colour(pieces: Sequence[str], *, colour: bool = True) -> Text:
    """Pieces as they are shown, side by side: backgrounds in turn, or bars between them where there is no colour."""
    if not colour:
        return Text("│".join(pieces))
    text = Text()
    for place, piece in enumerate(pieces):
        text.append(piece, style=f"#ffffff {COLOURS[place % len(COLOURS)]}")
        if piece.endswith("↵"):
            text.append("\n")
    return text


def to_json(pieces: Sequence[Piece], text: str) -> dict[str, Any]:
    """The pieces and their sums, JSON-able."""
    n_bytes = len(text.encode("utf-8", errors="replace"))
    return {
        "tokens": len(pieces),
        "bytes": n_bytes,
        "bytes_per_token": n_bytes / len(pieces) if pieces else None,
        "pieces": [asdict(piece) for piece in pieces],
    }


def _shown(character: str) -> str:
    if character in _NAMED:
        return _NAMED[character]
    category = unicodedata.category(character)
    if category == "Cc" and ord(character) < 0x20:
        return chr(0x2400 + ord(character))
    if category in _HIDDEN:
        return f"\\u{{{ord(character):x}}}"
    if unicodedata.combining(character) and category == "Mn":
        return f"◌{character}"
    return "\u00b7" if character == " " else f"\\u{{{ord(character):x}}}" if category == "Zs" else character
