"""What a tokenizer makes of a corpus, for people: tables for the terminal, one page of HTML that needs no network.

In: what `measure` found.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import DictLoader, Environment, StrictUndefined
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from groundup.console import format_bytes
from groundup.files import write_signed
from groundup.tokenizer.pieces import in_colour

CURVE_WIDTH, CURVE_HEIGHT = 920, 300
_MARGIN = 56
_SHOWN_TOKENS = 12


def render(measured: Mapping[str, Any], name: str, *, colour: bool = True) -> RenderableType:
    """The report for a terminal."""
    said = _in_words(measured, name)
    parts: list[RenderableType] = [Text(said["headline"], style="bold"), Text("")]
    for title, groups in (("language", measured["languages"]), ("source", measured["sources"])):
        parts += [_table(title, groups, measured["total"]), Text("")]
    if said["not_at_hand"]:
        parts.append(Text(said["not_at_hand"], style="dim"))
    parts.append(Text(said["unused"]))
    for label, key in (("most frequent", "frequent"), ("longest", "longest"), ("never used", "unused_examples")):
        tokens = measured[key][:_SHOWN_TOKENS]
        shown = [f"{token['shown']} {token['count']:,}" if key == "frequent" else token["shown"] for token in tokens]
        parts.append(Text.assemble((f"{label}: ", "dim"), "  ".join(shown)))
    parts.append(Text(said["frequency"]))
    for sample in measured["samples"]:
        where = " · ".join(part for part in (sample["language"], sample["source"]) if part)
        parts += [Text(""), Text(where, style="dim"), in_colour(sample["pieces"], colour=colour)]
    return Group(*parts)


def write_page(measured: Mapping[str, Any], name: str, path: Path) -> None:
    """The report as one HTML file: no script, no network, light and dark.

    Raises:
        RunError: a file that groundup did not write is there.
        GroundupError: the file cannot be written.
    """
    templates = {
        "style.css": resources.files("groundup.report").joinpath("style.css").read_text("utf-8"),
        "page.html.j2": resources.files("groundup.tokenizer").joinpath("page.html.j2").read_text("utf-8"),
    }
    environment = Environment(
        loader=DictLoader(templates), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    total = measured["total"]
    page = environment.get_template("page.html.j2").render(
        name=name,
        measured=measured,
        figures=[
            ("entries", f"{measured['tokenizer']['vocab_size']:,}"),
            ("bytes per token", f"{total['bytes_per_token']:.2f}"),
            ("tokens per word", f"{total['tokens_per_word']:.2f}"),
            ("never used", f"{_unused_share(measured):.1%}"),
            ("tokens", f"{total['tokens']:,}"),
            ("text", format_bytes(total["bytes"])),
        ],
        **_in_words(measured, name),
        known=list(total["bytes_per_token_of"]),
        curve=_curve(measured["frequency_curve"]),
        width=CURVE_WIDTH,
        height=CURVE_HEIGHT,
        margin=_MARGIN,
    )
    write_signed(path, page, "<!-- {} -->")


def _in_words(measured: Mapping[str, Any], name: str) -> dict[str, str]:
    """The tokenizer in one line, how much of it is unused, which comparisons are missing, and the curve in words."""
    facts, total, missing = measured["tokenizer"], measured["total"], measured["not_available_offline"]
    points = [(rank, count) for rank, count in measured["frequency_curve"] if math.log10(rank).is_integer()]
    told = ", ".join(f"{count:,} times at rank {rank:,}" for rank, count in points)
    return {
        "headline": f"{name}: {facts['kind']}, {facts['vocab_size']:,} entries; {total['bytes_per_token']:.2f} bytes "
        f"per token and {total['tokens_per_word']:.2f} tokens per word on {format_bytes(total['bytes'])} of text.",
        "unused": f"Never used in this text: {measured['unused']:,} tokens, {_unused_share(measured):.1%} of the "
        "vocabulary.",
        "not_at_hand": f"Not available offline: {', '.join(missing)}." if missing else "",
        "frequency": f"Tokens occur {told}." if told else "No token occurs.",
    }


def _unused_share(measured: Mapping[str, Any]) -> float:
    facts = measured["tokenizer"]
    return float(measured["unused"] / max(1, facts["vocab_size"] - facts["control_tokens"]))


def _table(title: str, groups: Sequence[Mapping[str, Any]], total: Mapping[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column(title, overflow="fold")
    for column in ("documents", "text", "bytes/token", *total["bytes_per_token_of"], "tokens/word"):
        table.add_column(column, justify="right")
    for group in [*groups, total] if len(groups) > 1 else groups:
        table.add_row(
            Text(group["name"]),
            f"{group['documents']:,}",
            format_bytes(group["bytes"]),
            Text(f"{group['bytes_per_token']:.2f}", style="bold"),
            *(f"{ratio:.2f}" for ratio in group["bytes_per_token_of"].values()),
            f"{group['tokens_per_word']:.2f}",
        )
    return table


def _curve(points: Sequence[Sequence[int]]) -> dict[str, Any]:
    """The frequency curve on two logarithmic axes, in the coordinates of the picture."""
    across, up = (max(1.0, math.log10(max((point[axis] for point in points), default=10))) for axis in (0, 1))

    def x(value: float) -> float:
        return _MARGIN + math.log10(value) / across * (CURVE_WIDTH - 2 * _MARGIN)

    def y(value: float) -> float:
        return CURVE_HEIGHT - _MARGIN - math.log10(value) / up * (CURVE_HEIGHT - 1.5 * _MARGIN)

    return {
        "line": " ".join(f"{x(rank):.1f},{y(count):.1f}" for rank, count in points),
        "ranks": [(f"{x(10**power):.1f}", f"{10**power:,}") for power in range(int(across) + 1)],
        "counts": [(f"{y(10**power):.1f}", f"{10**power:,}") for power in range(int(up) + 1)],
    }
