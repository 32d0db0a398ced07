"""Runs side by side on one page: settings that differ, curves over each other, scores, the same prompts, cost.

In: two to six runs, and the differences of their scores (`groundup.evaluation.comparison`, which stands above this
room). Out: one HTML file in the look of `report.html`, as closed to the network as that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from groundup.errors import RunError
from groundup.files import write_signed
from groundup.recipe import Recipe, resolved_settings
from groundup.report.charts import SERIES, overlay_chart
from groundup.report.closing import closing_rows
from groundup.report.cost import Cost, costs
from groundup.report.format import mappings
from groundup.report.page import environment, verdict
from groundup.report.record import RunRecord, read_record
from groundup.run import Run

MOST_PROMPTS = 12


def write_versus(runs: Sequence[Run], path: Path, differences: Sequence[Any] = ()) -> None:
    """Write the page.

    Args:
        runs: what is compared; the first is what the others are held against.
        path: of the page.
        differences: of `compare_cards`, for these runs.

    Raises:
        RunError: too many runs, or a file that is somebody else's at `path`.
        RecipeError: a run's recipe cannot be read.
    """
    if len(runs) > len(SERIES):
        raise RunError(f"{len(runs)} runs: a page shows {len(SERIES)} at most.", "Choose those that matter.")
    same_name = len({run.name for run in runs}) < len(runs)
    records = {run.root.as_posix() if same_name else run.name: read_record(run) for run in runs}
    stages = dict.fromkeys(stage for record in records.values() for stage in record.curves)
    logged = {
        stage: {name: record.curves[stage] for name, record in records.items() if stage in record.curves}
        for stage in stages
    }
    page = environment().get_template("versus.html.j2").render(
        names=list(records),
        verdicts=[(name, verdict(record, closing_rows(record.scores))) for name, record in records.items()],
        settings=_settings([run.recipe for run in runs]),
        curves=[(stage, overlay_chart(f"over-{stage}", curves)) for stage, curves in logged.items()],
        differences=differences,
        samples=_same_prompts({name: _last_samples(record) for name, record in records.items()}),
        answers=_same_prompts({name: _answers(record) for name, record in records.items()}),
        costs=[(name, *costs(record).get("all", Cost()).told()) for name, record in records.items()],
    )  # fmt: skip
    write_signed(path, page.encode("utf-8", errors="replace").decode("utf-8"), "<!-- {} -->")


def _settings(recipes: Sequence[Recipe]) -> list[tuple[str, ...]]:
    """The settings that are not equal in all recipes; a stage that some have not, as one line."""
    sections = [{recipe.section_of(name) for name in recipe.branches} for recipe in recipes]
    partial = sorted(name for name in {*chain(*sections)} if not all(name in of_one for of_one in sections))
    stages = [(f"[{name}]", *("there" if name in of_one else "–" for of_one in sections)) for name in partial]
    values = [resolved_settings(recipe) for recipe in recipes]
    keys = sorted({key for one in values for key in one if not key.startswith(tuple(f"{name}." for name in partial))})
    rows = [(key, *(one.get(key, "–") for one in values)) for key in keys]
    return stages + [row for row in rows if len({*row[1:]}) > 1]


def _last_samples(record: RunRecord) -> dict[str, str]:
    """What each model that trains wrote last, by stage and prompt."""
    return {
        f"{stage}: {prompt or 'from nothing'} …": line["text"].removeprefix(prompt).strip()
        for stage, curve in record.curves.items()
        for line in curve.samples
        for prompt in (str(line.get("prompt", "")),)
    }


def _answers(record: RunRecord) -> dict[str, str]:
    """What the run's last model answered, with whether it was right, by prompt."""
    return {
        str(answer["prompt"]): f"{'✓' if answer.get('correct') else '✗'} {answer.get('reply', '')}"
        for answer in mappings(record.scores.get("answers"))
        if "prompt" in answer
    }


def _same_prompts(texts: Mapping[str, Mapping[str, str]]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Prompts that two runs or more have a text for, those first for which the texts differ."""
    prompts = dict.fromkeys(prompt for of_run in texts.values() for prompt in of_run)
    found = [
        (prompt, [(run, of_run[prompt]) for run, of_run in texts.items() if prompt in of_run]) for prompt in prompts
    ]
    shared = [(prompt, each) for prompt, each in found if len(each) > 1]
    shared.sort(key=lambda one: len({text for _, text in one[1]}) == 1)
    return shared[:MOST_PROMPTS]
