"""Where a token stands: rotary position embedding (RoPE, arXiv:2104.09864).

Half-split form, as Llama and Qwen use it: feature i is paired with feature i + head_dim/2 and the pair is
turned by position · base^(−2i/head_dim). The table is a function of the positions; the model keeps no state.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

Rotation = tuple[Float[Tensor, "*rows 1 seq half"], Float[Tensor, "*rows 1 seq half"]]


def rotation_table(positions: Int[Tensor, "*batch seq"], head_dim: int, base: float, dtype: torch.dtype) -> Rotation:
    """Cosines and sines for every position, each (*batch, 1, seq, head_dim/2); computed in float32."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles = positions[..., None].float() * base**-exponents  # (*batch, seq, half)
    angles = angles.unsqueeze(-3)  # one axis for the heads
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(
    x: Float[Tensor, "batch heads seq head_dim"], rotation: Rotation
) -> Float[Tensor, "batch heads seq head_dim"]:
    """Turn each pair (i, i + head_dim/2) by its position's angle."""
    cos, sin = rotation
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
