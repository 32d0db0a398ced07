"""A scaling law: the loss that a model of N parameters reaches on D tokens, L(N, D) = E + A / N^alpha + B / D^beta.

In: points of finished runs, each with a schedule of its own. Out: the law with its uncertainty, predicted losses, and
the best N and D for a budget of compute. Hoffmann et al., arXiv:2203.15556, approach 3: least Huber loss of
log-residuals from a grid of starts, scatter by a parametric bootstrap, and each point as the others predict it. The
published fit runs L-BFGS; with five coefficients and exact derivatives, damped Gauss-Newton steps (Levenberg-Marquardt)
on reweighted residuals reach the same minimum, all starts and all replicates at once.

N counts all parameters, a tied embedding once, as `[model] size` does: small models are mostly embedding, and
exponents without it are off there (arXiv:2406.12907). D counts target tokens seen, repeated ones again.
"""

from __future__ import annotations

import functools
import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, TypeAdapter

from groundup.errors import ArtifactError, DataError
from groundup.files import read_json, write_json

LAW_FILE = "law.json"
DEFAULT_LAW = Path("runs/scaling") / LAW_FILE
"""Where `groundup scaling` leaves a law unless told otherwise."""
LEVEL = 0.9
"""Share of cases that intervals hold."""
COEFFICIENTS = ("e", "a", "alpha", "b", "beta")
_DIGITS = 7

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Coefficients = tuple[Positive, Positive, Positive, Positive, Positive]


@dataclass(frozen=True)
class ScalingPoint:
    """One finished run."""

    n_parameters: Annotated[int, Field(gt=0)]  # all
    n_tokens: Annotated[int, Field(gt=0)]  # target tokens seen
    loss: Positive  # final validation loss, nats per token
    flops: Positive  # of training, forward and backward


@dataclass(frozen=True)
class LawData:
    """What text a law is about: of other text, or cut otherwise, losses are others."""

    recipe: str
    tokenizer: str  # its fingerprint ("": the shards do not say)
    train: str  # fingerprint of the training shards
    validation: str  # fingerprint of the validation shards
    train_tokens: int  # of training text; runs on more see some again
    bytes_per_token: float  # of validation text; turns nats per token into bits per byte (0: the shards do not say)


@dataclass(frozen=True)
class Prediction:
    """What a law says of a run."""

    loss: float  # nats per token
    low: float  # of the 90 % interval of one run: the fit's uncertainty and a run's own scatter
    high: float
    beyond: float  # how many times further than the sweep's outermost runs, in parameters or tokens; 1: within


@dataclass(frozen=True)
class Optimum:
    """The best model and the tokens for it, for some compute."""

    flops: float
    n_parameters: float
    n_tokens: float
    prediction: Prediction
    beyond: float  # times the compute of the sweep's largest run; 1: within


