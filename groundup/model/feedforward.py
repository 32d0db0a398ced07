"""The feed-forward sub-layer: SwiGLU (arXiv:2002.05202) or the original's two layers with GELU."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from groundup.model.config import ModelConfig
from groundup.model.linear import Linear


class SwiGLU(nn.Module):
    """down(silu(gate(x)) · up(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.d_model, config.d_ff, config.bias)
        self.up_proj = Linear(config.d_model, config.d_ff, config.bias)
        self.down_proj = Linear(config.d_ff, config.d_model, config.bias)

    def forward(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """Apply the layer."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class GELU(nn.Module):
    """down(gelu(up(x))), with GELU's tanh form as in GPT-2."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up_proj = Linear(config.d_model, config.d_ff, config.bias)
        self.down_proj = Linear(config.d_ff, config.d_model, config.bias)

    def forward(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """Apply the layer."""
        return self.down_proj(F.gelu(self.up_proj(x), approximate="tanh"))


def make_feedforward(config: ModelConfig) -> nn.Module:
    """The configured feed-forward layer."""
    return SwiGLU(config) if config.activation == "swiglu" else GELU(config)
