"""`report.html`: a run on one page that opens from disk, without network, in light and dark, on a desk and a phone.

In: a run's folder. Out: one HTML file. Everything a text, a model or a source name says is escaped by Jinja;
the page has no script at all, and forbids any by its content security policy.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from groundup.console import format_bytes
from groundup.report.charts import BEFORE, TRAIN, curve_chart, estimates_chart, loss_chart
from groundup.report.closing import ClosingRow, closing_rows, pipeline_rows
from groundup.report.cost import HOW, costs
from groundup.report.format import format_many, format_number, format_whole, is_number, mapping, mappings
from groundup.report.picture import LANE, NARROW_STOP, WIDE_STOP, format_seconds, pipeline_stops
from groundup.report.record import Curve, RunRecord, read_record
from groundup.report.sections import attention_section, benchmark_chart, benchmark_rows, corpus_section, models_table
from groundup.run import REPORT_FILE, Run

MOST_SAMPLES_SHOWN = 6
MOST_SAMPLES = 40
MOST_ANSWERS = 24
MOST_BUFFERS = 3
LONGEST_TEXT = 1200
_HAS_MODEL = ("done", "changed")
VERDICT_KEYS = ("bits_per_byte", "exact_match")


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
        rows += pipeline_rows({name: stage.summary for name, stage in record.stages.items() if stage.state == "done"})
    models, shown = models_table(record), rows
    if models is not None:  # the table of all rows would say the same once more
        shown = [row for row in rows if row.gate or not row.n]
    page = (
        environment()
        .get_template("page.html.j2")
        .render(
            record=record,
            verdict=verdict(record, rows),
            rows=shown,
            figures=_headline_figures(record),
            stops=pipeline_stops(record, record.end),
            wide_stop=WIDE_STOP,
            narrow_stop=NARROW_STOP,
            lane=LANE,
            corpus=corpus_section(record),
            trainings=[
                _training(record, name, record.curves.get(name, Curve([], [], [], [])))
                for name, stage in record.stages.items()
                if name in record.curves or stage.shown.get("facts")
            ],
            models=models,
            benchmarks=benchmark_rows(record),
            benchmark_chart=benchmark_chart(record),
            attention=attention_section(record),
            costs=[(name, *cost.told()) for name, cost in costs(record).items()],
            how=HOW,
            digests=[
                (f"{stage.name}, {what}", digest)
                for stage in record.stages.values()
                for what, digest in (stage.manifest.outside.items() if stage.manifest else ())
                if digest
            ],
            by_kind=estimates_chart(
                "exact-match", mapping(record.scores.get("by_kind")), {"before": BEFORE, "after": TRAIN}
            ),
            answers=_answers(record.scores.get("answers")),
            machine=_machine(record),
            can_chat=record.end != record.base and record.state(record.end) in _HAS_MODEL,
            can_generate=any(record.state(name) in _HAS_MODEL for name in record.curves),
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

    firsts = {row.key: row for row in reversed(rows) if row.key in VERDICT_KEYS and row.after}
    firsts |= {row.key: row for row in rows if row.key == VERDICT_KEYS[-1] and row.model == record.end and row.after}
    told = [
        f"{row.label} {row.before} → {row.after}" if row.before else f"{row.label} {row.after}"
        for row in (firsts[key] for key in VERDICT_KEYS if key in firsts)
    ]
    missed = [row.label for row in rows if row.gate_passed is False]
    if missed:
        told.append(f"short of its gate: {', '.join(missed)}")
    elif any(row.gate_passed for row in rows):
        told.append("every gate passed")
    sentence = "; ".join(told)
    return f"{sentence[0].upper()}{sentence[1:]}." if sentence else "All stages are done."


def environment() -> Environment:
    """The templates, with all that a text says escaped."""
    made = Environment(
        loader=PackageLoader("groundup.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["readable"] = _readable
    made.globals["svg"] = Markup  # only for what was drawn here
    return made


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
    pretrain, tokenizer = record.summary(record.base), record.summary("tokenizer")
    seconds = [stage.seconds for stage in record.stages.values() if stage.seconds is not None]
    peaks = [value for stage in record.curves if is_number(value := record.summary(stage).get("peak_memory_bytes"))]
    figures = [
        ("parameters", format_many(pretrain.get("parameters"))),
        ("tokens read", format_many(pretrain.get("tokens"))),
        ("tokens/s in training", format_whole(pretrain.get("tokens_per_second"))),
        ("bytes per token", format_number(tokenizer.get("bytes_per_token"), 2)),
        ("peak memory", format_bytes(max(peaks)) if peaks else ""),
        ("whole pipeline", format_seconds(sum(seconds)) if seconds else ""),
    ]
    return [(label, value) for label, value in figures if value]


def _training(record: RunRecord, name: str, curve: Curve) -> dict[str, Any]:
    """One stage that trains, or has facts to tell: its plots, figures and samples."""
    stage, summary = record.stages[name], record.summary(name)
    expected = summary.get("expected_initial_loss")
    facts = [tuple(pair) for pair in stage.shown.get("facts", ()) if len(pair) == 2 and pair[1]]
    asked = [key.removesuffix("_stderr") for key in summary if key.startswith("val_") and key.endswith("_stderr")]
    plots = [(keys.split(), curve.lines) for keys in (*stage.shown.get("curves", ()), *asked)]
    plots.append((["tokens_per_second"], curve.timings))
    others = [curve_chart("-".join([name, *keys]), keys, lines) for keys, lines in plots]
    return {
        "stage": name,
        "title": stage.title if stage.title == name else f"{stage.title}: {name}",
        "state": stage.state,
        "last_step": curve.lines[-1]["step"] if curve.lines else 0,
        "facts": facts,
        "loss": loss_chart(f"{name}-loss", curve, expected if is_number(expected) else None) if curve.train else None,
        "curves": [chart for chart in others if chart is not None],
        "validation": [
            (f"{line['step']:,}", *(format_number(line.get(key), 4) for key in ("val_loss", "val_bits_per_byte")))
            for line in curve.validation
        ],
        "samples": _samples(curve.samples),
        "rollouts": _rollouts(curve.rollouts),
    }


def _samples(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each prompt its texts over the steps: some to show at once (early ones denser), and all, within reason."""
    by_prompt: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        prompt = str(line.get("prompt", ""))
        text = line["text"].removeprefix(prompt).removeprefix(" ")
        by_prompt.setdefault(prompt, []).append({"step": line["step"], "text": text})
    samples = []
    for prompt, texts in by_prompt.items():
        shown = _spread(len(texts), MOST_SAMPLES_SHOWN, 1.7)
        rest = [texts[index] for index in _spread(len(texts), MOST_SAMPLES) if index not in shown]
        samples.append({"prompt": prompt, "shown": [texts[index] for index in shown], "rest": rest})
    return samples


