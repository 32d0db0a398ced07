"""MinHash and banding, one text and one hash at a time (Mining of Massive Datasets, sections 3.2 to 3.4).

The fast form is `groundup.corpus.dedup.minhash`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def shingles(words: Sequence[object], n: int) -> set[tuple[object, ...]]:
    """Every run of n words; a text of fewer words has one shingle, of all of them."""
    if not words:
        return set()
    return {tuple(words[begin : begin + n]) for begin in range(max(len(words) - n + 1, 1))}


def jaccard(one: set[tuple[object, ...]], other: set[tuple[object, ...]]) -> float:
    """|A ∩ B| / |A ∪ B|."""
    return len(one & other) / len(one | other) if one or other else 0.0


def signature(hashes: Iterable[int], multipliers: Sequence[int], increments: Sequence[int]) -> list[int]:
    """The least of (a·x + b) mod 2³² over a text's 32-bit shingle hashes x, for every a and b."""
    hashes = list(hashes)
    return [
        min(((a * x + b) % 2**32 for x in hashes), default=2**32 - 1)
        for a, b in zip(multipliers, increments, strict=True)
    ]


def agreement(one: Sequence[int], other: Sequence[int]) -> float:
    """The share of places in which two signatures agree: an estimate of the texts' Jaccard similarity."""
    return sum(a == b for a, b in zip(one, other, strict=True)) / len(one)


def share_a_band(one: Sequence[int], other: Sequence[int], bands: int, rows: int) -> bool:
    """Whether two signatures agree in all places of at least one band."""
    return any(one[band * rows : (band + 1) * rows] == other[band * rows : (band + 1) * rows] for band in range(bands))


def survivors(signatures: Sequence[Sequence[int]], bands: int, rows: int, min_agreement: float) -> list[int]:
    """For each document the kept one that removes it, or itself; documents come in the order of survival."""
    found: list[int] = []
    for place, mine in enumerate(signatures):
        for earlier in range(place):
            if found[earlier] != earlier:
                continue
            other = signatures[earlier]
            if share_a_band(mine, other, bands, rows) and agreement(mine, other) >= min_agreement:
                found.append(earlier)
                break
        else:
            found.append(place)
    return found
