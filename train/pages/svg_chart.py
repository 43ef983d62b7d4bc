"""A chart as inline SVG: axes, curves, a band behind them, marks. The page's stylesheet has the colours and dashes.

The file needs no script and no library. Where many values fall on one place, the faint band behind a curve holds all
of them, so that no spike is averaged away; the strong curve is a centred moving mean. Rejected: a plotting library,
which takes 80 ms a figure and half a second to import; and a plotting script in the page, which would execute.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from html import escape

import numpy as np

PLACES = 240  # along the horizontal axis; more would not be seen
SMOOTHED = 30  # the moving mean is over this part of a curve's rows: one thirtieth
STYLES = 6  # of curves: colour and dash, in page.css
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 320.0, 190.0, 42.0, 14.0, 8.0, 24.0  # units of the SVG


LINE = 11.0  # height of a letter


@dataclass(frozen=True)
class Curve:
    name: str
    places: np.ndarray  # float64 [R], ascending or nearly so
    values: np.ndarray  # float64 [R]; what is not finite is marked at the upper edge
    style: int = 0
    exact: bool = False  # nothing is smoothed, and if there are few values each is a dot


@dataclass(frozen=True)
class Chart:
    """`scale`: log is drawn both ways, for the page's switch; zero starts the vertical axis at 0."""

    title: str
    unit: str
    scale: str  # log or zero
    over: str = "step"  # the horizontal axis
    level: tuple[float, str] | None = None  # a height that is marked, and what it is
    marks: Sequence[float] = ()  # places that are marked by vertical lines
    band: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None  # places, low and high of the reference
    letters: bool = False  # curves are named A, B, ... at their ends too
    top: float | None = None  # of the vertical axis; None: as the values need


@dataclass(frozen=True)
class Frame:
    """The ranges of both axes, and where their values lie in the SVG."""

    x: tuple[float, float]
    y: tuple[float, float]  # exponents of ten if `log`
    log: bool
    width: float = field(default=WIDTH - LEFT - RIGHT)
    height: float = field(default=HEIGHT - TOP - BOTTOM)

    def along(self, places: np.ndarray) -> np.ndarray:
        return (places - self.x[0]) / (self.x[1] - self.x[0]) * self.width

    def down(self, values: np.ndarray) -> np.ndarray:
        if self.log:
            with np.errstate(divide="ignore", invalid="ignore"):
                values = np.log10(values)
        share = (values - self.y[0]) / (self.y[1] - self.y[0])
        return (1 - np.nan_to_num(share, nan=-9.0, neginf=-9.0).clip(-9, 9)) * self.height


def draw_chart(chart: Chart, curves: Sequence[Curve]) -> str:
    """Return a `<figure>`, or nothing if no curve has two values to draw."""
    drawable = [_drawable(chart, curve) for curve in curves]
    curves = [curve for curve in drawable if np.isfinite(curve.values).sum() > 1]
    if not any(curve.values.any() for curve in curves):  # a number that is always 0 says nothing
        return ""
    kinds = ("log", "linear") if chart.scale == "log" else ("",)
    drawings = "".join(_draw(chart, curves, kind) for kind in kinds)
    last = [f"{curve.name} {_last(curve)}".strip() for curve in curves]
    label = f"{chart.title}: {'; '.join(last)} at {chart.over} {number(float(curves[0].places[-1]))}"
    keys = "".join(_key(curve, chart.letters) for curve in curves) if len(curves) > 1 else ""
    legend = f'<div class="legend">{keys}</div>' if keys else ""
    now = f'<span class="now">{_last(curves[0])}</span>' if len(curves) == 1 else ""
    caption = f"<figcaption>{now}<b>{escape(chart.title)}</b>{escape(chart.unit)}</figcaption>"
    return f'<figure role="img" aria-label="{escape(label)}">{caption}{drawings}{legend}</figure>'


def _drawable(chart: Chart, curve: Curve) -> Curve:
    """Leave out what a logarithm does not have."""
    shown = ~(curve.values <= 0) if chart.scale == "log" else np.full(len(curve.values), True)
    return replace(curve, places=curve.places[shown], values=curve.values[shown])


def _last(curve: Curve) -> str:
    """Return the end of what is drawn strongly."""
    values = _finite(curve).values
    return number(float(values[-1] if curve.exact else _smoothed(values)[-1]))


def _key(curve: Curve, letters: bool) -> str:
    """Return a curve's line of the legend, with its newest value."""
    name = f"{chr(65 + curve.style % 26)} {curve.name}" if letters else curve.name
    sample = f'<svg viewBox="0 0 26 8" class="key"><path class="c{curve.style % STYLES}" d="M0 4H26"/></svg>'
    return f"<span>{sample}{escape(name)} <b>{_last(curve)}</b></span>"


