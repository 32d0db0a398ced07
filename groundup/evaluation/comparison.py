"""Models side by side: differences of their scores with intervals, corrected for how many are looked at.

In: folders with scores, stages of runs, whole runs, or one recipe's runs of several seeds. Out: a difference for each
figure that the first of them shares with another. Where both have the scores of the same items, these are paired, which
takes out how hard the items are; where both have several seeds, these are the sample; else the two are two samples.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from scipy import stats

from groundup.errors import ArtifactError, DataError
from groundup.evaluation.harness import LOWER_IS_BETTER
from groundup.evaluation.measure import Record, item_scores, read_records
from groundup.evaluation.scorecard import BENCHMARKS, CARD, WAY_OUT, read_card, records_file
from groundup.evaluation.seeds import SEEDS_FILE, read_seeds
from groundup.evaluation.sets import METRICS_OF_TASK
from groundup.report.closing import is_share
from groundup.run import RECIPE_FILE, Run
from groundup.stage import stages_done
from groundup.untrusted import file_inside, reading

_RESAMPLES = 10_000
_LEVEL = 0.05
_SHOWN = 0.02  # the difference for which the needed number of items is told
_POWER = stats.norm.ppf(1 - _LEVEL / 2) + stats.norm.ppf(0.8)  # both sides at 5 %, found four times in five
_UNITS = {"bits_per_byte": " bits per byte", "val_bits_per_byte": " bits per byte"}
_UP, _DOWN = 1, -1


@dataclass(frozen=True)
class Difference:
    """How two models differ on one benchmark or figure."""

    # "items" that both answered, "seeds" of both, or "samples", each model's own
    sample: Literal["items", "seeds", "samples"]
    n: int  # how many
    first: float  # mean of the one; of texts, each counts the same
    second: float  # of the other
    value: float  # second − first
    # Ends of the 95 % interval: by 10,000 paired resamples, Welch's for seeds, of two normal means else
    low: float
    high: float
    p: float  # two-sided, corrected for the number of comparisons (Holm 1979)
    spread: float  # standard deviation of one draw of the difference
    benchmark: str = ""  # its name; of runs, with the stage
    other: str = ""  # what is compared with the first
    n_needed: int = 0  # how many would show a difference of 0.02 four times in five; 0 where 0.02 means nothing
    verdict: str = ""  # in words


@dataclass(frozen=True)
class _Figure:
    """What is known of one figure of one model."""

    metric: str
    items: Mapping[int, float] = field(default_factory=dict)
    fingerprint: str = ""  # of the items
    estimate: Mapping[str, Any] | None = None  # "value", "stderr", "n", "unit" of a sample that another may be beside
    seeds: Sequence[float] = ()
    unit: str = ""
    better: int = 0  # which way; 0: neither


def compare_cards(*paths: str | Path) -> list[Difference]:
    """The first against each other one, figure by figure.

    Args:
        paths: two or more of: a folder that `groundup evaluate --tasks` or a run's evaluation wrote; a run's stage; a
            run, whose models are taken by their stages' names; a folder of `groundup build --seeds`.

    Raises:
        ArtifactError: no scores there, or damaged ones.
        DataError: no other one shares a figure of the same items with the first.
    """
    first, *others = (_figures(Path(path)) for path in paths)
    found = [
        (place, name, one, result)
        for place, other in enumerate(others)
        for name, one in first.items()
        if name in other and (result := _compared(one, other[name])) is not None
    ]
    if not found:
        raise DataError(
            f"{paths[0]} and {', '.join(map(str, paths[1:]))} share no benchmark with two or more of the same items.",
            "Score both with the same --tasks, --shots, --limit and --seed.",
        )
    names = ["the second"] if len(others) == 1 else [str(path) for path in paths[1:]]
    return [
        _told(replace(result, benchmark=name, other=str(paths[1 + place]), p=p), one, names[place])
        for (place, name, one, result), p in zip(found, holm([result.p for *_, result in found]), strict=True)
    ]


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for how many there are (Holm 1979): the smallest times n, the next times n − 1, …"""
    p = np.array(p_values)
    order, found = p.argsort(kind="stable"), np.empty(len(p))
    found[order] = np.maximum.accumulate(np.minimum(1.0, p[order] * np.arange(len(p), 0, -1)))
    return [float(one) for one in found]


