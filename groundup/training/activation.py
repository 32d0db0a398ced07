"""Activation checkpointing: what the backward pass needs is computed again instead of kept (arXiv:1604.06174).

    none        everything is kept: fastest
    selective   a block keeps the outputs of its matrix products and computes what is cheap between them again
                (arXiv:2205.05198, section 5: most of the memory for a few percent of the work)
    full        a block keeps its input only: least memory for one more forward pass, a third more work

Losses and gradients stay the same: the same operations on the same numbers, dropout's included.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from groundup.model import Transformer

Checkpointing = Literal["none", "selective", "full"]

_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_scaled_dot_product_flash_attention",
             "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_efficient_attention",
             "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_fused_attention_overrideable")  # fmt: skip


def set_checkpointing(model: Transformer, kind: Checkpointing) -> None:
    """Make every block keep as much as `kind` says, in training."""
    ways: dict[Checkpointing, Callable[..., Tensor] | None] = {
        "none": None,
        "selective": partial(checkpoint, use_reentrant=False, context_fn=_selective),
        "full": partial(checkpoint, use_reentrant=False),
    }
    for block in model.blocks:
        block.recompute = ways[kind]


def _selective() -> Any:
    return create_selective_checkpoint_contexts(_policy)  # type: ignore[no-untyped-call]


def _policy(context: Any, operation: Any, *args: Any, **options: Any) -> CheckpointPolicy:
    """Matrix products are kept, everything else is computed again."""
    return CheckpointPolicy.MUST_SAVE if operation in _operations() else CheckpointPolicy.PREFER_RECOMPUTE


@functools.cache
def _operations() -> frozenset[Any]:
    known = (getattr(torch.ops.aten, name, None) for name in _PRODUCTS)  # not every version of torch has them all
    return frozenset(operation.default for operation in known if operation is not None)
