"""The models of a run side by side: each beside what it started from, and the recipe's gates.

In: `evaluate/NAME/scores.json` of every model, and the recipe. Out: `evaluate/scores.json`, which the closing table and
the report show. Nothing is measured here.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

from groundup.errors import ArtifactError, DataError, GroundupError
from groundup.evaluation.benchmarks import Benchmark
from groundup.evaluation.harness import before_name
from groundup.evaluation.measure import FIGURES, read_records
from groundup.evaluation.scorecard import CARD, figures_by_metric, read_scores, records_file
from groundup.evaluation.sets import BITS_PER_BYTE, EXACT, FIRST, HARM, LABELS, METRICS_OF_TASK, check_tasks, find_task
from groundup.evaluation.text_metrics import ROUGE
from groundup.files import own_folder, read_json, write_json
from groundup.interop.start import check_chat
from groundup.recipe import Gate, Recipe
from groundup.report.format import is_number
from groundup.run import Run
from groundup.stage import Check, Stage, current_stages, default_model, graph, language_models
from groundup.untrusted import reading

_NOTHING: dict[str, Any] = {"tasks": {}, "core": None}
_KEPT_ANSWERS = 60


def write_comparison(recipe: Recipe, run: Run) -> dict[str, Any]:
    """Write `evaluate/scores.json` from the scores that are there and of this recipe, and return what it holds."""
    path, found = run.folder("evaluate") / CARD, compare(recipe, run)
    if path.is_file() or found["rows"]:
        own_folder(path.parent)
        try:
            is_new = read_json(path) != found
        except ArtifactError:
            is_new = True
        if is_new:
            write_json(path, found)
    return found


def read_comparison(run: Run) -> dict[str, Any]:
    """What `write_comparison` wrote. Raises ArtifactError: it is not there, or damaged."""
    path = run.folder("evaluate") / CARD
    found = read_json(path)
    if not isinstance(found, dict):
        raise ArtifactError(f"{path}: is no table of scores.", "Make it again: the command that built the run.")
    return found


def compare(recipe: Recipe, run: Run) -> dict[str, Any]:
    """Rows of scores before and after each stage, the gates, and what the default model answered."""
    stages = graph(recipe)
    models, current = language_models(stages), current_stages(stages, run)
    scores = {
        str(stage.subject): read_scores(run.folder(stage.name))
        for stage in stages.values()
        if stage.subject is not None and stage.name in current
    }
    figures = {
        name: (manifest.summary if name in current and (manifest := run.manifest(name)) else {})
        | {metric: figure["value"] for metric, figure in figures_by_metric(scores.get(name, _NOTHING)).items()}
        for name in {*stages, *scores}
    }
    starts = {stage.name: before_name(stage, stages) for stage in models}
    rows = []
    for stage in models:
        before, after = (
            figures_by_metric(scores.get(name, _NOTHING), shown_only=True) for name in (starts[stage.name], stage.name)
        )
        for metric, value in after.items():
            was = before.get(metric)
            if was is None and stage.name in starts.values():
                continue  # it is shown as what another one started from
            label = f"{_label(metric)}, {stage.name}" + (" (control)" if stage.is_control else "")
            rows.append({"key": metric, "model": stage.name, "label": label, "before": was, "after": value})
    shown = default_model(recipe, to_chat=True)[0] if models else ""
    before, after = (_by_kind(scores.get(name, _NOTHING)) for name in (starts.get(shown, ""), shown))
    return {
        "rows": rows,
        "gates": [_gate(gate, stages, figures, current) for gate in recipe.evaluate.gates],
        "model": shown,
        "by_kind": {kind: {"before": before.get(kind), "after": value} for kind, value in after.items()},
        "answers": _answers(run, shown, scores.get(shown, _NOTHING)),
    }


def _by_kind(card: Mapping[str, Any]) -> dict[str, Any]:
    """The share of right answers of each kind of question."""
    groups = [card["tasks"].get(name, {}).get("groups", {}) for name in (*EXACT, FIRST, HARM)]
    return {kind: next(iter(figures.values())) for parts in groups for kind, figures in parts.items()}


def _answers(run: Run, model: str, card: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What a model answered, as the page shows it."""
    found: list[dict[str, Any]] = []
    for name in (*EXACT, FIRST, HARM):
        path, one = run.folder(f"evaluate/{model}") / records_file(name), card["tasks"].get(name)
        if one is None or len(found) >= _KEPT_ANSWERS:
            continue
        with contextlib.suppress(ArtifactError), reading(str(path)):  # scores stand without them
            for record in read_records(path, one["identity"])[:_KEPT_ANSWERS]:
                is_right = bool(next(iter(record["outcomes"].values())))
                asked = {"kind": record["group"], "prompt": record["prompt"], "expected": record.get("target", "")}
                found.append({**asked, "reply": record["reply"], "correct": is_right})
    return found[:_KEPT_ANSWERS]


