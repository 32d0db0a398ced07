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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from groundup.corpus.quality import textbatch
from groundup.corpus.quality.repetition import Shares, repeated_ngrams, repeated_parts, share
from groundup.corpus.quality.textbatch import Bools, Ints, TextBatch, letters
from groundup.corpus.words import batches, split_words

BATCH_CHARACTERS = 1 << 19  # what follows stays near the processor's cache
SHORT_LINE_CHARACTERS = 30
STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")
CLOSERS_AFTER_SENTENCE = 3
TOP_NGRAMS = (2, 3, 4)
DUPLICATE_NGRAMS = (5, 6, 7, 8, 9, 10)


@dataclass(frozen=True)
class Signal:
    """One number about a text.

    Attributes:
        about: what it is.
        source: who uses it.
    """

    about: str
    source: str


_GOPHER, _REPETITION, _C4, _FINEWEB = "Gopher, table A1 (quality)", "Gopher, table A1 (repetition)", "C4", "FineWeb"

SIGNALS: dict[str, Signal] = {
    "words": Signal("words, by white space, and by ICU in scripts without spaces", _GOPHER),
    "characters": Signal("characters", "-"),
    "mean_word_length": Signal("mean length of the words, in characters", _GOPHER),
    "longest_word": Signal("length of the longest word, in characters", _C4),
    "hash_signs": Signal("number signs (#) for each word", _GOPHER),
    "ellipses": Signal("ellipses (... or …) for each word", _GOPHER),
    "alphabetic_words": Signal("share of the words with at least one letter", _GOPHER),
    "stop_words": Signal("how many of the, be, to, of, and, that, have, with it has", _GOPHER),
    "lines": Signal("lines that are not blank", "-"),
    "bullet_lines": Signal("share of the lines that begin with a bullet", _GOPHER),
    "ellipsis_lines": Signal("share of the lines that end with an ellipsis", _GOPHER),
    "punctuated_lines": Signal(
        "share of the lines that end with the punctuation of a sentence or a quotation", _FINEWEB
    ),
    "short_lines": Signal(f"share of the lines of at most {SHORT_LINE_CHARACTERS} characters", _FINEWEB),
    "newlines_per_word": Signal("line breaks for each word", _FINEWEB),
    "sentences": Signal("words that end a sentence or a line", _C4),
    "curly_braces": Signal("opening curly braces", _C4),
    "lorem_ipsum": Signal('times "lorem ipsum" is written', _C4),
    "digits": Signal("share of the characters that are digits", "NeMo Curator"),
    "uppercase": Signal("share of the characters that are capital letters", "-"),
    "whitespace": Signal("share of the characters that are white space", "NeMo Curator"),
    "url_characters": Signal("share of the words' characters that stand in web addresses", "NeMo Curator"),
    "duplicate_lines": Signal("share of the lines that came before", _REPETITION),
    "duplicate_line_characters": Signal("share of the characters in lines that came before", _REPETITION),
    "duplicate_paragraphs": Signal("share of the paragraphs that came before", _REPETITION),
    "duplicate_paragraph_characters": Signal("share of the characters in paragraphs that came before", _REPETITION),
    **{
        f"top_{n}gram_characters": Signal(
            f"share of the characters in the most frequent {n}-gram of words", _REPETITION
        )
        for n in TOP_NGRAMS
    },
    **{
        f"duplicate_{n}gram_characters": Signal(f"share of the characters in {n}-grams that came before", _REPETITION)
        for n in DUPLICATE_NGRAMS
    },
}
"""Every signal: what it is and who uses it."""


def signals(texts: Sequence[str], names: Sequence[str] | None = None) -> dict[str, NDArray[np.float32]]:
    """Measure texts.

    Args:
        texts: the texts.
        names: which signals (None: all of them); only these are computed.

    Returns:
        (len(texts),) float32 for each name.
    """
    names = list(SIGNALS) if names is None else list(names)
    unknown = [name for name in names if name not in SIGNALS]
    assert not unknown, f"no such signals: {unknown}"
    parts = [_Measures(TextBatch(part)).columns(names) for part in batches(texts, BATCH_CHARACTERS)] if names else []
    return {
        name: np.concatenate([part[name] for part in parts]) if parts else np.empty(0, dtype=np.float32)
        for name in names
    }


