"""All the scores of a model into a folder, and two such folders side by side.

In: a model and what `[evaluate]` says. Out: `scores.json` with every figure, what it was measured with, and how;
beside it the records of each task's items. Models that answered the same items are compared item by item: the
difference is paired, which takes out how hard the items are.
"""

from __future__ import annotations

import functools
import math
import platform
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from groundup.console import Bar
from groundup.errors import ArtifactError, DataError
from groundup.evaluation.benchmarks import Benchmark, EvaluationTask, GenerationTask, fingerprint
from groundup.evaluation.contamination import NGRAM, contaminated_items
from groundup.evaluation.measure import (
    Record,
    by_group,
    confidences,
    figures_of,
    item_scores,
    measure,
    read_records,
    reliability,
    to_plain,
)
from groundup.evaluation.sets import METRICS_OF_TASK, TASKS, find_tasks
from groundup.files import read_json, value_digest, write_json, write_text
from groundup.model import Transformer
from groundup.recipe import EvaluateSettings
from groundup.report.closing import is_share
from groundup.report.format import is_number
from groundup.tokenizer import Tokenizer
from groundup.tokenizer.pretrained import PretrainedTokenizer
from groundup.tokenizer.special import CHAT_TEMPLATE
from groundup.untrusted import file_inside, reading

CARD = "scores.json"
_FORMAT = 2  # of scores and records; raised when figures change
_CORE_TASKS = 22  # of DCLM's CORE (its eval/additional_aggregation.json, low_variance_datasets)
_WAY_OUT = "Write them: groundup evaluate MODEL --tasks …"
_RESAMPLES = 10_000
_LEVEL = 0.05
_SHOWN = 0.02  # the difference for which the needed number of items is told
_POWER = 1.96 + 0.84  # both sides at 5 %, found four times in five


@dataclass(frozen=True)
class Scores:
    """What was found of a model.

    Attributes:
        card: what `scores.json` holds.
        records: of each task's items.
        generation_tokens_per_second: of answers to `groundup:tasks`, by the clock of this machine.
    """

    card: dict[str, Any]
    records: dict[str, list[Record]]
    generation_tokens_per_second: float | None = None

    @property
    def figures(self) -> dict[str, dict[str, Any]]:
        """Every figure by its metric."""
        return figures_by_metric(self.card)


