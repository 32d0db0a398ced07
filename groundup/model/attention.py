"""Causal self-attention: multi-head, grouped-query and multi-query, full or sparse, with or without a cache.

softmax(cap(q kᵀ · scale) + bias) v (arXiv:1706.03762, section 3.2.1; the bias is the mask of `masks.py`), by the
fastest form at hand: torch's fused kernel (`scaled_dot_product_attention`); on a GPU, where the bias is sparse or
scores are capped, FlexAttention (arXiv:2412.05496), which never holds the bias; plain products with a cache, with
capped scores elsewhere, and on a CPU in bfloat16 or inside the documents of packed rows (`documents.py`).
`groundup.reference.attention` is the textbook form of all.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from groundup.model.config import ModelConfig
from groundup.model.documents import DocumentPlan
from groundup.model.flex import FlexPlan, flex_attention
from groundup.model.linear import Linear
from groundup.model.masks import AttentionRule, attention_bias
from groundup.model.normalization import RMSNorm
from groundup.model.positions import Rotation, rotate

# torch's fused kernel has no bfloat16 matrix units behind its backward pass on CPUs: up to about this many positions
# plain products are faster, forward and backward: a quarter off a step of ground-1m (benchmarks/cpu_ladder.py).
PRODUCTS_UP_TO = 512
KEPT_UP_TO = 256
"""Positions up to which the weights are kept for the backward pass; beyond, computing them again is faster. Also
the queries of a block."""

FEW_WANTED = 4
"""Queries per row, of which keys and values are copied for each; for more wanted ones all are computed."""

Bias = Float[Tensor, "*batch heads q k"]
AttentionMask = Bias | FlexPlan | DocumentPlan | None
"""What a layer's queries attend to: a bias, a plan for FlexAttention or documents, None for plain causal attention."""


class KeyValueStore(Protocol):
    """What the model asks of a key/value cache."""

    def update(
        self,
        layer: int,
        keys: Float[Tensor, "batch kv_heads seq head_dim"],
        values: Float[Tensor, "batch kv_heads seq head_dim"],
        positions: Int[Tensor, "batch seq"],
    ) -> tuple[
        Float[Tensor, "batch kv_heads length head_dim"],
        Float[Tensor, "batch kv_heads length head_dim"],
        Int[Tensor, "batch *seq length"] | None,
    ]:
        """Store keys and values at each row's positions; return those stored, and their positions (None: 0, 1, …).

        Positions may differ from query to query: a key that stands beyond a query is hidden from it.
        """
        ...


@dataclass
class Cached:
    """A cache, and where this call's tokens stand in it."""

    store: KeyValueStore  # keys and values of earlier calls
    positions: Int[Tensor, "batch seq"]  # of this call's tokens
    _biases: dict[tuple[AttentionRule, int], Tensor] = field(default_factory=dict)

    def bias(self, rule: AttentionRule, length: int, where: Int[Tensor, "batch *seq length"] | None = None) -> Bias:
        """The bias of queries at `positions` over so many keys, at these positions (None: 0, 1, …).

        It is made once for all layers with the rule.
        """
        if (rule, length) not in self._biases:
            keys = torch.arange(length, device=self.positions.device) if where is None else where
            self._biases[rule, length] = attention_bias(rule, self.positions, keys, torch.float32)
        return self._biases[rule, length]


