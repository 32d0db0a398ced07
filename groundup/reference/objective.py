"""Next-token cross-entropy, one token at a time."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def cross_entropy(logits: Float[Tensor, "tokens vocab"], targets: Int[Tensor, " tokens"]) -> Float[Tensor, ""]:
    """Mean of −log p(target) in nats, where p = e^z / Σ e^z; targets of −100 are left out."""
    losses = []
    for z, target in zip(logits, targets.tolist(), strict=True):
        if target != -100:
            largest = z.max()  # e^(z − largest) cannot overflow
            losses.append(largest + (z - largest).exp().sum().log() - z[target])
    return torch.stack(losses).mean()


def regularized_cross_entropy(
    logits: Float[Tensor, "tokens vocab"], targets: Int[Tensor, " tokens"], smoothing: float, z_loss: float
) -> Float[Tensor, ""]:
    """The same towards smoothed targets, and with a pull on the normalizer; 0 and 0 is plain cross-entropy.

    The share `smoothing` of each target is spread over all tokens (arXiv:1512.00567, section 7); z_loss · (log Σ e^z)²
    keeps logits from drifting together (PaLM, arXiv:2204.02311, section 5).
    """
    losses = []
    for z, target in zip(logits, targets.tolist(), strict=True):
        if target != -100:
            normalizer = z.max() + (z - z.max()).exp().sum().log()
            wanted = torch.full_like(z, smoothing / len(z))
            wanted[target] += 1 - smoothing
            losses.append((wanted * (normalizer - z)).sum() + z_loss * normalizer**2)
    return torch.stack(losses).mean()
