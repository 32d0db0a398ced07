"""Weights as integers of 8 or 4 bits with a scale for each group of inputs: w ≈ value · scale, and how they are packed.

Symmetric, with float16 scales: the numbers and layouts of GGUF's Q8_0 and Q4_0, where a scale stands for 32 inputs (a
longer group's is repeated), so that a quantized model leaves as GGUF without a second rounding.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from groundup.errors import ArtifactError

Bits = Literal[8, 4]

RUN = 32
"""Inputs whose nibbles stand together, and the shortest group."""

_SHRINK = torch.linspace(1.0, 0.75, 11).tolist()
"""Scales tried for a 4-bit group, as parts of the one that clips nothing."""


def round_to_nearest(
    weight: Float[Tensor, "*rows d_in"], bits: Bits, group_size: int, *, name: str = "weight"
) -> tuple[Tensor, Tensor]:
    """Quantize by rounding each weight to the nearest value.

    In 8 bits (−127 … 127) the largest of a group is 127. In 4 bits (−8 … 7) the largest in magnitude is −8, as in
    Q4_0; smaller scales and the other sign are tried too, and the one with the least squared error is taken: with 16
    values to choose from it often pays to clip one weight and to hold the others better.

    Args:
        weight: of any float dtype.
        bits: 8 or 4.
        group_size: inputs per scale; divides d_in.
        name: of the weight, in messages.

    Returns:
        values: int8 (*rows, d_in).
        scales: float16 (*rows, d_in / group_size).

    Raises:
        ArtifactError: a weight is not finite, or so large that no float16 scale holds it.
    """
    groups = weight.detach().float().reshape(*weight.shape[:-1], -1, group_size)
    scales = find_scales(groups, bits)
    if not bool(scales.isfinite().all()):
        raise ArtifactError(
            f"{name}: has a value that is not finite, or too large for {bits} bits.",
            "The model is damaged: take an earlier one.",
        )
    return to_values(groups, scales.float()[..., None], bits).flatten(-2), scales


def find_scales(
    groups: Float[Tensor, "*rows size"], bits: Bits, importance: Float[Tensor, "*rows size"] | None = None
) -> Float[Tensor, " *rows"]:
    """The scale of each group, float16; see `round_to_nearest`. Not finite where a weight is not.

    Args:
        groups: of weights.
        bits: 8 or 4.
        importance: of each input's squared error; None: all the same.
    """
    largest, smallest = groups.amax(dim=-1), groups.amin(dim=-1)
    if bits == 8:
        return (torch.maximum(largest, -smallest) / 127).half()
    extreme = torch.where(largest > -smallest, largest, smallest)
    found = (extreme / -8).half()
    best = torch.full_like(extreme, torch.inf)
    for least in (-8, 7):
        for part in _SHRINK:
            scales = (extreme * (part / least)).half()
            wide = scales.float()[..., None]
            error = (to_values(groups, wide, bits) * wide - groups).square_()
            total = (error if importance is None else error.mul_(importance)).sum(dim=-1)
            is_better = total < best
            best, found = torch.where(is_better, total, best), torch.where(is_better, scales, found)
    return found


def to_values(weight: Tensor, scales: Tensor, bits: Bits) -> Tensor:
    """weight / scales, rounded and clipped, int8; 0 where the scale is 0."""
    low, high = (-127, 127) if bits == 8 else (-8, 7)
    scaled = weight / scales.masked_fill(scales == 0, torch.inf)
    return scaled.round_().clamp_(low, high).to(torch.int8)


def pack(values: Int[Tensor, "*rows d_in"], bits: Bits) -> Tensor:
    """Values as they stand in memory.

    8 bits: int8, as they are. 4 bits: uint8 (*rows, d_in / 2); in each run of 32 inputs byte i holds input i in its
    low and input i + 16 in its high nibble, each as value + 8.
    """
    if bits == 8:
        return values
    low, high = (values + 8).to(torch.uint8).reshape(*values.shape[:-1], -1, 2, RUN // 2).unbind(dim=-2)
    return (low | high << 4).flatten(-2)


def dequantize(packed: Tensor, scales: Tensor, bits: Bits) -> Float[Tensor, "*rows d_in"]:
    """value · scale, float32."""
    d_in = packed.shape[-1] * (8 // bits)
    if bits == 8:
        values = packed.float()
    else:
        # Written in place: at this size a second tensor costs more than the arithmetic.
        runs = packed.reshape(*packed.shape[:-1], -1, RUN // 2)
        values = torch.empty(*runs.shape[:-1], 2, RUN // 2, device=packed.device)
        values[..., 0, :] = runs & 15
        values[..., 1, :] = runs >> 4
        values.sub_(8)
    return values.view(*scales.shape, -1).mul_(scales.float()[..., None]).view(*packed.shape[:-1], d_in)
