"""`report.html`: a run on one page that opens from disk, without network, in light and dark, on a desk and a phone.

In: a run's folder. Out: one HTML file. Everything a text, a model or a source name says is escaped by Jinja;
the page has no script at all, and forbids any by its content security policy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import DictLoader, Environment, StrictUndefined
from markupsafe import Markup

from groundup.console import format_bytes
from groundup.report.charts import exact_match_chart, loss_chart, throughput_chart
from groundup.report.closing import ClosingRow, closing_rows, format_many, road_rows
from groundup.report.corpus import corpus_section
from groundup.report.picture import NARROW_STOP, WIDE_STOP, format_seconds, road_stops, road_words
from groundup.report.record import Curve, RunRecord, is_number, read_record
from groundup.run import REPORT_FILE, Run

MOST_SAMPLES_SHOWN = 6
MOST_SAMPLES = 40
MOST_ANSWERS = 24
LONGEST_TEXT = 1200
VERDICT_KEYS = ("bits_per_byte", "exact_match")
STAGE_TITLES = {"pretrain": "Pretraining", "sft": "Supervised fine-tuning"}


def write_report(run: Run) -> Path:
    """Write a run's `report.html` from what its stages left; missing and unfinished ones are not shown.

    Returns:
        The page's path.

    Raises:
        RunError: the folder holds no run, or a `report.html` that is somebody else's.
    """
    record = read_record(run)
    rows = closing_rows(record.scores)
    if rows:
        rows += road_rows({stage: record.summary(stage) for stage in record.stages})
    stops = road_stops(record)
    page = (
        _environment()
        .get_template("page.html.j2")
        .render(
            record=record,
            verdict=verdict(record, rows),
            rows=rows,
            figures=_headline_figures(record),
            stops=stops,
            road_words=road_words(stops),
            wide_stop=WIDE_STOP,
            narrow_stop=NARROW_STOP,
            corpus=corpus_section(record),
            trainings=[_training(record, stage, curve) for stage, curve in record.curves.items()],
            by_kind=exact_match_chart("exact-match", _mapping(record.scores.get("by_kind"))),
            answers=_answers(record.scores.get("answers")),
            machine=_machine(record),
            can_chat=record.stages["sft"].state == "done" if "sft" in record.stages else False,
            can_generate=record.stages["pretrain"].state == "done",
        )
    )
    # A model can emit halves of characters; what UTF-8 cannot hold is shown as "?".
    run.write(REPORT_FILE, page.encode("utf-8", errors="replace").decode("utf-8"), "<!-- {} -->")
    return run.root / REPORT_FILE


def verdict(record: RunRecord, rows: Sequence[ClosingRow]) -> str:
    """The run in one line."""
    waiting = [stage.name for stage in record.stages.values() if stage.state != "done"]
    if waiting:
        done = len(record.stages) - len(waiting)
        return f"Unfinished: {done} of {len(record.stages)} stages are done; next is {waiting[0]}."
    told = [
        f"{row.label} {row.before} → {row.after}" if row.before else f"{row.label} {row.after}"
        for row in rows
        if row.key in VERDICT_KEYS and row.after
    ]
    missed = [row.label for row in rows if row.gate_passed is False]
    if missed:
        told.append(f"short of its gate: {', '.join(missed)}")
    elif any(row.gate_passed for row in rows):
        told.append("every gate passed")
    sentence = "; ".join(told)
    return f"{sentence[0].upper()}{sentence[1:]}." if sentence else "All stages are done."


def _environment() -> Environment:
    files = resources.files("groundup.report")
    names = ("page.html.j2", "road.svg.j2", "style.css")
    environment = Environment(
        loader=DictLoader({name: files.joinpath(name).read_text("utf-8") for name in names}),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["readable"] = _readable
    environment.globals["svg"] = Markup  # only for what charts.py drew
    return environment


def _readable(text: object) -> str:
    """A text from outside, cut to length, its control characters made visible."""
    whole = str(text)
    shown = whole[:LONGEST_TEXT] + (" …" if len(whole) > LONGEST_TEXT else "")
    return "".join(
        chr(0x2400 + ord(character)) if ord(character) < 32 and character not in "\n\t" else character
        for character in shown
    )


def _headline_figures(record: RunRecord) -> list[tuple[str, str]]:
    """The few figures at the top: size, data, speed, time."""
    pretrain, tokenizer = record.summary("pretrain"), record.summary("tokenizer")
    seconds = [stage.seconds for stage in record.stages.values() if stage.seconds is not None]
    peaks = [value for stage in record.curves if is_number(value := record.summary(stage).get("peak_memory_bytes"))]
    figures = [
        ("parameters", format_many(pretrain.get("parameters"))),
        ("tokens read", format_many(pretrain.get("tokens"))),
        ("tokens/s in training", _count(pretrain.get("tokens_per_second"))),
        ("bytes per token", _number(tokenizer.get("bytes_per_token"), 2)),
        ("peak memory", format_bytes(max(peaks)) if peaks else ""),
        ("whole road", format_seconds(sum(seconds)) if seconds else ""),
    ]
    return [(label, value) for label, value in figures if value]


def _training(record: RunRecord, stage: str, curve: Curve) -> dict[str, Any]:
    """One training stage: its plots, figures and samples."""
    summary = record.summary(stage)
    expected = summary.get("expected_initial_loss")
    vocab_size = record.summary("tokenizer").get("vocab_size")
    if stage == "pretrain" and "expected_initial_loss" not in summary and is_number(vocab_size):
        expected = math.log(vocab_size)
    return {
        "stage": stage,
        "title": STAGE_TITLES[stage],
        "state": record.stages[stage].state if stage in record.stages else "done",
        "last_step": curve.train[-1]["step"] if curve.train else 0,
        "facts": _training_facts(record, stage, summary),
        "loss": loss_chart(f"{stage}-loss", curve, expected if is_number(expected) else None) if curve.train else None,
        "throughput": throughput_chart(f"{stage}-speed", curve) if curve.timings else None,
        "validation": curve.validation,
        "samples": _samples(curve.samples),
    }


def _training_facts(record: RunRecord, stage: str, summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    first, expected = summary.get("initial_loss"), summary.get("expected_initial_loss")
    start = _number(first, 3)
    if start and is_number(expected):
        start += f" (knowing nothing: {expected:.3f})"
    shape = _mapping(record.model.get("groundup"))
    layers, width, context = (shape.get(name) for name in ("n_layers", "d_model", "context_length"))
    facts = [
        ("model", f"{layers} layers × {width} wide, context {context}" if stage == "pretrain" and layers else ""),
        ("parameters", _count(summary.get("parameters"))),
        ("conversations", _count(summary.get("conversations_train"))),
        ("held out", _count(summary.get("conversations_held_out"))),
        ("supervised tokens", _count(summary.get("supervised_tokens"))),
        ("steps", _count(summary.get("steps"))),
        ("tokens", _count(summary.get("tokens"))),
        ("loss at the start", start),
        ("loss at the end", _number(summary.get("final_loss"), 3)),
        ("validation loss", _number(summary.get("val_loss"), 3)),
        ("validation bits per byte", _number(summary.get("val_bits_per_byte"), 3)),
        ("arithmetic", str(summary.get("precision", ""))),
        ("tokens per second", _count(summary.get("tokens_per_second"))),
        ("of the measured matmul ceiling (MFU)", f"{mfu:.0%}" if is_number(mfu := summary.get("mfu")) else ""),
    ]
    return [(label, value) for label, value in facts if value]


def _samples(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each prompt its texts over the steps: some to show at once (early ones denser), and all, within reason."""
    by_prompt: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        prompt = str(line.get("prompt", ""))
        text = line["text"].removeprefix(prompt).removeprefix(" ")
        by_prompt.setdefault(prompt, []).append({"step": line["step"], "text": text})
    samples = []
    for prompt, texts in by_prompt.items():
        shown = _spread(len(texts), MOST_SAMPLES_SHOWN)
        rest = [index for index in _evenly(len(texts), MOST_SAMPLES) if index not in shown]
        samples.append(
            {
                "prompt": prompt,
                "shown": [texts[index] for index in shown],
                "rest": [texts[index] for index in rest],
            }
        )
    return samples


