"""Whether a run's curves lie where those of reference runs lie: `bench/bands.py` makes the bands, this reads them.

A band is the spread of a recipe's logged curves over seeds and machines (bench/results/bands/NAME.json). A run is
compared up to the step that it has reached, if the settings that decide its curves are the band's. Each value is the
median of the last rows, in the band and in the run, so that one odd row changes nothing. A metric has left the band if
more than a tenth of its rows, and more than two, lie outside, or each of its last three. Rejected: a test of the final
loss alone, which says nothing of a run in progress and little of what went wrong.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from data.strict_json import loads
from train.config import read_yaml
from train.nested import leaves

FOLDER = Path(__file__).parents[2] / "bench" / "results" / "bands"
LEAST_ROWS = 5  # fewer say nothing
ALLOWED_SHARE, ALLOWED_ROWS = 0.1, 2  # of a metric's rows may lie outside
DATA_MAY_DIFFER = 0.03  # tokens and images a step, relative; seeds change them by less
NAMES = {"text_loss": "text loss", "image_loss": "image loss", "x0_error": "x0 error", "grad_norm": "gradient norm"}
# The settings that decide a curve are those of these groups, but for what says where and how fast.
GROUPS = ("model.", "data.", "diffusion.", "loss.", "optim.", "guard.", "init_from", "log.interval_steps")
NOT_OF_THE_CURVE = {
    *("model.text_loss_chunk", "data.tokenizer", "data.read_ahead", "data.cache_dir", "data.cache_gib"),
    *("data.read_warning_s", "data.num_workers", "data.prefetch_steps", "data.max_bad_documents"),
    "optim.ema_half_lives",
}


@dataclass(frozen=True)
class Curve:
    """One metric of the band at each of its steps."""

    median: list[float]
    low: list[float]
    high: list[float]


@dataclass(frozen=True)
class Band:
    name: str
    steps: list[int]  # of the rows
    curves: dict[str, Curve]  # by metric: text_loss, image_loss, x0_error, grad_norm
    smoothed_rows: int  # a value is the median of this many rows, its own the last
    settings: dict[str, Any]  # that decide a curve, by dotted name
    per_step: dict[str, float]  # tokens_seen and images_seen at the last step, divided by it
    made_from: str  # "8 runs: 5 seeds, 3 machines"


@dataclass(frozen=True)
class Verdict:
    within: bool  # comparable, and each metric within
    words: str  # one sentence or more, for people
    by_metric: dict[str, str]  # how each metric leaves the band, "" within it; empty if not comparable


def load_band(name: str) -> Band:
    """Return the band of this name, or of a file. Raises FileNotFoundError, or ValueError for what is no band."""
    path = Path(name) if name.endswith(".json") else FOLDER / f"{name}.json"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in FOLDER.glob("*.json")))
        raise FileNotFoundError(f"reference={name}: no such band; expected {known}, or a file of `bench.bands`")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        keys = ("name", "steps", "smoothed_rows", "settings", "per_step", "made_from")
        curves = {metric: Curve(**curve) for metric, curve in found["curves"].items()}
        return Band(**{key: found[key] for key in keys}, curves=curves)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"reference={name}: {path} is not a file of `python -m bench.bands` ({error!r})") from None


def compare_folder(run: Path, band: Band) -> Verdict:
    """Compare a run folder's metrics.jsonl, if its config.yaml is comparable; a row being written does not count."""
    return compare(rows_of(run), band, read_yaml(str(run / "config.yaml")))


def rows_of(run: Path) -> list[dict[str, Any]]:
    """Return the whole rows of a run's metrics.jsonl; none if there is no file."""
    file = run / "metrics.jsonl"
    lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
    return [loads(line) for line in lines if line.endswith(b"\n")]


