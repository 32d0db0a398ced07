"""A batch of texts as numpy arrays: its characters by class, its words, its lines and its paragraphs.

In: texts. Out: `TextBatch`, whose arrays are computed when first asked for, so that only what the rules need is
computed. All texts are laid end to end, one character an element; what lies outside ASCII is looked up in a table that
learns every character when it first comes, so words are exactly those of `words.split_words`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from groundup.corpus.words import PADDING, CharacterTable, is_unspaced, merged, mix, span_hashes, word_breaks

SPACE, LETTER, LINE_END, SENTENCE_END, CLOSER, BULLET = (1 << bit for bit in range(6))

SENTENCE_ENDS = ".!?…。！？．｡।॥؟۔።։។៕။།"
WITHOUT_SENTENCE_ENDS = "".join(map(chr, range(0xE00, 0xF00)))
"""Thai and Lao end a sentence with a space, so a line that ends with a letter of theirs may end a sentence."""
LINE_ENDS = SENTENCE_ENDS + "\"'”’»」』" + WITHOUT_SENTENCE_ENDS
CLOSERS = "\"'”’»)]）」』"
BULLETS = "-*•‣⁃▪●◦"

_ODD = np.uint64(0xD6E8FEB86659FD93)
# What of eight bytes read at a word's start belongs to a word of so many bytes (little-endian).
_KEPT_BYTES = np.array([(1 << (8 * size)) - 1 for size in range(9)], dtype=np.uint64)

Ints = NDArray[np.int64]
Hashes = NDArray[np.uint64]
Bools = NDArray[np.bool_]


def _class_of(character: str) -> int:
    return (
        SPACE * character.isspace()
        | LETTER * character.isalpha()
        | LINE_END * (character in LINE_ENDS)
        | SENTENCE_END * (character in SENTENCE_ENDS)
        | CLOSER * (character in CLOSERS)
        | BULLET * (character in BULLETS)
    )


_ASCII_CLASSES = bytes(_class_of(chr(code)) for code in range(128)) + bytes(128)
_CLASSES = CharacterTable(_class_of)


class TextBatch:
    """Texts laid end to end, each followed by a line break.

    Attributes:
        n: number of texts.
        bounds: (n + 1,) where each text begins; text i is [bounds[i], bounds[i + 1] - 1).
        bytes: (characters + padding,) the ASCII code of every character, 255 beyond ASCII.
        classes: (characters,) bits: white space, letter, end of a sentence, ...
        codes: (characters,) code points, or None where all is ASCII.
        word_starts, word_ends: (words,) where each word begins and ends.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self.n = len(texts)
        lengths = np.fromiter((len(text) for text in texts), dtype=np.int64, count=self.n)
        self.bounds: Ints = np.concatenate(([0], np.cumsum(lengths + 1)))
        joined = "\n".join(texts) + "\n" if texts else ""
        self.codes: NDArray[np.uint32] | None = None
        breaks: list[int] = []
        if joined.isascii():
            data = joined.encode()
            self.classes = np.frombuffer(data.translate(_ASCII_CLASSES), dtype=np.uint8)
            self.bytes = np.frombuffer(data + bytes(PADDING), dtype=np.uint8)
        else:
            breaks = self._take_unicode(joined)
        space = (self.classes & SPACE).view(np.bool_)
        edges = np.flatnonzero(space[1:] != space[:-1]) + 1
        if self.n and not space[0]:
            edges = np.concatenate(([0], edges))
        self.word_starts: Ints = edges[0::2]
        self.word_ends: Ints = edges[1::2]
        if breaks:
            inner = np.array(breaks)
            self.word_starts, self.word_ends = merged(self.word_starts, inner), merged(self.word_ends, inner)

    def _take_unicode(self, joined: str) -> list[int]:
        """Look at every character; returns where words begin without white space before them."""
        codes = np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), dtype="<u4")
        others = np.flatnonzero(codes >= 128)
        data = np.zeros(len(codes) + PADDING, dtype=np.uint8)
        data[: len(codes)] = codes
        data[others] = 255
        classes = np.frombuffer(bytearray(data[: len(codes)].tobytes().translate(_ASCII_CLASSES)), dtype=np.uint8)
        classes[others] = _CLASSES[codes[others]]
        unspaced = others[is_unspaced(codes[others])]
        self.codes, self.classes, self.bytes = codes, classes, data
        self._others = others
        return word_breaks(joined, unspaced)

    @property
    def n_words(self) -> int:
        """Words of all texts together."""
        return len(self.word_starts)

    @cached_property
    def first_words(self) -> Ints:
        """(n + 1,) the number of the first word of each text, and of all words."""
        return np.searchsorted(self.word_starts, self.bounds)

    @cached_property
    def words(self) -> Ints:
        """(n,) words of each text."""
        return np.diff(self.first_words)

    @cached_property
    def word_lengths(self) -> Ints:
        """(words,) characters."""
        return self.word_ends - self.word_starts

    @cached_property
    def characters_before(self) -> Ints:
        """(words + 1,) characters of words that stand before each word."""
        return np.concatenate(([0], np.cumsum(self.word_lengths)))

    @cached_property
    def word_characters(self) -> Ints:
        """(n,) characters of words of each text."""
        return np.diff(self.characters_before[self.first_words])

    @cached_property
    def text_of_word(self) -> Ints:
        """(words,) which text each word belongs to."""
        return np.repeat(np.arange(self.n), self.words)

    @cached_property
    def newlines(self) -> Ints:
        """Where line breaks stand, also those that end each text."""
        return np.flatnonzero(self.bytes[: self.bounds[-1]] == 10)

    @cached_property
    def breaks_before(self) -> Ints:
        """(words + 1,) line breaks between each word and the one before it."""
        return np.bincount(np.searchsorted(self.word_starts, self.newlines), minlength=self.n_words + 1)

    @cached_property
    def lines(self) -> Ints:
        """The number of the first word of each line, and of all words."""
        return self._parts(1)

    @cached_property
    def paragraphs(self) -> Ints:
        """The number of the first word of each paragraph (after a blank line or a text's end), and of all words."""
        return self._parts(2)

    def _parts(self, n_breaks: int) -> Ints:
        begins = self.breaks_before >= n_breaks
        begins[self.first_words] = True
        begins[-1] = True
        return np.flatnonzero(begins)

    @cached_property
    def beginnings(self) -> Hashes:
        """(words,) the first eight characters of each word, A to Z as small letters; compare with `letters`."""
        # Eight bytes as a number, from every byte on (no copy).
        eights = np.ndarray((len(self.bytes) - 7,), dtype="<u8", buffer=self.lowered, strides=(1,))
        return eights[self.word_starts] & _KEPT_BYTES.take(self.word_lengths, mode="clip")

    @cached_property
    def lowered(self) -> bytes:
        """`bytes` with A to Z as small letters."""
        return self.bytes.tobytes().lower()

    @cached_property
    def word_hashes(self) -> Hashes:
        """(words,) 64 bits of each word; equal within one batch only."""
        hashes = span_hashes(self.bytes.data, self.word_starts, self.word_ends)
        hashes ^= self.word_lengths.view(np.uint64) * _ODD  # a word may end in zeros
        if self.codes is not None and self.n_words:  # in `bytes` all characters beyond ASCII are one
            word = np.searchsorted(self.word_starts, self._others, side="right") - 1
            inside = (word >= 0) & (self._others < self.word_ends[word])
            word, others = word[inside], self._others[inside]
            values = (others - self.word_starts[word]).view(np.uint64) << np.uint64(32) | self.codes[others]
            mix(values)
            np.add.at(hashes, word, values)
        return hashes

    @cached_property
    def _hash_sums(self) -> Hashes:
        """(words + 1,) sums of the hashes of the words before each, times powers: a polynomial of every run."""
        sums = np.zeros(self.n_words + 1, dtype=np.uint64)
        np.cumsum(self.word_hashes * _powers(self.n_words)[0], out=sums[1:])
        return sums

    def hashes_of(self, parts: Ints) -> Hashes:
        """64 bits of each run of words; `parts`: (parts + 1,) the first word of each, and the number of words."""
        sums = self._hash_sums[parts]
        hashes: Hashes = (sums[1:] - sums[:-1]) * _powers(self.n_words)[1][parts[:-1]]
        mix(hashes)
        return hashes

    def count(self, positions: Ints) -> Ints:
        """(n,) how many of the sorted positions lie in each text (its final line break included)."""
        return np.diff(np.searchsorted(positions, self.bounds))

    def sum_words(self, words: Ints) -> NDArray[np.float64]:
        """(n,) how many of these words, by their numbers, each text has."""
        return np.bincount(self.text_of_word[words], minlength=self.n).astype(np.float64)


_power_table = np.ones((2, 0), dtype=np.uint64)


def _powers(n: int) -> Hashes:
    """(2, n) the powers of an odd number modulo 2^64, and those of its inverse."""
    global _power_table
    if _power_table.shape[1] < n:
        table = np.ones((2, max(1 << 17, n)), dtype=np.uint64)
        table[0, 1:], table[1, 1:] = _ODD, pow(int(_ODD), -1, 1 << 64)
        _power_table = np.cumprod(table, axis=1, dtype=np.uint64)
    return _power_table[:, :n]


def letters(text: str) -> int:
    """The value that `TextBatch.beginnings` have for a word that is this text (up to eight characters)."""
    return int.from_bytes(text.encode("ascii"), "little")
