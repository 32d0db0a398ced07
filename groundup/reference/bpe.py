"""Byte-pair encoding in one screen: how a vocabulary is learned, and how it cuts a text.

Sennrich, Haddow and Birch 2016 (arXiv:1508.07909), algorithm 1, over bytes as in GPT-2. A text is cut by a regex; every
piece begins as its bytes. Learning: the most frequent pair of neighbours becomes a token, everywhere, again and
again. Encoding: the pair that was learned first is merged first, until no neighbours are a learned pair.
"""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import regex  # type: ignore[import-untyped]

Pair = tuple[bytes, bytes]

_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
BYTES = [bytes([value]) for value in (*_PRINTABLE, *(value for value in range(256) if value not in _PRINTABLE))]
"""All bytes in the order of their ids, which is GPT-2's: printable ones first."""


def train(texts: list[str], n_merges: int, pattern: str) -> list[Pair]:
    """Learn merges.

    Args:
        texts: what to learn from.
        n_merges: how many to learn; fewer if no pair occurs twice any more.
        pattern: the regex that cuts a text into pieces; no merge crosses a cut.

    Returns:
        Pairs of tokens, in the order in which they were learned.
    """
    counts = Counter(piece for text in texts for piece in regex.findall(pattern, text))
    words = {word: [bytes([value]) for value in word.encode()] for word in counts}
    ids = {token: index for index, token in enumerate(BYTES)}
    merges: list[Pair] = []
    while len(merges) < n_merges:
        pairs: Counter[Pair] = Counter()
        for word, tokens in words.items():
            for pair in pairwise(tokens):
                pairs[pair] += counts[word]
        # The most frequent pair; of equals the one with the smaller ids.
        best = max(pairs, key=lambda pair: (pairs[pair], -ids[pair[0]], -ids[pair[1]]), default=None)
        if best is None or pairs[best] < 2:
            break
        merges.append(best)
        ids[best[0] + best[1]] = len(ids)
        words = {word: merge(tokens, best) for word, tokens in words.items()}
    return merges


def merge(tokens: list[bytes], pair: Pair) -> list[bytes]:
    """Join every occurrence of a pair, from left to right."""
    merged: list[bytes] = []
    for token in tokens:
        if merged and (merged[-1], token) == pair:
            merged[-1] += token
        else:
            merged.append(token)
    return merged


def encode(text: str, merges: list[Pair], pattern: str) -> list[int]:
    """Ids of a text: a byte's place in `BYTES`, or 256 + the number of the merge that made the token."""
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    ids = {token: index for index, token in enumerate([*BYTES, *(left + right for left, right in merges)])}
    found: list[int] = []
    for piece in regex.findall(pattern, text):
        tokens = [bytes([value]) for value in piece.encode()]
        while len(tokens) > 1:
            first = min(pairwise(tokens), key=lambda pair: ranks.get(pair, len(ranks)))
            if first not in ranks:
                break
            tokens = merge(tokens, first)
        found += [ids[token] for token in tokens]
    return found