def _rollouts(lines: Sequence[Mapping[str, Any]]) -> list[tuple[int, float, list[tuple[str, str, str, int]]]]:
    """Of the first buffer, one in the middle and the last: step, mean reward; prompts, answers, rewards, how often."""
    steps = list(dict.fromkeys(line["step"] for line in lines))
    found = []
    for step in (steps[place] for place in _spread(len(steps), MOST_BUFFERS)):
        rows = [line for line in lines if line["step"] == step]
        mean = sum(line["reward"] for line in rows) / len(rows)
        same = Counter((str(line["prompt"]), str(line["answer"]), f"{line['reward']:.2f}") for line in rows)
        found.append((step, mean, [(*row, n) for row, n in same.most_common(MOST_ANSWERS)]))
    return found


def _spread(count: int, most: int, power: float = 1.0) -> list[int]:
    """At most `most` indices, first and last included; over power 1 denser at the start, where a model changes fast."""
    if count <= most:
        return list(range(count))
    return sorted({round((count - 1) * (index / (most - 1)) ** power) for index in range(most)})


def _answers(answers: object) -> dict[str, Any] | None:
    """A sample of graded answers that holds every kind, the wrong ones not hidden: kinds take turns."""
    graded = mappings(answers)
    queues: dict[tuple[str, bool], list[Mapping[str, Any]]] = {}
    for answer in graded:
        queues.setdefault((str(answer.get("kind", "")), bool(answer.get("correct"))), []).append(answer)
    turns = chain.from_iterable(zip_longest(*queues.values()))
    empty = {"kind": "", "prompt": "", "expected": "", "reply": "", "correct": False}
    shown = [{**empty, **answer} for answer in turns if answer is not None][:MOST_ANSWERS]
    shown.sort(key=lambda answer: (str(answer["kind"]), not answer["correct"]))
    right = sum(bool(answer.get("correct")) for answer in graded)
    return {"shown": shown, "right": right, "of": len(graded)} if shown else None


def _machine(record: RunRecord) -> list[tuple[str, str]]:
    """Versions and machine; where stages were made on different ones, each value with its stages."""
    values: dict[str, dict[str, list[str]]] = {}
    for stage in record.stages.values():
        for name, value in (stage.manifest.environment if stage.manifest else {}).items():
            values.setdefault(name, {}).setdefault(str(value), []).append(stage.name)
    return [
        (
            name.replace("_gib", " (GiB)"),
            "; ".join(f"{value} ({', '.join(at)})" if len(seen) > 1 else value for value, at in seen.items()),
        )
        for name, seen in values.items()
    ]
