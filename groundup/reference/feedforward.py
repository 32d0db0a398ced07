"""The gated feed-forward layer SwiGLU (arXiv:2002.05202, equation 6) and GELU (arXiv:1606.08415, section 2)."""

from __future__ import annotations

import math

from jaxtyping import Float
from torch import Tensor


def swiglu(
    x: Float[Tensor, "*batch d"],
    gate: Float[Tensor, "d_ff d"],
    up: Float[Tensor, "d_ff d"],
    down: Float[Tensor, "d d_ff"],
) -> Float[Tensor, "*batch d"]:
    """(swish(x Wgᵀ) · x Wuᵀ) Wdᵀ, where swish(z) = z / (1 + e^−z)."""
    z = x @ gate.T
    return (z / (1 + (-z).exp()) * (x @ up.T)) @ down.T


def gelu(x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
    """x Φ(x), Φ the normal distribution, in GPT-2's approximation: x/2 · (1 + tanh(√(2/π) (x + 0.044715 x³)))."""
    return x / 2 * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).tanh())
