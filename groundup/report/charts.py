"""Plots as inline SVG: loss and learning rate, throughput, exact match by task.

In: what a stage logged. Out: SVG text for the page, drawn by matplotlib without pyplot's global state.
Each plot is drawn twice, wide for a desk and narrow for a phone, one unit to a CSS pixel, so that its words
stay readable. Colours are the page's CSS variables (light and dark); the same run gives the same bytes.
"""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from groundup.report.format import is_number
from groundup.report.record import Curve

# Stand-ins that no other part of a plot uses; in the SVG each becomes a CSS variable of the page.
INK, SOFT, LINE, TRAIN, VALIDATION, BEFORE = "#010a01", "#020a02", "#030a03", "#040a04", "#050a05", "#060a06"
CSS_COLOURS = {
    INK: "var(--ink)",
    SOFT: "var(--soft)",
    LINE: "var(--line)",
    TRAIN: "var(--blue)",
    VALIDATION: "var(--orange)",
    BEFORE: "var(--grey)",
}
MOST_POINTS = 500


@dataclass(frozen=True)
class Chart:
    """A plot in two widths, and in words for those who cannot see it."""

    wide: str
    narrow: str
    words: str


@dataclass(frozen=True)
class _Canvas:
    """A size to draw for, in CSS pixels."""

    suffix: str
    width: int
    font_size: float
    height_factor: float = 1.0


WIDE = _Canvas("wide", 920, 13)
NARROW = _Canvas("narrow", 350, 12, 0.85)