def score_model(
    model: Transformer,
    tokenizer: Tokenizer,
    settings: EvaluateSettings,
    *,
    seed: int = 1,
    identity: str = "",
    texts: Iterable[str] = (),
    start: Transformer | None = None,
    folder: Path | None = None,
    trained_on: Iterable[str] | None = None,
    ngram: int = NGRAM,
    bar: Bar | None = None,
) -> Scores:
    """Score a model on what `settings.tasks` names, and write what came out into a folder.

    Args:
        model: put into evaluation mode; its arithmetic is in its `compute_dtype`.
        tokenizer: of the model.
        settings: which tasks, and how they are put.
        seed: of generated items, of items under a limit, of worked examples and of what is drawn.
        identity: what stands for the model in the result, such as `model_digest`.
        texts: the validation documents, for bits per byte.
        start: the model that it was trained from, for `groundup:style`.
        folder: of the result; finished items that stand there are not done again (default: nothing is written).
        trained_on: the training texts: items that stand there are counted, and every figure is told without them, too
            ("clean").
        ngram: words in a row that count as standing there, 8 to 13.
        bar: shows the progress.

    Returns:
        Its card has "model", "tokenizer" and "template" (digests); "tasks" by name ("kind", "n", "settings",
        "fingerprint" of the items, "identity" of the records, "figures", "groups"; of choices "reliability", as
        `measure.reliability` gives it, which is drawn beside), those that stood there of the same model too; "core":
        the mean of centered accuracies over the tasks of DCLM's CORE (arXiv:2406.11794) that are given.

    Raises:
        DataError: an unknown task, or its files are missing or damaged; no validation text.
    """
    tasks = find_tasks(settings, texts)
    read = [task.read(settings, seed) for task in tasks]
    model_and_texts = {"model": identity, "tokenizer": tokenizer.fingerprint, "template": template_digest(tokenizer)}
    tainted = None if trained_on is None else contaminated_items(read, trained_on, ngram)
    found: dict[str, Any] = {}
    records: dict[str, list[Record]] = {}
    speed = None
    for place, (task, items) in enumerate(zip(tasks, read, strict=True)):
        told = _asked(task, settings, seed) | {"dtype": str(model.compute_dtype)}
        of_items = fingerprint(task, items)
        whole = value_digest([_FORMAT, model_and_texts, of_items, told, start is not None])
        began = time.perf_counter()
        own = records[task.name] = measure(
            model, tokenizer, task, items, settings=settings, seed=seed, start=start, identity=whole,
            kept=None if folder is None else folder / records_file(task.name),
            advance=None if bar is None else functools.partial(bar.update, total=len(items), note=task.name),
        )  # fmt: skip
        figures = figures_of(own)
        if task.name == TASKS:
            speed = sum(record["tokens"] for record in own) / (time.perf_counter() - began)
        found[task.name] = {
            "kind": task.kind,
            "n": len(own),
            "settings": told,
            "fingerprint": of_items,
            "identity": whole,
            "core_shots": task.core_shots if isinstance(task, Benchmark) else None,
            "figures": to_plain(figures),
            **({} if tainted is None else {"ngram": ngram, **_without(own, tainted[place])}),
            "groups": {group: to_plain(parts) for group, parts in by_group(own).items()},
            **_reliability(own, None if folder is None else folder / f"{task.name}-reliability.svg"),
        }
    if folder is not None:
        found = _kept(folder, model_and_texts) | found
    card = {
        "format": _FORMAT,
        **model_and_texts,
        "tasks": found,
        "core": core(found),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
    }
    if folder is not None:
        write_json(folder / CARD, card)
    return Scores(card, records, speed)


def _reliability(records: Sequence[Record], path: Path | None) -> dict[str, Any]:
    """The bins of a reliability plot, and the plot in a file; nothing of what is no choice between several."""
    if len(records[0].get("logprob", ())) < 2:
        return {}
    bins = reliability(*confidences(records))
    if path is not None:
        from groundup.report.charts import reliability_chart, standing_alone  # matplotlib: half a second

        write_text(path, standing_alone(reliability_chart("reliability", bins)))
    return {"reliability": bins}


def template_digest(tokenizer: Tokenizer) -> str | None:
    """What stands for a model's chat template; None: it has none."""
    theirs = tokenizer.chat_templates if isinstance(tokenizer, PretrainedTokenizer) else {"default": CHAT_TEMPLATE}
    template = theirs.get("default")
    return None if template is None else value_digest(template)


def records_file(task: str) -> str:
    """The name of the file of a task's records."""
    return f"{task.replace(':', '-')}.jsonl"


def _asked(task: EvaluationTask, settings: EvaluateSettings, seed: int) -> dict[str, Any]:
    """How a task is put: what of the settings is about it, and of a generation how tokens are drawn."""
    told: dict[str, Any] = {"seed": seed, "limit": settings.limit}
    if isinstance(task, Benchmark):
        told |= {"shots": settings.shots}
    if isinstance(task, GenerationTask) and task.kind != "text":
        told |= {"chat": settings.chat or task.is_chat}
        if task.kind != "choice":
            params, n = task.sampling(settings)
            told |= {"samples": n, "decoding": asdict(params)}
    return told