class Attention(nn.Module):
    """One attention sub-layer.

    Args:
        config: the model's configuration.
        layer: this block's index, under which a cache keeps its keys and values.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.rule = AttentionRule.of_layer(config, layer)
        self.n_heads, self.n_kv_heads, self.head_dim = config.n_heads, config.n_kv_heads, config.head_dim
        self.scale = config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale
        self.softcap = config.attention_softcap
        q_width, kv_width = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.q_proj = Linear(config.d_model, q_width, config.has_bias("qkv"))
        self.k_proj = Linear(config.d_model, kv_width, config.has_bias("qkv"))
        self.v_proj = Linear(config.d_model, kv_width, config.has_bias("qkv"))
        self.o_proj = Linear(q_width, config.d_model, config.has_bias("o"))
        norms = config.qk_norm
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps, config.norm_weight) if norms else None
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps, config.norm_weight) if norms else None

    def forward(
        self,
        x: Float[Tensor, "batch seq d_model"],
        rotation: Rotation | None,
        mask: AttentionMask = None,
        cached: Cached | None = None,
        wanted: tuple[Tensor, Tensor] | None = None,
    ) -> Float[Tensor, "batch seq d_model"]:
        """Attend to this and earlier positions.

        Args:
            x: the sub-layer's input.
            rotation: RoPE's table, or None.
            mask: what this layer's queries attend to; not used with a cache.
            cached: keys and values of earlier calls; the mask follows from their positions.
            wanted: rows and columns of the n positions whose results are wanted, (1, n, d_model).
        """
        batch, seq, _ = x.shape
        v = self._heads(self.v_proj(x))
        if wanted is not None and cached is None and mask is None and len(wanted[0]) <= FEW_WANTED * batch:
            k = self._heads(self.k_proj(x), self.k_norm, rotation)
            return self.o_proj(self._few(x, k, v, rotation, wanted))
        q, k = self.queries_and_keys(x, rotation)
        if cached is None:
            out = causal_attention(q, k, v, self.scale, mask, self.softcap)
        else:
            keys, values, where = cached.store.update(self.layer, k, v, cached.positions)
            bias = cached.bias(self.rule, keys.shape[2], where)
            out = attend_to_cache(q, keys, values, bias, self.scale, self.softcap)
        out = out.transpose(1, 2).reshape(batch, seq, -1)
        return self.o_proj(out if wanted is None else out[wanted][None])

    def queries_and_keys(
        self, x: Float[Tensor, "batch seq d_model"], rotation: Rotation | None
    ) -> tuple[Float[Tensor, "batch heads seq head_dim"], Float[Tensor, "batch kv_heads seq head_dim"]]:
        """What the scores are products of: normalized and rotated, where the model does so."""
        q = self._heads(self.q_proj(x), self.q_norm, rotation)
        return q, self._heads(self.k_proj(x), self.k_norm, rotation)

    def _heads(
        self, x: Float[Tensor, "batch seq width"], norm: RMSNorm | None = None, rotation: Rotation | None = None
    ) -> Float[Tensor, "batch heads seq head_dim"]:
        x = x.view(*x.shape[:2], -1, self.head_dim)
        x = (x if norm is None else norm(x)).transpose(1, 2)
        return x if rotation is None else rotate(x, rotation)

    def _few(
        self, x: Tensor, k: Tensor, v: Tensor, rotation: Rotation | None, wanted: tuple[Tensor, Tensor]
    ) -> Float[Tensor, "1 n width"]:
        """Plain causal attention of the wanted queries alone, each over the keys and values of its row."""
        rows, columns = wanted
        if rotation is not None:
            cos, sin = (part[0, columns, None, None] for part in rotation)  # (n, 1, 1, half)
            rotation = cos, sin
        q = self._heads(self.q_proj(x[rows, columns][:, None]), self.q_norm, rotation)  # (n, heads, 1, head_dim)
        where = torch.arange(x.shape[1], device=x.device)
        bias = attention_bias(self.rule, columns[:, None], where, torch.float32)
        return attend_to_cache(q, k[rows], v[rows], bias, self.scale, self.softcap).reshape(1, len(rows), -1)

    def weights(
        self, x: Float[Tensor, "batch seq d_model"], rotation: Rotation | None
    ) -> Float[Tensor, "batch heads seq seq"]:
        """How much each query attends to each key, float32: to look at; `forward` computes the same in other ways."""
        q, k = self.queries_and_keys(x, rotation)
        scores = (q @ _for_every_query_head(k, self.n_heads).mT).float() * self.scale
        where = torch.arange(x.shape[1], device=x.device)
        scores = scores if self.softcap is None else capped(scores, self.softcap)
        return (scores + attention_bias(self.rule, where, where, torch.float32)).softmax(dim=-1)


def causal_attention(
    q: Float[Tensor, "batch heads seq head_dim"],
    k: Float[Tensor, "batch kv_heads seq head_dim"],
    v: Float[Tensor, "batch kv_heads seq head_dim"],
    scale: float,
    mask: AttentionMask = None,
    softcap: float | None = None,
) -> Float[Tensor, "batch heads seq head_dim"]:
    """Attention among the positions of one call, by the fastest implementation for their number."""
    if isinstance(mask, FlexPlan):
        return flex_attention(q, k, v, scale, mask)
    if isinstance(mask, DocumentPlan):
        return _document_attention(q, k, v, scale, mask)
    seq = q.shape[2]
    is_small = q.device.type == "cpu" and q.dtype == torch.bfloat16 and seq <= PRODUCTS_UP_TO
    if is_small and seq > KEPT_UP_TO and mask is None and softcap is None:
        return _recomputed_attention(q, k, v, scale)
    if softcap is not None or is_small:
        return _plain_attention(q, k, v, scale, mask, softcap)
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
    )


def _plain_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None, softcap: float | None
) -> Tensor:
    batch, heads, seq, head_dim = q.shape
    k, v = (_for_every_query_head(part, heads) for part in (k, v))
    bias = _causal_bias(q, seq) if bias is None else bias
    flat = (batch * heads, seq, head_dim)
    q, k = (q * scale).reshape(flat), k.reshape(flat).transpose(1, 2)
    if softcap is not None or bias.ndim > 2:
        scores = (q @ k).view(batch, heads, seq, seq)
        scores = (scores if softcap is None else capped(scores, softcap)) + bias
        scores = scores.view(batch * heads, seq, seq)
    else:
        scores = torch.baddbmm(bias, q, k)
    return (scores.softmax(dim=-1) @ v.reshape(flat)).view(batch, heads, seq, head_dim)


def _recomputed_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention by products that keeps no (seq, seq) tensor for the backward pass."""
    shape = q.shape
    k, v = (_for_every_query_head(part, shape[1]) for part in (k, v))
    q, k, v = (part.reshape(-1, *shape[2:]) for part in (q * scale, k, v))
    out: Tensor = _RecomputedAttention.apply(q, k, v)  # type: ignore[no-untyped-call]
    return out.view(shape)


