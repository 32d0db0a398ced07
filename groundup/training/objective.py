"""Next-token cross-entropy, summed over valid tokens, without ever holding all logits.

The sum over a step (micro-batches, processes) is divided once by the step's global count of valid tokens, so
that uneven masks weigh every token alike. The logits of (batch · seq) × vocab are the largest tensor of
training; here they exist one slice of rows at a time. The gradient with respect to logits is known in closed
form, so it is taken in the forward pass, slice by slice, and only the gradients of the hidden states and of the
output matrix are kept (as in Liger Kernel, arXiv:2410.10989, section 3.2).

With logits z of V tokens, target y, label smoothing ε (arXiv:1512.00567, section 7) and z-loss ζ (PaLM,
arXiv:2204.02311, section 5), what is minimized is

    (1 − ε) (lse(z) − z_y) + ε (lse(z) − mean(z)) + ζ lse(z)²
    gradient: softmax(z) (1 + 2 ζ lse(z)) − (1 − ε) onehot(y) − ε / V

where ε = ζ = 0 is plain cross-entropy. What is reported is always the plain one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from groundup.model import OutputLayer

IGNORED = -100
"""The target of a position that is not predicted."""

_SLICE_LOGITS = 1 << 20  # logits held at once; 4 MiB in float32 stays near the cache


class Loss(NamedTuple):
    """A loss over a batch's valid targets, in nats, float32.

    Attributes:
        objective: what is minimized; has the gradient.
        nats: plain cross-entropy, Σ −log p(target); without a gradient.
    """

    objective: Float[Tensor, ""]
    nats: Float[Tensor, ""]


def cross_entropy_sum(
    hidden: Float[Tensor, "*batch d_model"],
    weight: Float[Tensor, "padded_vocab d_model"],
    targets: Int[Tensor, "*batch"],
    vocab_size: int | None = None,
    softcap: float | None = None,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Loss:
    """Sums over valid targets; see the head of this file.

    Args:
        hidden: last hidden states, in the compute dtype, in which the products are taken.
        weight: the output matrix, float32.
        targets: token ids, or `IGNORED`.
        vocab_size: rows of `weight` that stand for tokens (default: all).
        softcap: logits z become softcap · tanh(z / softcap).
        label_smoothing: ε.
        z_loss: ζ.
    """
    rows = hidden.reshape(-1, hidden.shape[-1])
    objective, nats = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        rows, weight, targets.reshape(-1), vocab_size or weight.shape[0], softcap, label_smoothing, z_loss
    )
    return Loss(objective, nats)


def head_loss(
    targets: Int[Tensor, "batch seq"], *, label_smoothing: float = 0.0, z_loss: float = 0.0
) -> Callable[[Tensor, OutputLayer], Loss]:
    """`cross_entropy_sum` for these targets, in the form that `Transformer.forward(head=…)` takes."""

    def loss(hidden: Float[Tensor, "batch seq d_model"], output: OutputLayer) -> Loss:
        return cross_entropy_sum(
            hidden, output.weight, targets, output.vocab_size, output.softcap,
            label_smoothing=label_smoothing, z_loss=z_loss,
        )  # fmt: skip

    return loss


def valid_tokens(targets: Int[Tensor, "*batch"]) -> int:
    """How many targets are predicted."""
    return int((targets != IGNORED).sum())


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor,
        vocab_size: int, softcap: float | None, smoothing: float, z_loss: float,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        cast = weight.to(hidden.dtype)
        wants_gradient = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        if wants_gradient:
            d_hidden = torch.empty_like(hidden)
            d_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        objective, nats = (torch.zeros((), dtype=torch.float32, device=hidden.device) for _ in range(2))
        step = max(1, _SLICE_LOGITS // weight.shape[0])
        for start in range(0, hidden.shape[0], step):
            part, target = hidden[start : start + step], targets[start : start + step]
            logits = (part @ cast.T).float()  # (rows, padded_vocab)
            if softcap is not None:
                bend = torch.tanh_(logits.div_(softcap))
                logits = bend * softcap
            logits[:, vocab_size:] = float("-inf")
            log_normalizer = logits.logsumexp(dim=-1, keepdim=True)
            valid = target != IGNORED
            index = target.where(valid, 0)[:, None]
            loss = log_normalizer - logits.gather(1, index)
            nats += (loss[:, 0] * valid).sum()
            if smoothing:
                mean = logits[:, :vocab_size].mean(dim=-1, keepdim=True)
                loss = (1 - smoothing) * loss + smoothing * (log_normalizer - mean)
            if z_loss:
                loss = loss + z_loss * log_normalizer.square()
            objective += (loss[:, 0] * valid).sum()
            if wants_gradient:
                gradient = logits.sub_(log_normalizer).exp_()
                if z_loss:
                    gradient.mul_(1 + 2 * z_loss * log_normalizer)
                gradient.scatter_add_(1, index, torch.full_like(index, smoothing - 1.0, dtype=torch.float32))
                if smoothing:
                    gradient[:, :vocab_size] -= smoothing / vocab_size
                if softcap is not None:
                    gradient.mul_(1 - bend.square())
                gradient = gradient.mul_(valid[:, None]).to(hidden.dtype)
                d_hidden[start : start + step] = gradient @ cast
                d_weight += gradient.T @ part
        if wants_gradient:
            ctx.save_for_backward(d_hidden, d_weight)
        ctx.mark_non_differentiable(nats)
        return objective, nats

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors
        return d_hidden * outputs[0], d_weight * outputs[0], None, None, None, None, None
