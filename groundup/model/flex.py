"""Sparse and capped attention on a GPU by FlexAttention (arXiv:2412.05496): fully masked blocks are not computed.

The rule becomes a `BlockMask` (which blocks of 128 × 128 scores are not fully masked) and the change of a score
(ALiBi, soft cap) a few lines that are compiled into the kernel; the bias itself is never made. Without `compiled` torch
runs the same functions step by step, which the tests use to compare them with the textbook form on a CPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.attention import flex_attention as torch_flex

from groundup.model.masks import AttentionRule, alibi_slopes


@dataclass(frozen=True)
class FlexPlan:
    """How FlexAttention computes a layer."""

    block_mask: Any  # which blocks of scores are computed
    # Changes each score, (score, batch, head, query, key) → score; None: scores stay
    change: Callable[..., Tensor] | None
    compiled: bool = True  # by torch.compile, as it should be on a GPU


def plan_attention(
    rule: AttentionRule,
    length: int,
    device: torch.device,
    *,
    softcap: float | None = None,
    positions: Int[Tensor, "batch seq"] | None = None,
    documents: Int[Tensor, "batch seq"] | None = None,
    compiled: bool = True,
) -> FlexPlan:
    """The plan for texts of this length.

    Args:
        rule: the layer's.
        length: of the rows.
        device: where the model computes.
        softcap: of the scores.
        positions: within each document (default: 0, 1, 2, … in each row).
        documents: which document each position belongs to; None: a row is one.
        compiled: see `FlexPlan`.
    """

    def place(batch: Tensor, index: Tensor) -> Tensor:
        return index if positions is None else positions[batch, index]

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = rule.visible(place(batch, query), place(batch, key))
        return seen if documents is None else seen & (documents[batch, query] == documents[batch, key])

    slopes = alibi_slopes(rule.alibi_heads).to(device) if rule.alibi_heads else None

    def change(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        if slopes is not None:
            score = score + slopes[head] * (place(batch, key) - place(batch, query))
        return score

    by_row = documents if documents is not None else positions
    rows = None if by_row is None else by_row.shape[0]
    block_mask = torch_flex.create_block_mask(sees, B=rows, H=None, Q_LEN=length, KV_LEN=length, device=device)
    return FlexPlan(block_mask, change if softcap is not None or slopes is not None else None, compiled)


def flex_attention(
    q: Float[Tensor, "batch heads seq head_dim"],
    k: Float[Tensor, "batch kv_heads seq head_dim"],
    v: Float[Tensor, "batch kv_heads seq head_dim"],
    scale: float,
    plan: FlexPlan,
) -> Float[Tensor, "batch heads seq head_dim"]:
    """Attention as planned."""
    run: Any = _compiled() if plan.compiled else torch_flex.flex_attention
    out: Tensor = run(
        q, k, v, score_mod=plan.change, block_mask=plan.block_mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(torch_flex.flex_attention)
