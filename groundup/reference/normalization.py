"""RMSNorm (arXiv:1910.07467) and LayerNorm (arXiv:1607.06450) as their papers write them."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def rmsnorm(x: Float[Tensor, "*batch d"], weight: Float[Tensor, " d"] | float, eps: float) -> Float[Tensor, "*batch d"]:
    """Divide by the root of the mean square, then scale."""
    mean_square = (x**2).mean(dim=-1, keepdim=True)
    return x / (mean_square + eps) ** 0.5 * weight


def layernorm(
    x: Float[Tensor, "*batch d"], weight: Float[Tensor, " d"] | float, bias: Float[Tensor, " d"] | float, eps: float
) -> Float[Tensor, "*batch d"]:
    """Take away the mean, divide by the standard deviation, then scale and shift."""
    centred = x - x.mean(dim=-1, keepdim=True)
    variance = (centred**2).mean(dim=-1, keepdim=True)
    return centred / (variance + eps) ** 0.5 * weight + bias
