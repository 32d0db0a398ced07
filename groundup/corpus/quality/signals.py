"""Numbers that say how good a text is: what the published quality rules look at, one column a signal.

In: texts. Out: float32 columns by name (`SIGNALS` lists them). The rules with their thresholds are in `rules`;
`groundup.reference.quality` defines every signal in plain Python. A word is what stands between white space: with
a tokenizer's words punctuation would count, and the same thresholds throw out most technical text. In scripts without
spaces ICU finds the words (`split_words`). Shares of characters count the characters of words: white space has none.

Sources: Gopher (arXiv:2112.11446, appendix A), C4 (arXiv:1910.10683, section 2.2), FineWeb (arXiv:2406.17557,
section 3.6); n-gram shares as in RedPajama-v2 (arXiv:2411.12372, appendix).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from groundup.batches import batches
from groundup.corpus.quality import textbatch
from groundup.corpus.quality.repetition import Shares, repeated_ngrams, repeated_parts, share
from groundup.corpus.quality.textbatch import Bools, Ints, TextBatch, letters
from groundup.corpus.words import CharacterTable, split_words

BATCH_CHARACTERS = 1 << 20
SHORT_LINE_CHARACTERS = 30
STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")
CLOSERS_AFTER_SENTENCE = 3
TOP_NGRAMS = (2, 3, 4)
DUPLICATE_NGRAMS = (5, 6, 7, 8, 9, 10)


def signals(texts: Sequence[str], names: Sequence[str] | None = None) -> dict[str, NDArray[np.float32]]:
    """(len(texts),) float32 for each signal of these names (None: all of them); only these are computed."""
    names = list(SIGNALS) if names is None else list(names)
    unknown = [name for name in names if name not in SIGNALS]
    assert not unknown, f"no such signals: {unknown}"
    columns = {name: np.empty(len(texts), dtype=np.float32) for name in names}
    for is_ascii in (True, False):  # apart, since ASCII alone takes far less time
        places = [place for place, text in enumerate(texts) if text.isascii() == is_ascii]
        for part in batches(places if names else [], BATCH_CHARACTERS, lambda place: len(texts[place])):
            measures = _Measures([texts[place] for place in part], names)
            for name in names:
                columns[name][part] = SIGNALS[name].measure(measures)
    return columns


def toxic_share(texts: Sequence[str], words: frozenset[str]) -> NDArray[np.float32]:
    """Share of each text's words that are in a list.

    Words are runs of letters, digits and underscores, compared without case; an entry of several words counts
    each of them where they stand side by side.
    """
    entries = {tuple(_plain_words(entry)) for entry in words} - {()}
    single = {entry[0] for entry in entries if len(entry) == 1}
    longer = sorted((entry for entry in entries if len(entry) > 1), key=len)
    return np.array([_toxic_share(_plain_words(text), single, longer) for text in texts], dtype=np.float32)


_WORD = re.compile(r"\w+")


def _plain_words(text: str) -> list[str]:
    text = text.casefold()
    return _WORD.findall(text if text.isascii() else " ".join(split_words(text)))


def _toxic_share(words: list[str], single: set[str], longer: list[tuple[str, ...]]) -> float:
    present = set(words)
    if present.isdisjoint(single) and not any(present.issuperset(entry) for entry in longer):
        return 0.0
    covered = {place for place, word in enumerate(words) if word in single}
    for entry in longer:
        if present.issuperset(entry):
            for start in range(len(words) - len(entry) + 1):
                if tuple(words[start : start + len(entry)]) == entry:
                    covered.update(range(start, start + len(entry)))
    return len(covered) / len(words)


class _Measures(TextBatch):
    """A batch of texts with what signals are made of."""

    def __init__(self, texts: Sequence[str], names: Sequence[str]) -> None:
        super().__init__(texts)
        self._names = names

    @cached_property
    def ngrams(self) -> dict[tuple[str, int], Shares]:
        top = [n for n in TOP_NGRAMS if f"top_{n}gram_characters" in self._names]
        duplicate = [n for n in DUPLICATE_NGRAMS if f"duplicate_{n}gram_characters" in self._names]
        return repeated_ngrams(self, top, duplicate)

    @cached_property
    def duplicate_lines(self) -> tuple[Shares, Shares]:
        return repeated_parts(self, self.lines)

    @cached_property
    def duplicate_paragraphs(self) -> tuple[Shares, Shares]:
        return repeated_parts(self, self.paragraphs)

    @cached_property
    def n_lines(self) -> Ints:
        return np.diff(np.searchsorted(self.lines[:-1], self.first_words))

    @cached_property
    def line_begins(self) -> Ints:
        """Where each line's first character stands."""
        return self.word_starts[self.lines[:-1]]

    @cached_property
    def line_ends(self) -> Ints:
        """Where each line's last character stands."""
        return self.word_ends[self.lines[1:] - 1] - 1

    def per_word(self, values: NDArray[np.generic]) -> Shares:
        return share(values, self.words)

    def per_line(self, which: Bools) -> Shares:
        return share(self.sum_words(self.lines[:-1][which]), self.n_lines)

    def signs(self, sign: str) -> Ints:
        return self.count(np.flatnonzero(self.bytes[: self.bounds[-1]] == ord(sign)))


