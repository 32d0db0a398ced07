"""A linear layer whose weights stay in float32 and whose arithmetic is in the dtype of its input.

No autocast: the cast is written out here, and gradients are float32 as the weights are.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class Linear(nn.Linear):
    """x Wᵀ + b in x's dtype."""

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """Apply the layer."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return product(x, self, bias)

    def reset_parameters(self) -> None:
        """Do nothing: every parameter is initialized in `model/initialization.py`, and only there."""


def product(x: Float[Tensor, "*batch d_in"], layer: Any, bias: Tensor | None = None) -> Float[Tensor, "*batch d_out"]:
    """x Wᵀ + b in x's dtype; what a frozen W is cast or dequantized to is not kept for the backward pass.

    Args:
        x: the inputs.
        layer: has W, as its `weight`.
        bias: b, in x's dtype.
    """
    weight = layer.weight
    is_trained = weight.requires_grad or (bias is not None and bias.requires_grad)
    if x.requires_grad and not is_trained:
        found: Tensor = _FrozenProduct.apply(x, weight.to(x.dtype), bias, layer)  # type: ignore[no-untyped-call]
        return found
    return F.linear(x, weight.to(x.dtype), bias)


class _FrozenProduct(torch.autograd.Function):
    """The product with a frozen W, which is cast or dequantized again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layer: Any) -> Tensor:
        ctx.layer = layer
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return gradients[0] @ ctx.layer.weight.to(gradients[0].dtype), None, None, None
