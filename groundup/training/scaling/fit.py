"""Points to a scaling law: least Huber loss of log-residuals from a grid of starts (arXiv:2203.15556, section 3.3).

In: finished runs. Out: the coefficients, their scatter by a parametric bootstrap, and each point as the others predict
it. The published fit runs L-BFGS; with five coefficients and exact derivatives, damped Gauss-Newton steps
(Levenberg-Marquardt) on reweighted residuals reach the same minimum, all starts and all replicates at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from groundup.errors import DataError
from groundup.training.scaling.law import COEFFICIENTS, LawData, ScalingLaw, ScalingPoint

HUBER_DELTA = 1e-3
"""As published: residuals over a tenth of a percent count by their size, not by its square."""
N_REPLICATES = 200
_DELTAS = (1.0, 1e-1, 1e-2, HUBER_DELTA)
"""Least squares first: its minimum is a good start for the next, which is harder."""
_STEPS = 20
_EXPONENTS = (0.1, 0.2, 0.35, 0.6, 1.0)
_FLOORS = (0.1, 0.5, 0.8)
"""Starts: exponents, and e as a share of the lowest loss; a and b are then linear."""
_EXPONENT_RANGE = (0.01, 4.0)
_LEAST_SHARE = 1e-3
"""A term that is a smaller share of every loss than this has vanished."""

Array = NDArray[np.float64]


def fit_scaling_law(points: Sequence[ScalingPoint], data: LawData | None = None, *, seed: int = 1) -> ScalingLaw:
    """The law of these points, with its uncertainty.

    Args:
        points: at least six finished runs: three sizes or more, three token budgets or more.
        data: what text they were trained on.
        seed: of the bootstrap.

    Raises:
        DataError: too few points, numbers that are none, or losses that do not follow the law.
    """
    points = tuple(points)
    _check(points)
    n, d, losses = (
        np.array([getattr(p, name) for p in points], float) for name in ("n_parameters", "n_tokens", "loss")
    )
    centre = np.log(n).mean(), np.log(d).mean()
    x, y, target = np.log(n) - centre[0], np.log(d) - centre[1], np.log(losses)

    starts = _starts(x, y, losses)
    found, objective = _minimize(starts, x, y, np.broadcast_to(target, (len(starts), len(points))))
    best = found[np.argmin(objective)]
    _check_terms(best, x, y)
    fitted = _log_loss(best[None], x, y)[0][0]
    noise = math.sqrt(float(((target - fitted) ** 2).sum()) / (len(points) - len(COEFFICIENTS)))

    # From the minimum, and once more from afar: most starts end in the same place.
    tried = np.stack([best, starts[np.argsort(objective)[len(starts) // 2]]])
    made_up = fitted + noise * np.random.default_rng(seed).standard_normal((N_REPLICATES, len(points)))
    replicates = _best_of(tried, x, y, made_up)
    without = 1.0 - np.eye(len(points))
    others = _best_of(tried, x, y, np.broadcast_to(target, without.shape), without)
    left_out = target - np.diagonal(_log_loss(others, x, y)[0])
    return ScalingLaw(
        *_coefficients(best, centre),
        points=points,
        noise=noise,
        left_out=tuple(float(error) for error in left_out),
        replicates=tuple(_coefficients(row, centre) for row in replicates),
        data=data,
    )


def check_enough(sizes: Sequence[int], budgets: Sequence[int]) -> None:
    """Hold that runs of these parameters and tokens, each in turn, can determine a law.

    Raises:
        DataError: they are too few.
    """
    n_runs, n_sizes, n_budgets = len(sizes), len(set(sizes)), len(set(budgets))
    if n_runs < len(COEFFICIENTS) + 1 or n_sizes < 3 or n_budgets < 3:
        raise DataError(
            f"{n_runs} runs of {n_sizes} sizes and {n_budgets} token budgets: too few for a law with "
            f"{len(COEFFICIENTS)} coefficients.",
            f"Train at least {len(COEFFICIENTS) + 1}, with three sizes (--sizes) and three budgets (--tokens).",
        )


def _check(points: Sequence[ScalingPoint]) -> None:
    for point in points:
        values = (point.n_parameters, point.n_tokens, point.loss, point.flops)
        if not all(math.isfinite(value) and value > 0 for value in values):
            raise DataError(
                f"a run of {point.n_parameters:,} parameters on {point.n_tokens:,} tokens ended with a loss of "
                f"{point.loss} after {point.flops:g} FLOPs: no point of a law.",
                "Look at its metrics.jsonl; leave it out, or train it again with a lower learning rate.",
            )
    check_enough([point.n_parameters for point in points], [point.n_tokens for point in points])


def _check_terms(theta: Array, x: Array, y: Array) -> None:
    shares = _log_loss(theta[None], x, y)[1][0].max(axis=0)
    for share, exponent, what, option in (
        (shares[1], theta[2], "parameters", "--sizes"), (shares[2], theta[4], "tokens", "--tokens"),
    ):  # fmt: skip
        if share < _LEAST_SHARE or exponent <= math.log(_EXPONENT_RANGE[0]) + 1e-6:
            raise DataError(
                f"the losses of these runs do not fall with {what}: there is no law in them.",
                f"Let {option} span more, up to larger ones; with little text, larger models only learn it by heart.",
            )


def _starts(x: Array, y: Array, losses: Array) -> Array:
    """(starts, 5): for each pair of exponents and floor, the other two by linear least squares of relative errors."""
    rows = []
    for alpha in _EXPONENTS:
        for beta in _EXPONENTS:
            for share in _FLOORS:
                e = share * losses.min()
                columns = np.stack([np.exp(-alpha * x), np.exp(-beta * y)], axis=1) / losses[:, None]
                factors = np.linalg.lstsq(columns, (losses - e) / losses, rcond=None)[0]
                a, b = np.maximum(factors, 0.01 * losses.min())
                rows.append([math.log(e), math.log(a), math.log(alpha), math.log(b), math.log(beta)])
    return np.array(rows)


def _best_of(starts: Array, x: Array, y: Array, targets: Array, weights: Array | None = None) -> Array:
    """For each row of targets (rows, points) the minimum, from every start: (rows, 5)."""
    n_rows, n_starts = len(targets), len(starts)
    repeated = None if weights is None else np.repeat(weights, n_starts, axis=0)
    found, objective = _minimize(np.tile(starts, (n_rows, 1)), x, y, np.repeat(targets, n_starts, axis=0), repeated)
    chosen = objective.reshape(n_rows, n_starts).argmin(axis=1)
    return found.reshape(n_rows, n_starts, -1)[np.arange(n_rows), chosen]


def _minimize(theta: Array, x: Array, y: Array, targets: Array, weights: Array | None = None) -> tuple[Array, Array]:
    """Minimize every problem's Huber loss: coefficients (problems, 5) and objectives (problems,).

    Coefficients are (log e, log a, log alpha, log b, log beta) at the centre of the points, where they depend least on
    each other; logarithms keep them positive.
    """
    weights = np.ones_like(targets) if weights is None else weights
    low, high = _bounds(targets)
    theta = np.clip(theta, low, high)
    for delta in _DELTAS:
        damping = np.full(len(theta), 1e-3)
        objective = _huber(_log_loss(theta, x, y)[0] - targets, weights, delta)
        for _ in range(_STEPS if delta != HUBER_DELTA else 4 * _STEPS):
            values, shares = _log_loss(theta, x, y)
            residuals = values - targets  # (problems, points)
            slopes = _slopes(theta, shares, x, y)  # (problems, points, 5)
            # Huber's loss is least squares with weights that follow the residuals (iteratively reweighted).
            inner = weights * np.minimum(1.0, delta / np.maximum(np.abs(residuals), 1e-300))
            gradient = np.einsum("kpi,kp->ki", slopes, inner * residuals)
            curvature = np.einsum("kpi,kp,kpj->kij", slopes, inner, slopes)
            diagonal = np.einsum("kii->ki", curvature)
            diagonal += damping[:, None] * diagonal + 1e-12 * diagonal.max(axis=1, keepdims=True) + 1e-30
            tried = np.clip(theta - np.linalg.solve(curvature, gradient[..., None])[..., 0], low, high)
            reached = _huber(_log_loss(tried, x, y)[0] - targets, weights, delta)
            better = reached < objective
            theta = np.where(better[:, None], tried, theta)
            objective = np.where(better, reached, objective)
            damping = np.clip(np.where(better, damping / 4, damping * 3), 1e-9, 1e9)
    return theta, objective


def _log_loss(theta: Array, x: Array, y: Array) -> tuple[Array, Array]:
    """Log loss (problems, points), and the share of each of its three terms (problems, points, 3)."""
    e, a, log_alpha, b, log_beta = (column[:, None] for column in theta.T)
    terms = np.stack([e + 0 * x, a - np.exp(log_alpha) * x, b - np.exp(log_beta) * y], axis=-1)
    largest = terms.max(axis=-1, keepdims=True)
    powers = np.exp(terms - largest)
    total = powers.sum(axis=-1, keepdims=True)
    return (largest + np.log(total))[..., 0], powers / total


def _slopes(theta: Array, shares: Array, x: Array, y: Array) -> Array:
    """Derivatives of log loss by the five coefficients, (problems, points, 5)."""
    alpha, beta = np.exp(theta[:, 2, None]), np.exp(theta[:, 4, None])
    by_e, by_a, by_b = shares[..., 0], shares[..., 1], shares[..., 2]
    return np.stack([by_e, by_a, -by_a * alpha * x, by_b, -by_b * beta * y], axis=-1)


def _huber(residuals: Array, weights: Array, delta: float) -> Array:
    """Sum over points, (problems,)."""
    size = np.abs(residuals)
    return (weights * np.where(size <= delta, 0.5 * size**2, delta * (size - 0.5 * delta))).sum(axis=1)


def _bounds(targets: Array) -> tuple[Array, Array]:
    """How far the coefficients may go: terms from almost nothing to far over every loss."""
    lowest, highest = float(targets.min()), float(targets.max())
    least, most = lowest - 8.0, highest + 8.0
    slow, fast = (math.log(value) for value in _EXPONENT_RANGE)
    return np.array([least, least, slow, least, slow]), np.array([lowest, most, fast, most, fast])


def _coefficients(theta: Array, centre: tuple[float, float]) -> tuple[float, float, float, float, float]:
    """e, a, alpha, b, beta, no longer at the centre."""
    alpha, beta = math.exp(theta[2]), math.exp(theta[4])
    a, b = math.exp(theta[1] + alpha * centre[0]), math.exp(theta[3] + beta * centre[1])
    return math.exp(theta[0]), a, alpha, b, beta
