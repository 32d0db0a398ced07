"""The road as a picture: a stop for each stage, what came out of it, and how long it took.

In: a `RunRecord`. Out: stops with texts and positions, which `road.svg.j2` draws: left to right for a desk,
top to bottom for a phone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from groundup.console import format_bytes
from groundup.report.closing import format_many, score_rows
from groundup.report.record import RunRecord, is_number

WIDE_STOP, NARROW_STOP = 116, 92


@dataclass(frozen=True)
class Stop:
    """One stop of the road.

    Attributes:
        icon: which glyph stands in its circle.
        lines: what came out, at most three short lines.
        took: wall-clock time, "" for the ends of the road.
        state: "done", "unfinished" or "to come".
        share: its part of the whole time, 0 to 1.
    """

    name: str
    icon: str
    lines: tuple[str, ...]
    took: str
    state: str
    share: float


def road_stops(record: RunRecord) -> list[Stop]:
    """Raw text, the stages of this road, and what one can do at its end."""
    total = sum(stage.seconds or 0.0 for stage in record.stages.values()) or 1.0
    corpus = record.summary("corpus")
    raw = _lines((corpus.get("documents_in"), "{} documents"), (corpus.get("bytes_in"), format_bytes))
    stops = [Stop("raw text", "text", raw, "", record.stages["corpus"].state, 0.0)]
    for name, stage in record.stages.items():
        lines = _came_out(name, stage.summary, record.scores) if stage.state == "done" else ()
        took = format_seconds(stage.seconds) if stage.seconds is not None else ""
        stops.append(Stop(name, name, lines, took, stage.state, (stage.seconds or 0.0) / total))
    end = "sft" if "sft" in record.stages else "pretrain"
    stops.append(
        Stop(
            "chat" if end == "sft" else "generate",
            "chat",
            ("talk to it" if end == "sft" else "let it write",) if record.stages[end].state == "done" else (),
            "",
            record.stages[end].state,
            0.0,
        )
    )
    return stops


def road_words(stops: list[Stop]) -> str:
    """The picture in words, for those who cannot see it."""
    parts = []
    for stop in stops:
        told = ", ".join(stop.lines) if stop.lines else stop.state
        parts.append(f"{stop.name}: {told}" + (f", {stop.took}" if stop.took else ""))
    return "The road. " + "; ".join(parts) + "."


def format_seconds(seconds: float) -> str:
    """`0.6 s`, `48 s`, `2:10 min`, `1:02:10 h`."""
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d} h" if hours else f"{minute}:{second:02d} min"


def _came_out(name: str, summary: Mapping[str, Any], scores: Mapping[str, Any]) -> tuple[str, ...]:
    """What a finished stage's output is, in a few words."""
    if name == "corpus":
        came, kept = summary.get("documents_in"), summary.get("documents_kept")
        aside = came - kept if is_number(came) and is_number(kept) else None
        return _lines((kept, "{} kept"), (aside, "{} set aside"))
    if name == "tokenizer":
        return _lines(
            (summary.get("vocab_size"), lambda value: f"{value:,} entries"),
            (summary.get("bytes_per_token"), lambda value: f"{value:.2f} bytes/token"),
        )
    if name == "shards":
        return _lines((summary.get("tokens_train"), "{} tokens"), (summary.get("tokens_validation"), "{} held out"))
    if name == "pretrain":
        return _lines((summary.get("parameters"), "{} weights"), (summary.get("tokens"), "{} tokens"), _loss(summary))
    if name == "sft":
        return _lines((summary.get("conversations_train"), "{} dialogues"), _loss(summary))
    after = {row.get("key"): (row.get("after") or {}).get("value") for row in score_rows(scores)}
    return _lines(
        (after.get("bits_per_byte"), lambda value: f"{value:.2f} bits/byte"),
        (after.get("exact_match"), lambda value: f"{value:.1%} right"),
    )


def _loss(summary: Mapping[str, Any]) -> tuple[Any, Any]:
    first, last = summary.get("initial_loss"), summary.get("final_loss")
    return (last, lambda value: f"loss {first:.2f} → {value:.2f}" if is_number(first) else f"loss {value:.2f}")


def _lines(*figures: tuple[Any, Any]) -> tuple[str, ...]:
    """Each figure that is there, by its format: a function, or a text around a short count."""
    return tuple(
        form(value) if callable(form) else form.format(format_many(value))
        for value, form in figures
        if is_number(value)
    )