def compare(rows: Sequence[Mapping[str, Any]], band: Band, config: Mapping[str, Any] | None = None) -> Verdict:
    """Compare a run's rows of metrics.jsonl; of `config`, its config as nested mappings, what decides the curves.

    Without `config` the caller vouches for it.
    """
    steps = set(band.steps)
    rows = [row for row in rows if row["step"] in steps and any(row.get(metric) is not None for metric in band.curves)]
    if differ := differences(config, band) if config is not None else []:
        more = f" and {len(differ) - 4} more" if len(differ) > 4 else ""
        return Verdict(False, f"not comparable with the band of {band.name}: {'; '.join(differ[:4])}{more}", {})
    if len(rows) < LEAST_ROWS:
        return Verdict(False, f"too short to compare with the band of {band.name}: {len(rows)} of its rows", {})
    if other := _other_data(rows[-1], band):
        return Verdict(False, f"not comparable with the band of {band.name}: {other}", {})
    by_step = {row["step"]: row for row in rows}
    found = {metric: _leaves(metric, by_step, band) for metric in band.curves}
    by_metric = {metric: how for metric, how in found.items() if how is not None}
    last = f"up to step {max(by_step)}"
    if left := [how for how in by_metric.values() if how]:
        words = f"outside the band of {band.name} ({band.made_from}) {last}: {'; '.join(left)}"
        return Verdict(False, words, by_metric)
    names = ", ".join(NAMES.get(metric, metric) for metric in by_metric)
    return Verdict(True, f"within the band of {band.name} ({band.made_from}) {last}: {names}", by_metric)


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that decide a run's curves, by dotted name."""
    found = {name: value for name, value in leaves(config) if name.startswith(GROUPS)}
    return {name: value for name, value in found.items() if name not in NOT_OF_THE_CURVE and name[-5:] != ".path"}


def differences(config: Mapping[str, Any], band: Band) -> list[str]:
    """Return a phrase for each setting that is not the band's. One that only one of them knows is off by default,
    unless it is a source's."""
    mine = settings_of(config)
    known = [
        n for n in {**band.settings, **mine} if n.startswith("data.sources.") or (n in mine and n in band.settings)
    ]
    pairs = {name: (mine.get(name, "absent"), band.settings.get(name, "absent")) for name in known}
    return [
        f"{n} is {_shown(is_)}, the band's {_shown(its)}" for n, (is_, its) in pairs.items() if not _equal(is_, its)
    ]


def smoothed(values: Sequence[float | None], rows: int) -> list[float | None]:
    """Return at each place the median of the last `rows` values, its own the last; None where there is no value."""
    found: list[float | None] = []
    for i, value in enumerate(values):
        window = [v for v in values[max(0, i + 1 - rows) : i + 1] if v is not None]
        found.append(None if value is None else median(v if v == v else math.inf for v in window))
    return found


def _leaves(metric: str, by_step: Mapping[int, Mapping[str, Any]], band: Band) -> str | None:
    """Return how one metric leaves the band, "" within it; None: no row has it."""
    values = smoothed([by_step.get(step, {}).get(metric) for step in band.steps], band.smoothed_rows)
    curve = band.curves[metric]
    all_of = zip(band.steps, values, curve.low, curve.high, strict=True)
    rows = [(step, value, low, high) for step, value, low, high in all_of if value is not None]
    if not rows:
        return None
    below, above = ([row for row in rows if row[1] < row[2]], [row for row in rows if row[1] > row[3]])
    newest = [row for row in below + above if row in rows[-ALLOWED_ROWS - 1 :]]
    if len(newest) <= ALLOWED_ROWS and len(below) + len(above) <= max(ALLOWED_ROWS, ALLOWED_SHARE * len(rows)):
        return ""
    way, outside = ("above", above) if len(above) >= len(below) else ("below", below)
    (first, *_), (last, value, low, high) = outside[0], outside[-1]
    where = f"from step {first} {'on' if last == rows[-1][0] else f'to {last}'}: {value:.3g} at step {last}"
    return f"{NAMES.get(metric, metric)} is {way} it {where}, expected {low:.3g} to {high:.3g}"


def _other_data(row: Mapping[str, Any], band: Band) -> str:
    """Return in what way the data of a run is not the band's, by its tokens and images a step; nothing if it is."""
    for name, expected in band.per_step.items():
        mine = row.get(name, 0) / row["step"]
        if abs(mine / expected - 1) > DATA_MAY_DIFFER:
            return f"other data: {mine:.0f} {name.removesuffix('_seen')} a step, the band's {expected:.0f}"
    return ""


def _equal(one: Any, other: Any) -> bool:
    """Compare as YAML does: 1e-5 and 0.00001, a tuple and a list, are the same."""
    numbers = [isinstance(value, int | float) and not isinstance(value, bool) for value in (one, other)]
    return math.isclose(one, other, rel_tol=1e-9) if all(numbers) else _plain(one) == _plain(other)


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _plain(value: Any) -> Any:
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value