@dataclass(frozen=True)
class ScalingLaw:
    """L(N, D) = e + a / N^alpha + b / D^beta, in nats per token."""

    e: Positive  # the loss that no size and no data take away
    a: Positive  # factor of the parameters' term, and `alpha` its exponent
    alpha: Positive
    b: Positive  # factor of the tokens' term, and `beta` its exponent
    beta: Positive
    points: tuple[ScalingPoint, ...] = ()  # the runs it was fitted to
    # Standard deviation of log loss about the law, degrees of freedom counted
    noise: Annotated[float, Field(ge=0)] = 0.0
    left_out: tuple[float, ...] = ()  # for each point, log(measured / predicted) by the law of all other points
    # Laws fitted to made-up points with that noise (parametric bootstrap), (n, 5)
    replicates: tuple[Coefficients, ...] = ()
    data: LawData | None = None  # what text it is about, or None where that is unknown

    def loss(self, n_parameters: float, n_tokens: float) -> float:
        """The loss that it predicts, in nats per token."""
        return self.e + self.a / n_parameters**self.alpha + self.b / n_tokens**self.beta

    def predict(self, n_parameters: float, n_tokens: float) -> Prediction:
        """The same with its interval, and how far beyond the sweep it is asked."""
        loss, low, high = self.loss(n_parameters, n_tokens), math.nan, math.nan
        if self.replicates:
            e, a, alpha, b, beta = self._replicates.T
            losses = e + a / n_parameters**alpha + b / n_tokens**beta
            scatter = np.random.default_rng(0).standard_normal(len(losses))  # the same for every question
            low, high = _interval(losses * np.exp(self.noise * scatter))
        return Prediction(loss, low, high, self.beyond(n_parameters, n_tokens))

    def compute_optimal(self, flops: float) -> Optimum:
        """Model and tokens with the lowest loss among all that cost so many FLOPs.

        Where C = k · N · D, the best of both satisfies alpha · a / N^alpha = beta · b / D^beta.

        Raises:
            DataError: not a positive number.
        """
        if not (math.isfinite(flops) and flops > 0):
            raise DataError(f"{flops:g} FLOPs: no budget.", "Give a positive number.")
        product = math.log(flops / self.flops_per_parameter_token)
        balance = math.log(self.alpha * self.a / (self.beta * self.b))
        log_n = (balance + self.beta * product) / (self.alpha + self.beta)
        n_parameters, n_tokens = math.exp(log_n), math.exp(product - log_n)
        largest = max((point.flops for point in self.points), default=flops)
        return Optimum(flops, n_parameters, n_tokens, self.predict(n_parameters, n_tokens), max(1.0, flops / largest))

    @property
    def flops_per_parameter_token(self) -> float:
        """k of C = k · N · D: 6 and attention's share, as the sweep's runs had it."""
        ratios = [point.flops / (point.n_parameters * point.n_tokens) for point in self.points]
        return statistics.geometric_mean(ratios) if ratios else 6.0

    def beyond(self, n_parameters: float, n_tokens: float) -> float:
        """How many times outside the sweep's range of parameters or tokens, whichever is more; 1: within."""
        if not self.points:
            return 1.0
        sizes = [point.n_parameters for point in self.points]
        budgets = [point.n_tokens for point in self.points]
        return max(
            1.0, n_parameters / max(sizes), min(sizes) / n_parameters, n_tokens / max(budgets), min(budgets) / n_tokens
        )

    def intervals(self) -> dict[str, tuple[float, float]]:
        """The 90 % interval of each coefficient; empty without replicates."""
        if not self.replicates:
            return {}
        return {name: _interval(column) for name, column in zip(COEFFICIENTS, self._replicates.T, strict=True)}

    @property
    def left_out_error(self) -> float:
        """Root mean square of `left_out`: how far off a run is that the law has not seen, as a share."""
        return math.sqrt(statistics.fmean(error**2 for error in self.left_out)) if self.left_out else math.nan

    def other_data(
        self, *, tokenizer: str | None = None, train: str | None = None, validation: str | None = None
    ) -> str | None:
        """Why this law is not about these shards (fingerprints of `TokenShards`); None if it is, as far as is known."""
        if self.data is None:
            return "the law does not say what text it is about"
        about = f"(recipe {self.data.recipe})"
        if tokenizer and self.data.tokenizer and tokenizer != self.data.tokenizer:
            return f"it was fitted with another tokenizer {about}: its losses are of other tokens"
        if validation is not None and validation != self.data.validation:
            return f"it was fitted on other validation text {about}"
        if train is not None and train != self.data.train:
            return f"it was fitted on other training text {about}"
        return None

    def save(self, path: str | Path) -> None:
        """Write it as JSON."""
        write_json(Path(path), self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """As `law.json` has it: plain values, with units."""
        errors = self.left_out or (math.nan,) * len(self.points)
        rows = []
        for point, error in zip(self.points, errors, strict=True):
            fitted = self.loss(point.n_parameters, point.n_tokens)
            residual = math.log(point.loss / fitted)
            rows.append({**asdict(point), "fitted": fitted, "residual": residual, "left_out": _or_none(error)})
        return {
            "law": "L(N, D) = e + a / N^alpha + b / D^beta",
            "units": {
                "loss": "nats per token",
                "N": "parameters, all; a tied embedding once",
                "D": "target tokens seen, repeated ones again",
                "residual, left_out, noise": "of log loss",
            },
            **{name: getattr(self, name) for name in COEFFICIENTS},
            "interval_level": LEVEL,
            "intervals": self.intervals(),
            "n": len(self.points),
            "noise": self.noise,
            "left_out_error": _or_none(self.left_out_error),
            "flops_per_parameter_token": self.flops_per_parameter_token,
            "data": None if self.data is None else asdict(self.data),
            "points": rows,
            "replicates": [[float(f"{value:.{_DIGITS}g}") for value in row] for row in self.replicates],
        }

    @classmethod
    def load(cls, path: str | Path = DEFAULT_LAW) -> ScalingLaw:
        """Read `law.json`, or the one in a folder.

        Raises:
            ArtifactError: missing, damaged, or of numbers that are no law.
        """
        path = Path(path) / LAW_FILE if Path(path).is_dir() else Path(path)
        values = read_json(path)
        try:
            left_out = [row["left_out"] for row in values["points"] if row["left_out"] is not None]
            return TypeAdapter(cls).validate_python({**values, "left_out": left_out})
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"{path}: no scaling law ({error}).", "Fit it again: groundup scaling.") from error

    @functools.cached_property
    def _replicates(self) -> NDArray[np.float64]:
        return np.array(self.replicates)


def _interval(values: NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


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


def fit_scaling_law(points: Sequence[ScalingPoint], data: LawData | None = None) -> ScalingLaw:
    """The law of these points, with its uncertainty.

    Args:
        points: at least six finished runs: three sizes or more, three token budgets or more.
        data: what text they were trained on.

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
    made_up = fitted + noise * np.random.default_rng(1).standard_normal((N_REPLICATES, len(points)))
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
    for alpha, beta, share in itertools.product(_EXPONENTS, _EXPONENTS, _FLOORS):
        e = share * losses.min()
        columns = np.stack([np.exp(-alpha * x), np.exp(-beta * y)], axis=1) / losses[:, None]
        factors = np.linalg.lstsq(columns, (losses - e) / losses, rcond=None)[0]
        a, b = np.maximum(factors, 0.01 * losses.min())
        rows.append(np.log([e, a, alpha, b, beta]))
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
    total = np.logaddexp.reduce(terms, axis=-1)
    return total, np.exp(terms - total[..., None])


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


def _coefficients(theta: Array, centre: tuple[float, float]) -> Coefficients:
    """e, a, alpha, b, beta, no longer at the centre."""
    alpha, beta = math.exp(theta[2]), math.exp(theta[4])
    a, b = math.exp(theta[1] + alpha * centre[0]), math.exp(theta[3] + beta * centre[1])
    return math.exp(theta[0]), a, alpha, b, beta
