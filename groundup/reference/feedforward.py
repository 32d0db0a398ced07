"""What stands between the matrices of a feed-forward layer: GELU (arXiv:1606.08415), ReLU² and gates."""

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
    """(swish(x Wgᵀ) · x Wuᵀ) Wdᵀ (arXiv:2002.05202, equation 6)."""
    return (swish(x @ gate.T) * (x @ up.T)) @ down.T


def geglu(
    x: Float[Tensor, "*batch d"],
    gate: Float[Tensor, "d_ff d"],
    up: Float[Tensor, "d_ff d"],
    down: Float[Tensor, "d d_ff"],
) -> Float[Tensor, "*batch d"]:
    """(GELU(x Wgᵀ) · x Wuᵀ) Wdᵀ (the same, equation 6)."""
    return (gelu(x @ gate.T) * (x @ up.T)) @ down.T


def swish(x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
    """x σ(x) = x / (1 + e^−x), also called SiLU (arXiv:1606.08415, section 4; arXiv:1710.05941)."""
    return x * x.sigmoid()  # the quotient's gradient is no number where e^−x overflows


def gelu(x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
    """x Φ(x), Φ the normal distribution: x/2 · (1 + erf(x / √2)) (arXiv:1606.08415, section 2)."""
    return x / 2 * (1 + (x / math.sqrt(2)).erf())


def gelu_tanh(x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
    """GPT-2's approximation of GELU: x/2 · (1 + tanh(√(2/π) (x + 0.044715 x³))) (the same section)."""
    return x / 2 * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).tanh())


def relu2(x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
    """max(x, 0)² (Primer, arXiv:2109.08668, section 4)."""
    return x.clamp(min=0) ** 2
