"""Next-token cross-entropy, summed over valid tokens, without ever holding all logits.

The sum over a step (micro-batches, processes) is divided once by the step's global count of valid tokens, so
that uneven masks weigh every token alike. The logits of (batch · seq) × vocab are the largest tensor of
training; here they exist one slice of rows at a time. The gradient with respect to logits is known in closed
form, softmax(z) − onehot(y), so it is taken in the forward pass, slice by slice, and only the gradients of the
hidden states and of the output matrix are kept (as in Liger Kernel, arXiv:2410.10989, section 3.2).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

IGNORED = -100
"""The target of a position that is not predicted."""

_SLICE_LOGITS = 1 << 20  # logits held at once; 4 MiB in float32 stays near the cache


def cross_entropy_sum(
    hidden: Float[Tensor, "*batch d_model"], weight: Float[Tensor, "vocab d_model"], targets: Int[Tensor, "*batch"]
) -> Float[Tensor, ""]:
    """Sum over valid targets of −log softmax(hidden weightᵀ)[target], in nats, float32.

    Args:
        hidden: last hidden states, in the compute dtype, in which the products are taken.
        weight: the output matrix, float32.
        targets: token ids, or `IGNORED`.
    """
    rows = hidden.reshape(-1, hidden.shape[-1])
    loss: Tensor = _LinearCrossEntropy.apply(rows, weight, targets.reshape(-1))  # type: ignore[no-untyped-call]
    return loss


def head_loss(targets: Int[Tensor, "batch seq"]) -> Any:
    """`cross_entropy_sum` for these targets, in the form that `Transformer.forward(head=…)` takes."""
    return partial(cross_entropy_sum, targets=targets)


def valid_tokens(targets: Int[Tensor, "*batch"]) -> int:
    """How many targets are predicted."""
    return int((targets != IGNORED).sum())


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        cast = weight.to(hidden.dtype)
        wants_gradient = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        if wants_gradient:
            d_hidden = torch.empty_like(hidden)
            d_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        step = max(1, _SLICE_LOGITS // weight.shape[0])
        for start in range(0, hidden.shape[0], step):
            part, target = hidden[start : start + step], targets[start : start + step]
            logits = (part @ cast.T).float()  # (rows, vocab)
            log_normalizer = logits.logsumexp(dim=-1, keepdim=True)
            valid = target != IGNORED
            index = target.where(valid, 0)[:, None]
            total += ((log_normalizer - logits.gather(1, index))[:, 0] * valid).sum()
            if wants_gradient:
                gradient = logits.sub_(log_normalizer).exp_()
                gradient.scatter_add_(1, index, torch.full_like(index, -1.0, dtype=torch.float32))
                gradient = gradient.mul_(valid[:, None]).to(hidden.dtype)
                d_hidden[start : start + step] = gradient @ cast
                d_weight += gradient.T @ part
        if wants_gradient:
            ctx.save_for_backward(d_hidden, d_weight)
        return total

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, Tensor, None]:
        d_hidden, d_weight = ctx.saved_tensors
        return d_hidden * outputs[0], d_weight * outputs[0], None
