"""GPTQ: rounding that makes up for its own errors (Frantar et al., arXiv:2210.17323, algorithm 1).

A layer's outputs matter, not its weights. With the layer's inputs X (tokens, d_in), the error of a row of weights w
rounded to q is (w − q) H (w − q)ᵀ, H = XᵀX. Inputs are rounded one after the other; once input i is, the best the rest
can do about its error is

    w_j ← w_j − (w_i − q_i) / U_ii · U_ij     for every j > i,     UᵀU = H⁻¹, U upper triangular,

with λ · mean(diag H) on H's diagonal first. A group's scale is found when its first input is reached, so that it fits
the weights as they are by then. Updates beyond a block of inputs are added up and made at the block's end.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from groundup.generation.rounding import Bits, find_scales, round_to_nearest, to_values

DAMPING = 0.01
_BLOCK = 128
"""Inputs whose updates of all the inputs behind them are made at once."""


def gptq(
    weight: Float[Tensor, "d_out d_in"],
    gram: Float[Tensor, "d_in d_in"],
    bits: Bits,
    group_size: int,
    *,
    name: str = "weight",
) -> tuple[Tensor, Tensor]:
    """Quantize a layer's weights for its inputs.

    Args:
        weight: of any float dtype.
        gram: XᵀX of its inputs; zeros (no input was seen): the same as `round_to_nearest`.
        bits: 8 or 4.
        group_size: inputs per scale; divides d_in.
        name: of the weight, in messages.

    Returns:
        values: int8 (d_out, d_in).
        scales: float16 (d_out, d_in / group_size).

    Raises:
        ArtifactError: a weight is not finite, or so large that no float16 scale holds it.
    """
    importance = gram.diagonal()
    if not bool(importance.any()):
        return round_to_nearest(weight, bits, group_size, name=name)
    round_to_nearest(weight, bits, group_size, name=name)  # holds that all weights are finite
    upper = _inverse_factor(gram)
    rest = weight.detach().float().clone()
    d_out, d_in = rest.shape
    values = torch.empty(d_out, d_in, dtype=torch.int8, device=rest.device)
    scales = torch.empty(d_out, d_in // group_size, dtype=torch.float16, device=rest.device)
    # Blocks begin where groups do: a group's scale is found in weights that are up to date.
    block = _BLOCK if group_size == d_in else group_size * max(1, _BLOCK // group_size)
    for begin in range(0, d_in, block):
        end = min(begin + block, d_in)
        errors = torch.empty(d_out, end - begin, device=rest.device)
        for i in range(begin, end):
            group = i // group_size
            if i % group_size == 0:
                inputs = slice(i, i + group_size)
                scales[:, group] = find_scales(rest[:, inputs], bits, importance[inputs])
            scale = scales[:, group].float()
            values[:, i] = to_values(rest[:, i], scale, bits)
            error = (rest[:, i] - values[:, i] * scale) / upper[i, i]
            rest[:, i:end] -= error[:, None] * upper[i, i:end]
            errors[:, i - begin] = error
        rest[:, end:] -= errors @ upper[begin:end, end:]
    return values, scales


def _inverse_factor(gram: Float[Tensor, "d_in d_in"]) -> Float[Tensor, "d_in d_in"]:
    """U of the damped H; in float64, in which H of inputs that hardly differ is still positive definite."""
    damped = gram.double()
    damped.diagonal().add_(DAMPING * float(damped.diagonal().mean()))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True).float()
