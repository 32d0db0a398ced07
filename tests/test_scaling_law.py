"""The scaling law: what a fit finds again, what a law promises, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import groundup as gu
from groundup.errors import ArtifactError, DataError
from groundup.report.scaling import draw_scaling
from groundup.training.scaling_law import COEFFICIENTS, HUBER_DELTA, LawData, ScalingLaw, ScalingPoint, fit_scaling_law

TRUE = ScalingLaw(e=1.7, a=40.0, alpha=0.34, b=120.0, beta=0.31)
SIZES = (240_000, 340_000, 700_000, 1_500_000)
BUDGETS = (200_000, 400_000, 800_000, 1_600_000)
DATA = LawData("tiny", "tok", "train", "validation", 400_000, 3.5)
NOISE = 0.003


def made_up(seed: int = 0, noise: float = NOISE, sizes=SIZES, budgets=BUDGETS) -> list[ScalingPoint]:
    """Runs that follow the law but for random noise."""
    draw = np.random.default_rng(seed)
    return [
        ScalingPoint(n, d, TRUE.loss(n, d) * math.exp(noise * draw.standard_normal()), 6.3 * n * d)
        for n in sizes
        for d in budgets
    ]


@pytest.fixture(scope="module")
def fitted() -> ScalingLaw:
    return fit_scaling_law(made_up(), DATA)


# --- The fit


def test_without_noise_the_coefficients_come_back() -> None:
    law = fit_scaling_law(made_up(noise=0.0))
    for name in COEFFICIENTS:
        assert getattr(law, name) == pytest.approx(getattr(TRUE, name), rel=1e-3), name
    assert law.noise < 1e-6


def test_with_noise_they_come_back_within_the_error_bars() -> None:
    inside, n_seeds = 0, 6
    far = (10_000_000, 10_000_000)
    predicted = 0
    for seed in range(n_seeds):
        law = fit_scaling_law(made_up(seed))
        intervals = law.intervals()
        inside += sum(intervals[name][0] <= getattr(TRUE, name) <= intervals[name][1] for name in COEFFICIENTS)
        said = law.predict(*far)
        predicted += said.low <= TRUE.loss(*far) <= said.high
        assert said.high - said.low < 0.5 * said.loss  # it holds the truth, and still says something
        assert 0.4 * NOISE < law.noise < 2.0 * NOISE
        assert 0.5 * law.noise < law.left_out_error < 3 * law.noise
    assert inside >= 0.75 * n_seeds * len(COEFFICIENTS)
    assert predicted >= n_seeds - 1


def test_no_other_optimizer_finds_a_lower_objective(fitted: ScalingLaw) -> None:
    points = made_up()
    n, d, loss = (torch.tensor([getattr(p, k) for p in points], dtype=torch.float64).log() for k in (
        "n_parameters", "n_tokens", "loss",
    ))  # fmt: skip

    def objective(theta: torch.Tensor) -> torch.Tensor:
        e, a, alpha, b, beta = theta
        terms = torch.stack([e.expand_as(n), a - alpha * n, b - beta * d])
        residuals = torch.logsumexp(terms, dim=0) - loss
        return torch.nn.functional.huber_loss(
            residuals, torch.zeros_like(residuals), reduction="sum", delta=HUBER_DELTA
        )

    ours = torch.tensor(
        [math.log(fitted.e), math.log(fitted.a), fitted.alpha, math.log(fitted.b), fitted.beta], dtype=torch.float64
    )
    for start in ([0.5, 4.0, 0.4, 5.0, 0.4], [0.0, 5.0, 0.5, 4.0, 0.2], ours.tolist()):
        theta = torch.tensor(start, dtype=torch.float64, requires_grad=True)
        search = torch.optim.LBFGS([theta], max_iter=300, tolerance_change=1e-14, line_search_fn="strong_wolfe")

        def closure(theta=theta, search=search) -> torch.Tensor:
            search.zero_grad()
            value = 1e4 * objective(theta)
            value.backward()
            return value

        search.step(closure)
        assert float(objective(ours)) <= float(objective(theta.detach())) * (1 + 1e-6)


def test_a_run_that_went_wrong_hardly_moves_the_law() -> None:
    points = made_up()
    points[5] = dataclasses.replace(points[5], loss=points[5].loss * 1.3)
    law = fit_scaling_law(points)
    for n, d in ((SIZES[0], BUDGETS[-1]), (SIZES[-1], BUDGETS[-1])):
        assert law.loss(n, d) == pytest.approx(TRUE.loss(n, d), rel=3 * NOISE)
    assert law.left_out[5] == pytest.approx(math.log(1.3), abs=0.02)
    assert max(abs(error) for index, error in enumerate(law.left_out) if index != 5) < 0.02


def test_the_same_points_give_the_same_law(fitted: ScalingLaw) -> None:
    assert fit_scaling_law(made_up(), DATA) == fitted


# --- What a law promises

exponents = st.floats(0.05, 1.5)
factors = st.floats(0.1, 1e5)
laws = st.builds(ScalingLaw, e=st.floats(0.01, 5.0), a=factors, alpha=exponents, b=factors, beta=exponents)
counts = st.floats(1e4, 1e10)


@given(laws, counts, counts, st.floats(1.5, 100.0))
def test_more_parameters_and_more_tokens_never_cost_loss(law: ScalingLaw, n: float, d: float, more: float) -> None:
    assert law.loss(n * more, d) <= law.loss(n, d)
    assert law.loss(n, d * more) <= law.loss(n, d)
    assert law.loss(n, d) > law.e


@given(laws, st.floats(1e12, 1e24), st.floats(1.01, 3.0))
def test_the_compute_optimum_spends_all_and_no_neighbour_is_better(law: ScalingLaw, flops: float, step: float) -> None:
    best = law.compute_optimal(flops)
    n, d = best.n_parameters, best.n_tokens
    assert n * d * law.flops_per_parameter_token == pytest.approx(flops)
    # First-order condition: the last FLOP buys as much as parameters as it does as tokens.
    assert law.alpha * law.a * n**-law.alpha == pytest.approx(law.beta * law.b * d**-law.beta)
    assert best.prediction.loss == law.loss(n, d)
    for factor in (step, 1 / step):
        assert law.loss(n * factor, d / factor) >= best.prediction.loss * (1 - 1e-12)


def test_the_cost_of_a_token_is_that_of_the_runs(fitted: ScalingLaw) -> None:
    assert fitted.flops_per_parameter_token == pytest.approx(6.3)
    assert TRUE.flops_per_parameter_token == 6.0


def test_extrapolation_is_flagged(fitted: ScalingLaw) -> None:
    assert fitted.beyond(500_000, 500_000) == 1.0
    assert fitted.beyond(3 * SIZES[-1], 500_000) == pytest.approx(3.0)
    assert fitted.beyond(SIZES[0], 5 * BUDGETS[-1]) == pytest.approx(5.0)
    assert fitted.beyond(SIZES[0] / 2, 500_000) == pytest.approx(2.0)
    largest = max(point.flops for point in fitted.points)
    assert fitted.compute_optimal(largest / 10).beyond == 1.0
    assert fitted.compute_optimal(largest * 3.4).beyond == pytest.approx(3.4)


def test_intervals_widen_with_the_distance(fitted: ScalingLaw) -> None:
    widths = []
    for factor in (1, 10, 1000):
        said = fitted.predict(SIZES[-1] * factor, BUDGETS[-1] * factor)
        assert said.low < said.loss < said.high
        widths.append((said.high - said.low) / said.loss)
    assert widths == sorted(widths)
    assert widths[0] > 2 * fitted.noise  # a run's own scatter is in it


def test_without_replicates_no_interval_is_made_up() -> None:
    said = TRUE.predict(1e6, 1e6)
    assert math.isnan(said.low)
    assert math.isnan(said.high)
    assert TRUE.intervals() == {}


@pytest.mark.parametrize("flops", [0.0, -1.0, math.nan, math.inf])
def test_compute_that_is_none_is_refused(flops: float) -> None:
    with pytest.raises(DataError, match="no budget"):
        TRUE.compute_optimal(flops)


# --- What is refused


@pytest.mark.parametrize("field", ["n_parameters", "n_tokens", "loss", "flops"])
@pytest.mark.parametrize("value", [math.nan, math.inf, 0, -3])
def test_a_number_that_is_none_is_named(field: str, value: float) -> None:
    points = made_up()
    points[3] = dataclasses.replace(points[3], **{field: value})
    if field in ("n_parameters", "n_tokens") and not math.isfinite(value):
        points[3] = dataclasses.replace(points[3], **{field: float(value)})
    with pytest.raises(DataError, match="no point of a law") as error:
        fit_scaling_law(points)
    assert "metrics.jsonl" in str(error.value)


@pytest.mark.parametrize(
    ("sizes", "budgets", "said"),
    [
        (SIZES[:2], BUDGETS, "8 runs of 2 sizes and 4 token budgets"),
        (SIZES, BUDGETS[:2], "8 runs of 4 sizes and 2 token budgets"),
        (SIZES[:1], BUDGETS[:1], "1 runs of 1 sizes"),
        ((), (), "0 runs"),
    ],
)
def test_too_few_runs_are_refused_with_a_way_out(sizes, budgets, said: str) -> None:
    with pytest.raises(DataError, match=said) as error:
        fit_scaling_law(made_up(sizes=sizes, budgets=budgets))
    assert "--sizes" in str(error.value)


@pytest.mark.parametrize(
    ("what", "loss"),
    [
        ("parameters", lambda n, d: 2.0 + 100 * d**-0.3 + 1e-7 * n),
        ("tokens", lambda n, d: 2.0 + 100 * n**-0.3 + 1e-7 * d),
    ],
)
def test_losses_that_do_not_fall_are_no_law(what: str, loss) -> None:
    points = [ScalingPoint(n, d, loss(n, d), 6.0 * n * d) for n in SIZES for d in BUDGETS]
    with pytest.raises(DataError, match=f"do not fall with {what}"):
        fit_scaling_law(points)


# --- The file


def test_saved_and_read_it_is_the_same_law(fitted: ScalingLaw, tmp_path: Path) -> None:
    fitted.save(tmp_path / "law.json")
    assert gu.ScalingLaw.load(tmp_path) == gu.ScalingLaw.load(tmp_path / "law.json")
    read = ScalingLaw.load(tmp_path)
    for field in ("e", "a", "alpha", "b", "beta", "points", "noise", "left_out", "data"):
        assert getattr(read, field) == getattr(fitted, field)
    np.testing.assert_allclose(read.replicates, fitted.replicates, rtol=1e-6)
    values = json.loads((tmp_path / "law.json").read_text(encoding="utf-8"))
    assert values["n"] == len(values["points"]) == 16
    for row in values["points"]:
        assert row["loss"] == pytest.approx(row["fitted"] * math.exp(row["residual"]))


def _without(values: dict, name: str) -> dict:
    return {key: value for key, value in values.items() if key != name}


@pytest.mark.parametrize(
    "damage",
    [
        lambda v: _without(v, "alpha"),
        lambda v: v | {"alpha": "steep"},
        lambda v: v | {"e": -1.0},
        lambda v: v | {"b": None},
        lambda v: v | {"noise": -0.1},
        lambda v: v | {"replicates": [[1.0, 2.0, 0.3, 4.0]]},
        lambda v: v | {"data": {"recipe": "x"}},
        lambda v: v | {"points": [{"n_parameters": 1}]},
        lambda v: v | {"points": 3},
        lambda v: [v],
        lambda v: None,
    ],
)
def test_a_damaged_file_is_named(fitted: ScalingLaw, tmp_path: Path, damage) -> None:
    path = tmp_path / "law.json"
    path.write_text(json.dumps(damage(fitted.to_dict())), encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"law\.json: no scaling law") as error:
        ScalingLaw.load(path)
    assert "groundup scaling" in str(error.value)


def test_a_file_cut_short_or_missing_is_named(fitted: ScalingLaw, tmp_path: Path) -> None:
    path = tmp_path / "law.json"
    with pytest.raises(ArtifactError, match=r"law\.json: not found"):
        ScalingLaw.load(path)
    fitted.save(path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ArtifactError, match=r"law\.json: not valid JSON"):
        ScalingLaw.load(path)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"tokenizer": "tok", "train": "train", "validation": "validation"}, None),
        ({}, None),
        ({"tokenizer": ""}, None),
        ({"tokenizer": "other"}, "another tokenizer"),
        ({"train": "other"}, "other training text"),
        ({"validation": "other"}, "other validation text"),
    ],
)
def test_a_law_of_other_data_says_so(fitted: ScalingLaw, asked: dict[str, str], said: str | None) -> None:
    answer = fitted.other_data(**asked)
    assert answer is None if said is None else said in (answer or "")
    assert "does not say" in (TRUE.other_data(**asked) or "")


# --- The picture


def test_the_picture_has_a_curve_for_each_size_and_a_dot_for_each_run(fitted: ScalingLaw) -> None:
    svg = draw_scaling(fitted)
    names = {element.get("id"): element for element in ElementTree.fromstring(svg).iter() if element.get("id")}
    for size in SIZES:
        assert f"curve-{size}" in names
        dots = [element for element in names[f"runs-{size}"].iter() if element.tag.endswith("use")]
        assert len(dots) == len(BUDGETS)
    assert "frontier" in names
    assert draw_scaling(fitted) == svg
