"""Attention masks: which positions a layer attends to, and the bias that is added to its scores.

A query at position i sees the key at position j ≤ i of its own document, if the layer's pattern lets it:

    full      every j
    window    i − j < window, or j < sink_tokens                        Mistral, arXiv:2310.06825; arXiv:2309.17453
    strided   i − j < stride, or (i − j) mod stride = 0                  Sparse Transformers, arXiv:1904.10509
    fixed     j in i's block of `stride`, or in the last `summary` columns of any block        (the same, section 4.3)

(The two heads of a sparse attention are merged: one head sees what both would.) ALiBi takes slope · (i − j) off the
score (arXiv:2108.12409). Every position sees itself, so no row of scores is empty.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from groundup.model.config import ModelConfig, Pattern


@dataclass(frozen=True)
class AttentionRule:
    """What one layer attends to; layers with equal rules share a mask."""

    pattern: Pattern = "full"  # see above
    window: int = 0  # of "window"
    stride: int = 0  # of "strided" and "fixed"
    summary: int = 0  # of "fixed"
    sink_tokens: int = 0  # of "window"
    alibi_heads: int = 0  # heads with linear biases; 0: none

    @classmethod
    def of_layer(cls, config: ModelConfig, layer: int) -> AttentionRule:
        """The rule of a layer; values that its pattern does not use are 0."""
        pattern = config.pattern(layer)
        return cls(
            pattern=pattern,
            window=config.window or 0 if pattern == "window" else 0,
            stride=config.stride or 0 if pattern in ("strided", "fixed") else 0,
            summary=config.summary if pattern == "fixed" else 0,
            sink_tokens=config.sink_tokens if pattern == "window" else 0,
            alibi_heads=config.n_heads if config.position == "alibi" else 0,
        )

    def is_causal_only(self, length: int) -> bool:
        """Whether the rule is plain causal attention for texts of this length."""
        if self.alibi_heads:
            return False
        if self.pattern == "window":
            return self.window + self.sink_tokens >= length
        return self.pattern == "full" or self.stride >= length

    def visible(self, i: Int[Tensor, "*#shape"], j: Int[Tensor, "*#shape"]) -> Bool[Tensor, "*shape"]:
        """Whether queries at positions i see keys at positions j of the same document."""
        behind = i - j
        seen = behind >= 0
        if self.pattern == "window":
            near = behind < self.window
            return seen & (near | (j < self.sink_tokens)) if self.sink_tokens else seen & near
        if self.pattern == "strided":
            return seen & ((behind < self.stride) | (behind % self.stride == 0))
        if self.pattern == "fixed":
            in_block = i // self.stride == j // self.stride
            return seen & (in_block | (j % self.stride >= self.stride - self.summary))
        return seen


def alibi_slopes(n_heads: int) -> Float[Tensor, " heads"]:
    """Each head's slope: 2^(−8h/n) for h = 1 … n, where n is a power of two.

    For other n, those of the next lower power of two and then every other one of the next higher (as in the
    authors' code, attention_with_linear_biases).
    """
    lower = 2 ** math.floor(math.log2(n_heads))
    slopes = [2.0 ** (-8 * (head + 1) / lower) for head in range(lower)]
    slopes += [2.0 ** (-4 * (2 * head + 1) / lower) for head in range(n_heads - lower)]
    return torch.tensor(slopes, dtype=torch.float32)


def attention_bias(
    rule: AttentionRule,
    queries: Int[Tensor, "*rows q"],
    keys: Int[Tensor, "*rows_or_queries k"],
    dtype: torch.dtype,
    documents: tuple[Int[Tensor, "*rows q"], Int[Tensor, "*rows k"]] | None = None,
) -> Float[Tensor, "*rows heads q k"]:
    """What is added to the scores: 0 where a query sees a key (or ALiBi's bias), −inf where it does not.

    Args:
        rule: the layer's.
        queries: positions of the queries in their documents.
        keys: positions of the keys; or of each query's own (rows, q, k), those beyond it hidden from that query.
        dtype: of the result.
        documents: which document each query and each key belongs to; None: all to one.

    Returns:
        One bias for all heads (heads = 1), or with ALiBi one for each.
    """
    i, j = queries[..., :, None], keys if keys.ndim > queries.ndim else keys[..., None, :]
    seen = rule.visible(i, j)
    if documents is not None:
        seen = seen & (documents[0][..., :, None] == documents[1][..., None, :])
    if rule.alibi_heads:
        slopes = alibi_slopes(rule.alibi_heads).to(i.device)[:, None, None]
        bias = slopes * (j - i).unsqueeze(-3).float()
    else:
        bias = torch.zeros((), device=i.device).expand_as(seen.unsqueeze(-3))
    return bias.masked_fill(~seen.unsqueeze(-3), float("-inf")).to(dtype)
