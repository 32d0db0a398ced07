"""All the scores of a model into a folder.

In: a model and what `[evaluate]` says. Out: `scores.json` with every figure, what it was measured with, and how;
beside it the records of each task's items, by which `comparison` compares models.
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

import torch

from groundup.console import Bar
from groundup.errors import ArtifactError
from groundup.evaluation.benchmarks import Benchmark, EvaluationTask, GenerationTask, fingerprint
from groundup.evaluation.contamination import NGRAM, contaminated_items
from groundup.evaluation.measure import (
    Record,
    by_group,
    confidences,
    figures_of,
    kept_records,
    measure,
    reliability,
    to_plain,
)
from groundup.evaluation.sandbox import sandbox_level
from groundup.evaluation.sets import METRICS_OF_TASK, TASKS, find_tasks
from groundup.files import read_json, value_digest, write_json, write_text
from groundup.model import Transformer
from groundup.recipe import EvaluateSettings
from groundup.report.closing import is_share
from groundup.report.format import is_number
from groundup.tokenizer import Tokenizer
from groundup.tokenizer.pretrained import PretrainedTokenizer
from groundup.tokenizer.special import CHAT_TEMPLATE
from groundup.untrusted import reading

CARD, BENCHMARKS = "scores.json", "benchmarks"  # a file of scores, and the folder beside a model that may hold it
_FORMAT = 2  # of scores and records; raised when figures change
_CORE_TASKS = 22  # of DCLM's CORE (its eval/additional_aggregation.json, low_variance_datasets)
WAY_OUT = "Write them: groundup evaluate RUN, or of any model: groundup evaluate MODEL --tasks …"


@dataclass(frozen=True)
class Scores:
    """What was found of a model."""

    card: dict[str, Any]  # what `scores.json` holds
    records: dict[str, list[Record]]  # of each task's items
    # Of the answers to `groundup:tasks` that were written in this call, by the clock of this machine; None: none was
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
        `measure.reliability` gives it, which is drawn beside; of code "sandbox", what isolated its programs), those
        that stood there of the same model too; "core": the mean of centered accuracies over the tasks of DCLM's CORE
        (arXiv:2406.11794) that are given.

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
        path = None if folder is None else folder / records_file(task.name)
        before, began = kept_records(path, whole), time.perf_counter()
        own = records[task.name] = measure(
            model, tokenizer, task, items, settings=settings, seed=seed, start=start, identity=whole, kept=path,
            advance=None if bar is None else functools.partial(bar.update, total=len(items), note=task.name),
        )  # fmt: skip
        seconds, figures = time.perf_counter() - began, figures_of(own)
        if task.name == TASKS and len(before) < len(own):
            speed = sum(one["tokens"] for one in own if one["item"] not in before) / seconds
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
            **({"sandbox": sandbox_level()} if task.kind == "code" else {}),
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
    """The card in a folder. Raises ArtifactError: none there, or a damaged one, or one of an earlier version."""
    path = folder / CARD
    if not path.is_file():
        raise ArtifactError(f"{path}: not found.", WAY_OUT)
    with reading(str(path), fix=WAY_OUT):
        card = read_json(path)
        if not isinstance(card, dict) or card.get("format") != _FORMAT:
            raise ArtifactError(f"{path}: is of another version, or no scores.", WAY_OUT)
        core(card["tasks"])
        figures = [*figures_by_metric(card).values()]
        for one in card["tasks"].values():
            figures += [figure for part in one["groups"].values() for figure in part.values()]
            if not (isinstance(one["fingerprint"], str) and isinstance(one["identity"], str)):
                raise ArtifactError(f"{path}: is damaged.", WAY_OUT)
        if not all(is_number(figure[name]) for figure in figures for name in ("value", "stderr")):
            raise ArtifactError(f"{path}: is damaged.", WAY_OUT)
    return dict(card)


def read_scores(folder: Path) -> dict[str, Any]:
    """The card in a folder; nothing if it is not there, damaged, or of another version."""
    try:
        return read_card(folder)
    except ArtifactError:
        return {}


def _without(records: Sequence[Record], tainted: Collection[int]) -> dict[str, Any]:
    """How many items the training text repeats, and the figures of the others."""
    clean = [record for record in records if record["item"] not in tainted]
    return {"n_contaminated": len(records) - len(clean), "clean": to_plain(figures_of(clean)) if clean else None}


def _kept(folder: Path, model_and_texts: Mapping[str, Any]) -> dict[str, Any]:
    """What was measured of the same model before."""
    card = read_scores(folder)
    return dict(card["tasks"]) if model_and_texts.items() <= card.items() else {}


def say(name: str, value: float, stderr: float) -> str:
    """A figure with its standard error: shares in percent."""
    return f"{value:.1%} ± {stderr:.1%}" if is_share(name) else f"{value:.4g} ± {stderr:.2g}"