def core(tasks: Mapping[str, Any]) -> dict[str, Any] | None:
    """The mean of centered accuracies over the tasks of DCLM's CORE that are given, as a figure; None: none is.

    Beside it stands which they are, of how many, and which of them had other numbers of worked examples than there.
    """
    own = {name: one for name, one in tasks.items() if one.get("core_shots") is not None}
    if not own:
        return None
    parts = [one["figures"].get("accuracy_centered", one["figures"]["accuracy"]) for one in own.values()]
    return {
        "value": sum(one["value"] for one in parts) / len(parts),
        "stderr": math.sqrt(sum(one["stderr"] ** 2 for one in parts)) / len(parts),
        "n": len(parts),
        "unit": "tasks",
        "of": _CORE_TASKS,
        "tasks": list(own),
        "other_shots": [name for name, one in own.items() if one["settings"]["shots"] != one["core_shots"]],
    }


def figures_by_metric(card: Mapping[str, Any], *, shown_only: bool = False) -> dict[str, dict[str, Any]]:
    """The figures of a card by metric: those of a generated set by their own names, others as "arc_easy.accuracy".

    Args:
        card: as `score_model` makes it.
        shown_only: of a benchmark its first figure only, as a table shows it.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, one in card["tasks"].items():
        figures = one["figures"]
        if name in METRICS_OF_TASK:
            found |= {metric: figures[metric] for metric in METRICS_OF_TASK[name] if metric in figures}
        else:
            names = list(figures)[: 1 if shown_only else None]
            found |= {f"{name}.{figure}": figures[figure] for figure in names}
    return found | ({} if card["core"] is None else {"core": card["core"]})


def read_card(folder: Path) -> dict[str, Any]:
    """The card in a folder.

    Raises:
        ArtifactError: none there, or a damaged one, or one of an earlier version.
    """
    path = folder / CARD
    if not path.is_file():
        raise ArtifactError(f"{path}: not found.", _WAY_OUT)
    with reading(str(path), fix=_WAY_OUT):
        card = read_json(path)
        if not isinstance(card, dict) or card.get("format") != _FORMAT:
            raise ArtifactError(f"{path}: is of another version, or no scores.", _WAY_OUT)
        core(card["tasks"])
        figures = [*figures_by_metric(card).values()]
        for one in card["tasks"].values():
            figures += [figure for part in one["groups"].values() for figure in part.values()]
            if not (isinstance(one["fingerprint"], str) and isinstance(one["identity"], str)):
                raise ArtifactError(f"{path}: is damaged.", _WAY_OUT)
        if not all(is_number(figure[name]) for figure in figures for name in ("value", "stderr")):
            raise ArtifactError(f"{path}: is damaged.", _WAY_OUT)
    return dict(card)


def _without(records: Sequence[Record], tainted: Collection[int]) -> dict[str, Any]:
    """How many items the training text repeats, and the figures of the others."""
    clean = [record for record in records if record["item"] not in tainted]
    return {"n_contaminated": len(records) - len(clean), "clean": to_plain(figures_of(clean)) if clean else None}


def _kept(folder: Path, model_and_texts: Mapping[str, Any]) -> dict[str, Any]:
    """What was measured of the same model before."""
    try:
        card = read_card(folder)
    except ArtifactError:
        return {}
    return dict(card["tasks"]) if model_and_texts.items() <= card.items() else {}


@dataclass(frozen=True)
class Difference:
    """How two models differ on one benchmark.

    Attributes:
        benchmark: its name.
        n: items that both answered.
        first, second: their mean scores, of a text −bits per byte.
        value: second − first.
        low, high: of the 95 % interval, by 10,000 paired resamples.
        p: two-sided, corrected for the number of benchmarks (Holm 1979).
        n_needed: items that would show a difference of 0.02 four times in five.
        verdict: in words.
    """

    benchmark: str
    n: int
    first: float
    second: float
    value: float
    low: float
    high: float
    p: float
    n_needed: int
    verdict: str


def compare_cards(first: str | Path, second: str | Path) -> list[Difference]:
    """Two folders that `score_benchmarks` wrote, benchmark by benchmark.

    Raises:
        ArtifactError: no scores there, or damaged ones.
        DataError: they share no benchmark with the same items.
    """
    cards = [read_card(Path(folder))["tasks"] for folder in (first, second)]
    paired: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    units: dict[str, str] = {}
    for name, one in cards[0].items():
        other = cards[1].get(name)
        if other is None or other["fingerprint"] != one["fingerprint"]:
            continue
        scores, is_text = zip(
            *(_scores(Path(folder), name, card) for folder, card in ((first, one), (second, other))), strict=True
        )
        if any(is_text):
            units[name] = " bits per byte"
        places = sorted(scores[0].keys() & scores[1].keys())
        if len(places) > 1:
            paired[name] = (
                np.array([scores[0][place] for place in places]),
                np.array([scores[1][place] for place in places]),
            )
    if not paired:
        raise DataError(
            f"{first} and {second} share no benchmark with two or more of the same items.",
            "Score both with the same --tasks, --shots, --limit and --seed.",
        )
    plain = {name: _p_value(b - a) for name, (a, b) in paired.items()}
    corrected = holm(plain)
    return [_difference(name, a, b, corrected[name], units.get(name, "")) for name, (a, b) in paired.items()]


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """P-values corrected for how many there are (Holm 1979): the smallest times n, the next times n − 1, …"""
    found: dict[str, float] = {}
    most = 0.0
    for place, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        most = max(most, min(1.0, p * (len(p_values) - place)))
        found[name] = most
    return {name: found[name] for name in p_values}


def _p_value(differences: np.ndarray) -> float:
    """Two-sided, by 10,000 random signs: of two equal models, either could have been the better one at any item."""
    rng = np.random.default_rng(0)
    seen = abs(differences.sum())
    if not seen:
        return 1.0
    signs = (rng.integers(0, 2, (len(differences), 1000)) * 2 - 1 for _ in range(_RESAMPLES // 1000))
    n_beyond = sum(int((abs(differences @ part) >= seen - 1e-9).sum()) for part in signs)
    return (n_beyond + 1) / (_RESAMPLES + 1)


def _difference(name: str, a: np.ndarray, b: np.ndarray, p: float, unit: str) -> Difference:
    rng = np.random.default_rng(0)
    differences = b - a
    n = len(differences)
    resampled = [differences[rng.integers(0, n, n)].mean() for _ in range(_RESAMPLES)]
    low, high = np.quantile(resampled, [_LEVEL / 2, 1 - _LEVEL / 2])
    spread = float(differences.std(ddof=1))
    n_needed = max(2, math.ceil((_POWER * spread / _SHOWN) ** 2))
    value = float(differences.mean())
    least = f"{_SHOWN}{unit}" if unit else f"{_SHOWN * 100:g} points"
    if p < _LEVEL:
        better = f"{abs(value):.3g}{unit}" if unit else f"{abs(value):.1%}"
        verdict = f"the {'second' if value > 0 else 'first'} is better by {better}"
    elif n < n_needed:
        verdict = f"no difference shown at n = {n:,}; {n_needed:,} items would show one of {least}"
    else:
        verdict = f"no difference shown at n = {n:,}, where one of {least} would have been seen"
    return Difference(name, n, float(a.mean()), float(b.mean()), value, float(low), float(high), p, n_needed, verdict)


def _scores(folder: Path, name: str, card: Mapping[str, Any]) -> tuple[dict[int, float], bool]:
    """The score of each item, and whether they are texts."""
    path = file_inside(folder, records_file(name))
    with reading(str(path), fix=_WAY_OUT):
        records = read_records(path, card["identity"])
        scores = item_scores(records)
    if not all(map(math.isfinite, scores.values())):
        raise ArtifactError(f"{path}: a score that is no finite number.", _WAY_OUT)
    return scores, "bits" in records[0]


def say(name: str, value: float, stderr: float) -> str:
    """A figure with its standard error: shares in percent."""
    return f"{value:.1%} ± {stderr:.1%}" if is_share(name) else f"{value:.4g} ± {stderr:.2g}"
