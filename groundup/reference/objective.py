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
