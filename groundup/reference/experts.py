"""A mixture of experts, token by token (Mixtral, arXiv:2401.04088, section 2.1), and the loss that balances it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def mixture(
    x: Float[Tensor, "tokens d"],
    router: Float[Tensor, "n d"],
    experts: Sequence[Callable[[Tensor], Tensor]],
    k: int,
) -> Float[Tensor, "tokens d"]:
    """Σ over the k experts with the largest x Wᵣᵀ of softmax(those k)ᵢ · expertᵢ(x)."""
    out = torch.empty_like(x)
    for token, features in enumerate(x):
        scores = router @ features
        chosen = scores.argsort(descending=True)[:k].tolist()
        weights = (scores[chosen] - scores.max()).exp()
        weights = weights / weights.sum()
        best = [experts[i] for i in chosen]
        out[token] = sum(weight * expert(features) for weight, expert in zip(weights, best, strict=True))
    return out


def load_balance(x: Float[Tensor, "tokens d"], router: Float[Tensor, "n d"], k: int) -> Float[Tensor, ""]:
    """n Σᵢ fᵢ Pᵢ (Switch Transformer, arXiv:2101.03961, equations 4 to 6; for k > 1 as Mixtral counts it).

    fᵢ is the share of the tokens that chose expert i, Pᵢ the mean of its probability.
    """
    n = len(router)
    scores = x @ router.T
    probabilities = (scores - scores.amax(dim=-1, keepdim=True)).exp()  # (tokens, n)
    probabilities = probabilities / probabilities.sum(dim=-1, keepdim=True)
    loss = probabilities.new_zeros(())
    choices = [i for row in probabilities.tolist() for i in sorted(range(n), key=lambda i: -row[i])[:k]]
    for i in range(n):
        loss = loss + n * choices.count(i) / len(x) * probabilities[:, i].mean()
    return loss
