"""The feed-forward sub-layer: down(activation(up(x))), or with a gate down(activation(gate(x)) · up(x)).

Activations: GELU exactly and in its tanh form (arXiv:1606.08415), squared ReLU (arXiv:2109.08668); with a gate SiLU
(SwiGLU) and GELU (GeGLU; arXiv:2002.05202).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from groundup.model.config import Activation, ModelConfig
from groundup.model.experts import Experts
from groundup.model.linear import Linear


def squared_relu(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """max(x, 0)²."""
    return F.relu(x).square()


ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "swiglu": F.silu,
    "geglu": F.gelu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu2": squared_relu,
}


class FeedForward(nn.Module):
    """One feed-forward layer, for every token the same."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        has_bias = config.has_bias("ff")
        self.activation = ACTIVATIONS[config.activation]
        self.gate_proj = Linear(config.d_model, config.d_ff, has_bias) if config.is_gated else None
        self.up_proj = Linear(config.d_model, config.d_ff, has_bias)
        self.down_proj = Linear(config.d_ff, config.d_model, has_bias)

    def forward(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """Apply the layer."""
        if self.gate_proj is None:
            return self.down_proj(self.activation(self.up_proj(x)))
        gate = self.activation(self.gate_proj(x))
        return self.down_proj(gate * self.up_proj(x) if torch.is_grad_enabled() else gate.mul_(self.up_proj(x)))


def make_feedforward(config: ModelConfig) -> nn.Module:
    """The configured feed-forward layer, or a router and its experts."""
    if config.n_experts:
        return Experts(config, ACTIVATIONS[config.activation])
    return FeedForward(config)
