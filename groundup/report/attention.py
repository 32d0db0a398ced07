"""The page's part on attention: for each head a square, a row for each token, a cell for each that it looks back at."""

from __future__ import annotations

from typing import Any

from groundup.report.record import RunRecord

LEVELS = 6


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