class _RecomputedAttention(torch.autograd.Function):
    """softmax(q kᵀ + causal bias) v.

    The backward pass computes the weights again, as FlashAttention does (arXiv:2205.14135, algorithm 4).
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        return _attend(q, k, v)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return _attend_backward(gradients[0], *ctx.saved_tensors)


@_disable_dynamo  # compiled, it would be anew for every batch; torch.compiler.disable takes a second to import
def _document_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, plan: DocumentPlan) -> Tensor:
    batch, heads, seq, head_dim = q.shape
    k, v = (_for_every_query_head(part, heads) for part in (k, v))
    tokens = (part.transpose(1, 2).reshape(-1, head_dim) for part in (q * scale, k, v))
    out: Tensor = _DocumentAttention.apply(*tokens, plan)  # type: ignore[no-untyped-call]
    return out.view(batch, seq, heads, head_dim).transpose(1, 2)


class _DocumentAttention(torch.autograd.Function):
    """softmax(q kᵀ + bias) v in each text of a plan, (tokens, head_dim); weights of long documents are not kept."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: DocumentPlan) -> Tensor:
        parts, kept = [plan.to_slots(part) for part in (q, k, v)], list[Tensor]()
        batches = plan.texts(*parts)
        out = [_attend(*own, kept=kept if own[0].shape[1] <= PRODUCTS_UP_TO else None) for own in batches]
        ctx.plan = plan
        ctx.save_for_backward(*parts, *kept)
        return torch.cat([part.flatten(0, 1) for part in out]).index_select(0, plan.slot)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        plan: DocumentPlan = ctx.plan
        q, k, v, *kept = ctx.saved_tensors
        batches = reversed([*plan.texts(plan.to_slots(gradients[0]), q, k, v)])  # as the weights are taken
        found = [_attend_backward(*own, kept=kept if own[0].shape[1] <= PRODUCTS_UP_TO else None) for own in batches]
        parts = (torch.cat([part.flatten(0, 1) for part in one]) for one in zip(*found[::-1], strict=True))
        return *(part.index_select(0, plan.slot) for part in parts), None


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, kept: list[Tensor] | None = None) -> Tensor:
    """One block of queries after the other, over the keys up to the block's end; weights are added to `kept`."""
    out = []
    for rows in _blocks(q.shape[1]):
        weights = _weights(q, k, rows, bias)
        out.append(weights @ v[:, : rows.stop])
        if kept is not None:
            kept.append(weights)
    return out[0] if len(out) == 1 else torch.cat(out, dim=1)


