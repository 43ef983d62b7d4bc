"""The error of x0 over noise levels and steps as a heat map: which levels a model has learnt, and when.

Colours are those of viridis (Smith and van der Walt 2015), light to dark in print and even to the colour-blind; the
scale is logarithmic and shared by all maps of a page. A map is a picture of one pixel a cell, enlarged by the browser.
"""

import base64
import io
import re
from collections.abc import Sequence
from html import escape

import numpy as np
from PIL import Image

from train.pages.metric_columns import Columns
from train.pages.page import block
from train.pages.report_inputs import RunInputs
from train.pages.svg_chart import number

COLUMNS = 120  # steps are averaged into at most so many
VIRIDIS = ("440154", "482878", "3e4989", "31688e", "26828e", "1f9e89", "35b779", "6ece58", "b5de2b", "fde725")
LEFT, TOP, CELL, WIDTH = 42, 6, 19, 224  # units of the SVG


def draw_noise_maps(runs: Sequence[RunInputs]) -> str:
    """Return a map of training and of each held-out source for each run; nothing without errors by bin."""
    grids = []
    for i, run in enumerate(runs):
        for prefix, what in _prefixes(run.columns).items():
            if (grid := _grid(run.columns, prefix)) is not None:
                grids.append((what if len(runs) == 1 else f"{chr(65 + i)} {run.name}: {what}", *grid))
    if not grids:
        return ""
    known = np.concatenate([cells[np.isfinite(cells)] for _, _, _, cells in grids])
    scale = float(np.log10(known.min())), float(np.log10(known.max()))
    maps = [_figure(title, bins, steps, cells, scale) for title, bins, steps, cells in grids]
    return _scale_bar(scale) + block("charts", maps)


def _prefixes(columns: Columns) -> dict[str, str]:
    """Return what is before the bins in the names of rows, and what it is in words."""
    names = [re.fullmatch("(heldout|heldout_ema)/(.*)/x0_error/-?[0-9]+\\.\\..*", name) for name in columns.names]
    held_out = {match[0].rpartition("/")[0]: match for match in names if match}
    words = {"heldout": "Held-out", "heldout_ema": "Held-out, EMA"}
    return {"x0_error": "Training"} | {at: f"{words[m[1]]}: {m[2]}" for at, m in held_out.items()}


def _grid(columns: Columns, prefix: str) -> tuple[list[str], tuple[float, float], np.ndarray] | None:
    """Return bins from clean to noisy, the first and last step, and errors f64 [bins, columns]; nan: no image."""
    found = columns.matching(f"{re.escape(prefix)}/(-?[0-9]+\\.\\.-?[0-9]+)")
    bins = sorted(found, key=lambda of_bin: -int(of_bin.partition("..")[0]))
    series = [columns[found[of_bin]].finite for of_bin in bins]
    steps = np.unique(np.concatenate([of_bin.steps for of_bin in series])) if series else np.empty(0)
    if len(steps) < 2:
        return None
    width = min(COLUMNS, len(steps))
    cells = np.full((len(bins), width), np.nan)
    for row, of_bin in zip(cells, series, strict=True):
        place = np.searchsorted(steps, of_bin.steps) * width // len(steps)
        sums, counts = np.bincount(place, of_bin.values, width), np.bincount(place, minlength=width)
        np.divide(sums, counts, out=row, where=counts > 0)
    cells[cells <= 0] = np.nan
    return (bins, (float(steps[0]), float(steps[-1])), cells) if np.isfinite(cells).any() else None


def _figure(
    title: str, bins: list[str], steps: tuple[float, float], cells: np.ndarray, scale: tuple[float, float]
) -> str:
    height = CELL * len(bins)
    place = f'x="{LEFT}" y="{TOP}" width="{WIDTH}" height="{height}"'
    drawn = f'<image {place} href="{_picture(cells, scale)}" preserveAspectRatio="none"/>'
    texts = ""
    for i, (of_bin, row) in enumerate(zip(bins, cells, strict=True)):
        y = TOP + CELL * (i + 0.5) + 3.5
        texts += f'<text x="{LEFT - 5}" y="{y}" text-anchor="end">{escape(of_bin.replace("-", "−"))}</text>'
        known = row[np.isfinite(row)]
        texts += f'<text x="{LEFT + WIDTH + 5}" y="{y}">{f"{known[-1]:.3g}" if len(known) else "—"}</text>'
    bottom = TOP + height + 14
    texts += f'<text x="{LEFT}" y="{bottom}">step {number(steps[0])}</text>'
    texts += f'<text x="{LEFT + WIDTH}" y="{bottom}" text-anchor="end">{number(steps[1])}</text>'
    box = f'viewBox="0 0 {LEFT + WIDTH + 54} {bottom + 6}" class="chart map"'
    caption = f"<figcaption><b>{escape(title)}</b>error of x0 by log SNR; the newest at the right</figcaption>"
    label = escape(f"{title}: error of x0 by log SNR and step")
    return f'<figure role="img" aria-label="{label}">{caption}<svg {box}>{drawn}{texts}</svg></figure>'


def _picture(cells: np.ndarray, scale: tuple[float, float]) -> str:
    """Return cells as a data URI; those without a value are transparent."""
    known = np.isfinite(cells)
    shares = (np.log10(np.where(known, cells, 1.0)) - scale[0]) / max(scale[1] - scale[0], 1e-9)
    rgb = _colours(shares)
    pixels = np.concatenate([rgb, np.where(known, 255, 0)[..., None]], axis=-1).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels, "RGBA").save(buffer, "WEBP", lossless=True)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _colours(shares: np.ndarray) -> np.ndarray:
    """Return RGB [..., 3] of shares [...] of the scale; the lowest error is the lightest."""
    table = np.array([[int(colour[i : i + 2], 16) for i in (0, 2, 4)] for colour in reversed(VIRIDIS)])
    at = shares.clip(0, 1) * (len(table) - 1)
    return np.stack([np.interp(at, np.arange(len(table)), table[:, channel]) for channel in range(3)], axis=-1)


def _scale_bar(scale: tuple[float, float]) -> str:
    low, high = (f"{10**end:.2g}" for end in scale)
    bar = _picture(10 ** np.linspace(*scale, 64)[None], scale)
    return f'<p class="note scale">{low} <img src="{bar}" alt="scale" width="160" height="10"> {high}, logarithmic</p>'
