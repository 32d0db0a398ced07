"""Plots as inline SVG: loss and learning rate, scores with error bars, curves of several runs.

In: what a stage logged. Out: SVG text for the page, drawn by matplotlib without pyplot's global state.
Each plot is drawn twice, wide for a desk and narrow for a phone, one unit to a CSS pixel, so that its words
stay readable. Colours are the page's CSS variables (light and dark); the same run gives the same bytes.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from groundup.report.format import format_many, is_number, mapping
from groundup.report.record import Curve

# Stand-ins that no other part of a plot uses; in the SVG each becomes a CSS variable of the page.
INK, SOFT, LINE, TRAIN, VALIDATION, BEFORE = "#010a01", "#020a02", "#030a03", "#040a04", "#050a05", "#060a06"
GREEN, VIOLET, RED = "#070a07", "#080a08", "#090a09"
CSS_COLOURS = {
    INK: "var(--ink)",
    SOFT: "var(--soft)",
    LINE: "var(--line)",
    TRAIN: "var(--blue)",
    VALIDATION: "var(--orange)",
    BEFORE: "var(--grey)",
    GREEN: "var(--good)",
    VIOLET: "var(--violet)",
    RED: "var(--bad)",
}
SERIES = (TRAIN, VALIDATION, GREEN, VIOLET, RED, BEFORE)
"""Of things side by side, in this order; there are no more colours to tell apart."""
MOST_POINTS = 500
HELD_OUT = "held_out"
"""What the names of scores on held-out prompts begin with."""


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
    columns: int  # of small plots, or of a legend
    height_factor: float = 1.0


_TICKS = {"color": SOFT, "major.size": 0, "minor.size": 0, "major.pad": 6}
WIDE = _Canvas("wide", 920, 13, 4)
NARROW = _Canvas("narrow", 350, 12, 2, 0.85)


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
        above, below = _above_and_below(figure)
        above.plot(*_thinned(steps, losses), color=TRAIN, alpha=0.45, linewidth=1, label="train, each step")
        above.plot(*_thinned(steps, smooth), color=TRAIN, label=f"train, smoothed: {final:.2f}")
        if curve.validation:
            seen = [line["step"] for line in curve.validation]
            values = [line["val_loss"] for line in curve.validation]
            style: dict[str, Any] = {"linestyle": "--", "marker": "o" if len(seen) <= 60 else "", "markersize": 4}
            above.plot(seen, values, color=VALIDATION, label=f"validation: {values[-1]:.2f}", **style)
        if expected_initial_loss is not None:
            above.axhline(expected_initial_loss, color=SOFT, linewidth=1, linestyle=":")
            above.plot(steps[:1], losses[:1], color=INK, marker="o", markersize=6, markerfacecolor="none", linestyle="")
            words_there = f"{expected_initial_loss:.2f}: knowing nothing"
            _note(above, words_there, (0, expected_initial_loss), (12, 4), va="bottom", color=SOFT)
        top = max(float(losses.max()), expected_initial_loss or 0.0)
        above.set(ylim=(max(0.0, float(losses.min()) - 0.06 * top), top * 1.09), ylabel="loss, nats per token")
        above.legend(loc="upper right", bbox_to_anchor=(1, 0.88))
        if rates:
            x, y = np.array(rates, dtype=float).T
            below.fill_between(*_thinned(x, y), color=SOFT, alpha=0.2, linewidth=0)
            below.plot(*_thinned(x, y), color=SOFT, linewidth=1.5)
            below.set(ylim=(0, float(y.max()) * 1.15 or 1.0), yticks=[0.0, float(y.max())])
            below.yaxis.set_major_formatter("{x:g}")
        below.set(xlabel="step", ylabel="lr", xlim=(0, float(steps[-1]) * 1.01 + 1))
        below.xaxis.set_major_locator(MaxNLocator(2 * canvas.columns, integer=True))
        below.xaxis.set_major_formatter("{x:,.0f}")

    return _chart(name, 400, paint, words)


def curve_chart(name: str, keys: Sequence[str], lines: Sequence[Mapping[str, Any]]) -> Chart | None:
    """More of the values that a stage logged, under each other over the same steps; None: no line has one of them.

    A score on held-out prompts has its best step marked in all of them: what is trained for may go on rising from there
    while the score falls, which is overoptimization (arXiv:2210.10760).
    """
    series, words, best = {}, [], None
    for key in keys:
        logged = np.array([(line["step"], line[key]) for line in lines if is_number(line.get(key))], dtype=float)
        if not len(logged):
            continue
        series[key] = steps, values = logged.T
        smooth = smoothed(values)
        words.append(
            f"{key}: from {smooth[0]:.4g} at step {steps[0]:,.0f} to {smooth[-1]:.4g} at step {steps[-1]:,.0f}."
        )
        if key.startswith(HELD_OUT) and len(keys) > 1:
            best = int(steps[np.flatnonzero(values == values.max())[-1]])
            words[-1] += f" Its best: {values.max():.3g} at step {best:,}."
    if not series:
        return None
    height = 150 * len(series) + 60

    def paint(figure: Figure, canvas: _Canvas) -> None:
        panels = figure.subplots(len(series), sharex=True, squeeze=False)[:, 0]
        for axes, (key, (steps, values)) in zip(panels, series.items(), strict=True):
            colour = VALIDATION if key.startswith(HELD_OUT) else TRAIN
            axes.plot(*_thinned(steps, values), color=colour, alpha=0.45, linewidth=1)
            axes.plot(*_thinned(steps, smoothed(values)), color=colour)
            axes.set_ylabel(key.replace("_", " "))
            if values.min() > 1000:
                axes.yaxis.set_major_formatter(lambda value, _: f"{value / 1000:g} k")
            if best is not None:
                axes.axvline(best, color=VALIDATION, linewidth=1.6, linestyle="--")
                if key.startswith(HELD_OUT):
                    _note(axes, f" best: step {best:,}", (best, values.min()), (2, 2), "data", color=VALIDATION)
        figure.align_ylabels(panels)
        panels[-1].set_xlabel("step")

    return _chart(name, height, paint, " ".join(words))


def overlay_chart(name: str, curves: Mapping[str, Curve]) -> Chart | None:
    """What several runs logged of one stage, over the tokens they had read; None: fewer than two logged a loss.

    Bits per byte, which do not depend on the tokenizer, where all have them; else the loss.
    """
    lines = [line for curve in curves.values() for line in curve.train]
    names = ("loss", "val_loss")
    if all(is_number(line.get("bits_per_byte")) for line in lines):
        names = ("bits_per_byte", "val_bits_per_byte")
    drawn = {
        run: [
            np.array([(line["tokens"], line[key]) for line in logged if {"tokens", key} <= line.keys()], dtype=float)
            for logged, key in zip((curve.train, curve.validation), names, strict=True)
        ]
        for run, curve in curves.items()
    }
    drawn = {run: both for run, both in drawn.items() if len(both[0])}
    if len(drawn) < 2:
        return None
    unit = "loss, nats per token" if names[0] == "loss" else "bits per byte"
    ends = {run: float(smoothed(train[:, 1])[-1]) for run, (train, _) in drawn.items()}
    words = f"{unit}, over tokens: " + "; ".join(f"{run} ends at {end:.3f}" for run, end in ends.items()) + "."

    def paint(figure: Figure, canvas: _Canvas) -> None:
        axes = figure.subplots()
        for colour, (run, (train, held_out)) in zip(SERIES, drawn.items(), strict=False):
            axes.plot(*_thinned(train[:, 0], smoothed(train[:, 1])), color=colour, linewidth=1.6, label=run)
            if len(held_out):
                axes.plot(*held_out.T, "o--", color=colour, markersize=3, linewidth=1)
        smooth = np.concatenate([smoothed(train[:, 1]) for train, _ in drawn.values()])
        lowest = min([smooth.min(), *(held_out[:, 1].min() for _, held_out in drawn.values() if len(held_out))])
        axes.set(xlabel="tokens; dashed: held-out", ylabel=unit, ylim=(0.94 * lowest, 1.03 * smooth.max()))
        axes.xaxis.set_major_locator(MaxNLocator(canvas.columns + 1))
        axes.xaxis.set_major_formatter(lambda value, _: format_many(value))
        axes.legend(loc="upper right")

    return _chart(name, 360, paint, words)


def estimates_chart(name: str, rows: Mapping[str, Mapping[str, Any]], series: Mapping[str, str]) -> Chart | None:
    """Shares with one standard error: a row of dots for each name, a colour for each series; None without figures.

    Args:
        name: unique on the page.
        rows: for each row, estimates ("value", "stderr") by series; what is missing is left out.
        series: the colour of each.
    """
    shown = {
        row: found
        for row, of_row in rows.items()
        if (found := {one: estimate for one in series if (estimate := _estimate(of_row, one))})
    }
    if not shown:
        return None
    ordered = sorted(shown.items(), key=lambda item: ([*item[1].values()][-1][0], item[0]))
    words = "; ".join(
        f"{row}: " + ", ".join(f"{one} {value:.0%} ± {error:.1%}" for one, (value, error) in found.items())
        for row, found in reversed(ordered)
    )
    height = (22 + 12 * len(series)) * len(ordered) + 84

    def paint(figure: Figure, canvas: _Canvas) -> None:
        left = min(max(map(len, shown)) * canvas.font_size * 0.58 + 18, canvas.width * 0.42)
        _margins(figure, left=left, right=64, bottom=60)
        axes = figure.subplots()
        for place, (one, colour) in enumerate(series.items()):
            offset = 0.7 * (place + 0.5) / len(series) - 0.35
            points = [(row - offset, *found[one]) for row, (_, found) in enumerate(ordered) if one in found]
            if points:
                y, x, error = np.array(points).T
                spread = [np.minimum(error, x), np.minimum(error, 1 - x)]
                axes.errorbar(x, y, xerr=spread, fmt="o", color=colour, markersize=6, elinewidth=1.6, capsize=3)
                axes.plot([], [], marker="o", linestyle="", color=colour, label=one)
        for row, (_, found) in enumerate(ordered):
            _note(axes, f"{[*found.values()][-1][0]:.0%}", (1, row), (8, 0), va="center", color=INK)
        axes.set_yticks(range(len(ordered)), [row for row, _ in ordered], color=INK)
        axes.set(xlim=(0, 1), ylim=(-0.6, len(ordered) - 0.4))
        axes.xaxis.set_major_locator(MaxNLocator(canvas.columns))
        axes.xaxis.set_major_formatter("{x:.0%}")
        figure.legend(loc="lower center", ncols=canvas.columns)

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
        _margins(figure, left=72, right=26)
        above, below = _above_and_below(figure)
        above.plot([0, 1], [0, 1], color=SOFT, linewidth=1, linestyle=":", label="as sure as it is right")
        spread = np.sqrt(right * (1 - right) / counts)
        style: dict[str, Any] = {"color": TRAIN, "marker": "o", "markersize": 5, "capsize": 2.5}
        above.errorbar(sure, right, yerr=[np.minimum(spread, right), np.minimum(spread, 1 - right)], **style)
        above.set(ylim=(0, 1.03), ylabel="right")
        above.legend(loc="upper left")
        below.bar([edge + 0.05 for edge, *_ in bins], counts, width=0.09, color=TRAIN)
        below.set(xlabel="probability of the answer", ylabel="answers", xlim=(0, 1))
        below.yaxis.set_major_locator(MaxNLocator(2, integer=True))
        for axis in (above.yaxis, below.xaxis):
            axis.set_major_formatter("{x:.0%}")

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

    def height_of(canvas: _Canvas) -> float:
        return 112 * -(-len(shown) // canvas.columns) / canvas.height_factor + 10

    def paint(figure: Figure, canvas: _Canvas) -> None:
        _margins(figure, left=8, right=8, top=26, bottom=40)
        grid = [*figure.subplots(-(-len(shown) // canvas.columns), canvas.columns, squeeze=False).flat]
        figure.subplots_adjust(hspace=1.1, wspace=0.18)
        for axes in grid[len(shown) :]:
            axes.remove()
        for axes, (signal, found) in zip(grid, shown, strict=False):
            counts, edges = np.array(found["counts"], dtype=float), np.array(found["edges"], dtype=float)
            # Square roots: the few documents that a rule removes stay visible beside the many that it keeps.
            axes.bar(edges[:-1], np.sqrt(counts), width=np.diff(edges), align="edge", color=TRAIN, linewidth=0)
            for bound in (found.get("least"), found.get("most")):
                if bound is not None:
                    axes.axvline(bound, color=VALIDATION, linewidth=1.6)
            axes.set_title(signal.replace("_", " "), fontsize=canvas.font_size - 1, color=INK, loc="left")
            axes.set(yticks=[], xlim=(edges[0], edges[-1]))
            axes.tick_params(labelsize=canvas.font_size - 2)
            if edges[-1] > 1000:
                axes.set_xscale("symlog", linthresh=1)
                axes.set_xticks([1, 100, 10_000, 1_000_000], ["1", "100", "10 k", "1 M"])
                axes.minorticks_off()
            else:
                axes.xaxis.set_major_locator(MaxNLocator(2))

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


def _estimate(row: object, series: str) -> tuple[float, float] | None:
    """A share and its standard error."""
    value, stderr = (mapping(mapping(row).get(series)).get(name) for name in ("value", "stderr"))
    if not is_number(value) or not 0 <= value <= 1:
        return None
    return float(value), float(stderr) if is_number(stderr) else 0.0


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


def _note(
    axes: Axes, text: str, at: tuple[float, float], offset: tuple[float, float], x_is: str = "axes fraction",
    **style: Any,
) -> None:  # fmt: skip
    """Words beside the place that is so far along the x axis, a share of it, and at so much of the y axis."""
    axes.annotate(text, at, xycoords=(x_is, "data"), xytext=offset, textcoords="offset points", **style)


def _drawn(name: str, canvas: _Canvas, height: float, paint: Callable[[Figure, _Canvas], None]) -> str:
    """Paint a figure for one width and give its SVG, fit for the page: no box, thin grid, soft words."""
    name = f"{name}-{canvas.suffix}"
    settings = {
        "font.size": canvas.font_size, "svg.fonttype": "none", "svg.hashsalt": name, "figure.facecolor": "none",
        "axes.facecolor": "none", "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False,
        "axes.edgecolor": LINE, "axes.labelcolor": SOFT, "axes.grid": True, "axes.axisbelow": True,
        "grid.color": LINE, "grid.linewidth": 1, "lines.linewidth": 2, "legend.frameon": False,
        "legend.labelcolor": INK, "figure.subplot.hspace": 0.2,
        **{f"{axis}tick.{what}": value for axis in "xy" for what, value in _TICKS.items()},
    }  # fmt: skip

    def fill(figure: Figure) -> None:
        _margins(figure)
        paint(figure, canvas)

    size = canvas.width / 72, height * canvas.height_factor / 72
    return _fit_page(draw(size, settings, fill), name)


def draw(size: tuple[float, float], settings: Mapping[str, Any], fill: Callable[[Figure], None]) -> str:
    """A figure of so many inches as SVG; the same gives the same bytes."""
    # Matplotlib's own defaults, so that nobody's matplotlibrc changes the picture.
    all_settings: Any = {key: value for key, value in matplotlib.rcParamsDefault.items() if "backend" not in key}
    all_settings |= {"text.parse_math": False, **settings}
    buffer = io.StringIO()
    with matplotlib.rc_context(all_settings):
        figure = Figure(figsize=size)
        fill(figure)
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


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


def _above_and_below(figure: Figure) -> tuple[Axes, Axes]:
    """Two axes over the same x, the upper one four times as high."""
    above, below = figure.subplots(2, sharex=True, height_ratios=(4, 1), gridspec_kw={"hspace": 0.14})
    figure.align_ylabels([above, below])
    return above, below


def _margins(figure: Figure, left: float = 58, right: float = 10, bottom: float = 46, top: float = 10) -> None:
    """Margins in pixels."""
    width, height = 72 * figure.get_size_inches()
    figure.subplots_adjust(left / width, bottom / height, 1 - right / width, 1 - top / height)
