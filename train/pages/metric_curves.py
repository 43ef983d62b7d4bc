"""Which numbers of metrics.jsonl are drawn together, and in what unit: the curves of one run, or of several.

Numbers of one unit share a chart where a page shows one run: training's, the held-out ones of the raw weights and of
their average, those of each source. Where it shows several runs, each number has a chart and the curves are the runs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from train.pages.metric_columns import Series
from train.pages.page import block
from train.pages.report_inputs import RunInputs
from train.pages.svg_chart import Chart, Curve, draw_chart

NATS, SQUARED = "nats a text target", "mean squared error of the prediction"
# Held-out losses: (kind, title, unit). Text loss and x0 error join training's, which have their unit.
HELD_OUT = (
    ("image_loss", "Image loss, held-out", f"{SQUARED}, over all timesteps"),
    ("captioning_loss", "Captioning loss, held-out", "nats a token of captions after their image"),
)


@dataclass(frozen=True)
class Group:
    """Numbers that one chart shows: by what each is called, its name in metrics.jsonl."""

    title: str
    unit: str
    scale: str  # log or zero, as in svg_chart.Chart
    members: dict[str, str]
    exact: bool = False  # not noisy: nothing is smoothed
    divided_by: str = ""  # a name whose value each is divided by; tokens/: by the sum of all numbers of that prefix


def loss_groups(runs: Sequence[RunInputs]) -> list[Group]:
    text, image = _by_source(runs, "text_loss"), _by_source(runs, "image_loss")
    groups = [
        Group("Text loss", NATS, "log", {"training": "text_loss", **_held_out(runs, "text_loss")}),
        Group("Text loss by source", f"{NATS}, training", "log", text),
        Group("Image loss", f"{SQUARED}, training", "log", {"training": "image_loss"}),
        Group("Image loss by source", f"{SQUARED}, training", "log", image),
        Group("Image loss by order", f"{SQUARED}, training", "log", _by(runs, "image_loss_by_order/(.*)")),
    ]
    groups += [Group(title, unit, "log", _held_out(runs, kind)) for kind, title, unit in HELD_OUT]
    about = "mean squared, mean over bins of log SNR"
    return [*groups, Group("Error of x0", about, "log", {"training": "x0_error", **_held_out(runs, "x0_error")})]


def update_groups(runs: Sequence[RunInputs]) -> list[Group]:
    return [
        Group("Gradient norm", "before clipping, at the last step of each row", "log", {"all": "grad_norm"}),
        Group("Gradient norm by part", "before clipping", "log", _by(runs, "grad_norm/(.*)")),
        Group("Update to weight", "ratio of norms, by part", "log", _by(runs, "update_ratio/(.*)")),
        Group("Learning rate", "of AdamW", "zero", {"": "learning_rate"}, exact=True),
    ]


def data_groups(runs: Sequence[RunInputs]) -> list[Group]:
    tokens, kinds = _by_source(runs, "tokens"), {"text": "text_tokens", "image": "image_tokens"}
    return [
        Group("Tokens by source", "share of those trained on", "zero", tokens, divided_by="tokens/"),
        Group("Tokens by kind", "share of those trained on", "zero", kinds, divided_by="_tokens"),
        Group("Epoch by source", "passes over the source", "zero", _by(runs, "epoch/(.*)"), exact=True),
        Group(
            "Unused", "share of all token slots", "zero", {"padding": "padding_share", "idle rows": "idle_row_share"}
        ),
    ]


def speed_groups() -> list[Group]:
    mfu = {"MFU": "mfu", "HFU": "hfu", "MFU by Bagel's formula": "mfu_bagel"}
    return [
        Group("Tokens", "tokens a second, all ranks", "zero", {"": "tokens_per_s"}),
        Group("Images", "images a second, all ranks", "zero", {"": "images_per_s"}),
        Group("FLOPs", "share of the dense bf16 peak", "zero", mfu),
        Group("FLOP/s", "model TFLOP/s a rank", "zero", {"": "model_tflops_per_s_per_rank"}),
        Group("Slowest rank", "share of the time that others wait for it", "zero", {"": "slowest_lag_share"}),
        Group("Device memory", "GiB, peak of the largest rank", "zero", {"": "device_memory_gib"}, exact=True),
        Group("Host memory", "GiB, resident, of the largest rank", "zero", {"": "host_memory_gib"}, exact=True),
    ]


def draw_groups(runs: Sequence[RunInputs], groups: Sequence[Group], bands: dict | None = None) -> str:
    """Return the charts that have something to show; `bands` by name: places, low, high of the reference."""
    figures = []
    for group in groups:
        members = {label: name for label, name in group.members.items() if any(len(r.columns[name]) for r in runs)}
        if len(runs) == 1:
            figures.append(_one_run(runs[0], group, members, bands or {}))
        else:
            figures += [_several(runs, group, label, name, bands or {}) for label, name in members.items()]
    shown = [figure for figure in figures if figure]
    return block("charts", shown) if shown else ""


def resumed_at(run: RunInputs) -> list[float]:
    """Return the steps at which the run was started again or went back, for marks in its charts."""
    kinds = [("start", "step"), ("went_back", "to")]
    found = [event.get(key) for kind, key in kinds for event in run.events if event.get("kind") == kind]
    return sorted({float(step) for step in found if isinstance(step, int) and step > 0})[:50]


def _one_run(run: RunInputs, group: Group, members: dict[str, str], bands: dict) -> str:
    curves = [
        _curve(run, group, name, label if len(members) > 1 else "", i)
        for i, (label, name) in enumerate(members.items())
    ]
    chart = _chart(run, group, group.title, members, bands, resumed_at(run), False)
    return draw_chart(chart, curves)


def _several(runs: Sequence[RunInputs], group: Group, label: str, name: str, bands: dict) -> str:
    curves = [_curve(run, group, name, run.name, i) for i, run in enumerate(runs)]
    alone = len(group.members) == 1 and label in ("", "training", "all")
    title = group.title if alone else f"{group.title.removesuffix(', held-out')}: {label}"
    return draw_chart(_chart(runs[0], group, title, {label: name}, bands, [], True), curves)


def _chart(
    run: RunInputs, group: Group, title: str, members: dict[str, str], bands: dict, marks: list[float], letters: bool
) -> Chart:
    banded = next((name for name in members.values() if name in bands), None)
    clip = run.setting("optim.clip_norm") if "grad_norm" in members.values() else None
    level = (float(clip), "clipped above") if isinstance(clip, int | float) and clip > 0 else None
    unit = group.unit + ("; grey: the reference" if banded else "")
    band = bands[banded] if banded else None
    return Chart(title, unit, group.scale, level=level, marks=marks, band=band, letters=letters)


def _curve(run: RunInputs, group: Group, name: str, label: str, style: int) -> Curve:
    series = run.columns[name]
    if group.divided_by and len(series):
        others = [n for n in run.columns.names if n.startswith(group.divided_by) or n.endswith(group.divided_by)]
        series = share_of(series, [run.columns[n] for n in others if n in group.members.values()])
    return Curve(label, series.steps, series.values, style, exact=group.exact or name.startswith("heldout"))


def share_of(series: Series, parts: Sequence[Series]) -> Series:
    """Return a series divided by the sum of `parts`, at the steps that all of them have."""
    steps = series.steps
    for part in parts:
        steps = np.intersect1d(steps, part.steps)
    total = sum((_at(part, steps) for part in parts), np.zeros(len(steps)))
    return Series(steps, _at(series, steps) / np.maximum(total, 1e-9))


def _at(series: Series, steps: np.ndarray) -> np.ndarray:
    """Return the newest value of a series at each of some of its steps."""
    order = np.argsort(series.steps, kind="stable")
    return series.values[order][np.searchsorted(series.steps[order], steps, side="right") - 1]


def _by(runs: Sequence[RunInputs], pattern: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for run in runs:
        found |= run.columns.matching(pattern)
    return found


def _by_source(runs: Sequence[RunInputs], number: str) -> dict[str, str]:
    """Return the numbers of each source; none of a single source, which are those of all."""
    found = _by(runs, f"{number}/(.*)")
    return found if len(found) > 1 else {}


def _held_out(runs: Sequence[RunInputs], kind: str) -> dict[str, str]:
    raw, average = _by(runs, f"heldout/(.*)/{kind}"), _by(runs, f"heldout_ema/(.*)/{kind}")
    return {f"held-out {n}": of for n, of in raw.items()} | {f"held-out {n}, EMA": of for n, of in average.items()}
