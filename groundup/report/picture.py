"""The pipeline as a picture: a stop for each stage, what came out of it, how long it took, and branches side by side.

In: a `RunRecord`. Out: stops with texts and places, which `pipeline.svg.j2` draws: left to right for a desk, a lane for
each branch; top to bottom for a phone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from groundup.console import format_bytes, format_duration
from groundup.report.format import format_lines
from groundup.report.record import RunRecord, StageRecord

WIDE_STOP, NARROW_STOP, LANE = 124, 92, 150
MOST_LINES = 3  # under a stop


@dataclass(frozen=True)
class Stop:
    """One stop."""

    name: str
    icon: str  # which glyph stands in its circle
    lines: tuple[str, ...]  # what came out, at most three short lines
    took: str  # wall-clock time, "" for the ends of the pipeline
    state: str  # "done", "unfinished" or "to come"
    share: float  # its part of the whole time, 0 to 1
    column: int  # how many stops are before it
    lane: int  # which branch it is on, 0 at the top
    after: int  # the place of the stop before it in the list, -1 for the first
    beside: tuple[int, ...] = ()  # the places of other stops that it needs: a reward model, what a control is beside


def pipeline_stops(record: RunRecord, end: str) -> list[Stop]:
    """Raw text, the stages, their evaluation as one, and what one can do at the end.

    Args:
        record: the run.
        end: the stage whose model is used at the end.
    """
    total = sum(stage.seconds or 0.0 for stage in record.stages.values()) or 1.0
    corpus = record.summary("corpus")
    stages = [stage for stage in record.stages.values() if "/" not in stage.name]
    evaluations = [stage for stage in record.stages.values() if "/" in stage.name]
    stops: list[Stop] = []

    def add(
        name: str, icon: str, lines: Sequence[str], of: list[StageRecord], state: str, after: int,
        beside: tuple[int, ...] = (),
    ) -> None:  # fmt: skip
        seconds = sum(stage.seconds or 0.0 for stage in of)
        took = format_seconds(seconds) if of and any(stage.seconds is not None for stage in of) else ""
        column = stops[after].column + 1 if stops else 0
        is_taken = {(stop.column, stop.lane) for stop in stops}
        lane = stops[after].lane if stops else 0
        while (column, lane) in is_taken:
            lane += 1
        shown = (*lines[:MOST_LINES],) if state == "done" else (*lines[: MOST_LINES - 1], state)
        stops.append(Stop(name, icon, shown, took, state, seconds / total, column, lane, after, beside))

    if corpus or any(stage.name == "corpus" for stage in stages):
        raw = format_lines((corpus.get("documents_in"), "{} documents"), (corpus.get("bytes_in"), format_bytes))
        add("raw text", "text", raw, [], record.stages["corpus"].state, -1)
    place = {stop.name: index for index, stop in enumerate(stops)}
    for stage in stages:
        before = max((place[name] for name in stage.needs if name in place), key=lambda at: stops[at].column, default=0)
        lines = [*(["control"] if stage.is_control else []), *stage.shown.get("lines", ())]
        beside = tuple(place[name] for name in stage.beside if name in place)
        add(stage.name, stage.name, lines, [stage], stage.state, before if stops else -1, beside)
        place[stage.name] = len(stops) - 1
    if evaluations:
        states = {stage.state for stage in evaluations}
        of_end = next((stage for stage in evaluations if stage.name.endswith(f"/{end}")), evaluations[-1])
        state = "done" if states == {"done"} else "to come" if states == {"to come"} else "unfinished"
        add("evaluate", "evaluate", of_end.shown.get("lines", ()), evaluations, state, place.get(end, len(stops) - 1))
    if end in place:
        talks = end != record.base
        state = record.stages[end].state
        words = ("talk to it" if talks else "let it write",) if state == "done" else ()
        add("chat" if talks else "generate", "chat", words, [], state, len(stops) - 1)
    return stops


def format_seconds(seconds: float) -> str:
    """`0.6 s`, `48 s`, `2:10 min`, `1:02:10 h`."""
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    shown = format_duration(seconds)
    return f"{shown} {'h' if shown.count(':') == 2 else 'min'}"
