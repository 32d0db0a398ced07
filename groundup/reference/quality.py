"""The quality signals of one document, each written as it is defined: word by word and line by line, in plain Python.

A word is what stands between white space (`str.split`), and in scripts without spaces what ICU's dictionaries take for
one, with the punctuation behind it. A line is a line with a word in it; a paragraph is a run of
lines between blank ones. Shares of characters count the characters of words, so white space has no weight, and
lines, paragraphs and n-grams are equal when their words are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import groupby
from unicodedata import category, east_asian_width

from icu4py.breakers import WordBreaker

STOP_WORDS = frozenset({"the", "be", "to", "of", "and", "that", "have", "with"})
BULLETS = tuple("-*•‣⁃▪●◦")
SENTENCE_ENDS = tuple(".!?…。！？．｡।॥؟۔።։។៕။།")
CLOSERS = tuple("\"'”’»)]）」』")
LINE_ENDS = (*SENTENCE_ENDS, *"\"'”’»」』", *map(chr, range(0xE00, 0xF00)))  # Thai and Lao have no sign for it
SHORT_LINE_CHARACTERS = 30
UNSPACED = (
    (0xE00, 0xEFF), (0x1000, 0x109F), (0x1780, 0x17FF),  # Thai and Lao, Burmese, Khmer
    (0x3005, 0x303C), (0x3041, 0x30FF), (0x31F0, 0x31FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF),  # Kana, Han
    (0xA9E0, 0xA9FF), (0xAA60, 0xAA7F), (0xF900, 0xFAFF), (0xFF66, 0xFF9F), (0x1AFF0, 0x1B16F), (0x20000, 0x3FFFF),
)  # fmt: skip


def quality_signals(text: str) -> dict[str, float]:
    """Every signal of one text, by name."""
    words = words_of(text)
    lines = [line for line in text.split("\n") if line.split()]
    return {
        "words": len(words),
        "mean_word_length": _ratio(sum(map(len, words)), len(words)),
        "hash_signs": _ratio(text.count("#"), len(words)),
        "ellipses": _ratio(text.count("...") + text.count("…"), len(words)),
        "alphabetic_words": _ratio(sum(any(c.isalpha() for c in word) for word in words), len(words)),
        "stop_words": len(STOP_WORDS & {_lower(word) for word in words}),
        "bullet_lines": _share(line.lstrip().startswith(BULLETS) for line in lines),
        "ellipsis_lines": _share(line.rstrip().endswith(("...", "…")) for line in lines),
        "punctuated_lines": _share(line.rstrip().endswith(LINE_ENDS) for line in lines),
        "short_lines": _share(width(line.strip()) <= SHORT_LINE_CHARACTERS for line in lines),
        "newlines_per_word": _ratio(text.count("\n"), len(words)),
        "sentences": sum(map(sentences, lines)),
        "curly_braces": text.count("{"),
        "lorem_ipsum": _lower(text).count("lorem ipsum"),
        **_duplicates("line", [words_of(line) for line in lines]),
        **_duplicates("paragraph", paragraphs(text)),
        **{f"top_{n}gram_characters": top_ngram(words, n) for n in (2, 3, 4)},
        **{f"duplicate_{n}gram_characters": duplicate_ngrams(words, n) for n in range(5, 11)},
    }


def words_of(text: str) -> list[str]:
    """The words of a text, in order."""
    return [word for piece in text.split() for word in _cut(piece)]


def _cut(piece: str) -> list[str]:
    """Words of what stands between white space: cut where ICU cuts, and before what follows such a word."""
    found: list[list[str]] = [[]]
    after_run = False
    for is_run, letters in groupby(piece, is_unspaced):
        for part in WordBreaker("".join(letters), "en") if is_run else letters:
            is_letter = part.isalnum() or part == "_"
            if is_run or (after_run and is_letter):
                opening: list[str] = []
                while found[-1] and category(found[-1][-1][-1]) in ("Ps", "Pi"):
                    opening.insert(0, found[-1].pop())
                found.append([*opening, part])
            else:
                found[-1].append(part)
            after_run = is_run or (after_run and not is_letter)
    return ["".join(parts) for parts in found if parts]


def is_unspaced(character: str) -> bool:
    """Whether it is a letter, digit or mark of a script without spaces."""
    return category(character)[0] in "LMN" and any(first <= ord(character) <= last for first, last in UNSPACED)


def width(line: str) -> int:
    """Characters of a line; one as wide as two Latin letters counts as two."""
    return sum(1 + (east_asian_width(character) in "WF") for character in line)


def sentences(line: str) -> int:
    """Words that end a sentence, the line's last one in any case; up to three closing quotes or brackets may follow."""
    count = 0
    for word in words_of(line)[:-1]:
        for _ in range(3):
            if len(word) > 1 and word.endswith(CLOSERS):
                word = word[:-1]
        count += word.endswith(SENTENCE_ENDS)
    return count + 1


def paragraphs(text: str) -> list[list[str]]:
    """The words of every paragraph."""
    found: list[list[str]] = [[]]
    for line in text.split("\n"):
        if line.split():
            found[-1].extend(words_of(line))
        else:
            found.append([])
    return [words for words in found if words]


def top_ngram(words: Sequence[str], n: int) -> float:
    """Share of the characters in the most frequent n-gram: its length times its count, 0 if none comes twice.

    Of several equally frequent ones the longest. Its occurrences may overlap.
    """
    grams = Counter(tuple(words[start : start + n]) for start in range(len(words) - n + 1))
    most = max(grams.values(), default=0)
    if most < 2:
        return 0.0
    length = max(sum(map(len, gram)) for gram, count in grams.items() if count == most)
    return most * length / sum(map(len, words))


def duplicate_ngrams(words: Sequence[str], n: int) -> float:
    """Share of the characters that stand in an n-gram which came before, each character counted once."""
    seen: set[tuple[str, ...]] = set()
    covered: set[int] = set()
    for start in range(len(words) - n + 1):
        gram = tuple(words[start : start + n])
        if gram in seen:
            covered.update(range(start, start + n))
        seen.add(gram)
    return _ratio(sum(len(words[place]) for place in covered), sum(map(len, words)))


def _duplicates(name: str, parts: Sequence[Sequence[str]]) -> dict[str, float]:
    seen: set[tuple[str, ...]] = set()
    count = characters = 0
    for part in map(tuple, parts):
        if part in seen:
            count += 1
            characters += sum(map(len, part))
        seen.add(part)
    total = sum(len(word) for part in parts for word in part)
    return {
        f"duplicate_{name}s": _ratio(count, len(parts)),
        f"duplicate_{name}_characters": _ratio(characters, total),
    }


def _lower(text: str) -> str:
    """Small letters for A to Z only: what the rules look for is ASCII."""
    return "".join(c.lower() if c.isascii() else c for c in text)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _share(answers: Iterable[bool]) -> float:
    listed = list(answers)
    return _ratio(sum(listed), len(listed))
