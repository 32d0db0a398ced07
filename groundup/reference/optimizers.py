"""What an update is, optimizer by optimizer: AdamW (arXiv:1412.6980, algorithm 1; arXiv:1711.05101, algorithm 2), Muon
(Jordan et al., 2024), Lion (arXiv:2302.06675, algorithm 2) and Adafactor (arXiv:1804.04235, algorithms 4 and 5).
"""

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


def lion_step(
    weight: Float[Tensor, "*shape"],
    gradient: Float[Tensor, "*shape"],
    momentum: Float[Tensor, "*shape"],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
    """Every weight moves by the same amount, in the direction of the gradient mixed with its past.

    w ← w − lr · (sign(β₁ m + (1 − β₁) g) + λ w); then m ← β₂ m + (1 − β₂) g. Returns (w, m).
    """
    direction = (beta1 * momentum + (1 - beta1) * gradient).sign()
    return weight - lr * (direction + weight_decay * weight), beta2 * momentum + (1 - beta2) * gradient


def adafactor_step(
    weight: Float[Tensor, "rows cols"],
    gradient: Float[Tensor, "rows cols"],
    row_means: Float[Tensor, "rows 1"],
    col_means: Float[Tensor, "1 cols"],
    step: int,
    *,
    lr: float,
    weight_decay: float,
) -> tuple[Float[Tensor, "rows cols"], Float[Tensor, "rows 1"], Float[Tensor, "1 cols"]]:
    """Adam without momentum, whose second moment is kept as a product of its rows and columns; step number 1, 2, ….

    With β = 1 − t^−0.8 the means over each row and each column of g² decay; V = rows · cols / mean(rows); u = g / √V is
    clipped to a root mean square of 1. The step is a share of the weights' own size: w ← w − lr λ w, then
    w ← w − max(0.001, rms(w)) · min(lr, 1/√t) · u. Returns (w, rows, cols).
    """
    beta = 1 - step**-0.8
    row_means = beta * row_means + (1 - beta) * (gradient**2).mean(dim=1, keepdim=True)
    col_means = beta * col_means + (1 - beta) * (gradient**2).mean(dim=0, keepdim=True)
    update = gradient / (row_means @ col_means / row_means.mean()) ** 0.5
    update = update / max(1.0, float((update**2).mean() ** 0.5))
    size = max(1e-3, float((weight**2).mean() ** 0.5))
    weight = weight - lr * weight_decay * weight
    return weight - size * min(lr, step**-0.5) * update, row_means, col_means
