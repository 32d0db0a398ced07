"""Causal self-attention: multi-head and grouped-query, with or without a key/value cache.

softmax(q kᵀ / sqrt(head_dim) + mask) v (arXiv:1706.03762, section 3.2.1), by torch's fused kernel where that is the
fastest, by plain products where those are: with a cache, and on a CPU in bfloat16.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from groundup.model.config import ModelConfig
from groundup.model.linear import Linear
from groundup.model.normalization import RMSNorm
from groundup.model.positions import Rotation, rotate

# torch's fused kernel has no bfloat16 matrix units behind it on CPUs: up to about this many positions the products
# of the plain form are faster, forward and backward: a quarter off a step of ground-1m (benchmarks/cpu_ladder.py).
_PLAIN_UP_TO = 1024


class KeyValueStore(Protocol):
    """What the model asks of a key/value cache."""

    def update(
        self,
        layer: int,
        keys: Float[Tensor, "batch kv_heads seq head_dim"],
        values: Float[Tensor, "batch kv_heads seq head_dim"],
        positions: Int[Tensor, "batch seq"],
    ) -> tuple[Float[Tensor, "batch kv_heads length head_dim"], Float[Tensor, "batch kv_heads length head_dim"]]:
        """Store keys and values at each row's positions; return those of positions 0 … length−1."""
        ...


class Attention(nn.Module):
    """One attention sub-layer.

    Args:
        config: the model's configuration.
        layer: this block's index, under which a cache keeps its keys and values.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.n_heads, self.n_kv_heads, self.head_dim = config.n_heads, config.n_kv_heads, config.head_dim
        self.q_proj = Linear(config.d_model, config.n_heads * config.head_dim, config.bias)
        self.k_proj = Linear(config.d_model, config.n_kv_heads * config.head_dim, config.bias)
        self.v_proj = Linear(config.d_model, config.n_kv_heads * config.head_dim, config.bias)
        self.o_proj = Linear(config.n_heads * config.head_dim, config.d_model, config.bias)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None

    def forward(
        self,
        x: Float[Tensor, "batch seq d_model"],
        rotation: Rotation | None,
        positions: Int[Tensor, "batch seq"] | None = None,
        cache: KeyValueStore | None = None,
    ) -> Float[Tensor, "batch seq d_model"]:
        """Attend to this and earlier positions."""
        batch, seq, _ = x.shape
        q = self.q_proj(x).view(batch, seq, self.n_heads, self.head_dim)
        k = self.k_proj(x).view(batch, seq, self.n_kv_heads, self.head_dim)
        v = self.v_proj(x).view(batch, seq, self.n_kv_heads, self.head_dim).transpose(1, 2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = q.transpose(1, 2), k.transpose(1, 2)  # (batch, heads, seq, head_dim)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        if cache is None:
            out = causal_attention(q, k, v)
        else:
            assert positions is not None
            keys, values = cache.update(self.layer, k, v, positions)
            out = attend_to_cache(q, keys, values, positions)
        return self.o_proj(out.transpose(1, 2).reshape(batch, seq, -1))


def causal_attention(
    q: Float[Tensor, "batch heads seq head_dim"],
    k: Float[Tensor, "batch kv_heads seq head_dim"],
    v: Float[Tensor, "batch kv_heads seq head_dim"],
) -> Float[Tensor, "batch heads seq head_dim"]:
    """Each position attends to itself and to earlier ones."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[2] <= _PLAIN_UP_TO:
        return _plain_causal_attention(q, k, v)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


def _plain_causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    batch, heads, seq, head_dim = q.shape
    group = heads // k.shape[1]
    k, v = (part.repeat_interleave(group, dim=1) if group > 1 else part for part in (k, v))
    flat = (batch * heads, seq, head_dim)
    mask = torch.full((seq, seq), float("-inf"), dtype=q.dtype, device=q.device).triu(1)
    scores = torch.baddbmm(mask, (q * head_dim**-0.5).reshape(flat), k.reshape(flat).transpose(1, 2))
    return (scores.softmax(dim=-1) @ v.reshape(flat)).view(batch, heads, seq, head_dim)


def attend_to_cache(
    q: Float[Tensor, "batch heads seq head_dim"],
    keys: Float[Tensor, "batch kv_heads length head_dim"],
    values: Float[Tensor, "batch kv_heads length head_dim"],
    positions: Int[Tensor, "batch seq"],
) -> Float[Tensor, "batch heads seq head_dim"]:
    """Attention of queries at `positions` to cached keys 0 … length−1, each to its own and earlier positions."""
    batch, heads, seq, head_dim = q.shape
    kv_heads, length = keys.shape[1], keys.shape[2]
    grouped = q.reshape(batch, kv_heads, heads // kv_heads * seq, head_dim)
    scores = (grouped @ keys.transpose(-1, -2)).float() * head_dim**-0.5  # (batch, kv_heads, group·seq, length)
    visible = torch.arange(length, device=q.device) <= positions[..., None]  # (batch, seq, length)
    scores = scores.view(batch, kv_heads, heads // kv_heads, seq, length)
    scores = scores.masked_fill(~visible[:, None, None], float("-inf"))
    weights = scores.softmax(dim=-1).to(q.dtype).view(batch, kv_heads, -1, length)
    return (weights @ values).view(batch, heads, seq, head_dim)
