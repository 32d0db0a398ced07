"""Parts of the page: models beside each other, benchmarks with error bars, attention, and the corpus.

In: a `RunRecord`. Out: plain values, texts and charts for the template.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from groundup.console import format_bytes, format_count
from groundup.report.charts import SERIES, Chart, estimates_chart, histogram_chart
from groundup.report.closing import format_figure, format_stderr, is_share
from groundup.report.format import format_whole, is_number, mapping, mappings
from groundup.report.record import RunRecord

LONGEST_FACT = 60
EXAMPLES_PER_REASON = 20
MOST_ROWS = 20
LEVELS = 6  # of shades for attention


def models_table(record: RunRecord) -> tuple[list[str], list[list[str]]] | None:
    """Figures down, models across, with what each started from; None: fewer than three models were scored.

    A figure has an arrow where it differs from its start's by more than two standard errors of the difference.
    """
    rows = mappings(record.scores.get("rows"))
    models = list(dict.fromkeys(str(row.get("model")) for row in rows))
    if len(models) < 3:
        return None
    cells = {(row.get("key"), str(row.get("model"))): row for row in rows}
    labels = {row.get("key"): str(row.get("label", "")).partition(f", {row.get('model')}")[0] for row in rows}
    return ["figure", *(_title(record, model) for model in models)], [
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
    """The first figure of each benchmark, which is the usual one, of the last models; where it is a share."""
    models = list(record.benchmarks)[-len(SERIES) :]
    rows: dict[str, dict[str, Any]] = {}
    for model in models:
        for name, card in record.benchmarks[model].items():
            figure, estimate = next(iter(card["figures"].items()))
            if is_share(figure):
                rows.setdefault(name, {})[model] = estimate
    return estimates_chart("benchmarks-chart", rows, dict(zip(models, SERIES, strict=False)))


def _title(record: RunRecord, model: str) -> str:
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


def attention_section(record: RunRecord) -> dict[str, Any] | None:
    """The heads of the run's last model, or of its first; None: none were kept, or they are damaged."""
    name = next((name for name in (record.end, record.base) if name in record.attention), "")
    try:
        found = record.attention[name]
        heads = [
            {"layer": layer["layer"], "head": number, "svg": _head(weights)}
            for layer in found["layers"]
            for number, weights in enumerate(layer["heads"], 1)
        ]
        return {"model": name, "tokens": [str(token) for token in found["tokens"]], "heads": heads}
    except (KeyError, TypeError):
        return None


def _head(weights: list[list[int]]) -> str:
    """One head as SVG, the darker the more percent of a row's attention a cell has."""
    paths = [""] * LEVELS
    for y, row in enumerate(weights):
        for x, percent in enumerate(row):
            if 1 <= percent <= 100:
                paths[min(LEVELS - 1, int((percent / 100) ** 0.5 * LEVELS))] += f"M{x} {y}h1v1h-1z"
    drawn = "".join(f'<path fill-opacity="{(level + 1) / LEVELS:.2f}" d="{path}"/>' for level, path in enumerate(paths))
    n = len(weights)
    return f'<svg viewBox="0 0 {n} {n}" aria-hidden="true"><path class="past" d="M0 0L{n} {n}H0z"/>{drawn}</svg>'


def corpus_section(record: RunRecord) -> dict[str, Any] | None:
    """What was kept, what was set aside at which step, with histograms and examples; None before the stage is done."""
    summary, statistics = record.summary("corpus"), record.filter_statistics
    if not summary:
        return None
    ratio = record.summary("tokenizer").get("bytes_per_token")
    languages = ", ".join(f"{name} {count:,}" for name, count in mapping(statistics.get("languages")).items())
    keys, clusters = mapping(statistics.get("duplicate_keys")), mapping(statistics.get("clusters"))
    facts = [
        ("documents read", format_whole(summary.get("documents_in"))),
        ("documents kept", format_whole(summary.get("documents_kept"))),
        ("for training", format_whole(summary.get("documents_train"))),
        ("for validation", format_whole(summary.get("documents_validation"))),
        ("text kept", _size(summary.get("bytes_kept"))),
        ("validation chosen by", str(summary.get("validation_by", ""))),
        ("languages found", languages[:LONGEST_FACT] + ("…" if len(languages) > LONGEST_FACT else "")),
        ("files passed over", format_whole(mapping(statistics.get("files")).get("passed_over") or None)),
        ("records with an id seen before", format_whole(keys.get("count") or None)),
        ("largest cluster of near-duplicates", format_whole(clusters.get("largest_cluster") or None)),
        *((name, f"{count:,}") for name, count in mapping(statistics.get("changed")).items()),
    ]
    return {
        "facts": [(label, value) for label, value in facts if value],
        "steps": [_step(step, ratio) for step in statistics.get("steps", ()) if step.get("in")],
        "tables": [
            (title, _rows(mapping(statistics.get(name))))
            for title, name in (("language", "by_language"), ("source", "by_source"))
            if len(mapping(statistics.get(name))) > 1
        ],
        "histograms": histogram_chart("signals", mapping(statistics.get("histograms"))),
        "examples": [one for one in _examples(statistics) if one[2]],
    }


def _examples(statistics: Mapping[str, Any]) -> list[tuple[str, str, list[tuple[Any, ...]]]]:
    """Lists with a heading and a caption; of each example its kind, where it is, a word on it, and an excerpt."""
    private = mapping(statistics.get("private")).items()
    tasks = mapping(statistics.get("contamination")).items()
    reasons = mapping(statistics.get("examples")).items()
    found = [
        (f"{task}, record {one['record']}", f"document {one['document']}", "", one["text"])
        for task, matches in tasks
        for one in matches["examples"]
    ]
    removed = [
        (reason, f"{one.get('source', '')} {one.get('record', '')}", one.get("detail"), one.get("excerpt"))
        for reason, examples in reasons
        for one in examples[:EXAMPLES_PER_REASON]
    ]
    return [
        (
            "Taken for private",
            "Samples, to judge what was replaced by a placeholder.",
            [(kind, "", "", sample) for kind, samples in private for sample in samples],
        ),
        ("Evaluation data found in the text", "", found[:MOST_ROWS]),
        ("Examples of what was set aside", "All of it is listed in corpus/set_aside.jsonl.", removed),
    ]


def _step(step: Mapping[str, Any], bytes_per_token: Any) -> tuple[str, ...]:
    """A row of the steps' table; tokens are estimated from bytes, since only the last step's are counted."""
    size = step.get("bytes_out")
    tokens = format_count(size / bytes_per_token) if is_number(size) and is_number(bytes_per_token) else ""
    return (step["step"], f"{step['in']:,}", f"{step['out']:,}", _size(size), tokens, _removed(step) or "nothing")


def _rows(table: Mapping[str, Any]) -> list[tuple[str, ...]]:
    return [
        (name, f"{row.get('in', 0):,}", f"{row.get('kept', 0):,}", _size(row.get("bytes_kept")), _removed(row))
        for name, row in list(table.items())[:MOST_ROWS]
    ]


def _removed(row: Mapping[str, Any]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in mapping(row.get("removed")).items())


def _size(value: Any) -> str:
    return format_bytes(value) if is_number(value) else ""
