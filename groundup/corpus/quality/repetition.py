"""How much of a text repeats itself: equal lines and paragraphs, and n-grams of words, for a whole batch at once.

In: a `TextBatch`. Out: shares, one number a text.

An n-gram that comes twice is made of two (n-1)-grams that come twice. So the pairs of words that repeat within their
text are found first, by one sort, and longer n-grams are made only where both halves are still alive: the pair of the
halves' numbers names the n-gram exactly, and each further n has far less to sort.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from groundup.corpus.quality.textbatch import Bools, Hashes, Ints, TextBatch

_TEXT = np.uint64(0xC2B2AE3D27D4EB4F)
_SPREAD = np.uint64(0x9E3779B97F4A7C15)
_CHARACTER_BITS = 32

Shares = NDArray[np.float64]


@dataclass(frozen=True)
class _Groups:
    """Keys that come at least twice, group by group, each in the order of its places.

    Attributes:
        places: (members,) where the keys stand.
        group: (members,) the number of each one's group, from 0 on.
        first: (members,) whether it is its group's first.
    """

    places: Ints
    group: Ints
    first: Bools


def repeated_parts(batch: TextBatch, parts: Ints) -> tuple[Shares, Shares]:
    """Lines or paragraphs that their text had before: their share of its parts, and of its characters, (n,) each.

    `parts`: (parts + 1,) the first word of each line or paragraph, and the number of words.
    """
    groups = _groups(_within_texts(batch, batch.hashes_of(parts), batch.text_of_word[parts[:-1]]))
    again = groups.places[~groups.first]
    text = batch.text_of_word[parts[again]]
    lengths = batch.characters_before[parts[again + 1]] - batch.characters_before[parts[again]]
    n_parts = np.diff(np.searchsorted(parts[:-1], batch.first_words))
    count = np.bincount(text, minlength=batch.n)
    characters = np.bincount(text, weights=lengths, minlength=batch.n)
    return share(count, n_parts), share(characters, batch.word_characters)


def repeated_ngrams(
    batch: TextBatch, top: Collection[int], duplicate: Collection[int]
) -> dict[tuple[str, int], Shares]:
    """The most frequent n-gram's share of the characters, and that of all n-grams that came before, for these n >= 2:
    (n,) shares by ("top", n) and ("duplicate", n)."""
    found: dict[tuple[str, int], Shares] = {}
    last = max((*top, *duplicate), default=0)
    words = _within_texts(batch, batch.word_hashes, batch.text_of_word) if last else np.empty(0, dtype=np.uint64)
    keys = words[:-1] * _SPREAD + words[1:]  # a pair of two texts' words comes but once
    # Sorting takes longest, and most pairs come once: such a pair is mostly alone in its bucket, and is not sorted.
    bucket = (keys * _SPREAD >> np.uint64(62 - len(keys).bit_length())).view(np.int64)
    places = np.flatnonzero(np.bincount(bucket)[bucket] > 1)  # where the n-grams begin that are compared, in order
    keys = keys[places]
    for n in range(2, last + 1):
        groups = _groups(keys, exact_bits=64 if n == 2 else 2 * int(batch.n_words).bit_length())
        if n in top:
            found["top", n] = _top(batch, n, places, groups)
        if n in duplicate:
            found["duplicate", n] = _duplicate(batch, n, places, groups)
        # A text has as many n-grams as words, fewer (n - 1): names of one batch's n-grams fit in the bits of n_words.
        names = np.full(len(places), -1, dtype=np.int64)
        names[groups.places] = groups.group
        alive = np.flatnonzero(names >= 0)
        places, names = places[alive], names[alive]
        next_too = np.flatnonzero(places[1:] == places[:-1] + 1)
        places = places[next_too]
        keys = (names[next_too] << int(batch.n_words).bit_length() | names[next_too + 1]).view(np.uint64)
    return found


def share(part: NDArray[np.generic], whole: NDArray[np.generic]) -> Shares:
    """part / whole, and 0 where the whole is 0."""
    return np.divide(part, whole, out=np.zeros(len(whole)), where=whole != 0, dtype=np.float64)


def _top(batch: TextBatch, n: int, places: Ints, groups: _Groups) -> Shares:
    """Length times count of the most frequent n-gram (of equally frequent ones the longest), of all characters."""
    if not len(groups.places):
        return np.zeros(batch.n)
    begins = places[groups.places[groups.first]]
    lengths = batch.characters_before[begins + n] - batch.characters_before[begins]
    best = np.zeros(batch.n, dtype=np.int64)
    np.maximum.at(best, batch.text_of_word[begins], np.bincount(groups.group) << _CHARACTER_BITS | lengths)
    return share((best >> _CHARACTER_BITS) * (best & ((1 << _CHARACTER_BITS) - 1)), batch.word_characters)


def _duplicate(batch: TextBatch, n: int, places: Ints, groups: _Groups) -> Shares:
    """Characters in n-grams that their text had before, each character once, of all characters."""
    begins = np.sort(places[groups.places[~groups.first]])
    if not len(begins):
        return np.zeros(batch.n)
    uncounted = begins.copy()
    uncounted[1:] = np.maximum(begins[1:], begins[:-1] + n)
    lengths = batch.characters_before[begins + n] - batch.characters_before[uncounted]
    covered = np.bincount(batch.text_of_word[begins], weights=lengths, minlength=batch.n)
    return share(covered, batch.word_characters)


def _within_texts(batch: TextBatch, hashes: Hashes, texts: Ints) -> Hashes:
    """Hashes that are equal only for equal things of the same text."""
    return hashes ^ (texts.view(np.uint64) + np.uint64(1)) * _TEXT if batch.n > 1 else hashes


def _groups(keys: Hashes, exact_bits: int = 64) -> _Groups:
    """Find the keys that come at least twice.

    The place goes into the low bits of one number with the key above it, so one plain sort (many times faster than
    an argsort) brings equals together in order. Where the key has to be cut for that, equals are compared whole.
    """
    n = len(keys)
    bits = np.uint64(max(1, n - 1).bit_length())
    place_bits = (np.uint64(1) << bits) - np.uint64(1)
    is_whole = exact_bits + int(bits) <= 64
    packed = keys << bits if is_whole else (keys * _SPREAD) & ~place_bits
    packed |= np.arange(n, dtype=np.uint64)
    packed.sort()
    members, first = _repeated(packed[1:] ^ packed[:-1] <= place_bits)
    order = (packed[members] & place_bits).view(np.int64)
    if not is_whole and (np.diff(keys[order]) != 0)[~first[1:]].any():
        order = np.argsort(keys, kind="stable")
        members, first = _repeated(np.diff(keys[order]) == 0)
        order = order[members]
    return _Groups(order, np.cumsum(first) - 1, first)


def _repeated(equal: Bools) -> tuple[Ints, Bools]:
    """Which of some sorted things come again, and which of these are the first of their kind.

    Args:
        equal: (n - 1,) whether each equals the one before it.
    """
    again = np.concatenate(([False], equal, [False]))
    members = np.flatnonzero(again[1:] | again[:-1])
    return members, ~again[members]
