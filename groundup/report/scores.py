"""The page's part on scores: the models of a run beside each other, and their benchmarks with error bars.

In: what `evaluate/scores.json` and the models' `benchmarks/scores.json` say. Out: tables of text, and a chart.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from groundup.report.charts import SERIES, Chart, estimates_chart
from groundup.report.closing import format_figure, format_stderr, score_rows
from groundup.report.format import is_number, mapping
from groundup.report.record import RunRecord


def models_table(record: RunRecord) -> tuple[list[str], list[list[str]]] | None:
    """Figures down, models across, with what each started from; None: fewer than three models were scored.

    A figure has an arrow where it differs from its start's by more than two standard errors of the difference.
    """
    rows = score_rows(record.scores)
    models = list(dict.fromkeys(str(row.get("model")) for row in rows))
    if len(models) < 3:
        return None
    cells = {(row.get("key"), str(row.get("model"))): row for row in rows}
    labels = {row.get("key"): str(row.get("label", "")).partition(f", {row.get('model')}")[0] for row in rows}
    return ["figure", *(_head(record, model) for model in models)], [
        [label, *(_cell(str(key), mapping(cells.get((key, model)))) for model in models)]
        for key, label in labels.items()
    ]


def benchmark_rows(record: RunRecord) -> list[tuple[str, ...]]:
    """Every figure of every benchmark: benchmark, model, figure, value, standard error, n."""
    found = [
        (name, model, figure, estimate)
        for model, cards in record.benchmarks.items()
        for name, card in cards.items()
        for figure, estimate in card["figures"].items()
    ]
    return [
        (*names, format_figure(names[2], one["value"]), format_stderr(names[2], one["stderr"]), f"{one['n']:,}")
        for *names, one in sorted(found, key=lambda row: row[0])
    ]


def benchmark_chart(record: RunRecord) -> Chart | None:
    """The first figure of each benchmark, which is the usual one, of the last models."""
    models = list(record.benchmarks)[-len(SERIES) :]
    rows: dict[str, dict[str, Any]] = {}
    for model in models:
        for name, card in record.benchmarks[model].items():
            rows.setdefault(name, {})[model] = next(iter(card["figures"].values()))
    return estimates_chart("benchmarks-chart", rows, dict(zip(models, SERIES, strict=False)))


def _head(record: RunRecord, model: str) -> str:
    stage = record.stages.get(model)
    starts = [need for need in stage.needs if need in record.curves] if stage else []
    is_control = stage is not None and stage.is_control
    return model + (" (control)" if is_control else "") + (f", from {starts[0]}" if starts else "")


def _cell(key: str, row: Mapping[str, Any]) -> str:
    before, after = mapping(row.get("before")), mapping(row.get("after"))
    shown = f"{format_figure(key, after.get('value'))} {format_stderr(key, after.get('stderr'))}"
    numbers = [value for one in (before, after) for name in ("value", "stderr") if is_number(value := one.get(name))]
    if len(numbers) < 4:
        return shown
    was, error_before, now, error_after = numbers
    differs = abs(now - was) > 2 * (error_before**2 + error_after**2) ** 0.5
    return f"{'↑' if now > was else '↓'} {shown}" if differs else shown
