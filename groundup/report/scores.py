"""The page's part on scores: the models of a run beside each other, and their benchmarks with error bars.

In: what `evaluate/scores.json` and the models' `benchmarks/scores.json` say. Out: plain values and charts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from groundup.report.charts import MOST_SERIES, SERIES, Chart, estimates_chart
from groundup.report.closing import format_figure, format_stderr, score_rows
from groundup.report.format import format_whole, is_number, mapping
from groundup.report.record import RunRecord


def models_table(record: RunRecord) -> dict[str, Any] | None:
    """Figures down, models across, each beside what it started from; None: fewer than three models were scored.

    A figure is marked where it differs from its start by more than two standard errors of the difference.
    """
    rows = score_rows(record.scores)
    models = list(dict.fromkeys(str(row.get("model")) for row in rows))
    if len(models) < 3:
        return None
    cells = {(row.get("key"), str(row.get("model"))): row for row in rows}
    labels = {row.get("key"): str(row.get("label", "")).partition(f", {row.get('model')}")[0] for row in rows}
    heads = []
    for name in models:
        stage = record.stages.get(name)
        start = ", ".join(need for need in stage.needs if need in record.curves) if stage else ""
        heads.append({"name": name, "start": start, "is_control": stage is not None and stage.is_control})
    return {
        "models": heads,
        "rows": [
            (label, [_cell(str(key), mapping(cells.get((key, model)))) for model in models])
            for key, label in labels.items()
        ],
    }


def benchmark_section(record: RunRecord) -> dict[str, Any] | None:
    """Every benchmark of every model: shares as a chart, all figures as a table; None: none was asked."""
    models = [name for name in record.stages if name in record.benchmarks]
    if not models:
        return None
    rows = [
        (
            name, model, figure, format_figure(figure, estimate.get("value")),
            format_stderr(figure, estimate.get("stderr")), format_whole(estimate.get("n")),
        )
        for model in models
        for name, card in record.benchmarks[model].items()
        for figure, estimate in ((one, mapping(found)) for one, found in mapping(mapping(card).get("figures")).items())
    ]  # fmt: skip
    return {"chart": _benchmark_chart(record, models[-MOST_SERIES:]), "rows": sorted(rows, key=lambda row: row[0])}


def _benchmark_chart(record: RunRecord, models: list[str]) -> Chart | None:
    """The first figure of each benchmark, which is the usual one."""
    names = dict.fromkeys(name for model in models for name in record.benchmarks[model])
    rows = {
        name: {
            model: next(iter(mapping(mapping(record.benchmarks[model].get(name)).get("figures")).values()), None)
            for model in models
        }
        for name in names
    }
    return estimates_chart("benchmarks", rows, dict(zip(models, SERIES, strict=False)))


def _cell(key: str, row: Mapping[str, Any]) -> dict[str, str]:
    before, after = mapping(row.get("before")), mapping(row.get("after"))
    shown = {"value": format_figure(key, after.get("value")), "stderr": format_stderr(key, after.get("stderr"))}
    numbers = [value for one in (before, after) for name in ("value", "stderr") if is_number(value := one.get(name))]
    mark = ""
    if len(numbers) == 4:
        was, error_before, now, error_after = numbers
        if abs(now - was) > 2 * (error_before**2 + error_after**2) ** 0.5:
            mark = "↑" if now > was else "↓"
    return {**shown, "mark": mark, "n": f"{after.get('n', 0):,} {after.get('unit', '')}"}