def loss_chart(name: str, curve: Curve, expected_initial_loss: float | None) -> Chart:
    """Training loss (each step and smoothed), validation loss, and the learning rate below.

    Args:
        name: unique on the page.
        curve: what the stage logged; at least one training line.
        expected_initial_loss: drawn as the level of knowing nothing; None leaves it out.
    """
    steps = np.array([line["step"] for line in curve.train])
    losses = np.array([line["loss"] for line in curve.train], dtype=float)
    smooth = smoothed(losses)
    final = float(losses[-max(1, len(losses) // 20) :].mean())
    words = f"Training loss falls from {losses[0]:.2f} at step {steps[0]:,} to {final:.2f} at step {steps[-1]:,}."
    if final > losses[0]:
        words = words.replace("falls", "rises")
    if curve.validation:
        last = curve.validation[-1]
        words += f" Validation loss ends at {last['val_loss']:.3f} (step {last['step']:,})."
    if expected_initial_loss is not None:
        words += f" Guessing evenly among all tokens would give {expected_initial_loss:.2f}."

    def paint(figure: Figure, canvas: _Canvas) -> None:
        rates = [(line["step"], line["lr"]) for line in curve.train if is_number(line.get("lr"))]
        grid = figure.add_gridspec(2, 1, height_ratios=(4, 1), hspace=0.14, **_margins(canvas, 400, bottom=46))
        above = figure.add_subplot(grid[0])
        below = figure.add_subplot(grid[1], sharex=above)
        for axes in (above, below):
            _quiet(axes)
        above.plot(*_thinned(steps, losses), color=TRAIN, alpha=0.45, linewidth=1, label="train, each step")
        above.plot(*_thinned(steps, smooth), color=TRAIN, linewidth=2, label=f"train, smoothed: {final:.2f}")
        if curve.validation:
            seen = [line["step"] for line in curve.validation]
            values = [line["val_loss"] for line in curve.validation]
            marker = "o" if len(seen) <= 60 else ""
            style: dict[str, Any] = {
                "color": VALIDATION,
                "linewidth": 2,
                "linestyle": "--",
                "marker": marker,
                "markersize": 4,
            }
            above.plot(seen, values, label=f"validation: {values[-1]:.2f}", **style)
        if expected_initial_loss is not None:
            _mark_knowing_nothing(above, expected_initial_loss, steps, losses)
        top = max(float(losses.max()), expected_initial_loss or 0.0)
        above.set_ylim(max(0.0, float(losses.min()) - 0.06 * top), top * 1.09)
        above.set_ylabel("loss, nats per token")
        above.tick_params(labelbottom=False)
        above.legend(loc="upper right", frameon=False, labelcolor=INK, bbox_to_anchor=(1, 0.88))
        if rates:
            x, y = np.array([step for step, _ in rates]), np.array([rate for _, rate in rates], dtype=float)
            below.fill_between(*_thinned(x, y), color=SOFT, alpha=0.2, linewidth=0)
            below.plot(*_thinned(x, y), color=SOFT, linewidth=1.5)
            below.set_ylim(0, float(y.max()) * 1.15 or 1.0)
            below.set_yticks([0.0, float(y.max())])
            below.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        below.set_ylabel("lr")
        below.set_xlabel("step")
        below.xaxis.set_major_locator(MaxNLocator(8 if canvas is WIDE else 4, integer=True))
        below.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        figure.align_ylabels([above, below])
        above.set_xlim(0, float(steps[-1]) * 1.01 + 1)

    return _chart(name, 400, paint, words)


def curve_chart(name: str, key: str, curve: Curve) -> Chart:
    """One more of the values that a stage logged, each step and smoothed; at least one line has it."""
    lines = [(line["step"], line[key]) for line in curve.lines if is_number(line.get(key))]
    steps, values = np.array([step for step, _ in lines]), np.array([value for _, value in lines], dtype=float)
    smooth = smoothed(values)
    words = f"{key}: from {smooth[0]:.3g} at step {steps[0]:,} to {smooth[-1]:.3g} at step {steps[-1]:,}."

    def paint(figure: Figure, canvas: _Canvas) -> None:
        axes = figure.add_subplot(figure.add_gridspec(1, 1, **_margins(canvas, 210, bottom=46))[0])
        _quiet(axes)
        axes.plot(*_thinned(steps, values), color=TRAIN, alpha=0.45, linewidth=1)
        axes.plot(*_thinned(steps, smooth), color=TRAIN, linewidth=2)
        axes.set_ylabel(key)
        axes.set_xlabel("step")

    return _chart(name, 210, paint, words)


def throughput_chart(name: str, curve: Curve, unit: str = "tokens") -> Chart:
    """What a stage learns from per second, over its wall-clock time; at least one timing line."""
    seconds = np.array([line["seconds"] for line in curve.timings], dtype=float)
    speeds = np.array([line["tokens_per_second"] for line in curve.timings], dtype=float)
    median = float(np.median(speeds))
    words = f"Throughput: median {median:,.0f} {unit} per second, from {speeds.min():,.0f} to {speeds.max():,.0f}."
    per_minute = seconds[-1] > 300

    def paint(figure: Figure, canvas: _Canvas) -> None:
        axes = figure.add_subplot(figure.add_gridspec(1, 1, **_margins(canvas, 210, bottom=46))[0])
        _quiet(axes)
        time = seconds / 60 if per_minute else seconds
        axes.plot(*_thinned(time, speeds), color=TRAIN, linewidth=2)
        axes.axhline(median, color=SOFT, linewidth=1, linestyle=":")
        axes.set_ylim(0, float(speeds.max()) * 1.3)
        _note(axes, f"median {median:,.0f}", (1, median), (-4, -6), ha="right", va="top", color=SOFT)
        axes.set_ylabel(f"{unit}/s")
        axes.set_xlabel("minutes" if per_minute else "seconds")
        axes.yaxis.set_major_locator(MaxNLocator(3))
        axes.yaxis.set_major_formatter(
            FuncFormatter(lambda value, _: f"{value / 1000:g} k" if value >= 1000 else f"{value:g}")
        )
        axes.set_xlim(0, float(time[-1]) * 1.01 or 1.0)

    return _chart(name, 210, paint, words)


def exact_match_chart(name: str, by_kind: Mapping[str, Any]) -> Chart | None:
    """Exact match of each kind of task before and after, with one standard error; None without figures."""
    figures = [(kind, *_estimate(value, "before"), *_estimate(value, "after")) for kind, value in by_kind.items()]
    kinds = sorted((item for item in figures if not math.isnan(item[3])), key=lambda item: (item[3], item[0]))
    if not kinds:
        return None
    words = "Exact match by kind of task: " + ", ".join(
        f"{kind} {after:.0%}" + ("" if math.isnan(before) else f" (before: {before:.0%})")
        for kind, before, _, after, _ in reversed(kinds)
    )

    height = 34 * len(kinds) + 84

    def paint(figure: Figure, canvas: _Canvas) -> None:
        left = min(max(len(kind) for kind, *_ in kinds) * canvas.font_size * 0.58 + 18, canvas.width * 0.42)
        axes = figure.add_subplot(
            figure.add_gridspec(1, 1, **_margins(canvas, height, left=left, right=64, bottom=60))[0]
        )
        _quiet(axes)
        rows = np.arange(len(kinds))
        _, before, before_error, after, after_error = (np.array(column) for column in zip(*kinds, strict=True))
        axes.barh(rows + 0.18, after, height=0.42, color=TRAIN, label="after")
        axes.barh(rows - 0.25, np.nan_to_num(before), height=0.24, color=BEFORE, label="before")
        for offset, values, errors in ((0.18, after, after_error), (-0.25, before, before_error)):
            low, high = np.minimum(errors, values), np.minimum(errors, 1 - values)
            axes.errorbar(values, rows + offset, xerr=[low, high], fmt="none", ecolor=INK, elinewidth=1.2, capsize=2.5)
        for row, value in zip(rows, after, strict=True):
            _note(axes, f"{value:.0%}", (1, row + 0.18), (8, 0), va="center", color=INK)
        axes.set_yticks(rows, [kind for kind, *_ in kinds], color=INK)
        axes.grid(axis="y", visible=False)
        axes.set_xlim(0, 1)
        axes.set_ylim(-0.6, len(kinds) - 0.4)
        axes.xaxis.set_major_locator(MaxNLocator(4 if canvas is WIDE else 2))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
        figure.legend(loc="lower center", frameon=False, labelcolor=INK, ncols=2)

    return _chart(name, height, paint, words)


def reliability_chart(name: str, bins: Sequence[tuple[float, float, float, int]]) -> Chart:
    """How often answers are right, by the probability that the model gives them, and how many there are of each.

    Args:
        name: unique on the page.
        bins: lower edge, mean probability, share of right answers and their number, as `measure.reliability` gives.
    """
    _, sure, right, counts = (np.array(column, dtype=float) for column in zip(*bins, strict=True))
    error = float((np.abs(right - sure) * counts).sum() / counts.sum())
    words = f"Calibration: expected calibration error {error:.1%}. " + ", ".join(
        f"at {probability:.0%} right {share:.0%} of {n:,}" for _, probability, share, n in bins
    )

    def paint(figure: Figure, canvas: _Canvas) -> None:
        grid = figure.add_gridspec(
            2, 1, height_ratios=(4, 1), hspace=0.14, **_margins(canvas, 400, left=72, right=26, bottom=46)
        )
        above = figure.add_subplot(grid[0])
        below = figure.add_subplot(grid[1], sharex=above)
        for axes in (above, below):
            _quiet(axes)
        above.plot([0, 1], [0, 1], color=SOFT, linewidth=1, linestyle=":", label="as sure as it is right")
        spread = np.sqrt(right * (1 - right) / counts)
        style: dict[str, Any] = {"color": TRAIN, "linewidth": 2, "marker": "o", "markersize": 5, "capsize": 2.5}
        above.errorbar(sure, right, yerr=[np.minimum(spread, right), np.minimum(spread, 1 - right)], **style)
        above.set_ylim(0, 1.03)
        above.set_ylabel("right")
        above.tick_params(labelbottom=False)
        above.legend(loc="upper left", frameon=False, labelcolor=INK)
        below.bar([edge + 0.05 for edge, *_ in bins], counts, width=0.09, color=TRAIN)
        below.set_ylabel("answers")
        below.set_xlabel("probability of the answer")
        below.yaxis.set_major_locator(MaxNLocator(2, integer=True))
        below.set_xlim(0, 1)
        figure.align_ylabels([above, below])
        for axis in (above.yaxis, below.xaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))

    return _chart(name, 400, paint, words)


def histogram_chart(name: str, histograms: Mapping[str, Mapping[str, Any]]) -> Chart | None:
    """How the documents' signals are distributed, small plots side by side, each with the threshold that cuts it."""
    shown = [(signal, found) for signal, found in histograms.items() if sum(found.get("counts", ())) > 0]
    if not shown:
        return None
    words = "Signals of all documents: " + "; ".join(
        f"{signal}, {found['rule']} at {found['least'] if found.get('least') is not None else found.get('most')}"
        if "rule" in found
        else signal
        for signal, found in shown
    )

    def rows_of(canvas: _Canvas) -> tuple[int, int]:
        columns = 4 if canvas is WIDE else 2
        return -(-len(shown) // columns), columns

    def height_of(canvas: _Canvas) -> float:
        return 112 * rows_of(canvas)[0] / canvas.height_factor + 10

    def paint(figure: Figure, canvas: _Canvas) -> None:
        n_rows, n_columns = rows_of(canvas)
        grid = figure.add_gridspec(
            n_rows, n_columns, hspace=1.1, wspace=0.18, **_margins(canvas, height_of(canvas), left=8, right=8, top=26)
        )
        for place, (signal, found) in enumerate(shown):
            axes = figure.add_subplot(grid[place // n_columns, place % n_columns])
            _quiet(axes)
            counts, edges = np.array(found["counts"], dtype=float), np.array(found["edges"], dtype=float)
            grows = bool(edges[-1] > 1000)
            if grows:
                axes.set_xscale("symlog", linthresh=1)
            # Square roots: the few documents that a rule removes stay visible beside the many that it keeps.
            axes.bar(edges[:-1], np.sqrt(counts), width=np.diff(edges), align="edge", color=TRAIN, linewidth=0)
            for bound in (found.get("least"), found.get("most")):
                if bound is not None:
                    axes.axvline(bound, color=VALIDATION, linewidth=1.6)
            axes.set_title(signal.replace("_", " "), fontsize=canvas.font_size - 1, color=INK, loc="left")
            axes.set_yticks([])
            axes.set_xlim(edges[0], edges[-1])
            if grows:
                axes.set_xticks([1, 100, 10_000, 1_000_000], ["1", "100", "10 k", "1 M"], fontsize=canvas.font_size - 2)
                axes.minorticks_off()
            else:
                axes.xaxis.set_major_locator(MaxNLocator(2))
                axes.tick_params(labelsize=canvas.font_size - 2)

    return _chart(name, height_of, paint, words)


def standing_alone(chart: Chart) -> str:
    """A plot as an SVG file of its own, in the page's colours, light and dark."""
    style = (resources.files("groundup.report") / "style.css").read_text(encoding="utf-8").partition("\n* {")[0]
    opening = '<svg xmlns="http://www.w3.org/2000/svg" role="img" style="background: var(--paper)"'
    told = f"<title>{html.escape(chart.words)}</title><style>{style}</style>"
    return chart.wide.replace(' aria-hidden="true">', f">{told}", 1).replace("<svg", opening, 1)


def smoothed(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean of each value with its neighbours, a hundredth of all values on each side.

    At the start the window shrinks on both sides, so that the steep fall is not smeared; at the end on the right only.
    """
    index = np.arange(len(values))
    reach = np.minimum(max(1, len(values) // 100), index)
    end = np.minimum(index + reach, len(values) - 1)
    total = np.concatenate([[0.0], np.cumsum(values)])
    return (total[end + 1] - total[index - reach]) / (end - index + reach + 1)


def _mark_knowing_nothing(axes: Axes, level: float, steps: NDArray[np.int64], losses: NDArray[np.float64]) -> None:
    axes.axhline(level, color=SOFT, linewidth=1, linestyle=":")
    axes.plot([steps[0]], [losses[0]], color=INK, marker="o", markersize=6, markerfacecolor="none", linestyle="")
    _note(axes, f"{level:.2f}: knowing nothing", (0, level), (12, 4), va="bottom", color=SOFT)


def _estimate(value: object, when: str) -> tuple[float, float]:
    estimate = value.get(when) if isinstance(value, Mapping) else None
    if not isinstance(estimate, Mapping) or not is_number(estimate.get("value")):
        return math.nan, 0.0
    stderr = estimate.get("stderr")
    return float(estimate["value"]), float(stderr) if stderr is not None and is_number(stderr) else 0.0


def _thinned(x: NDArray[Any], y: NDArray[np.float64]) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """At most `MOST_POINTS` points: of each stretch its lowest and its highest, so that no spike is lost."""
    if len(x) <= MOST_POINTS:
        return x, y
    stretches = np.array_split(np.arange(len(x)), MOST_POINTS // 2 - 1)
    chosen = {0, len(x) - 1}
    for stretch in stretches:
        chosen |= {int(stretch[np.argmin(y[stretch])]), int(stretch[np.argmax(y[stretch])])}
    kept = np.array(sorted(chosen))
    return x[kept], y[kept]


def _chart(
    name: str, height: float | Callable[[_Canvas], float], paint: Callable[[Figure, _Canvas], None], words: str
) -> Chart:
    """The plot in both widths; `height` for both, or of each."""
    of = height if callable(height) else lambda _: height
    wide, narrow = (_drawn(name, canvas, of(canvas), paint) for canvas in (WIDE, NARROW))
    return Chart(wide, narrow, words)


def _note(axes: Axes, text: str, at: tuple[float, float], offset: tuple[float, float], **style: Any) -> None:
    """Words beside the place that is so far along the x axis, a share, and at so much of the y axis."""
    axes.annotate(
        text, at, xycoords=("axes fraction", "data"), xytext=offset, textcoords="offset points", **style
    )  # fmt: skip


def _drawn(name: str, canvas: _Canvas, height: float, paint: Callable[[Figure, _Canvas], None]) -> str:
    """Paint a figure for one width and give its SVG, fit for the page."""
    name = f"{name}-{canvas.suffix}"
    # Matplotlib's own defaults, so that nobody's matplotlibrc changes the page.
    settings: Any = {key: value for key, value in matplotlib.rcParamsDefault.items() if "backend" not in key}
    settings |= {
        "font.size": canvas.font_size,
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "text.parse_math": False,
    }
    buffer = io.StringIO()
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(canvas.width / 72, height * canvas.height_factor / 72))
        figure.patch.set_alpha(0)
        paint(figure, canvas)
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return _fit_page(buffer.getvalue(), name)


def _fit_page(svg: str, name: str) -> str:
    """Give an SVG the page's colours and font, ids of its own, no namespaces and few digits."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<svg [^>]*?(viewBox=\"[^\"]*\")[^>]*>", r'<svg \1 aria-hidden="true">', svg, count=1)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r'id="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", svg)
    svg = re.sub(r"(font: [\d.]+px) [^;\"]*", r"\1 var(--sans)", svg)
    svg = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path.group()), svg)
    for colour, variable in CSS_COLOURS.items():
        svg = svg.replace(colour, variable)
    return re.sub(r"\n\s*", "\n", svg)


def _margins(
    canvas: _Canvas, height: float, *, left: float = 58, right: float = 10, bottom: float = 40, top: float = 10
) -> dict[str, float]:
    """Margins in pixels as gridspec's shares."""
    height *= canvas.height_factor
    return {
        "left": left / canvas.width,
        "right": 1 - right / canvas.width,
        "bottom": bottom / height,
        "top": 1 - top / height,
    }


def _quiet(axes: Axes) -> None:
    """No box, thin grid, soft words."""
    axes.set_facecolor("none")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(LINE)
    axes.grid(color=LINE, linewidth=1)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, colors=SOFT, pad=6)
    axes.xaxis.label.set_color(SOFT)
    axes.yaxis.label.set_color(SOFT)