def evaluation_checks(recipe: Recipe, stages: Mapping[str, Stage]) -> Iterable[Check]:
    """What can be wrong with tasks and gates."""
    yield "[evaluate] tasks", lambda: check_tasks(recipe.evaluate)
    if BITS_PER_BYTE in recipe.evaluate.tasks and not recipe.reads_text:
        what = "bits_per_byte needs a validation text."
        yield "[evaluate] tasks", functools.partial(_refuse, what, "Add [corpus] inputs = […].")
    is_chat = recipe.evaluate.chat
    asked = [task for task in recipe.evaluate.tasks if (task in METRICS_OF_TASK or is_chat) and task != BITS_PER_BYTE]
    if asked:
        where = f'[evaluate] tasks = "{asked[0]}"'
        for stage in language_models(stages):
            if stage.start is None:
                yield where, functools.partial(check_chat, stage, where)
    for gate in recipe.evaluate.gates:
        yield "[[evaluate.gates]]", functools.partial(_check_gate, gate, recipe, stages)


def _check_gate(gate: Gate, recipe: Recipe, stages: Mapping[str, Stage]) -> None:
    scored = {metric for task in recipe.evaluate.tasks for metric in _metrics_of(task)}
    for name in filter(None, (gate.model, gate.over)):
        if name == "start":
            stage = stages[gate.model]
            is_fresh = stage.start is None and stage.outside_start is None
            known = scored & {BITS_PER_BYTE} if is_fresh else scored
        else:
            stage = stages[name]
            known = {*stage.method.figures, *(scored if stage.method.makes == "lm" else ())}
        if gate.metric not in known:
            what = f"what {gate.model} starts from" if name == "start" else name
            _refuse(
                f'metric = "{gate.metric}" is not measured of {what}.',
                f"Measured there: {', '.join(sorted(known)) or 'nothing'} ([evaluate] tasks say what is).",
            )


def _metrics_of(name: str) -> Sequence[str]:
    """The metrics that a task gives."""
    if name in METRICS_OF_TASK:
        return METRICS_OF_TASK[name]
    try:
        task = find_task(name)
    except GroundupError:  # which another check says
        return ()
    assert isinstance(task, Benchmark), "what else there is has its metrics in METRICS_OF_TASK"
    without = () if task.rouge else ROUGE
    own = [f"{task.name}.{figure}" for figure in FIGURES[task.kind] if figure not in without]
    return [*own, "core"] if task.core_shots is not None else own


def _label(metric: str) -> str:
    task, _, figure = metric.rpartition(".")
    return f"{task}, {figure.replace('_', ' ')}" if task else LABELS.get(metric, metric)


def _refuse(what: str, fix: str) -> None:
    raise DataError(what, fix)


def _gate(
    gate: Gate, stages: Mapping[str, Stage], figures: Mapping[str, Mapping[str, Any]], done: Set[str]
) -> dict[str, Any]:
    """How a gate is met; one on a figure that its finished stages did not measure is missed."""
    places = [gate.model]
    words = [_label(gate.metric), f"of {gate.model}"]
    if gate.over is not None:
        other = gate.over if gate.over != "start" else before_name(stages[gate.model], stages)
        places.append(other)
        words.append(f"over {'what it started from' if gate.over == 'start' else gate.over}")
    found = [value for name in places if is_number(value := figures.get(name, {}).get(gate.metric))]
    value = found[0] - sum(found[1:]) if len(found) == len(places) else None
    bounds = [f"at least {gate.min:g}"] if gate.min is not None else []
    bounds += [f"at most {gate.max:g}"] if gate.max is not None else []
    passed = value is not None and (gate.min is None or value >= gate.min) and (gate.max is None or value <= gate.max)
    measured_by = [f"evaluate/{name}" if gate.metric in LABELS or "." in gate.metric else name for name in places]
    is_done = {*measured_by} <= done
    outcome = f", is {value:.4g}" if value is not None else ", was not measured" if is_done else ""
    return {
        "key": gate.metric,
        "label": f"{_label(gate.metric)}, {gate.model}",
        "model": gate.model,
        "over": gate.over,
        "value": value,
        "measured_by": measured_by,
        "bounds": " and ".join(bounds) + (f" over {gate.over}" if gate.over else ""),
        "text": f"{' '.join(words)}: {' and '.join(bounds)}{outcome}",
        "passed": passed if is_done or value is not None else None,
    }
