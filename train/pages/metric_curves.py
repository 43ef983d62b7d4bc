"""Curves of a run as inline SVG: rows of metrics.jsonl in, small multiples out.

A long run is averaged down to at most POINTS points a curve, and the chart says so. The SVG takes its colours from the
page (`currentColor`, CSS variables), so light, dark and print need one drawing. Rejected: a plotting script in the
page, which would bring megabytes and something that executes.
"""

import io
import re
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

POINTS = 600  # of a curve; more would not be seen
# Matplotlib needs colours; each of these is replaced by one of the page.
COLOURS = {"#010203": "currentColor", "#010204": "var(--line)", "#010205": "var(--accent)", "#010206": "var(--soft)"}
INK, LINE, ACCENT, SOFT = COLOURS


@dataclass(frozen=True)
class Chart:
    """What one small multiple shows; `scale` log needs positive values, zero starts the vertical axis at 0."""

    key: str  # of the rows
    title: str
    unit: str
    scale: str  # log or zero
    over: str = "step"  # the horizontal axis


CHARTS = (
    Chart("text_loss", "Text loss", "nats a text target, training data, log scale", "log"),
    Chart("image_loss", "Image loss", "mean squared error of the prediction, training data, log scale", "log"),
    Chart("x0_error", "Error of x0", "mean squared, mean over bins of log SNR, training data, log scale", "log"),
    Chart("grad_norm", "Gradient norm", "before clipping, at the step of each row, log scale", "log"),
    Chart("learning_rate", "Learning rate", "of AdamW", "zero"),
    Chart("tokens_per_s", "Tokens", "tokens a second, all ranks", "zero"),
    Chart("images_per_s", "Images", "images a second, all ranks", "zero"),
)


def draw_charts(rows: list[dict[str, Any]], clip_norm: float | None = None) -> list[str]:
    """Return a `<figure>` for each chart that has at least two finite values in `rows` (each with its `step`).

    Held-out errors of x0 follow the charts of training. `clip_norm` is marked in the chart of the gradient norm.
    """
    names = dict.fromkeys(name for row in rows for name in row if re.fullmatch("heldout/.*/x0_error", name))
    unit = "mean squared, mean over bins of log SNR, held-out data, log scale"
    held_out = [Chart(name, f"Error of x0: {name[8:-9]}", unit, "log") for name in names]
    figures = []
    for chart in (*CHARTS, *held_out):
        points = [(row["step"], row[chart.key]) for row in rows if row.get(chart.key) is not None]
        figures.append(draw_chart(chart, points, clip_norm if chart.key == "grad_norm" else None))
    return [figure for figure in figures if figure]


def draw_chart(chart: Chart, points: list[tuple[float, float]], clipped_above: float | None = None) -> str:
    """Return a `<figure>` of (x, value) points, or nothing if fewer than two of them can be drawn."""
    points = [(x, value) for x, value in points if np.isfinite(value) and (chart.scale != "log" or value > 0)]
    if len(points) < 2:
        return ""
    places, values, rows_a_point = _thinned(np.array(points, dtype=np.float64))
    svg = _draw(chart, places, values, clipped_above)
    note = f"; each point is the mean of {rows_a_point} rows" if rows_a_point > 1 else ""
    caption = f"<figcaption><b>{escape(chart.title)}</b>{escape(chart.unit + note)}</figcaption>"
    last = f"{chart.title}, {points[-1][1]:.4g} at {chart.over} {points[-1][0]}"
    return f'<figure role="img" aria-label="{escape(last)}">{caption}{svg}</figure>'


def _thinned(points: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Average neighbours of [R, 2] so that at most POINTS remain; the last mean may be of fewer rows."""
    size = -(-len(points) // POINTS)
    starts = np.arange(0, len(points), size)
    means = np.add.reduceat(points, starts) / np.diff([*starts, len(points)])[:, None]
    return means[:, 0], means[:, 1], size


def _draw(chart: Chart, places: np.ndarray, values: np.ndarray, clipped_above: float | None) -> str:
    """Return the curve as an `<svg>` for a page that may hold several: its ids begin with the chart's key."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    style: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": chart.key, "text.color": INK, "font.size": 9}
    style |= {"axes.edgecolor": LINE, "xtick.color": SOFT, "ytick.color": SOFT, "grid.color": LINE}
    with rc_context(style):
        drawing = Figure(figsize=(4.2, 2.3), layout="constrained")
        axes = drawing.add_subplot(axisbelow=True)
        axes.plot(places, values, color=ACCENT, linewidth=1.6, solid_joinstyle="round")
        shown = values
        if clipped_above is not None:
            shown = np.append(values, clipped_above)
            axes.axhline(clipped_above, color=SOFT, linewidth=1, linestyle="--")
            axes.annotate("clipped above", (1, clipped_above), (0, 3), xycoords=("axes fraction", "data"), ha="right",
                          color=SOFT, textcoords="offset points", fontsize=8)  # fmt: skip
        if chart.scale == "log":
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if shown.max() < 20 * shown.min() else (1,)))
            axes.yaxis.set_minor_formatter(NullFormatter())
        else:
            axes.set_ylim(0, values.max() * 1.08 or 1)
            axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(_tick))
        axes.set_xlabel(chart.over, color=SOFT)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", linewidth=0.6)
        axes.tick_params(which="both", length=0)
        buffer = io.StringIO()
        drawing.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _for_the_page(buffer.getvalue(), chart.key)


def _tick(value: float, _: int) -> str:
    if value != 0 and abs(value) < 1e-4:
        return f"{value:.1e}".replace("e-0", "e-").replace(".0e", "e")
    return f"{value:,.10g}"


def _for_the_page(svg: str, key: str) -> str:
    """Return only the drawing: no prologue, size, metadata, or style rules that would reach the page around it."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r' (?:width|height)="[^"]*"', "", svg, count=2)
    svg = re.sub(r' xmlns(?::\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")
    prefix = re.sub(r"\W+", "-", key)
    svg = re.sub(r'((?: id="|url\(#|href="#))', rf"\1{prefix}-", svg)
    svg = re.sub(r"font: ([^;\"]*?)'[^;\"]*", r"font: \1sans-serif", svg)
    for colour, meant in COLOURS.items():
        svg = svg.replace(colour, meant)
    return svg
