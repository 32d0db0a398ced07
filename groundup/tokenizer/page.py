"""What a tokenizer makes of a corpus, for people: tables for the terminal, one page of HTML that needs no network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import DictLoader, Environment, StrictUndefined
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from groundup.console import format_bytes
from groundup.files import write_signed
from groundup.tokenizer.measure import Measured, TextGroup
from groundup.tokenizer.pieces import in_colour

CURVE_WIDTH, CURVE_HEIGHT = 920, 300
_MARGIN = 56
_SHOWN_TOKENS = 12


def render(measured: Measured, name: str, *, colour: bool = True) -> RenderableType:
    """The report for a terminal."""
    parts: list[RenderableType] = [Text(headline(measured, name), style="bold"), Text("")]
    for title, groups in (("language", measured.languages), ("source", measured.sources)):
        parts += [_table(title, groups, measured), Text("")]
    if measured.not_at_hand:
        parts.append(Text(not_at_hand(measured), style="dim"))
    parts += [
        Text(unused(measured)),
        _line("most frequent", [f"{piece.shown} {count:,}" for piece, count in measured.frequent[:_SHOWN_TOKENS]]),
        _line("longest", [piece.shown for piece, _ in measured.longest[:_SHOWN_TOKENS]]),
        _line("never used", [piece.shown for piece in measured.unused_examples[:_SHOWN_TOKENS]]),
        Text(frequency(measured)),
    ]
    for sample in measured.samples:
        where = " · ".join(part for part in (sample.language, sample.source) if part)
        parts += [Text(""), Text(where, style="dim"), in_colour(sample.pieces, colour=colour)]
    return Group(*parts)


def write_page(measured: Measured, name: str, path: Path) -> None:
    """The report as one HTML file: no script, no network, light and dark.

    Raises:
        RunError: a file that groundup did not write is there.
        GroundupError: the file cannot be written.
    """
    environment = Environment(
        loader=DictLoader(
            {
                "style.css": resources.files("groundup.report").joinpath("style.css").read_text("utf-8"),
                "page.html.j2": resources.files("groundup.tokenizer").joinpath("page.html.j2").read_text("utf-8"),
            }
        ),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    total = measured.total
    page = environment.get_template("page.html.j2").render(
        name=name,
        measured=measured,
        figures=[
            ("entries", f"{measured.tokenizer['vocab_size']:,}"),
            ("bytes per token", f"{total.bytes_per_token:.2f}"),
            ("tokens per word", f"{total.fertility:.2f}"),
            ("never used", f"{_unused_share(measured):.1%}"),
            ("tokens", f"{total.tokens:,}"),
            ("text", format_bytes(total.bytes)),
        ],
        headline=headline(measured, name),
        known=list(total.known_tokens),
        not_at_hand=not_at_hand(measured),
        unused=unused(measured),
        frequency=frequency(measured),
        curve=_curve(measured.curve),
        width=CURVE_WIDTH,
        height=CURVE_HEIGHT,
        margin=_MARGIN,
    )
    write_signed(path, page, "<!-- {} -->")


def headline(measured: Measured, name: str) -> str:
    """The tokenizer in one line."""
    facts, total = measured.tokenizer, measured.total
    return (
        f"{name}: {facts['kind']}, {facts['vocab_size']:,} entries; {total.bytes_per_token:.2f} bytes per token and "
        f"{total.fertility:.2f} tokens per word on {format_bytes(total.bytes)} of text."
    )


def unused(measured: Measured) -> str:
    """How much of the vocabulary is unused, in words."""
    return f"Never used in this text: {measured.unused:,} tokens, {_unused_share(measured):.1%} of the vocabulary."


def not_at_hand(measured: Measured) -> str:
    """Which comparisons are missing, in words; "" if none."""
    return f"Not available offline: {', '.join(measured.not_at_hand)}." if measured.not_at_hand else ""


def frequency(measured: Measured) -> str:
    """The frequency curve in words: how few tokens make up how much of the text."""
    points = dict(measured.curve)
    shown = [rank for rank in points if math.log10(rank).is_integer()]
    told = ", ".join(f"{points[rank]:,} times at rank {rank:,}" for rank in shown)
    return f"Tokens occur {told}." if told else "No token occurs."


def _unused_share(measured: Measured) -> float:
    text_tokens = measured.tokenizer["vocab_size"] - measured.tokenizer["control_tokens"]
    return measured.unused / max(1, text_tokens)


def _line(name: str, shown: Sequence[str]) -> Text:
    return Text.assemble((f"{name}: ", "dim"), "  ".join(shown))


def _table(title: str, groups: Sequence[TextGroup], measured: Measured) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column(title, overflow="fold")
    known = list(measured.total.known_tokens)
    for column in ("documents", "text", "bytes/token", *known, "tokens/word"):
        table.add_column(column, justify="right")
    for group in [*groups, measured.total] if len(groups) > 1 else groups:
        others = group.known_bytes_per_token()
        table.add_row(
            Text(group.name),
            f"{group.documents:,}",
            format_bytes(group.bytes),
            Text(f"{group.bytes_per_token:.2f}", style="bold"),
            *(f"{others[name]:.2f}" for name in known),
            f"{group.fertility:.2f}",
        )
    return table


def _curve(points: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """The frequency curve on two logarithmic axes, in the coordinates of the picture."""
    across = max(1.0, math.log10(max((rank for rank, _ in points), default=10)))
    up = max(1.0, math.log10(max((count for _, count in points), default=10)))

    def x(value: float) -> float:
        return _MARGIN + math.log10(value) / across * (CURVE_WIDTH - 2 * _MARGIN)

    def y(value: float) -> float:
        return CURVE_HEIGHT - _MARGIN - math.log10(value) / up * (CURVE_HEIGHT - 1.5 * _MARGIN)

    return {
        "line": " ".join(f"{x(rank):.1f},{y(count):.1f}" for rank, count in points),
        "ranks": [(f"{x(10**power):.1f}", f"{10**power:,}") for power in range(int(across) + 1)],
        "counts": [(f"{y(10**power):.1f}", f"{10**power:,}") for power in range(int(up) + 1)],
    }
