"""Attention masks as sets of positions, the way Sparse Transformers (arXiv:1904.10509, section 4.2) writes them.

Each function gives the keys that the query at position i sees; none is later than i.
"""

from __future__ import annotations

import math


def full(i: int) -> set[int]:
    """All positions up to i (arXiv:1706.03762, section 3.2.3)."""
    return set(range(i + 1))


def window(i: int, width: int, sinks: int = 0) -> set[int]:
    """The last `width` positions, i included (Mistral, arXiv:2310.06825), and the first few (arXiv:2309.17453)."""
    last = set(range(max(0, i - width + 1), i + 1))
    first = set(range(min(sinks, i + 1)))
    return last | first


def strided(i: int, stride: int) -> set[int]:
    """The row behind i, and every stride-th position before (arXiv:1904.10509, section 4.3)."""
    row = set(range(max(0, i - stride), i + 1))
    column = {j for j in range(i + 1) if (i - j) % stride == 0}
    return row | column


def fixed(i: int, stride: int, summary: int) -> set[int]:
    """i's own block, and the last `summary` columns of every block (the same section)."""
    block = {j for j in range(i + 1) if j // stride == i // stride}
    summaries = {j for j in range(i + 1) if j % stride in range(stride - summary, stride)}
    return block | summaries


def alibi_slopes(n_heads: int) -> list[float]:
    """Each head's penalty per position of distance (arXiv:2108.12409, section 3): 2^(−8/n), 2^(−16/n), … 2^(−8).

    Where n is no power of two: the slopes of the power below, then every other slope of the power above.
    """

    def of_a_power(n: int) -> list[float]:
        return [2 ** (-8 * (head + 1) / n) for head in range(n)]

    below = 2 ** math.floor(math.log2(n_heads))
    return of_a_power(below) + of_a_power(2 * below)[::2][: n_heads - below]
