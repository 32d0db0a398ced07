"""Rotary positions (RoPE, arXiv:2104.09864), half-split as in Llama, their scalings, and the first sinusoids."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor


def rope(
    x: Float[Tensor, "seq d"], positions: Int[Tensor, " seq"], frequencies: Sequence[float]
) -> Float[Tensor, "seq d"]:
    """Turn pair (i, i + n) of a token at position p by the angle p · frequency i; n frequencies turn 2n features."""
    n = len(frequencies)
    turned = x.clone()
    for token, position in enumerate(positions.tolist()):
        for i, frequency in enumerate(frequencies):
            angle = position * frequency
            a, b = x[token, i], x[token, i + n]
            turned[token, i] = a * math.cos(angle) - b * math.sin(angle)
            turned[token, i + n] = b * math.cos(angle) + a * math.sin(angle)
    return turned


def rope_frequencies(d: int, base: float) -> list[float]:
    """base^(−2i/d) radians a position for the pairs i = 0 … d/2 − 1, fastest first (section 3.2.2)."""
    return [base ** (-2 * i / d) for i in range(d // 2)]


def linear_scaling(frequencies: Sequence[float], factor: float) -> list[float]:
    """Position interpolation (arXiv:2306.15595, equation 4): position p stands where p / factor stood."""
    return [frequency / factor for frequency in frequencies]


def ntk_scaling(d: int, base: float, factor: float) -> list[float]:
    """NTK-aware (arXiv:2309.00071, section 3.1): the base times factor^(d/(d−2)).

    So the fastest pair stays, the slowest (i = d/2 − 1) is divided by the factor, and the others lie between.
    """
    return [base ** (-2 * i / d) * factor ** (-2 * i / max(d - 2, 1)) for i in range(d // 2)]


def yarn_scaling(
    d: int, base: float, factor: float, original_context: int, beta_fast: float = 32, beta_slow: float = 1
) -> list[float]:
    """YaRN (arXiv:2309.00071, section 3.2): pairs that turn more than beta_fast times in the context stay.

    Those that turn less than beta_slow times are divided by the factor. Between the two the authors' code goes from
    one to the other in equal steps from pair to pair; the paper's formula goes by the number of turns.
    """

    def pair_with(turns: float) -> float:  # solves original_context · base^(−2i/d) = 2π · turns for i
        return d * math.log(original_context / (2 * math.pi * turns)) / (2 * math.log(base))

    first = max(math.floor(pair_with(beta_fast)), 0)
    last = min(math.ceil(pair_with(beta_slow)), d - 1)
    scaled = []
    for i, frequency in enumerate(rope_frequencies(d, base)):
        divided = min(max((i - first) / max(last - first, 0.001), 0), 1)
        scaled.append(frequency * (1 - divided) + frequency / factor * divided)
    return scaled


def yarn_attention_factor(factor: float) -> float:
    """What YaRN multiplies queries and keys by: √(1/t) = 0.1 ln(factor) + 1 (section 3.4, equation 22)."""
    return 0.1 * math.log(factor) + 1


def llama3_scaling(
    frequencies: Sequence[float], factor: float, original_context: int, low: float = 1, high: float = 4
) -> list[float]:
    """Llama 3.1's: pairs that turn `high` times or more in the context stay, those under `low` are divided."""
    scaled = []
    for frequency in frequencies:
        turns = original_context * frequency / (2 * math.pi)
        kept = min(max((turns - low) / (high - low), 0), 1)
        scaled.append(frequency * kept + frequency / factor * (1 - kept))
    return scaled


def sinusoids(positions: Int[Tensor, " seq"], d: int) -> Float[Tensor, "seq d"]:
    """sin(p / 10000^(2i/d)) in feature 2i and its cosine in feature 2i + 1 (arXiv:1706.03762, section 3.5)."""
    table = torch.empty(len(positions), d, dtype=torch.float64)
    for token, position in enumerate(positions.tolist()):
        for i in range(d // 2):
            angle = position / 10_000 ** (2 * i / d)
            table[token, 2 * i], table[token, 2 * i + 1] = math.sin(angle), math.cos(angle)
    return table
