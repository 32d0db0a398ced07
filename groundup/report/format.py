"""Figures as short text, for the report, the closing table and what stages say of themselves."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, TypeGuard


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether a logged value is a finite number (a loss that overflowed is logged as null)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def mapping(value: object) -> Mapping[str, Any]:
    """A value that should be an object of JSON; an empty one where it is not."""
    return value if isinstance(value, Mapping) else {}


def mappings(values: object) -> list[Mapping[str, Any]]:
    """The objects of what should be a list of them."""
    return [value for value in values if isinstance(value, Mapping)] if isinstance(values, list) else []


def format_many(count: object) -> str:
    """A count in few digits: `950`, `51 k`, `0.48 M`, `1.20 B`."""
    if not is_number(count):
        return ""
    for floor, size, unit, digits in ((1e9, 1e9, "B", 2), (1e5, 1e6, "M", 2), (1e4, 1e3, "k", 0)):
        if count >= floor:
            return f"{count / size:.{digits}f} {unit}"
    return f"{count:,.0f}"


def format_number(value: object, digits: int) -> str:
    """A number with so many decimals; "" for none."""
    return f"{value:.{digits}f}" if is_number(value) else ""


def format_whole(value: object) -> str:
    """A whole number with thousands; "" for none."""
    return f"{value:,.0f}" if is_number(value) else ""


def format_lines(*figures: tuple[Any, Any]) -> tuple[str, ...]:
    """Each figure that is there, by its format: a function, or a text around a short count."""
    return tuple(
        form(value) if callable(form) else form.format(format_many(value))
        for value, form in figures
        if is_number(value)
    )


def loss_line(summary: Mapping[str, Any]) -> tuple[Any, Any]:
    """A training stage's loss, for `format_lines`."""
    first, last = summary.get("initial_loss"), summary.get("final_loss")
    return (last, lambda value: f"loss {first:.2f} → {value:.2f}" if is_number(first) else f"loss {value:.2f}")


def training_facts(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the report says of every stage that trains."""
    first, expected, mfu = (summary.get(name) for name in ("initial_loss", "expected_initial_loss", "mfu"))
    start, unit = format_number(first, 3), summary.get("unit", "tokens")
    if start and is_number(expected):
        start += f" (knowing nothing: {expected:.3f})"
    return [
        ("parameters", format_whole(summary.get("parameters"))),
        ("steps", format_whole(summary.get("steps"))),
        (unit, format_whole(summary.get("tokens"))),
        ("FLOPs", f"{flops:.2e}" if is_number(flops := summary.get("flops")) else ""),
        ("loss at the start", start),
        ("loss at the end", format_number(summary.get("final_loss"), 3)),
        ("validation loss", format_number(summary.get("val_loss"), 3)),
        ("validation bits per byte", format_number(summary.get("val_bits_per_byte"), 3)),
        ("arithmetic", str(summary.get("precision", ""))),
        (f"{unit} per second", format_whole(summary.get("tokens_per_second"))),
        ("of the measured peak matmul FLOP/s (MFU)", f"{mfu:.0%}" if is_number(mfu) else ""),
    ]