def _compared(a: _Figure, b: _Figure) -> Difference | None:
    """A difference before it is corrected and told; None: there are not two of anything."""
    if a.items and a.fingerprint == b.fingerprint:
        places = sorted(a.items.keys() & b.items.keys())
        if len(places) < 2:
            return None
        return _paired(*(np.array([one.items[place] for place in places]) for one in (a, b)))
    if a.seeds and b.seeds:
        return _over_seeds(np.array(a.seeds), np.array(b.seeds))
    return _two_samples(a.estimate, b.estimate) if a.estimate and b.estimate else None


def _two_samples(a: Mapping[str, Any], b: Mapping[str, Any]) -> Difference:
    error, middle = math.hypot(a["stderr"], b["stderr"]), b["value"] - a["value"]
    p = float(2 * stats.norm.sf(abs(middle) / error)) if error else float(not middle)
    reach = stats.norm.ppf(1 - _LEVEL / 2) * error
    spread = math.hypot(*(one["stderr"] * math.sqrt(one["n"]) for one in (a, b)))
    n = min(a["n"], b["n"])
    return Difference("samples", n, a["value"], b["value"], middle, middle - reach, middle + reach, p, spread)


def _paired(a: np.ndarray, b: np.ndarray) -> Difference:
    """By resampled items, and by random signs: of two equal models, either could have been the better at any item."""
    first, second, differences = float(a.mean()), float(b.mean()), b - a
    how: dict[str, Any] = {"n_resamples": _RESAMPLES, "batch": 500}
    low, high = stats.bootstrap(
        (differences,), np.mean, confidence_level=1 - _LEVEL, method="percentile", rng=np.random.default_rng(0), **how
    ).confidence_interval
    signs = stats.permutation_test(
        (differences,), np.mean, permutation_type="samples", rng=np.random.default_rng(0), **how
    )
    p, spread = float(signs.pvalue), float(differences.std(ddof=1))
    return Difference("items", len(a), first, second, second - first, float(low), float(high), p, spread)


def _over_seeds(a: np.ndarray, b: np.ndarray) -> Difference:
    """Welch's test: each group of runs has its own spread."""
    first, second, n = float(a.mean()), float(b.mean()), min(len(a), len(b))
    value, spread = second - first, math.hypot(a.std(ddof=1), b.std(ddof=1))
    if not spread:
        return Difference("seeds", n, first, second, value, value, value, float(not value), 0.0)
    test = stats.ttest_ind(b, a, equal_var=False)
    low, high = test.confidence_interval(1 - _LEVEL)
    return Difference("seeds", n, first, second, value, float(low), float(high), float(test.pvalue), spread)


def _told(found: Difference, figure: _Figure, second: str) -> Difference:
    """With a verdict, and how many would be needed."""
    is_scaled = bool(figure.unit) or is_share(figure.metric)
    n_needed = max(2, math.ceil((_POWER * found.spread / _SHOWN) ** 2)) if is_scaled else 0
    value, of = found.value, f"n = {found.n:,}" if found.sample != "seeds" else f"{found.n} seeds each"
    in_units = bool(figure.unit) or not is_scaled
    least = f"{_SHOWN}{figure.unit}" if in_units else f"{_SHOWN * 100:g} points"
    if found.p < _LEVEL:
        by = f"{abs(value):.3g}{figure.unit}" if in_units else f"{100 * abs(value):.3g} points"
        better = second if value * (figure.better or _UP) > 0 else "the first"
        verdict = f"{better} is {'better' if figure.better else 'higher'} by {by}"
    elif not is_scaled:
        verdict = f"no difference shown at {of}"
    elif found.n < n_needed:
        what = "seeds" if found.sample == "seeds" else "items"
        verdict = f"no difference shown at {of}; {n_needed:,} {what} would show one of {least}"
    else:
        verdict = f"no difference shown at {of}, where one of {least} would have been seen"
    return replace(found, n_needed=n_needed, verdict=verdict)