def _spread(count: int, most: int) -> list[int]:
    """At most `most` indices, denser at the start, where a model changes fastest; first and last included."""
    if count <= most:
        return list(range(count))
    return sorted({round((count - 1) * (index / (most - 1)) ** 1.7) for index in range(most)})


def _evenly(count: int, most: int) -> list[int]:
    if count <= most:
        return list(range(count))
    return sorted({round(index * (count - 1) / (most - 1)) for index in range(most)})


def _answers(answers: object) -> dict[str, Any] | None:
    """A sample of graded answers that holds every kind, the wrong ones not hidden: kinds take turns."""
    if not isinstance(answers, list):
        return None
    graded = [answer for answer in answers if isinstance(answer, Mapping)]
    queues: dict[tuple[str, bool], list[Mapping[str, Any]]] = {}
    for answer in graded:
        queues.setdefault((str(answer.get("kind", "")), bool(answer.get("correct"))), []).append(answer)
    chosen: list[Mapping[str, Any]] = []
    while len(chosen) < min(MOST_ANSWERS, len(graded)):
        for queue in queues.values():
            if queue and len(chosen) < MOST_ANSWERS:
                chosen.append(queue.pop(0))
    if not chosen:
        return None
    fields = ("kind", "prompt", "expected", "reply")
    shown = [
        {**{name: answer.get(name, "") for name in fields}, "correct": bool(answer.get("correct"))} for answer in chosen
    ]
    shown.sort(key=lambda answer: (str(answer["kind"]), not answer["correct"]))
    return {"shown": shown, "right": sum(bool(answer.get("correct")) for answer in graded), "of": len(graded)}


def _machine(record: RunRecord) -> list[tuple[str, str]]:
    """Versions and machine; where stages were made on different ones, each value with its stages."""
    values: dict[str, dict[str, list[str]]] = {}
    for stage in record.stages.values():
        for name, value in (stage.manifest.environment if stage.manifest else {}).items():
            values.setdefault(name, {}).setdefault(str(value), []).append(stage.name)
    return [
        (name.replace("_gib", " (GiB)"), next(iter(seen)))
        if len(seen) == 1
        else (name.replace("_gib", " (GiB)"), "; ".join(f"{value} ({', '.join(at)})" for value, at in seen.items()))
        for name, seen in values.items()
    ]


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _number(value: object, digits: int) -> str:
    return f"{value:.{digits}f}" if is_number(value) else ""


def _count(value: object) -> str:
    return f"{value:,.0f}" if is_number(value) else ""
