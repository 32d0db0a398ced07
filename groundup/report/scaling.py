"""A scaling law as a picture: loss against compute, and how well each run is predicted by the others.

In: a fitted law (`training.scaling_law`). Out: one SVG, readable on its own, on light and dark pages. Left: a dot for
each run, a curve for each size, and the frontier, which is the lowest loss that some size reaches with that compute.
The same law gives the same bytes.
"""

from __future__ import annotations

from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from groundup.console import format_count
from groundup.report.charts import draw

N_SAMPLES = 80  # places at which a curve is drawn
_AHEAD = 10.0  # the frontier is drawn up to so many times the compute of the largest run
Law = Any
"""A `ScalingLaw`: training stands above this room, so it is not imported."""


def draw_scaling(law: Law) -> str:
    """The picture of a law, as SVG text."""
    sizes = sorted({point.n_parameters for point in law.points})
    colours = dict(zip(sizes, matplotlib.colormaps["viridis"](np.linspace(0.0, 0.85, len(sizes))), strict=True))
    settings = {
        "svg.fonttype": "path", "svg.hashsalt": "groundup", "font.size": 10, "figure.constrained_layout.use": True,
        "axes.grid": True, "axes.grid.axis": "y", "grid.color": "#dddddd", "grid.linewidth": 0.6,
        "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
    }  # fmt: skip

    def fill(figure: Figure) -> None:
        left, right = figure.subplots(1, 2, width_ratios=(3, 2))
        _draw_losses(left, law, colours)
        _draw_errors(right, law, colours)
        for axes in (left, right):
            axes.set(xscale="log", xlabel="FLOPs of training")
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0e}".replace("e+", "e"))
            axes.xaxis.set_minor_formatter(NullFormatter())

    return draw((9.8, 4.2), settings, fill)


def _draw_losses(axes: Axes, law: Law, colours: dict[int, Any]) -> None:
    for n_parameters, colour in colours.items():
        points = sorted((p for p in law.points if p.n_parameters == n_parameters), key=lambda p: p.n_tokens)
        per_token = points[-1].flops / points[-1].n_tokens
        tokens = np.geomspace(points[0].n_tokens / 1.3, points[-1].n_tokens * 3, N_SAMPLES)
        curve = [law.loss(n_parameters, float(count)) for count in tokens]
        axes.plot(tokens * per_token, curve, color=colour, linewidth=1.3, gid=f"curve-{n_parameters}")
        axes.plot(
            [point.flops for point in points], [point.loss for point in points], "o", color=colour, markersize=5,
            label=f"{format_count(n_parameters)} parameters", gid=f"runs-{n_parameters}",
        )  # fmt: skip
    budgets = [point.flops for point in law.points]
    flops = np.geomspace(min(budgets), max(budgets) * _AHEAD, N_SAMPLES)
    best = [law.compute_optimal(float(value)).prediction for value in flops]
    axes.plot(
        flops, [one.loss for one in best], color="black", linestyle=(0, (4, 2)), linewidth=1.3,
        label="compute-optimal, 90 %", gid="frontier",
    )  # fmt: skip
    axes.fill_between(
        flops, [one.low for one in best], [one.high for one in best], color="black", alpha=0.12, linewidth=0,
    )  # fmt: skip
    highest, lowest = max(point.loss for point in law.points), min(one.low for one in best)
    axes.set_ylim(lowest - 0.03 * (highest - lowest), highest + 0.08 * (highest - lowest))
    axes.set(title="validation loss, and the law", ylabel="nats per token")
    axes.legend(fontsize=9)


def _draw_errors(axes: Axes, law: Law, colours: dict[int, Any]) -> None:
    for point, error in zip(law.points, law.left_out, strict=True):
        axes.plot([point.flops], [100 * error], color=colours[point.n_parameters], marker="o", markersize=5)
    axes.axhline(0.0, color="black", linewidth=0.8)
    title = f"each run, by the others: {100 * law.left_out_error:.2g} % (rms)"
    axes.set(title=title, ylabel="measured over predicted loss, %")