def _ellipses(m: _Measures) -> Shares:
    dots = np.flatnonzero(m.bytes == ord("."))
    runs = np.flatnonzero(np.concatenate(([True], dots[1:] != dots[:-1] + 1))) if len(dots) else dots
    lengths = np.diff(np.append(runs, len(dots)))
    found = m.count(np.repeat(dots[runs], lengths // 3))
    return m.per_word(found if m.codes is None else found + m.count(np.flatnonzero(m.codes == ord("…"))))


def _alphabetic_words(m: _Measures) -> Shares:
    letter = (m.classes & textbatch.LETTER).view(np.bool_)
    # Most words begin with a letter; of the others every character is looked at.
    doubtful = np.flatnonzero(~letter[m.word_starts])
    if len(doubtful):
        spans = np.stack((m.word_starts[doubtful], m.word_ends[doubtful]), axis=1).ravel()
        doubtful = doubtful[~np.logical_or.reduceat(letter, spans)[0::2]]
    return m.per_word(m.words - m.sum_words(doubtful))


def _stop_words(m: _Measures) -> Ints:
    has = np.zeros((len(STOP_WORDS), m.n), dtype=np.bool_)
    short = np.flatnonzero(m.word_lengths <= max(map(len, STOP_WORDS)))
    beginnings, texts = m.beginnings[short], m.text_of_word[short]
    for row, word in enumerate(STOP_WORDS):
        has[row, texts[beginnings == letters(word)]] = True
    return has.sum(axis=0)


def _ellipsis_lines(m: _Measures) -> Shares:
    ends = m.line_ends
    # Before a line's beginning there is a line break or the batch's end (zeros), never a dot.
    dots = (m.bytes[ends] == ord(".")) & (m.bytes[ends - 1] == ord(".")) & (m.bytes[ends - 2] == ord("."))
    return m.per_line(dots if m.codes is None else dots | (m.codes[ends] == ord("…")))


def _short_lines(m: _Measures) -> Shares:
    widths = m.line_ends + 1 - m.line_begins
    if m.codes is not None:
        wide = np.flatnonzero(_IS_WIDE[m.codes])
        widths += np.searchsorted(wide, m.line_ends, side="right") - np.searchsorted(wide, m.line_begins)
    return m.per_line(widths <= SHORT_LINE_CHARACTERS)


_IS_WIDE = CharacterTable(lambda character: unicodedata.east_asian_width(character) in "WF")
"""Characters as wide as two Latin letters, which say about as much (Unicode's East Asian Width)."""


def _sentences(m: _Measures) -> Shares:
    last = m.word_ends - 1
    closed = np.flatnonzero((m.classes[last] & textbatch.CLOSER) != 0)
    for _ in range(CLOSERS_AFTER_SENTENCE):
        closed = closed[(m.classes[last[closed]] & textbatch.CLOSER) != 0]
        closed = closed[last[closed] > m.word_starts[closed]]
        last[closed] -= 1
    ends = (m.classes[last] & textbatch.SENTENCE_END) != 0
    ends[m.lines[1:] - 1] = True
    return m.sum_words(np.flatnonzero(ends))


def _lorem_ipsum(m: _Measures) -> Ints:
    found = [match.start() for match in re.finditer(b"lorem ipsum", m.lowered)]
    return m.count(np.array(found, dtype=np.int64))


@dataclass(frozen=True)
class Signal:
    """One number about a text: what it is, who uses it, and how it is measured for a batch."""

    about: str
    source: str
    measure: Callable[[_Measures], NDArray[np.generic]]


_GOPHER, _REPETITION, _C4, _FINEWEB = "Gopher, table A1 (quality)", "Gopher, table A1 (repetition)", "C4", "FineWeb"

SIGNALS: dict[str, Signal] = {
    "words": Signal("words, by white space, and by ICU in scripts without spaces", _GOPHER, lambda m: m.words),
    "mean_word_length": Signal(
        "mean length of the words, in characters", _GOPHER, lambda m: m.per_word(m.word_characters)),
    "hash_signs": Signal("number signs (#) for each word", _GOPHER, lambda m: m.per_word(m.signs("#"))),
    "ellipses": Signal("ellipses (... or …) for each word", _GOPHER, _ellipses),
    "alphabetic_words": Signal("share of the words with at least one letter", _GOPHER, _alphabetic_words),
    "stop_words": Signal("how many of the, be, to, of, and, that, have, with it has", _GOPHER, _stop_words),
    "bullet_lines": Signal("share of the lines that begin with a bullet", _GOPHER,
        lambda m: m.per_line((m.classes[m.line_begins] & textbatch.BULLET) != 0)),
    "ellipsis_lines": Signal("share of the lines that end with an ellipsis", _GOPHER, _ellipsis_lines),
    "punctuated_lines": Signal("share of the lines that end with the punctuation of a sentence or quotation", _FINEWEB,
        lambda m: m.per_line((m.classes[m.line_ends] & textbatch.LINE_END) != 0)),
    "short_lines": Signal(
        f"share of the lines of at most {SHORT_LINE_CHARACTERS} characters, wide ones (Chinese, Kana, Hangul) as two",
        _FINEWEB, _short_lines),
    "newlines_per_word": Signal("line breaks for each word", _FINEWEB, lambda m: m.per_word(m.count(m.newlines) - 1)),
    "sentences": Signal("words that end a sentence or a line", _C4, _sentences),
    "curly_braces": Signal("opening curly braces", _C4, lambda m: m.signs("{")),
    "lorem_ipsum": Signal('times "lorem ipsum" is written', _C4, _lorem_ipsum),
    **{
        f"duplicate_{part}{suffix}": Signal(f"share of the {what} that came before", _REPETITION,
            lambda m, part=part, column=column: getattr(m, f"duplicate_{part}s")[column])
        for part in ("line", "paragraph")
        for column, (suffix, what) in enumerate((("s", f"{part}s"), ("_characters", f"characters in {part}s")))
    },
    **{
        f"top_{n}gram_characters": Signal(f"share of the characters in the most frequent {n}-gram", _REPETITION,
            lambda m, n=n: m.ngrams["top", n])
        for n in TOP_NGRAMS
    },
    **{
        f"duplicate_{n}gram_characters": Signal(f"share of the characters in {n}-grams that came before", _REPETITION,
            lambda m, n=n: m.ngrams["duplicate", n])
        for n in DUPLICATE_NGRAMS
    },
}  # fmt: skip
"""Every signal, by name."""
