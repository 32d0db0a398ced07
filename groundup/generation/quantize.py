"""Weights in 8 or 4 bits: one symmetric scale for a row or a group of inputs, w ≈ value · scale.

A token written alone is as slow as the weights are long in memory, so fewer bits are more tokens a second. Matrices
are quantized: every linear layer of the blocks, the embedding and the output layer. Norms, biases, learned positions
and the experts' routers stay as they are: they are small, and an error in them hurts most. With 4 bits, the output
layer, an embedding that is tied to it and rows that groups do not divide have 8, as in llama.cpp.

The layouts and numbers are those of GGUF's Q8_0 and Q4_0 (there a scale stands for 32 inputs; a longer group's is
repeated), so a quantized model is exported without a second rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from groundup.errors import ArtifactError, GroundupError
from groundup.model import Transformer
from groundup.model.experts import StackedLinear
from groundup.model.linear import Linear

Bits = Literal[8, 4]

RUN = 32
"""Inputs whose nibbles stand together, and the shortest group."""

_SHRINK = torch.linspace(1.0, 0.75, 11)
"""Scales tried for a 4-bit group, as parts of the one that clips nothing."""


def round_to_nearest(weight: Float[Tensor, "*rows d_in"], bits: Bits, group_size: int) -> tuple[Tensor, Tensor]:
    """Quantize by rounding each weight to the nearest value.

    In 8 bits the largest of a group is 127. In 4 bits (−8 … 7) the largest in magnitude is −8, as in Q4_0; smaller
    scales and the other sign are tried too, and the one with the least squared error is taken: with 16 values to
    choose from, it often pays to clip one weight and to hold the others better.

    Args:
        weight: of any float dtype.
        bits: 8 or 4.
        group_size: inputs per scale; divides d_in.

    Returns:
        values: int8 (*rows, d_in).
        scales: float16 (*rows, d_in / group_size).

    Raises:
        ArtifactError: a weight is not finite, or so large that no float16 scale holds it.
    """
    groups = weight.detach().float().reshape(*weight.shape[:-1], -1, group_size)
    scales = find_scales(groups, bits)
    return to_values(groups, scales.float()[..., None], bits).flatten(-2), scales


def find_scales(groups: Float[Tensor, "*rows size"], bits: Bits) -> Float[Tensor, " *rows"]:
    """The scale of each group, float16; see `round_to_nearest`."""
    largest, smallest = groups.amax(dim=-1), groups.amin(dim=-1)
    if not bool((largest - smallest).isfinite().all()) or float(groups.abs().max()) > 65504.0 * (
        127 if bits == 8 else 7
    ):
        raise ArtifactError(
            "A weight is not finite, or too large to be quantized.", "The model is damaged: take an earlier one."
        )
    if bits == 8:
        return (torch.maximum(largest, -smallest) / 127).half()
    extreme = torch.where(largest > -smallest, largest, smallest)
    best = torch.full_like(extreme, torch.inf)
    found = torch.zeros_like(extreme, dtype=torch.float16)
    for sign in (-1, 1):
        for part in (_SHRINK / (8 if sign < 0 else 7)).tolist():
            scales = (extreme * (sign * part)).half()
            wide = scales.float()[..., None]
            error = (to_values(groups, wide, bits) * wide - groups).square().sum(dim=-1)
            is_better = error < best
            best, found = torch.where(is_better, error, best), torch.where(is_better, scales, found)
    return found


def to_values(weight: Tensor, scales: Tensor, bits: Bits) -> Tensor:
    """weight / scales, rounded and clipped, int8; 0 where the scale is 0."""
    low, high = (-127, 127) if bits == 8 else (-8, 7)
    scaled = torch.where(scales == 0, 0.0, weight / scales)
    return scaled.round_().clamp_(low, high).to(torch.int8)


def pack(values: Int[Tensor, "*rows d_in"], bits: Bits) -> Tensor:
    """Values as they stand in memory.

    8 bits: int8, as they are. 4 bits: uint8 (*rows, d_in / 2); in each run of 32 inputs byte i holds input i in its
    low and input i + 16 in its high nibble, each as value + 8.
    """
    if bits == 8:
        return values.contiguous()
    low, high = (values + 8).to(torch.uint8).reshape(*values.shape[:-1], -1, 2, RUN // 2).unbind(dim=-2)
    return (low | high << 4).flatten(-2)


def unpack(packed: Tensor, bits: Bits) -> Int[Tensor, "*rows d_in"]:
    """The values, int8: the inverse of `pack`."""
    if bits == 8:
        return packed
    runs = packed.reshape(*packed.shape[:-1], -1, RUN // 2)
    return torch.stack([runs & 15, runs >> 4], dim=-2).flatten(-3).to(torch.int8) - 8


class Quantized(nn.Module):
    """What quantized matrices share.

    Attributes:
        bits: per weight.
        group_size: inputs per scale.
        packed: the values; see `pack`.
        scales: float16 (*rows, d_in / group_size); they keep their dtype when the model is moved to another.
        bias: a parameter, or None.
    """

    packed: Tensor
    scales: Tensor

    def __init__(self, packed: Tensor, scales: Tensor, bits: Bits, bias: Tensor | None = None) -> None:
        super().__init__()
        self.bits: Bits = bits
        self.group_size = packed.shape[-1] * (8 // bits) // scales.shape[-1]
        self.register_buffer("packed", packed)
        self.register_buffer("scales", scales)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @property
    def weight(self) -> Float[Tensor, "*rows d_in"]:
        """The dequantized weights, float32."""
        return dequantize(self.packed, self.scales, self.bits)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        kept = self.scales
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.scales = kept.to(self.packed.device)
        return self

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"bits={self.bits}, group_size={self.group_size}, shape={tuple(self.scales.shape[:-1])}"


def dequantize(packed: Tensor, scales: Tensor, bits: Bits) -> Float[Tensor, "*rows d_in"]:
    """value · scale, float32."""
    values = unpack(packed, bits).reshape(*scales.shape, -1)
    return (values * scales.float()[..., None]).flatten(-2)


class QuantizedLinear(Quantized):
    """x Wᵀ + b, with the weights dequantized to x's dtype."""

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """Apply the layer."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class QuantizedStackedLinear(Quantized):
    """One linear layer for each expert; packed is (n_experts, d_out, …)."""

    def forward(self, x: Float[Tensor, "tokens d_in"], index: int) -> Float[Tensor, "tokens d_out"]:
        """Apply one expert's layer."""
        weight = dequantize(self.packed[index], self.scales[index], self.bits).to(x.dtype)
        return F.linear(x, weight, None if self.bias is None else self.bias[index].to(x.dtype))


