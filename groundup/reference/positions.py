"""Rotary position embedding (RoPE, arXiv:2104.09864), half-split as in Llama, one pair at a time."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor


def rope(x: Float[Tensor, "seq d"], positions: Int[Tensor, " seq"], base: float) -> Float[Tensor, "seq d"]:
    """Turn each pair (i, i + d/2) of a token at position p by the angle p · base^(−2i/d)."""
    half = x.shape[-1] // 2
    turned = torch.empty_like(x)
    for token, position in enumerate(positions.tolist()):
        for i in range(half):
            angle = position * base ** (-2 * i / x.shape[-1])
            a, b = x[token, i], x[token, i + half]
            turned[token, i] = a * math.cos(angle) - b * math.sin(angle)
            turned[token, i + half] = b * math.cos(angle) + a * math.sin(angle)
    return turned