def _draw(chart: Chart, curves: Sequence[Curve], kind: str) -> str:
    frame = _frame(chart, curves, kind == "log")
    inside = _band(chart, frame) + _marks(chart, frame)
    inside += "".join(_faint(curve, frame) for curve in curves) + "".join(_strong(curve, frame) for curve in curves)
    inside += "".join(_not_finite(curve, frame) for curve in curves)
    size = f'x="{LEFT:g}" y="{TOP:g}" width="{frame.width:g}" height="{frame.height:g}"'
    letters = _letters(curves, frame) if chart.letters else ""
    box = f'viewBox="0 0 {WIDTH:g} {HEIGHT:g}" class="chart {kind}"'
    clipped = f"<svg {size}>{inside}</svg>"  # an inner svg is a clip path without an id
    return f"<svg {box}>{axes(frame, chart.over)}{clipped}{_level(chart, frame)}{letters}</svg>"


def _frame(chart: Chart, curves: Sequence[Curve], log: bool) -> Frame:
    places = np.concatenate([curve.places for curve in curves])
    first, last = float(places.min()), float(places.max())
    finite = [curve.values[np.isfinite(curve.values)] for curve in curves]
    values = np.concatenate([*finite, *([[chart.level[0]]] if chart.level else [])])
    if log:
        low, high = np.log10(values.min()), np.log10(values.max())
        room = max(0.04 * (high - low), 0.01)
        return Frame((first, max(last, first + 1e-9)), (float(low - room), float(high + room)), True)
    # A switch to linear looks at the end of a curve: the few largest values, mostly of its start, may leave the frame.
    high = max(float(np.percentile(part, 98 if chart.scale == "log" else 100)) for part in finite)
    high = chart.top or 1.06 * max(high, *(float(_smoothed(part)[len(part) // 20 :].max()) for part in finite))
    low = min(0.0, float(values.min()))
    if chart.scale == "log" and (least := float(values.min())) > 0.5 * high:
        low = least - 0.04 * (high - least)
    return Frame((first, max(last, first + 1e-9)), (low, high if high > low else low + 1), False)


def axes(frame: Frame, over: str = "step", percent: bool = False) -> str:
    """Return grid lines and the labels of both axes, outside of the frame."""
    lines = texts = ""
    for value in _ticks(*frame.y, log=frame.log):
        y = TOP + float(frame.down(np.array(value)))
        label = f"{100 * value:.3g}%" if percent else number(value)
        lines += f"M{LEFT:g} {y:.1f}H{WIDTH - RIGHT:g}"
        texts += f'<text x="{LEFT - 5:g}" y="{y + 3.5:.1f}" text-anchor="end">{label}</text>'
    whole = [value for value in _ticks(*frame.x, log=False, about=4) if over != "step" or value % 1 == 0]
    for value in whole:
        x = LEFT + float(frame.along(np.array(value)))
        anchor = "end" if x > WIDTH - RIGHT - 12 else "middle"
        texts += f'<text x="{x:.1f}" y="{HEIGHT - 9:g}" text-anchor="{anchor}">{number(value)}</text>'
    return f'<path class="grid" d="{lines}"/>{texts}'


def _ticks(low: float, high: float, *, log: bool, about: int = 5) -> list[float]:
    """Return round values between two, of which the logarithms are given if `log`; none in an empty range."""
    if not low < high < np.inf:
        return []
    if log and high - low > 0.7:
        factors = (1, 2, 5) if high - low < 1.7 else (1,)
        decades = range(int(np.floor(low)), int(np.ceil(high)) + 1)
        every = max(1, round((high - low) / 6))
        return [f * 10.0**d for d in decades for f in factors if low <= np.log10(f) + d <= high and d % every == 0]
    if log:
        low, high = 10**low, 10**high
    raw = (high - low) / about
    unit = 10.0 ** np.floor(np.log10(raw))
    step = unit * next(nice for nice in (1, 2, 2.5, 5, 10) if nice * unit >= raw * 0.999)
    first = int(np.ceil(low / step - 1e-9))
    return [round(i * step, 12) + 0.0 for i in range(first, int(np.floor(high / step + 1e-9)) + 1)]


def _path(x: np.ndarray, y: np.ndarray) -> str:
    return "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in zip(x.tolist(), y.tolist(), strict=True))


def _thinned(curve: Curve) -> np.ndarray:
    """Return where each of at most PLACES pieces of a curve begins."""
    return np.arange(0, len(curve.places), -(-len(curve.places) // PLACES))


def _finite(curve: Curve) -> Curve:
    known = np.isfinite(curve.values)
    return replace(curve, places=curve.places[known], values=curve.values[known])


def _faint(curve: Curve, frame: Frame) -> str:
    """Return all values: as a line, or as the area between the lowest and highest of each place."""
    curve = _finite(curve)
    if curve.exact or len(curve.places) < SMOOTHED * 2:
        return ""
    starts = _thinned(curve)
    x = frame.along(curve.places[starts])
    if len(starts) == len(curve.places):
        return f'<path class="c{curve.style % STYLES} raw" d="{_path(x, frame.down(curve.values))}"/>'
    low, high = (ufunc.reduceat(curve.values, starts) for ufunc in (np.minimum, np.maximum))
    around = _path(np.append(x, x[::-1]), np.append(frame.down(high), frame.down(low)[::-1]))
    return f'<path class="f{curve.style % STYLES} raw" d="{around}Z"/>'


def _strong(curve: Curve, frame: Frame) -> str:
    curve = _finite(curve)
    smooth = curve.values if curve.exact else _smoothed(curve.values)
    starts = _thinned(curve)
    starts = np.append(starts, len(smooth) - 1) if starts[-1] != len(smooth) - 1 else starts
    x, y = frame.along(curve.places[starts]), frame.down(smooth[starts])
    style = curve.style % STYLES
    dots = "".join(f'<circle class="f{style}" cx="{a:.1f}" cy="{b:.1f}" r="1.8"/>' for a, b in zip(x, y, strict=True))
    line = f'<path class="c{style}" d="{_path(x, y)}"><title>{escape(curve.name)}</title></path>'
    return line + (dots if curve.exact and len(x) <= 60 else "")


def _smoothed(values: np.ndarray) -> np.ndarray:
    """Return the centred moving mean. Near its start it is over fewer values, so that a steep start stays steep."""
    half = len(values) // SMOOTHED // 2
    places = np.arange(len(values))
    first = places - np.minimum(half, places)
    after = np.minimum(places + np.minimum(half, places), len(values) - 1) + 1
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return (sums[after] - sums[first]) / (after - first)


def _not_finite(curve: Curve, frame: Frame) -> str:
    lost = curve.places[~np.isfinite(curve.values)]
    crosses = [f"M{x - 3:.1f} 2l6 6m0 -6l-6 6" for x in frame.along(lost[:PLACES])]
    return f'<path class="lost" d="{"".join(crosses)}"><title>not finite</title></path>' if crosses else ""


def _band(chart: Chart, frame: Frame) -> str:
    if chart.band is None:
        return ""
    places, low, high = chart.band
    x = frame.along(places)
    return (
        f'<path class="band" d="{_path(np.append(x, x[::-1]), np.append(frame.down(high), frame.down(low)[::-1]))}Z"/>'
    )


def _marks(chart: Chart, frame: Frame) -> str:
    lines = "".join(f"M{x:.1f} 0V{frame.height:g}" for x in frame.along(np.array(chart.marks, dtype=np.float64)))
    return f'<path class="mark" d="{lines}"/>' if lines else ""


def _level(chart: Chart, frame: Frame) -> str:
    if chart.level is None or not -0.01 <= (y := float(frame.down(np.array(chart.level[0])))) <= frame.height:
        return ""
    line = f'<path class="level" d="M{LEFT:g} {TOP + y:.1f}H{WIDTH - RIGHT:g}"/>'
    words = f'<text x="{WIDTH - RIGHT:g}" y="{TOP + y - 3:.1f}" text-anchor="end">{escape(chart.level[1])}</text>'
    return line + words


def _letters(curves: Sequence[Curve], frame: Frame) -> str:
    """Return each run's letter at the end of its curve, readable without colour; those that would touch move apart."""
    ends = []
    for curve in map(_finite, curves):
        end = curve.values[-1:] if curve.exact else _smoothed(curve.values)[-1:]
        ends.append((TOP + float(frame.down(end)[0]), LEFT + float(frame.along(curve.places[-1:])[0]), curve.style))
    ends.sort(reverse=True)
    places = [y for y, _, _ in ends]
    for i in range(1, len(places)):
        places[i] = min(places[i], places[i - 1] - LINE)
    for i in reversed(range(len(places))):  # back into the frame
        places[i] = max(places[i], places[i + 1] + LINE if i + 1 < len(places) else TOP)
    return "".join(
        f'<text class="end" x="{x + 3:.1f}" y="{y + 3.5:.1f}">{chr(65 + style % 26)}</text>'
        for y, (_, x, style) in zip(places, ends, strict=True)
    )


def number(value: float) -> str:
    """Return a number as an axis shows it: 20k, 1.25M, 0.0005, 2e-5."""
    size = abs(value)
    if size >= 9999.5:
        for unit, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
            if size >= 0.9999 * unit:
                return f"{value / unit:.4g}{suffix}"
    if size and size < 1e-3:
        return f"{value:.2e}".replace("e-0", "e-").replace(".00e", "e").replace("0e", "e")
    return f"{value:.4g}" if size < 1000 else f"{value:,.0f}"
