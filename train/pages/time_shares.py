"""Where a run's time went: computing, and what kept it from that. Shares are drawn over steps, and summed in hours.

Every second of the logged steps belongs to one kind: the loop waited for data, waited for a save, evaluated, or
computed, in which waiting for the slowest rank is included. Seconds outside of logged steps are starts, restarts and
steps that a restart did again.
"""

from dataclasses import dataclass
from html import escape

import numpy as np

from train.pages.metric_columns import Columns
from train.pages.page import table
from train.pages.svg_chart import HEIGHT, LEFT, TOP, WIDTH, Frame, axes

KINDS = {
    "data_stall_share": "waiting for data",
    "checkpoint_stall_share": "waiting for saves",
    "evaluation_share": "evaluations and previews",
}
COMPUTING, OUTSIDE = "computing", "between attempts, and starting"
PLACES = 120


@dataclass(frozen=True)
class TimeShares:
    """Shares [kinds, places] of the time of the steps up to each place, and hours in all by kind."""

    steps: np.ndarray  # f64 [places]
    shares: np.ndarray
    hours: dict[str, float]

    @classmethod
    def of(cls, columns: Columns) -> "TimeShares | None":
        """Return where the time went; None with fewer than two rows."""
        series = [columns[name] for name in ("step_s", "interval_steps", "time", *KINDS)]
        if len({len(one) for one in series}) != 1 or len(series[0]) < 2:
            return None
        step_s, interval, time, *shares = (np.nan_to_num(one.values) for one in series)
        seconds = step_s * interval
        lost = np.stack(shares) * seconds
        of_kind = np.vstack([lost, np.maximum(seconds - lost.sum(0), 0)])
        starts = np.arange(0, len(seconds), -(-len(seconds) // PLACES))
        sums = np.add.reduceat(of_kind, starts, axis=1)
        hours = dict(zip([*KINDS.values(), COMPUTING], (of_kind.sum(1) / 3600).tolist(), strict=True))
        outside = float(time.max() - time.min()) + float(seconds[0]) - float(seconds.sum())
        hours[OUTSIDE] = max(outside, 0.0) / 3600
        ends = np.append(starts[1:], len(seconds)) - 1
        return cls(series[0].steps[ends], sums / np.maximum(sums.sum(0), 1e-9), hours)

    def draw(self, title: str) -> str:
        """Return the shares as areas on top of one another, computing left out as it is the rest."""
        tops = np.vstack([np.zeros(len(self.steps)), np.cumsum(self.shares[:-1], axis=0)])
        most = min(1.0, max(0.02, 1.1 * float(tops.max())))
        frame = Frame((float(self.steps[0]), float(self.steps[-1])), (0.0, most), False)
        x, y = LEFT + frame.along(self.steps), TOP + frame.down(tops)
        areas = keys = ""
        for i, name in enumerate(KINDS.values()):
            points = [*zip(x, y[i], strict=True), *zip(x[::-1], y[i + 1][::-1], strict=True)]
            areas += f'<path class="s{i}" d="M{"L".join(f"{a:.1f} {b:.1f}" for a, b in points)}Z"/>'
            sample = f'<svg viewBox="0 0 26 8" class="key"><path class="s{i}" d="M0 0H26V8H0Z"/></svg>'
            keys += f"<span>{sample}{escape(name)}</span>"
        caption = f"<figcaption><b>{escape(title)}</b>share of time, summed; the rest is computing</figcaption>"
        box = f'viewBox="0 0 {WIDTH:g} {HEIGHT:g}" class="chart"'
        drawing = f'<svg {box}>{axes(frame, percent=True)}{areas}</svg><div class="legend">{keys}</div>'
        label = f"{title}: {100 * float(self.shares[-1].mean()):.0f} % computing"
        return f'<figure role="img" aria-label="{escape(label)}">{caption}{drawing}</figure>'


def time_table(of_runs: dict[str, TimeShares]) -> str:
    """Return hours and shares by kind, a column for each run."""
    rows = []
    for kind in (COMPUTING, *KINDS.values(), OUTSIDE):
        cells = [kind]
        for shares in of_runs.values():
            whole = max(sum(shares.hours.values()), 1e-9)
            cells += [spoken(3600 * shares.hours[kind]), f"{100 * shares.hours[kind] / whole:.1f}\u00a0%"]
        rows.append(cells)
    several = len(of_runs) > 1
    head = [""] + [cell for name in of_runs for cell in (escape(name) if several else "time", "share")]
    return table(head, rows, "times")


def spoken(seconds: float) -> str:
    """Return a time in its two largest units: 3 d 4 h, 5 min 12 s, 0.3 s."""
    if seconds < 10:
        return f"{seconds:.1f}\u00a0s"
    units = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
    parts: list[str] = []
    left = round(seconds)
    for unit, size in units:
        if left >= size or parts:
            parts.append(f"{left // size}\u00a0{unit}")
            left %= size
    return "\u00a0".join(part for part in parts[:2] if not part.startswith("0"))
