"""What an initialization does to signals, layer by layer, before any training: mean-field theory.

The weights are independent and normal, so in a wide layer every feature is a sum of many independent ones: normal,
with a variance that follows from the layer below (Poole et al., arXiv:1606.05340). What is carried from layer to layer
is a matrix of the covariances between the positions of a text, the same for every feature of the stream; backwards
the covariances of the gradient (Schoenholz et al., arXiv:1611.01232). At the start scores are small, so attention is
taken to weigh all keys alike. Norms divide by a root mean square; a LayerNorm's mean is near 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

Covariance = Float[Tensor, "seq seq"]
Backwards = Callable[[Covariance], Covariance]


@dataclass(frozen=True)
class Blocks:
    """The blocks of a Transformer, as far as their signals depend on them."""

    n_layers: int  # how many
    d_model: int  # width of the stream
    d_attention: int  # heads · head_dim; as many key/value heads as heads
    d_ff: int  # width of the feed-forward layer
    # Standard deviations of the weights of v, o, up, down, and of the gate, where there is one
    deviations: Mapping[str, float]
    activation: Callable[[Tensor], Tensor]  # of the feed-forward layer
    is_post_norm: bool  # norm(x + f(x)) instead of x + f(norm(x))


def predicted_variances(blocks: Blocks, embedding_variance: float, seq: int) -> tuple[list[float], list[float]]:
    """Mean squares of the stream before the first block and behind each, and of the gradient at the same places.

    The texts have `seq` different tokens; the gradient behind the last block is independent and of variance 1.
    """
    stream = embedding_variance * torch.eye(seq, dtype=torch.float64)
    forward, back = [embedding_variance], []
    for _ in range(blocks.n_layers):
        for sublayer in (attention_sublayer, feedforward_sublayer):
            if blocks.is_post_norm:  # norm(x + f(x))
                added, backwards = sublayer(blocks, stream)
                sizes = _sizes(stream + added)
                stream = (stream + added) / sizes
                back.append(lambda g, backwards=backwards, sizes=sizes: g / sizes + backwards(g / sizes))
            else:  # x + f(norm(x))
                sizes = _sizes(stream)
                added, backwards = sublayer(blocks, stream / sizes)
                stream = stream + added
                back.append(lambda g, backwards=backwards, sizes=sizes: g + backwards(g) / sizes)
        forward.append(stream.diagonal().mean().item())
    gradient, backward = torch.eye(seq, dtype=torch.float64), [1.0]
    for place, step in enumerate(reversed(back)):
        gradient = step(gradient)
        if place % 2:
            backward.append(gradient.diagonal().mean().item())
    return forward, backward[::-1]


def attention_sublayer(blocks: Blocks, x: Covariance) -> tuple[Covariance, Backwards]:
    """Covariances of o(mean of v(x) over this and earlier positions), and how the gradient comes back."""
    std, d, seq = blocks.deviations, blocks.d_model, len(x)
    mean = torch.ones(seq, seq, dtype=x.dtype).tril() / torch.arange(1, seq + 1)[:, None]
    values, out = d * std["v"] ** 2, blocks.d_attention * std["o"] ** 2
    slope = d * std["o"] ** 2 * blocks.d_attention * std["v"] ** 2
    return out * values * mean @ x @ mean.T, lambda g: slope * mean.T @ g @ mean


def feedforward_sublayer(blocks: Blocks, x: Covariance) -> tuple[Covariance, Backwards]:
    """Covariances of down(φ(up(x))) or down(φ(gate(x)) · up(x)), and how the gradient comes back."""
    std, d = blocks.deviations, blocks.d_model
    is_gated = "gate" in std
    first = std["gate" if is_gated else "up"]
    inner, slopes = activation_means(blocks.activation, d * first**2 * x)
    slopes = first**2 * slopes
    if is_gated:
        up = d * std["up"] ** 2 * x
        inner, slopes = inner * up, slopes * up + std["up"] ** 2 * inner
    down = std["down"] ** 2
    return blocks.d_ff * down * inner, lambda g: d * down * blocks.d_ff * slopes * g


def activation_means(
    activation: Callable[[Tensor], Tensor], x: Covariance, terms: int = 40
) -> tuple[Covariance, Covariance]:
    """E[φ(xᵢ) φ(xⱼ)] and E[φ'(xᵢ) φ'(xⱼ)] for normal features of equal variances and covariances x.

    By Hermite polynomials: with φ(σ g) = Σ cₙ Heₙ(g)/√n! the first is Σ cₙ² ρⁿ, and its derivative by the covariance
    is the second.
    """
    variance = x[0, 0].item()
    nodes, weights = np.polynomial.hermite_e.hermegauss(120)
    values = activation(variance**0.5 * torch.from_numpy(nodes)) * torch.from_numpy(weights / weights.sum())
    polynomial, before = torch.ones(len(nodes), dtype=x.dtype), torch.zeros(len(nodes), dtype=x.dtype)
    means, slopes = torch.zeros_like(x), torch.zeros_like(x)
    for n in range(terms):
        square = (values @ polynomial).item() ** 2
        means += square * (x / variance) ** n
        if n:
            slopes += square * n * (x / variance) ** (n - 1) / variance
        # Heₙ₊₁ = g Heₙ − n Heₙ₋₁, each over √n!
        following = (torch.from_numpy(nodes) * polynomial - n**0.5 * before) / (n + 1) ** 0.5
        polynomial, before = following, polynomial
    return means, slopes


def _sizes(x: Covariance) -> Covariance:
    """What a norm divides each covariance by."""
    size = x.diagonal().sqrt()
    return size[:, None] * size