def toxic_share(texts: Sequence[str], words: frozenset[str]) -> NDArray[np.float32]:
    """Share of each text's words that are in a list.

    Words are runs of letters, digits and underscores, compared without case; an entry of several words counts
    each of them where they stand side by side.

    Args:
        texts: the texts.
        words: the list's entries.
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


class _Measures:
    """The signals of one batch, each made when its column is asked for."""

    def __init__(self, batch: TextBatch) -> None:
        self._batch = batch

    def columns(self, names: Sequence[str]) -> dict[str, NDArray[np.float32]]:
        self._top = [n for n in TOP_NGRAMS if f"top_{n}gram_characters" in names]
        self._duplicate = [n for n in DUPLICATE_NGRAMS if f"duplicate_{n}gram_characters" in names]
        return {name: _COMPUTE[name](self).astype(np.float32) for name in names}

    @cached_property
    def ngrams(self) -> dict[tuple[str, int], Shares]:
        return repeated_ngrams(self._batch, self._top, self._duplicate)

    @cached_property
    def duplicate_lines(self) -> tuple[Shares, Shares]:
        return repeated_parts(self._batch, self._batch.lines)

    @cached_property
    def duplicate_paragraphs(self) -> tuple[Shares, Shares]:
        return repeated_parts(self._batch, self._batch.paragraphs)

    def per_word(self, values: NDArray[np.generic]) -> Shares:
        return share(values, self._batch.words)

    def per_character(self, classes: int) -> Shares:
        return share(self._batch.count_of(classes), self._batch.characters)

    def mean_word_length(self) -> Shares:
        return share(self._batch.word_characters, self._batch.words)

    def longest_word(self) -> Ints:
        longest = np.zeros(self._batch.n, dtype=np.int64)
        some = np.flatnonzero(self._batch.words)
        if len(some):
            longest[some] = np.maximum.reduceat(self._batch.word_lengths, self._batch.first_words[some])
        return longest

    def count(self, character: str) -> Ints:
        batch = self._batch
        return batch.count(np.flatnonzero(batch.bytes[: batch.bounds[-1]] == ord(character)))

    def ellipses(self) -> Shares:
        dots = np.flatnonzero(self._batch.bytes == ord("."))
        runs = np.flatnonzero(np.concatenate(([True], dots[1:] != dots[:-1] + 1))) if len(dots) else dots
        lengths = np.diff(np.append(runs, len(dots)))
        return self.per_word(
            self._batch.count(np.repeat(dots[runs], lengths // 3)) + self._batch.count(self._signs("…"))
        )

    def _signs(self, sign: str) -> Ints:
        """Where a character beyond ASCII stands."""
        codes = self._batch.codes
        return np.empty(0, dtype=np.int64) if codes is None else np.flatnonzero(codes == ord(sign))

    def alphabetic_words(self) -> Shares:
        batch = self._batch
        letter = (batch.classes & textbatch.LETTER).view(np.bool_)
        # Most words begin with a letter; of the others every character is looked at.
        doubtful = np.flatnonzero(~letter[batch.word_starts])
        if len(doubtful):
            spans = np.stack((batch.word_starts[doubtful], batch.word_ends[doubtful]), axis=1).ravel()
            doubtful = doubtful[~np.logical_or.reduceat(letter, spans)[0::2]]
        return self.per_word(batch.words - batch.sum_words(doubtful))

    def stop_words(self) -> Ints:
        batch = self._batch
        has = np.zeros((len(STOP_WORDS), batch.n), dtype=np.bool_)
        for row, word in enumerate(STOP_WORDS):
            has[row, batch.text_of_word[batch.beginnings == letters(word)]] = True
        return has.sum(axis=0)

    def url_characters(self) -> Shares:
        batch = self._batch
        is_url = (batch.beginnings & np.uint64((1 << 56) - 1)) == letters("http://")
        is_url |= batch.beginnings == letters("https://")
        is_url |= (batch.beginnings & np.uint64((1 << 32) - 1)) == letters("www.")
        urls = np.flatnonzero(is_url)
        return share(batch.sum_words(urls, batch.word_lengths[urls]), batch.word_characters)

    def lorem_ipsum(self) -> Ints:
        data, phrase = self._batch.bytes.tobytes().lower(), b"lorem ipsum"
        found, at = [], data.find(phrase)
        while at >= 0:
            found.append(at)
            at = data.find(phrase, at + len(phrase))
        return self._batch.count(np.array(found, dtype=np.int64))

    def sentences(self) -> Shares:
        batch = self._batch
        last = batch.word_ends - 1
        closed = np.flatnonzero((batch.classes[last] & textbatch.CLOSER) != 0)
        for _ in range(CLOSERS_AFTER_SENTENCE):
            closed = closed[(batch.classes[last[closed]] & textbatch.CLOSER) != 0]
            closed = closed[last[closed] > batch.word_starts[closed]]
            last[closed] -= 1
        ends = (batch.classes[last] & textbatch.SENTENCE_END) != 0
        ends[batch.lines[1:] - 1] = True
        return batch.sum_words(np.flatnonzero(ends))

    @cached_property
    def lines(self) -> Ints:
        """(n,) lines of each text."""
        return np.diff(np.searchsorted(self._batch.lines[:-1], self._batch.first_words))

    @cached_property
    def line_ends(self) -> Ints:
        """Where each line's last character stands."""
        return self._batch.word_ends[self._batch.lines[1:] - 1] - 1

    def line_share(self, which: Bools) -> Shares:
        return share(self._batch.sum_words(self._batch.lines[:-1][which]), self.lines)

    def bullet_lines(self) -> Shares:
        begins = self._batch.word_starts[self._batch.lines[:-1]]
        return self.line_share((self._batch.classes[begins] & textbatch.BULLET) != 0)

    def punctuated_lines(self) -> Shares:
        return self.line_share((self._batch.classes[self.line_ends] & textbatch.LINE_END) != 0)

    def ellipsis_lines(self) -> Shares:
        data, ends, codes = self._batch.bytes, self.line_ends, self._batch.codes
        # Before a line's beginning there is a line break or the batch's end (zeros), never a dot.
        dots = (data[ends] == ord(".")) & (data[ends - 1] == ord(".")) & (data[ends - 2] == ord("."))
        return self.line_share(dots if codes is None else dots | (codes[ends] == ord("…")))

    def short_lines(self) -> Shares:
        begins = self._batch.word_starts[self._batch.lines[:-1]]
        return self.line_share(self.line_ends + 1 - begins <= SHORT_LINE_CHARACTERS)

    def newlines_per_word(self) -> Shares:
        return self.per_word(self._batch.count(self._batch.newlines) - 1)

    def whitespace(self) -> Shares:
        return share(self._batch.characters - self._batch.word_characters, self._batch.characters)


