"""Attention (arXiv:1706.03762, section 3.2), head by head and query by query."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def causal_attention(
    q: Float[Tensor, "heads seq d"], k: Float[Tensor, "kv_heads seq d"], v: Float[Tensor, "kv_heads seq d"]
) -> Float[Tensor, "heads seq d"]:
    """softmax(q kᵀ / √d) v over this and earlier tokens; neighbouring query heads share a key/value head."""
    heads, seq, d = q.shape
    group = heads // k.shape[0]
    out = torch.empty_like(q)
    for head in range(heads):
        for i in range(seq):
            scores = k[head // group, : i + 1] @ q[head, i] / d**0.5  # (i + 1,)
            weights = (scores - scores.max()).exp()
            out[head, i] = weights / weights.sum() @ v[head // group, : i + 1]
    return out


def sparse_attention(
    q: Float[Tensor, "heads seq d"],
    k: Float[Tensor, "kv_heads seq d"],
    v: Float[Tensor, "kv_heads seq d"],
    seen: Sequence[set[int]],
    *,
    scale: float,
    softcap: float | None = None,
    slopes: Sequence[float] | None = None,
) -> Float[Tensor, "heads seq d"]:
    """The same over the keys in `seen[i]`, with capped scores (arXiv:2408.00118) and ALiBi (arXiv:2108.12409)."""
    heads, seq, _ = q.shape
    group = heads // k.shape[0]
    out = torch.empty_like(q)
    for head in range(heads):
        for i in range(seq):
            j = torch.tensor(sorted(seen[i]))
            scores = k[head // group, j] @ q[head, i] * scale
            if softcap is not None:
                scores = softcap * (scores / softcap).tanh()
            if slopes is not None:
                scores = scores - slopes[head] * (i - j)
            weights = (scores - scores.max()).exp()
            out[head, i] = weights / weights.sum() @ v[head // group, j]
    return out
