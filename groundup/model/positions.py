"""Position encodings: rotary embeddings with their scalings, and the original sinusoids.

RoPE (arXiv:2104.09864) in the half-split form that Llama and Qwen use: of the r rotated features of a head, feature i
is paired with feature i + r/2, and the pair is turned by position · base^(−2i/r). Longer contexts change the
frequencies (`RopeScaling`). All tables are functions of the positions; the model keeps no state.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from groundup.model.config import RopeScaling

Rotation = tuple[Float[Tensor, "*rows 1 seq half"], Float[Tensor, "*rows 1 seq half"]]


def rotation_table(
    positions: Int[Tensor, "*batch seq"],
    rotated: int,
    base: float,
    dtype: torch.dtype,
    scaling: RopeScaling | None = None,
) -> Rotation:
    """Cosines and sines for every position, each (*batch, 1, seq, rotated/2); computed in float32."""
    frequencies, factor = rotary_frequencies(rotated, base, scaling)
    angles = positions[..., None].float() * frequencies.to(positions.device)  # (*batch, seq, half)
    angles = angles.unsqueeze(-3)  # one axis for the heads
    return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)


def rotate(
    x: Float[Tensor, "batch heads seq head_dim"], rotation: Rotation
) -> Float[Tensor, "batch heads seq head_dim"]:
    """Turn each pair (i, i + rotated/2) by its position's angle; features behind the rotated ones stay."""
    cos, sin = rotation
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    if x.dtype == torch.float32 and not torch.is_grad_enabled():  # half as many passes over memory
        out = x.clone()
        out[..., :half].mul_(cos).addcmul_(second, sin, value=-1)
        out[..., half : 2 * half].mul_(cos).addcmul_(first, sin)
        return out
    turned = (first * cos - second * sin, second * cos + first * sin)
    return torch.cat((*turned, rest) if rest.shape[-1] else turned, dim=-1)


def rotary_frequencies(
    rotated: int, base: float, scaling: RopeScaling | None = None
) -> tuple[Float[Tensor, " half"], float]:
    """Radians per position of each pair, fastest first, float32; and what queries and keys are multiplied by."""
    if scaling is not None and scaling.kind == "ntk" and rotated > 2:
        base = base * scaling.factor ** (rotated / (rotated - 2))
    exponents = torch.arange(0, rotated, 2, dtype=torch.float32, device="cpu") / rotated
    frequencies = 1.0 / base**exponents
    if scaling is None or scaling.kind == "ntk":
        return frequencies, 1.0
    if scaling.kind == "linear":
        return frequencies / scaling.factor, 1.0
    if scaling.kind == "llama3":
        return _by_wavelength(frequencies, scaling), 1.0
    factor = scaling.attention_factor
    return _yarn(frequencies, rotated, base, scaling), 0.1 * math.log(scaling.factor) + 1 if factor is None else factor


def _by_wavelength(frequencies: Float[Tensor, " half"], scaling: RopeScaling) -> Float[Tensor, " half"]:
    """Llama 3.1: long waves divided by the factor, short ones kept, those between mixed."""
    assert scaling.original_context is not None
    wavelengths = 2 * math.pi / frequencies
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    kept = ((scaling.original_context / wavelengths - low) / (high - low)).clamp(0.0, 1.0)
    return frequencies / scaling.factor * (1 - kept) + frequencies * kept


def _yarn(
    frequencies: Float[Tensor, " half"], rotated: int, base: float, scaling: RopeScaling
) -> Float[Tensor, " half"]:
    """YaRN (arXiv:2309.00071, section 3.2): what turns often in the original context stays, the rest is divided."""
    context = scaling.original_context
    assert context is not None

    def pair_that_turns(times: float) -> float:
        """The pair, as a fraction, that turns so often within the original context."""
        return rotated * math.log(context / (times * 2 * math.pi)) / (2 * math.log(base))

    first = max(math.floor(pair_that_turns(scaling.beta_fast)), 0)
    last = min(math.ceil(pair_that_turns(scaling.beta_slow)), rotated - 1)
    span = last - first or 0.001
    divided = ((torch.arange(rotated // 2, dtype=torch.float32, device="cpu") - first) / span).clamp(0.0, 1.0)
    return frequencies / scaling.factor * divided + frequencies * (1 - divided)


def sinusoids(positions: Int[Tensor, "*batch seq"], d_model: int) -> Float[Tensor, "*batch seq d_model"]:
    """sin(position / 10000^(2i/d)) in feature 2i and its cosine in 2i + 1 (arXiv:1706.03762, section 3.5), float32."""
    exponents = torch.arange(0, d_model, 2, device=positions.device, dtype=torch.float32) / d_model
    angles = positions[..., None].float() * 10_000.0**-exponents
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)
