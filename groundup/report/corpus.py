"""The page's part on the corpus: documents read, what each step removed, the signals' distributions, and examples.

In: a run's `filter_statistics.json` and summaries. Out: plain values and one chart for the template.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from groundup.console import format_bytes, format_count
from groundup.report.charts import histogram_chart
from groundup.report.format import format_whole, is_number, mapping
from groundup.report.record import RunRecord

LONGEST_FACT = 60
EXAMPLES_PER_REASON = 20
MOST_ROWS = 20


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