class QuantizedEmbedding(Quantized):
    """Rows of an embedding; only those that are looked up are dequantized."""

    def forward(self, ids: Int[Tensor, " *batch"]) -> Float[Tensor, "*batch width"]:
        """Look ids up."""
        return dequantize(self.packed[ids], self.scales[ids], self.bits)


_KINDS: dict[type[nn.Module], type[Quantized]] = {
    Linear: QuantizedLinear,
    StackedLinear: QuantizedStackedLinear,
    nn.Embedding: QuantizedEmbedding,
}


def matrices(model: Transformer, bits: Bits, group_size: int | None = None) -> Iterator[tuple[str, Bits, int]]:
    """Which modules of a model are quantized: their names, bits and inputs per scale."""
    is_tied = model.lm_head is None
    for name, module in model.named_modules():
        if (
            not isinstance(module, Linear | StackedLinear | nn.Embedding)
            or name == "embed_positions"
            or name.endswith(".router")
        ):
            continue
        d_in = module.weight.shape[-1]
        size = group_size or (RUN if bits == 4 else d_in)
        is_output = name == "lm_head" or (is_tied and name == "embed_tokens")
        if bits == 4 and not is_output and d_in % size == 0:
            yield name, 4, size
        else:
            yield name, 8, size if bits == 8 and d_in % size == 0 else d_in


def replace(model: Transformer, name: str, packed: Tensor, scales: Tensor, bits: Bits) -> None:
    """Put a quantized matrix in the place of a module, which keeps its bias."""
    before = model.get_submodule(name)
    kind = next(made for kind, made in _KINDS.items() if isinstance(before, kind))
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, kind(packed, scales, bits, getattr(before, "bias", None)))


@torch.no_grad()
def quantize(model: Transformer, bits: Bits = 8, group_size: int | None = None) -> Transformer:
    """Quantize a model's matrices in place, and return it. It cannot be trained any more.

    Args:
        model: with float weights, on one device.
        bits: per weight.
        group_size: inputs per scale, a multiple of 32; None: the whole row with 8 bits, 32 with 4.

    Raises:
        GroundupError: bits or group_size that there are not, or the model is quantized already.
        ArtifactError: a weight is not finite.
    """
    if bits not in (8, 4) or (group_size is not None and (group_size < RUN or group_size % RUN)):
        raise GroundupError(f"bits = {bits}, group_size = {group_size}: bits are 8 or 4, groups multiples of {RUN}.")
    if any(isinstance(module, Quantized) for module in model.modules()):
        raise GroundupError("The model is quantized already.", "Quantize the model it was made from.")
    for name, n_bits, size in list(matrices(model, bits, group_size)):
        values, scales = round_to_nearest(model.get_parameter(f"{name}.weight"), n_bits, size)
        replace(model, name, pack(values, n_bits), scales, n_bits)
    return model.eval().requires_grad_(requires_grad=False)
