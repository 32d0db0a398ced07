"""The closing table: what each figure was before and is after, with its error bar, n and gate.

In: the content of `evaluate/scores.json`, and the stages' summaries. Out: a rich
table for the console, or rows of text for the page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

from groundup.report.format import format_many, is_number, mapping, mappings
from groundup.run import Run
from groundup.stage import stages_done


@dataclass(frozen=True)
class ClosingRow:
    """One figure as text; empty strings where there is nothing to show."""

    key: str
    model: str
    label: str
    before: str
    after: str
    stderr: str
    n: str
    gate: str
    gate_passed: bool | None  # None without a gate


def closing_table(scores: Mapping[str, Any], run: Run | None = None) -> Table:
    """The table that a build ends with: `bits per byte  7.90 → 2.31 ±0.02  51 k bytes`.

    Args:
        scores: the content of `evaluate/scores.json`.
        run: adds what its manifests say of documents, compression and speed.
    """
    rows = closing_rows(scores)
    if run is not None:
        manifests = {name: run.manifest(name) for name in stages_done(run)}
        rows += pipeline_rows({name: manifest.summary for name, manifest in manifests.items() if manifest})
    table = Table(box=None, pad_edge=False, padding=(0, 1), header_style="dim")
    for title in ("", "before", "", "after", "", "n"):
        table.add_column(title, justify="right" if title in ("before", "after") else "left")
    gated = any(row.gate for row in rows)
    if gated:
        table.add_column("gate")
    for row in rows:
        # Text, never markup: a label in [brackets] is a label.
        cells = [row.label, row.before, "→" if row.before and row.after else "", row.after, row.stderr, row.n]
        shown = [Text(cell, no_wrap=True) for cell in cells]
        shown[3].stylize("bold")
        if gated:
            mark = "" if row.gate_passed is None else ("✓ " if row.gate_passed else "✗ ")
            shown.append(Text(mark + row.gate, style={None: "dim", True: "green", False: "red"}[row.gate_passed]))
        table.add_row(*shown)
    return table


def closing_rows(scores: Mapping[str, Any]) -> list[ClosingRow]:
    """The rows of the closing table, formatted: scores with their gates, then gates on a stage's own figures."""
    gates: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for gate in mappings(scores.get("gates")):
        gates.setdefault((str(gate.get("key")), str(gate.get("model"))), []).append(gate)
    rows = [
        _row(row, gates.pop((str(row.get("key")), str(row.get("model"))), ())) for row in mappings(scores.get("rows"))
    ]
    for (key, model), others in gates.items():
        value = next((gate.get("value") for gate in others if gate.get("over") is None), None)
        rows.append(
            _row({"key": key, "label": others[0].get("label", f"{key}, {model}"), "after": {"value": value}}, others)
        )
    return rows


def pipeline_rows(summaries: Mapping[str, Mapping[str, Any]]) -> list[ClosingRow]:
    """Rows for what the stages' summaries say: documents, compression, speed of training and of generation."""
    figures: list[tuple[str, str, object, object, object, str]] = []
    for name, summary in summaries.items():
        came, kept = summary.get("documents_in"), summary.get("documents_kept")
        if is_number(kept):
            figures.append(("documents", "documents kept", came, kept, None, ""))
        if is_number(summary.get("vocab_size")):
            figures.append(("bytes_per_token", "bytes per token", None, summary.get("bytes_per_token"), None, ""))
        unit, speed = summary.get("unit", "tokens"), summary.get("tokens_per_second")
        figures.append(("training", f"training, {unit}/s, {name}", None, speed, summary.get("tokens"), unit))
    speeds = [speed for one in summaries.values() if is_number(speed := one.get("generation_tokens_per_second"))]
    figures.append(("generation", "generation, tokens/s", None, max(speeds, default=None), None, ""))
    return [
        _row({"key": key, "label": label, "before": {"value": before}, "after": {"value": after, "n": n, "unit": unit}})
        for key, label, before, after, n, unit in figures
        if is_number(after)
    ]


def format_figure(key: str, value: object) -> str:
    """A figure by the name of its metric: shares in percent, counts with thousands, the rest with two decimals."""
    if not is_number(value):
        return ""
    if is_share(key):
        return f"{100 * value:.1f}%"
    whole = float(value).is_integer() and abs(value) >= 10
    return f"{value:,.0f}" if whole or abs(value) >= 1000 else f"{value:.2f}"


def format_stderr(key: str, value: object) -> str:
    """A figure's standard error, as `format_figure` shows the figure."""
    if not is_number(value):
        return ""
    if is_share(key):
        return f"±{100 * value:.1f}"
    return f"±{value:,.0f}" if value >= 100 else f"±{value:.2f}"


def is_share(key: str) -> bool:
    """Whether a metric is a share between 0 and 1, shown in percent; a benchmark's is named "arc_easy.accuracy"."""
    figure = key.rpartition(".")[2]
    is_named = figure.startswith(("exact_match", "accuracy", "pass@")) or figure.endswith(("accuracy", "share", "rate"))
    return is_named or figure in ("core", "f1", "calibration_error", "rouge1", "rouge2", "rougeL")


def _row(row: Mapping[str, Any], gates: Sequence[Mapping[str, Any]] = ()) -> ClosingRow:
    key = str(row.get("key", ""))
    before, after = (mapping(row.get(name)) for name in ("before", "after"))
    n, outcomes = format_many(after.get("n")), [gate.get("passed") for gate in gates]
    is_measured = all(is_number(gate.get("value")) for gate in gates)
    return ClosingRow(
        key=key,
        model=str(row.get("model", "")),
        label=str(row.get("label", key)),
        before=format_figure(key, before.get("value")),
        after=format_figure(key, after.get("value")),
        stderr=format_stderr(key, after.get("stderr")),
        n=f"{n} {after.get('unit') or ''}".strip() if n else "",
        gate="; ".join(str(gate.get("bounds", "")) for gate in gates) + ("" if is_measured else ", not measured"),
        gate_passed=all(outcomes) if outcomes and None not in outcomes else None,
    )