def _attend_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, kept: list[Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    d_q, d_k, d_v = [], torch.empty(0), torch.empty(0)
    for rows in reversed(_blocks(q.shape[1])):  # the last queries first: they see every key
        d_block = d_out[:, rows]
        weights = _weights(q, k, rows, bias) if kept is None else kept.pop()
        d_weights = d_block @ v[:, : rows.stop].mT
        d_scores = torch.ops.aten._softmax_backward_data(d_weights, weights, -1, weights.dtype)
        d_q.append(d_scores @ k[:, : rows.stop])
        d_keys, d_values = d_scores.mT @ q[:, rows], weights.mT @ d_block
        if rows.stop == q.shape[1]:
            d_k, d_v = d_keys, d_values
        else:
            d_k[:, : rows.stop] += d_keys
            d_v[:, : rows.stop] += d_values
    return d_q[0] if len(d_q) == 1 else torch.cat(d_q[::-1], dim=1), d_k, d_v


def _blocks(seq: int) -> list[slice]:
    return [slice(first, min(first + KEPT_UP_TO, seq)) for first in range(0, seq, KEPT_UP_TO)]


def _weights(q: Tensor, k: Tensor, rows: slice, bias: Tensor | None) -> Float[Tensor, "texts queries keys"]:
    own = _causal_bias(q[:, rows], rows.stop) if bias is None else bias[rows, : rows.stop]
    return torch.baddbmm(own, q[:, rows], k[:, : rows.stop].mT).softmax(dim=-1)


def _causal_bias(queries: Tensor, n_keys: int) -> Float[Tensor, "queries keys"]:
    bias = torch.full((queries.shape[-2], n_keys), float("-inf"), dtype=queries.dtype, device=queries.device)
    return bias.triu(n_keys - queries.shape[-2] + 1)


def _for_every_query_head(x: Tensor, heads: int) -> Tensor:
    """Keys or values, repeated where several query heads share them."""
    group = heads // x.shape[1]
    return x.repeat_interleave(group, dim=1) if group > 1 else x


def attend_to_cache(
    q: Float[Tensor, "batch heads seq head_dim"],
    keys: Float[Tensor, "batch kv_heads length head_dim"],
    values: Float[Tensor, "batch kv_heads length head_dim"],
    bias: Float[Tensor, "batch heads_or_1 seq length"],
    scale: float,
    softcap: float | None = None,
) -> Float[Tensor, "batch heads seq head_dim"]:
    """Attention of new queries to cached keys, the scores in float32."""
    batch, heads, seq, head_dim = q.shape
    kv_heads, length = keys.shape[1], keys.shape[2]
    grouped = q.reshape(batch, kv_heads, heads // kv_heads * seq, head_dim)
    scores = (grouped @ keys.transpose(-1, -2)).float() * scale  # (batch, kv_heads, group·seq, length)
    if softcap is not None:
        scores = capped(scores, softcap)
    scores = scores.view(batch, heads, seq, length) + bias
    weights = scores.softmax(dim=-1).to(q.dtype).view(batch, kv_heads, -1, length)
    return (weights @ values).view(batch, heads, seq, head_dim)


def capped(scores: Float[Tensor, "*shape"], cap: float) -> Float[Tensor, "*shape"]:
    """cap · tanh(scores / cap): small scores hardly change, none exceeds ± cap."""
    return cap * torch.tanh(scores / cap)
