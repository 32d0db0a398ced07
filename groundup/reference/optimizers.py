"""AdamW (arXiv:1412.6980, algorithm 1; arXiv:1711.05101, algorithm 2) and Muon (Jordan et al., 2024)."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def adamw_step(
    weight: Float[Tensor, "*shape"],
    gradient: Float[Tensor, "*shape"],
    first_moment: Float[Tensor, "*shape"],
    second_moment: Float[Tensor, "*shape"],
    step: int,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
    """Adam with decoupled weight decay, step number `step` (1, 2, …); the moments begin at zero.

    m ← β₁ m + (1 − β₁) g and v ← β₂ v + (1 − β₂) g²; both are divided by 1 − βᵗ, since they begin at zero; then
    w ← w − lr · (m̂ / (√v̂ + ε) + λ w). Returns (w, m, v).
    """
    m = beta1 * first_moment + (1 - beta1) * gradient
    v = beta2 * second_moment + (1 - beta2) * gradient**2
    m_unbiased = m / (1 - beta1**step)
    v_unbiased = v / (1 - beta2**step)
    weight = weight - lr * (m_unbiased / (v_unbiased**0.5 + eps) + weight_decay * weight)
    return weight, m, v


def muon_step(
    weight: Float[Tensor, "rows cols"],
    gradient: Float[Tensor, "rows cols"],
    momentum: Float[Tensor, "rows cols"],
    *,
    lr: float,
    beta: float,
    weight_decay: float,
) -> tuple[Float[Tensor, "rows cols"], Float[Tensor, "rows cols"]]:
    """Momentum, Nesterov's look ahead, then a step in all of the matrix's directions by about the same amount.

    M ← β M + (1 − β) G; X = (1 − β) G + β M, over its Frobenius norm; five Newton-Schulz steps
    X ← a X + b (X Xᵀ) X + c (X Xᵀ)² X; then W ← W − lr · (√max(1, rows/cols) X + λ W). Returns (W, M).
    """
    momentum = beta * momentum + (1 - beta) * gradient
    x = (1 - beta) * gradient + beta * momentum
    x = x / (x**2).sum() ** 0.5
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x - 4.7750 * gram @ x + 2.0315 * gram @ gram @ x
    rows, cols = weight.shape
    return weight - lr * (max(1, rows / cols) ** 0.5 * x + weight_decay * weight), momentum
