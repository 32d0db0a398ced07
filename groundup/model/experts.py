"""A mixture of experts in the feed-forward layer's place: a router sends each token to the best k of n layers.

Mixtral's shape (arXiv:2401.04088): the k largest of the router's probabilities, divided by their sum, weigh the outputs
of their experts. No token is ever dropped. The load-balancing loss (Switch, arXiv:2101.03961, equation 4; for k > 1 as
Mixtral counts it)

    n · Σᵢ fᵢ Pᵢ        fᵢ: share of the tokens that chose expert i,  Pᵢ: its mean probability

is k where all experts have the same to do, and n where k of them do everything.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from groundup.model.config import ModelConfig
from groundup.model.linear import Linear


class StackedLinear(nn.Module):
    """The weights of n linear layers in one tensor: (n, d_out, d_in), and (n, d_out) of biases."""

    def __init__(self, n: int, d_in: int, d_out: int, has_bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n, d_out, d_in))
        self.bias = nn.Parameter(torch.empty(n, d_out)) if has_bias else None

    def forward(self, x: Float[Tensor, "tokens d_in"], index: int) -> Float[Tensor, "tokens d_out"]:
        """Apply layer `index`, in x's dtype."""
        y = x @ self.weight[index].to(x.dtype).T
        return y if self.bias is None else y + self.bias[index].to(x.dtype)


class Experts(nn.Module):
    """The router and its experts.

    Args:
        config: the model's.
        activation: between the experts' matrices.

    Attributes:
        balance: after a forward pass in training: the load-balancing loss times its number of tokens, float32.
        takes_balance: false while a forward pass is recomputed for the backward pass: `balance` would keep that
            pass's whole graph in memory.
    """

    def __init__(self, config: ModelConfig, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        n, has_bias = config.n_experts, config.has_bias("ff")
        self.n_experts, self.n_chosen = n, config.experts_per_token
        self.activation = activation
        self.router = Linear(config.d_model, n, bias=False)
        self.gate_proj = StackedLinear(n, config.d_model, config.d_ff, has_bias) if config.is_gated else None
        self.up_proj = StackedLinear(n, config.d_model, config.d_ff, has_bias)
        self.down_proj = StackedLinear(n, config.d_ff, config.d_model, has_bias)
        self.balance: Tensor | None = None
        self.takes_balance = True

    def forward(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """Each token's chosen experts, weighed by the router."""
        tokens = x.reshape(-1, x.shape[-1])
        probabilities = self.router(tokens).float().softmax(dim=-1)  # (tokens, n_experts)
        weights, chosen = probabilities.topk(self.n_chosen, dim=-1)
        weights = (weights / weights.sum(dim=-1, keepdim=True)).to(x.dtype)
        if self.training:
            balance = load_balance(probabilities, chosen) * len(tokens)
            if self.takes_balance:
                self.balance = balance
        out = torch.zeros_like(tokens)
        for index in range(self.n_experts):
            rows, slots = (chosen == index).nonzero(as_tuple=True)
            out = out.index_add(0, rows, self._expert(tokens[rows], index) * weights[rows, slots, None])
        return out.view_as(x)

    def _expert(self, x: Float[Tensor, "tokens d_model"], index: int) -> Float[Tensor, "tokens d_model"]:
        up = self.up_proj(x, index)
        inner = self.activation(up) if self.gate_proj is None else self.activation(self.gate_proj(x, index)) * up
        return self.down_proj(inner, index)


def load_balance(probabilities: Float[Tensor, "tokens experts"], chosen: Int[Tensor, "tokens k"]) -> Float[Tensor, ""]:
    """The load-balancing loss n · Σᵢ fᵢ Pᵢ; its gradient goes through the probabilities alone."""
    n = probabilities.shape[-1]
    shares = torch.zeros(n, device=chosen.device).index_add_(
        0, chosen.flatten(), torch.full((chosen.numel(),), 1 / max(1, len(chosen)), device=chosen.device)
    )
    return n * (shares * probabilities.mean(dim=0)).sum()
