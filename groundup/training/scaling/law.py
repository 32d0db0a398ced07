"""A scaling law: the loss that a model of N parameters reaches on D tokens, L(N, D) = E + A / N^alpha + B / D^beta.

In: points of finished runs, each with a schedule of its own (`training.scaling.fit` fits them). Out: predicted losses
with intervals, and the best N and D for a budget of compute. Hoffmann et al., arXiv:2203.15556, approach 3.

N counts all parameters, a tied embedding once, as `[model] size` does: small models are mostly embedding, and
exponents without it are off there (arXiv:2406.12907). D counts target tokens seen, repeated ones again.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from groundup.errors import ArtifactError, DataError
from groundup.files import read_json, write_json

LAW_FILE = "law.json"
DEFAULT_LAW = Path("runs/scaling") / LAW_FILE
"""Where `groundup scaling` leaves a law unless told otherwise."""
LEVEL = 0.9
"""Share of cases that intervals hold."""
COEFFICIENTS = ("e", "a", "alpha", "b", "beta")
_DIGITS = 7


@dataclass(frozen=True)
class ScalingPoint:
    """One finished run.

    Attributes:
        n_parameters: all parameters.
        n_tokens: target tokens seen.
        loss: final validation loss, nats per token.
        flops: of training, forward and backward.
    """

    n_parameters: int
    n_tokens: int
    loss: float
    flops: float


@dataclass(frozen=True)
class LawData:
    """What text a law is about: of other text, or cut otherwise, losses are others.

    Attributes:
        recipe: name of the recipe.
        tokenizer: its fingerprint ("": the shards do not say).
        train: fingerprint of the training shards.
        validation: fingerprint of the validation shards.
        train_tokens: tokens of training text; runs on more see some again.
        bytes_per_token: of validation text; turns nats per token into bits per byte (0: the shards do not say).
    """

    recipe: str
    tokenizer: str
    train: str
    validation: str
    train_tokens: int
    bytes_per_token: float


@dataclass(frozen=True)
class Prediction:
    """What a law says of a run.

    Attributes:
        loss: nats per token.
        low: lower end of its 90 % interval (of one run: the fit's uncertainty and a run's own scatter).
        high: upper end.
        beyond: how many times further than the sweep's outermost runs, in parameters or tokens; 1: within.
    """

    loss: float
    low: float
    high: float
    beyond: float


@dataclass(frozen=True)
class Optimum:
    """The best model and the tokens for it, for some compute.

    Attributes:
        flops: the compute.
        n_parameters: of the best model.
        n_tokens: to train it on.
        prediction: its loss.
        beyond: times the compute of the sweep's largest run; 1: within.
    """

    flops: float
    n_parameters: float
    n_tokens: float
    prediction: Prediction
    beyond: float


@dataclass(frozen=True)
class ScalingLaw:
    """L(N, D) = e + a / N^alpha + b / D^beta, in nats per token.

    Attributes:
        e: the loss that no size and no data take away.
        a: factor of the parameters' term.
        alpha: its exponent.
        b: factor of the tokens' term.
        beta: its exponent.
        points: the runs it was fitted to.
        noise: standard deviation of log loss about the law, degrees of freedom counted.
        left_out: for each point, log(measured / predicted) by the law of all other points.
        replicates: laws fitted to made-up points with that noise (parametric bootstrap), (n, 5).
        data: what text it is about, or None where that is unknown.
    """

    e: float
    a: float
    alpha: float
    b: float
    beta: float
    points: tuple[ScalingPoint, ...] = ()
    noise: float = 0.0
    left_out: tuple[float, ...] = ()
    replicates: tuple[tuple[float, ...], ...] = ()
    data: LawData | None = None

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
        shares = [math.log(point.flops / (point.n_parameters * point.n_tokens)) for point in self.points]
        return math.exp(sum(shares) / len(shares)) if shares else 6.0

    def beyond(self, n_parameters: float, n_tokens: float) -> float:
        """How many times outside the sweep's range of parameters or tokens, whichever is more; 1: within."""
        factors = [1.0]
        for asked, name in ((n_parameters, "n_parameters"), (n_tokens, "n_tokens")):
            seen = [getattr(point, name) for point in self.points]
            if seen:
                factors += [asked / max(seen), min(seen) / asked]
        return max(factors)

    def intervals(self) -> dict[str, tuple[float, float]]:
        """The 90 % interval of each coefficient; empty without replicates."""
        if not self.replicates:
            return {}
        return {name: _interval(column) for name, column in zip(COEFFICIENTS, self._replicates.T, strict=True)}

    @property
    def left_out_error(self) -> float:
        """Root mean square of `left_out`: how far off a run is that the law has not seen, as a share."""
        return math.sqrt(sum(error**2 for error in self.left_out) / len(self.left_out)) if self.left_out else math.nan

    def other_data(
        self, *, tokenizer: str | None = None, train: str | None = None, validation: str | None = None
    ) -> str | None:
        """Why this law is not about these shards (fingerprints of `TokenShards`); None if it is, as far as is known."""
        if self.data is None:
            return "the law does not say what text it is about"
        if tokenizer and self.data.tokenizer and tokenizer != self.data.tokenizer:
            return f"it was fitted with another tokenizer (recipe {self.data.recipe}): its losses are of other tokens"
        if validation is not None and validation != self.data.validation:
            return f"it was fitted on other validation text (recipe {self.data.recipe})"
        if train is not None and train != self.data.train:
            return f"it was fitted on other training text (recipe {self.data.recipe})"
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
            return cls._from_dict(values)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ArtifactError(f"{path}: no scaling law ({error!r}).", "Fit it again: groundup scaling.") from error

    @classmethod
    def _from_dict(cls, values: Mapping[str, Any]) -> ScalingLaw:
        names = ("n_parameters", "n_tokens", "loss", "flops")
        points = tuple(ScalingPoint(**{name: row[name] for name in names}) for row in values["points"])
        left_out = tuple(float(row["left_out"]) for row in values["points"] if row["left_out"] is not None)
        coefficients = {name: float(values[name]) for name in COEFFICIENTS}
        law = cls(
            **coefficients,
            points=points,
            noise=float(values["noise"]),
            left_out=left_out,
            replicates=tuple(tuple(map(float, row)) for row in values["replicates"]),
            data=None if values["data"] is None else LawData(**values["data"]),
        )
        numbers = [*coefficients.values(), *(value for row in law.replicates for value in row)]
        numbers += [float(getattr(point, name)) for point in points for name in names]
        if not all(math.isfinite(value) and value > 0 for value in numbers) or law.noise < 0:
            raise ValueError("a number is not positive")
        if any(len(row) != len(COEFFICIENTS) for row in law.replicates):
            raise ValueError("a replicate has not five numbers")
        return law

    @functools.cached_property
    def _replicates(self) -> NDArray[np.float64]:
        return np.array(self.replicates)


def _interval(values: NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None
