"""A linear layer whose weights stay in float32 and whose arithmetic is in the dtype of its input.

No autocast: the cast is written out here, and gradients are float32 as the weights are.
"""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class Linear(nn.Linear):
    """x Wᵀ + b in x's dtype."""

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """Apply the layer."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)

    def reset_parameters(self) -> None:
        """Do nothing: every parameter is initialized in `model/initialization.py`, and only there."""
