"""Charts as inline SVG for a page: matplotlib draws, the page decides the colours.

The SVG takes its colours from the page (`currentColor`, CSS variables), so light, dark and print need one drawing.
Rejected: a plotting script in the page, which would bring megabytes and something that executes.
"""

import io
import re
from collections.abc import Callable
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Matplotlib wants colours of its own; these stand for what the page decides.
INK, LINE, ACCENT, SOFT = "#010203", "#010204", "#010205", "#010206"
_PAGE = {INK: "currentColor", LINE: "var(--line)", ACCENT: "var(--accent)", SOFT: "var(--soft)"}


def figure(key: str, title: str, unit: str, said: str, draw: Callable[["Axes"], None]) -> str:
    """Return a `<figure>` of what `draw` puts on the axes; `said` is for those who do not see it.

    Ids are made from the key, so that several fit into one page.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style = {"svg.fonttype": "none", "svg.hashsalt": key, "text.color": INK, "font.size": 9}
    style |= {"axes.edgecolor": LINE, "xtick.color": SOFT, "ytick.color": SOFT, "grid.color": LINE}
    with rc_context(style):
        drawing = Figure(figsize=(4.2, 2.3), layout="constrained")
        axes = drawing.add_subplot(axisbelow=True)
        draw(axes)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", linewidth=0.6)
        axes.tick_params(which="both", length=0)
        buffer = io.StringIO()
        drawing.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    caption = f"<figcaption><b>{escape(title)}</b>{escape(unit)}</figcaption>"
    svg = _for_the_page(buffer.getvalue(), key)
    return f'<figure role="img" aria-label="{escape(said)}">{caption}{svg}</figure>'


def label(value: float, _: int) -> str:
    if value != 0 and abs(value) < 1e-4:
        return f"{value:.1e}".replace("e-0", "e-").replace(".0e", "e")
    return f"{value:,.10g}"


def _for_the_page(svg: str, key: str) -> str:
    """Keep the drawing alone: no prologue, no metadata, no rules that would reach the page around it."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r' xmlns(?::\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r'((?: id="|url\(#|href="#))', rf"\1{key}-", svg)
    svg = re.sub(r"font: ([^;\"]*?)'[^;\"]*", r"font: \1sans-serif", svg)
    for colour, meant in _PAGE.items():
        svg = svg.replace(colour, meant)
    return svg
