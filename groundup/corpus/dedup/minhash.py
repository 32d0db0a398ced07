"""MinHash: a text as a few hundred bytes, so that the share of equal numbers estimates how much two texts share.

In: words (`words.py`). Out: signatures, (n_texts, n_hashes) uint32.

A text's shingles are its runs of `ngram` words. Hash i of a shingle x is (a_i·x + b_i) mod 2³², a_i odd: one
multiplication and one addition, since x, the high half of the run's 64-bit hash, is as good as random already. The
signature holds the least hash of all shingles, for every i. Two texts agree in a place with probability J, the
Jaccard similarity of their sets of shingles: |A ∩ B| / |A ∪ B|. Cut into b bands of r numbers, they agree in at
least one whole band with probability 1 - (1 - J^r)^b.

Source: Broder, On the resemblance and containment of documents (1997), section 3; Leskovec, Rajaraman, Ullman, Mining
of Massive Datasets, sections 3.3 and 3.4.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from groundup.corpus.words import WORDS_VERSION, Words, words_of

HASH_VERSION = f"{WORDS_VERSION}.1"
"""Signatures of two versions must not be compared: the words' hashes, and what is made of them here."""

NO_SHINGLES = np.uint32(0xFFFFFFFF)
"""What the whole signature of a text without words consists of."""

_BLOCK = 1 << 16
"""Shingles hashed at a time: with their products they stay in a core's second-level cache."""


def signatures(texts: Sequence[str] | Words, *, ngram: int = 5, n_hashes: int = 112) -> np.ndarray:
    """The signatures of texts (or of their words): (n_texts, n_hashes) uint32, `NO_SHINGLES` of a text without words.

    A text with fewer words than `ngram` has one shingle, of all its words. The first numbers of a longer signature are
    those of a shorter one.
    """
    words = texts if isinstance(texts, Words) else words_of(texts)
    grams, starts = words.ngrams(ngram)
    result = np.full((words.n_texts, n_hashes), NO_SHINGLES, dtype=np.uint32)
    filled = np.flatnonzero(np.diff(starts))
    if len(filled):
        shingles = (grams >> np.uint64(32)).astype(np.uint32)
        result[filled] = _least_hashes(shingles, starts[filled], n_hashes).T
    return result


def match_probability(similarity: float, bands: int, rows: int) -> float:
    """How likely two texts of this Jaccard similarity agree in a whole band: 1 - (1 - s^rows)^bands."""
    return 1.0 - (1.0 - similarity**rows) ** bands


@functools.cache
def hash_family(n_hashes: int) -> tuple[np.ndarray, np.ndarray]:
    """The odd multipliers and the increments of the hashes: two (n_hashes,) uint32, the same for ever."""
    numbers = _split_mix(2 * n_hashes) >> np.uint64(32)
    multipliers = (numbers[0::2] | np.uint64(1)).astype(np.uint32)
    return multipliers, numbers[1::2].astype(np.uint32)


def _split_mix(n: int) -> np.ndarray:
    """The first n numbers of SplitMix64 from seed 0 (Steele, Lea, Flood 2014): (n,) uint64."""
    values = np.arange(1, n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _least_hashes(shingles: np.ndarray, starts: np.ndarray, n_hashes: int) -> np.ndarray:
    """(n_hashes, n_texts) uint32, the least of every hash over each text's shingles; no text is without."""
    # Texts are cut where blocks end, so that a piece lies in one block; the least of the pieces is the least of all.
    blocks = np.arange(0, len(shingles), _BLOCK)
    pieces = np.unique(np.concatenate([starts, blocks]))
    first_piece = np.searchsorted(pieces, [*blocks, len(shingles)])
    least = np.empty((n_hashes, len(pieces)), dtype=np.uint32)
    multipliers, increments = hash_family(n_hashes)
    hashes = np.empty(min(_BLOCK, len(shingles)), dtype=np.uint32)
    for number, begin in enumerate(blocks):
        block = shingles[begin : begin + _BLOCK]
        values = hashes[: len(block)]
        inside = slice(first_piece[number], first_piece[number + 1])
        places = pieces[inside] - begin
        for i in range(n_hashes):
            np.multiply(block, multipliers[i], out=values)
            np.add(values, increments[i], out=values)
            np.minimum.reduceat(values, places, out=least[i, inside])
    if len(pieces) == len(starts):
        return least
    return np.minimum.reduceat(least, np.searchsorted(pieces, starts), axis=1)
