"""Normalization layers: RMSNorm (arXiv:1910.07467) and LayerNorm (arXiv:1607.06450)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from groundup.model.config import ModelConfig


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight, over the last dimension, in the input's dtype."""

    def __init__(self, width: int, eps: float, has_weight: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width)) if has_weight else None
        self.eps = eps

    def forward(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        """Normalize the last dimension."""
        if x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_grad_enabled():
            # There torch's own is composed of six passes over memory.
            norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
            x = x * (norm.square() / x.shape[-1] + self.eps).rsqrt()
            return x if self.weight is None else x.mul_(self.weight)
        weight = None if self.weight is None else self.weight.to(x.dtype)
        return F.rms_norm(x, (x.shape[-1],), weight, self.eps)


class LayerNorm(nn.Module):
    """(x − mean) / sqrt(var + eps) · weight + bias, over the last dimension, in the input's dtype."""

    def __init__(self, width: int, eps: float, has_weight: bool = True, has_bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width)) if has_weight else None
        self.bias = nn.Parameter(torch.empty(width)) if has_bias else None
        self.eps = eps

    def forward(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        """Normalize the last dimension."""
        weight = None if self.weight is None else self.weight.to(x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.layer_norm(x, (x.shape[-1],), weight, bias, self.eps)


def make_norm(config: ModelConfig, width: int) -> nn.Module:
    """The configured normalization over `width` features."""
    if config.norm == "layernorm":
        return LayerNorm(width, config.norm_eps, config.norm_weight, config.has_bias("norm"))
    return RMSNorm(width, config.norm_eps, config.norm_weight)