_COMPUTE: dict[str, Callable[[_Measures], NDArray[np.generic]]] = {
    "words": lambda m: m._batch.words,
    "characters": lambda m: m._batch.characters,
    "mean_word_length": _Measures.mean_word_length,
    "longest_word": _Measures.longest_word,
    "hash_signs": lambda m: m.per_word(m.count("#")),
    "ellipses": _Measures.ellipses,
    "alphabetic_words": _Measures.alphabetic_words,
    "stop_words": _Measures.stop_words,
    "lines": lambda m: m.lines,
    "bullet_lines": _Measures.bullet_lines,
    "ellipsis_lines": _Measures.ellipsis_lines,
    "punctuated_lines": _Measures.punctuated_lines,
    "short_lines": _Measures.short_lines,
    "newlines_per_word": _Measures.newlines_per_word,
    "sentences": _Measures.sentences,
    "curly_braces": lambda m: m.count("{"),
    "lorem_ipsum": _Measures.lorem_ipsum,
    "digits": lambda m: m.per_character(textbatch.DIGIT),
    "uppercase": lambda m: m.per_character(textbatch.UPPER),
    "whitespace": _Measures.whitespace,
    "url_characters": _Measures.url_characters,
    "duplicate_lines": lambda m: m.duplicate_lines[0],
    "duplicate_line_characters": lambda m: m.duplicate_lines[1],
    "duplicate_paragraphs": lambda m: m.duplicate_paragraphs[0],
    "duplicate_paragraph_characters": lambda m: m.duplicate_paragraphs[1],
    **{f"top_{n}gram_characters": lambda m, n=n: m.ngrams["top", n] for n in TOP_NGRAMS},
    **{f"duplicate_{n}gram_characters": lambda m, n=n: m.ngrams["duplicate", n] for n in DUPLICATE_NGRAMS},
}
