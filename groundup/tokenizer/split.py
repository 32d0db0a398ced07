"""How text is cut before tokens are made of it: the split regexes, and cuts that do not change any split's result.

Only regexes that llama.cpp and the Hub implement are offered, in the Hub's spelling: a tokenizer with a regex of its
own could not be used in another program.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from tokenizers import Regex, pre_tokenizers

from groundup.tokenizer.special import REPLACEMENT

_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

PATTERNS = {"qwen2": _QWEN2, "llama3": _LLAMA3, "gpt2": _GPT2}
"""By name: qwen2 (digits one by one), llama3 (digits by threes) and gpt2 (runs of digits)."""

LLAMA3_FROM = 32_768
"""Vocabularies of this size and more have room for numbers of three digits."""

_SURROGATE = re.compile("[\ud800-\udfff]")
_LETTER = "[A-Za-z\u0430-\u044f\u3041-\u3096\u4e00-\u9fa5\uac00-\ud7a3]"
_SAFE_CUT = re.compile(f"(?<={_LETTER})[ \n](?={_LETTER})")
_SPACE_CUT = re.compile(f"(?<={_LETTER}) (?={_LETTER})")
PIECE_CHARACTERS = 1 << 16
LONGEST_WORD = 24  # characters of a word of WordPiece


def default_split(vocab_size: int) -> str:
    """The split of a recipe that names none: qwen2, or llama3 from `LLAMA3_FROM` entries on."""
    return "llama3" if vocab_size >= LLAMA3_FROM else "qwen2"


def pre_tokenizer(split: str, before: list[pre_tokenizers.PreTokenizer] | None = None) -> pre_tokenizers.PreTokenizer:
    """The cuts of a split, and behind them each byte as a printable letter (GPT-2's byte-level alphabet).

    Args:
        split: a key of `PATTERNS`.
        before: further cuts, made in the pieces of the split before they become letters.
    """
    more = before or []
    if split == "gpt2":
        # ByteLevel has this regex built in, and is what other programs look for.
        whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        if not more:
            return whole
    cut = pre_tokenizers.Split(Regex(PATTERNS[split]), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([cut, *more, byte_level])


def word_pre_tokenizer(split: str) -> pre_tokenizers.PreTokenizer:
    """The cuts of a split for WordPiece: `#` by itself, as it marks what continues a word, and no word too long."""
    longest = Regex(rf"[\s\S]{{1,{LONGEST_WORD}}}")
    return pre_tokenizer(split, [pre_tokenizers.Split("#", "isolated"), pre_tokenizers.Split(longest, "isolated")])


def replace_surrogates(text: str) -> str:
    """The text with U+FFFD for every lone surrogate, which has no UTF-8 form (Python allows it in a str)."""
    return text if text.isascii() else _SURROGATE.sub(REPLACEMENT, text)


def cut_into_pieces(text: str, characters: int = PIECE_CHARACTERS, *, drop_space: bool = False) -> Iterator[str]:
    """Cut a long text where every split regex cuts it too: before a space or line end between two letters.

    Encoding the pieces is encoding the text, in a fraction of the memory (which the engine spends per
    character of its input), and on all cores.

    Args:
        text: any text.
        characters: a piece is cut at the first such place behind so many; without one it goes on.
        drop_space: cut at spaces alone and leave them out, for tokenizers that put one before every text.
    """
    start = 0
    place = _SPACE_CUT if drop_space else _SAFE_CUT
    while len(text) - start > characters:
        cut = place.search(text, start + characters)
        if cut is None:
            break
        yield text[start : cut.start()]
        start = cut.end() if drop_space else cut.start()
    yield text[start:] if start else text