def _figures(path: Path) -> dict[str, _Figure]:
    """Every figure that stands at a path, by name. Raises ArtifactError: none does, or something is damaged."""
    if (path / SEEDS_FILE).is_file():
        return {
            f"{row['key']}, {row['model']}": _figure(row["key"], seeds=row["values"])
            for row in read_seeds(path)["rows"]
        }
    if (path / RECIPE_FILE).is_file():
        done = stages_done(Run(path))
        return {
            f"{figure}, {name}": value
            for name in done
            if "/" not in name
            for folder in _of_stage(path, name, done)
            for figure, value in _of_folder(folder).items()
        }
    run = path.parent
    folders = _of_stage(run, path.name, stages_done(Run(run))) if (run / RECIPE_FILE).is_file() else []
    return {name: value for folder in folders or [path] for name, value in _of_folder(folder).items()}


def _of_stage(run: Path, stage: str, done: Collection[str]) -> list[Path]:
    """Folders with scores of a stage's model. Raises ArtifactError: they are of an earlier model or recipe."""
    scores = run / "evaluate" / stage
    if (scores / CARD).is_file() and f"evaluate/{stage}" not in done:
        raise ArtifactError(
            f"{scores}: these scores are of an earlier model or recipe.",
            f"Score it anew: groundup evaluate {run}; or remove that folder.",
        )
    return [folder for folder in (scores, run / stage / BENCHMARKS) if (folder / CARD).is_file()]


def _of_folder(folder: Path) -> dict[str, _Figure]:
    """A benchmark's main figure by its name, every figure of a generated set by its own."""
    found: dict[str, _Figure] = {}
    for task, card in read_card(folder)["tasks"].items():
        path = file_inside(folder, records_file(task))
        with reading(str(path), fix=WAY_OUT):
            records = read_records(path, card["identity"])
            for name, metric, items in _items(task, card, records):
                if not all(map(math.isfinite, items.values())):
                    raise ArtifactError(f"{path}: a score that is no finite number.", WAY_OUT)
                # Another seed draws other items of a generated set, but texts are of different difficulty.
                estimate = card["figures"][metric] if task in METRICS_OF_TASK and metric not in _UNITS else None
                found[name] = _figure(metric, items=items, fingerprint=card["fingerprint"], estimate=estimate)
    return found


def _items(
    task: str, card: Mapping[str, Any], records: Sequence[Record]
) -> Iterator[tuple[str, str, dict[int, float]]]:
    """Of each figure that is compared: its name, its metric, and the score of each item."""
    main = next(iter(card["figures"]))
    if task not in METRICS_OF_TASK or "outcomes" not in records[0]:
        sign = -1 if main in _UNITS else 1  # of a text the score is −bits per byte
        yield task, main, {item: sign * score for item, score in item_scores(records).items()}
        return
    for metric in card["figures"]:
        outcomes = {one["item"]: one["outcomes"][metric] for one in records if metric in one["outcomes"]}
        # Of one answer: what it is worth, or a sum and over how much it goes.
        scores = {item: value if isinstance(value, list) else (value, 1) for item, value in outcomes.items()}
        yield metric, metric, {item: float(total) / max(1, n) for item, (total, n) in scores.items()}


def _figure(metric: str, **known: Any) -> _Figure:
    """Told in its unit, and which way it is better, if known. Over seeds a metric is "wikitext2.bits_per_byte"."""
    metric = metric.rpartition(".")[2]
    lower = metric in LOWER_IS_BETTER or metric in _UNITS or metric.endswith("loss")
    better = _DOWN if lower else _UP if is_share(metric) else 0
    return _Figure(metric, unit=_UNITS.get(metric, ""), better=better, **known)
