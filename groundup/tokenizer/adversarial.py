"""Adversarial texts: what two engines must encode alike before one may replace the other.

All planes of Unicode, halves of surrogate pairs, control characters, long runs, names of control tokens, digits,
mixed white space, joined emoji, stacked accents. The same seed gives the same texts.
"""

from __future__ import annotations

import random

from groundup.tokenizer.special import CONTROL_TOKENS, spare_token

_SPACES = " \t\n\r\x0b\x0c\x1c\x85\xa0\u1680\u2003\u2028\u2029\u202f\u205f\u3000\u200b\ufeff"
_ACCENTS = "\u0300\u0301\u0327\u0338\u0489\u20dd\ufe0f\u093c\u0e31"
_NAMES = (*CONTROL_TOKENS, *(spare_token(index) for index in range(4)), "<|im_start|>", "<s>", "[UNK]", "##", "▁")
_CONTRACTIONS = ("'s", "'S", "'ll", "'LL", "'ſ", "'Re", "n't", "'\u212a", "’s", "'", "''", "'ve", "'d'm")
_EMOJI = ("👩‍👩‍👧‍👦", "🏳️‍🌈", "🇩🇪", "👍🏽", "🫨", "🩷", "❤️", "1️⃣", "🏴\U000e0067\U000e007f")
_WORDS = (
    "the", "The", " of", "don't", "naïve", "Straße", "ﬁn", "İstanbul", "привет", "世界", "こんにちは", "안녕", "नमस्ते",
    "ไทย", "שלום", "مرحبا", "x_1", "http://a.b/c?d=1&e=%20", "</div>", "int main(){}", "e=mc²", "½", "٣٤", "Ⅷ", "１２",
    "𝟘𝟙", "3.14159", "1,000,000", "2026-11-21", "0x1F", "a\u0308", "ǅ", "ʰ", "ªº", "\U00016d40",
    "\u088f", "꟎", "\U000323b0",
)  # fmt: skip
_BLOCKS = (
    (0x0, 0x20), (0x20, 0x7F), (0x7F, 0x100), (0x100, 0x250), (0x300, 0x370), (0x370, 0x800), (0x800, 0x1000),
    (0x1000, 0x2000), (0x2000, 0x2100), (0x2100, 0x3000), (0x3000, 0xA000), (0xA000, 0xD800), (0xD800, 0xE000),
    (0xE000, 0x10000), (0x10000, 0x20000), (0x20000, 0x30000), (0x30000, 0xE0000), (0xE0000, 0xE01F0),
    (0xF0000, 0x110000),
)  # fmt: skip


def adversarial_texts(count: int, seed: int) -> list[str]:
    """So many adversarial texts, some empty, most short, a few long."""
    rng = random.Random(seed)
    return ["".join(_atom(rng) for _ in range(rng.choice((0, 1, 1, 2, 3, 5, 8, 13)))) for _ in range(count)]


def _atom(rng: random.Random) -> str:
    kind = rng.randrange(12)
    if kind == 0:
        blocks = (rng.choice(_BLOCKS) for _ in range(rng.randrange(1, 12)))
        return "".join(chr(rng.randrange(*block)) for block in blocks)
    if kind == 1:
        block = rng.choice(_BLOCKS)
        return "".join(chr(rng.randrange(*block)) for _ in range(rng.randrange(1, 12)))
    if kind == 2:
        return "".join(rng.choice(_SPACES) for _ in range(rng.randrange(1, 9)))
    if kind == 3:
        return rng.choice(_NAMES)
    if kind == 4:
        return rng.choice(_NAMES)[rng.randrange(3) : rng.choice((None, -1, -2))]
    if kind == 5:
        return "".join(rng.choice("0123456789٣४𝟘½") for _ in range(rng.randrange(1, 12)))
    if kind == 6:
        return rng.choice(_EMOJI) * rng.randrange(1, 4)
    if kind == 7:
        return rng.choice("aeonßж가") + "".join(rng.choice(_ACCENTS) for _ in range(rng.randrange(1, 6)))
    if kind == 8:
        run = rng.choice((*"a .!7\n中\u200d\x00", " \n", "ab", "\r\n", "=-"))
        return run * rng.choice((3, 17, 64, 64, 256, 257))
    if kind == 9:
        return rng.choice(_WORDS).rstrip() + rng.choice(_CONTRACTIONS)
    return rng.choice(("", " ", "\n", "  ")) + rng.choice(_WORDS)
