"""The sections of the report, in the order of the page: each turns ReportInputs into HTML.

A section that has nothing to show raises LeftOut with the sentence to print in its place.
"""

import importlib.metadata
import platform
from collections.abc import Callable
from functools import partial
from html import escape

import numpy as np

from train.pages.metric_curves import data_groups, draw_groups, loss_groups, speed_groups, update_groups
from train.pages.noise_map import draw_noise_maps
from train.pages.page import block, fact_list, image, note, read_picture, spread, table
from train.pages.report_examples import best_and_worst, by_split, codec, prompts
from train.pages.report_health import differences, health, timelines
from train.pages.report_inputs import LeftOut, ReportInputs
from train.pages.report_scores import heldout, scores
from train.pages.time_shares import TimeShares, time_table

PACKAGES = ("torch", "diffusers", "numpy", "sentencepiece", "webdataset", "torchdata")
# The switch between both scales: the stylesheet hides the drawings of the one that is not chosen.
SWITCH = (
    '<input type="radio" name="scale" id="scale-log" checked><label for="scale-log">logarithmic</label>'
    '<input type="radio" name="scale" id="scale-linear"><label for="scale-linear">linear</label>'
)


def _curves(inputs: ReportInputs) -> str:
    bands = {}
    comparable = any(verdict.by_metric for verdict in inputs.verdicts.values())  # else a curve beside it misleads
    if comparable and (band := inputs.band) is not None:
        for name, curve in band.curves.items():
            bands[name] = tuple(np.array(numbers, dtype=float) for numbers in (band.steps, curve.low, curve.high))
    groups = {"Losses": loss_groups, "Gradients and updates": update_groups, "Data": data_groups}
    html = ""
    for title, groups_of in groups.items():
        drawn = draw_groups(inputs.runs, groups_of(inputs.runs), bands)
        html += f"<h3>{title}</h3>{drawn}" if drawn else ""
    if not html:
        raise LeftOut(f"Fewer than two rows in {inputs.runs[0].folder}/metrics.jsonl yet: nothing to draw.")
    about = (
        "Strong: the moving mean over a thirtieth of the rows; its end is the number shown. Faint: every row. Dots: "
    )
    about += "held-out data. "
    one = "Dashed uprights: where the run began again."
    about += one if len(inputs.runs) == 1 else "The letter at a curve's end names its run."
    return note(about) + SWITCH + html


def _noise(inputs: ReportInputs) -> str:
    maps = draw_noise_maps(inputs.runs)
    if not maps:
        raise LeftOut("No errors of x0 by noise level yet: too few rows, or no images in them.")
    return (
        note("Noise is at the bottom, clean pictures at the top. Lighter is better: the error of x0 is smaller.") + maps
    )


def _speed(inputs: ReportInputs) -> str:
    of_runs = {run.name: found for run in inputs.runs if (found := TimeShares.of(run.columns)) is not None}
    drawn = draw_groups(inputs.runs, speed_groups())
    if not (of_runs or drawn):
        raise LeftOut(f"Fewer than two rows in {inputs.runs[0].folder}/metrics.jsonl yet: nothing to draw.")
    titles = [name if len(inputs.runs) > 1 else "Where time went" for name in of_runs]
    figures = [found.draw(title) for title, found in zip(titles, of_runs.values(), strict=True)]
    times = f"<h3>Where time went</h3>{block('beside', [time_table(of_runs), *figures])}" if of_runs else ""
    return times + (f"<h3>Throughput and memory</h3>{drawn}" if drawn else "")


def _previews(inputs: ReportInputs) -> str:
    html = ""
    for run in inputs.runs:
        sheets = sorted((run.folder / "previews").glob("step-*.png"))
        figures = []
        for path in spread(sheets, inputs.config.num_previews):
            step = path.stem.removeprefix("step-").lstrip("0") or "0"
            sheet = image(read_picture(path.parent, path.name), f"pictures at step {step}", width=360)
            figures.append(f"<figure>{sheet}<figcaption>step {escape(step)}</figcaption></figure>")
        if figures:
            html += f"<h3>{escape(run.name)}</h3>" if len(inputs.runs) > 1 else ""
            html += note(f"The same prompts and the same noise each time. {len(figures)} of {len(sheets)} sheets.")
            html += block("sheets", figures)
    if not html:
        raise LeftOut("The run has saved no preview sheets (preview.interval_steps of train.pretrain).")
    return html


def _seconds(inputs: ReportInputs) -> str:
    if not inputs.seconds:
        raise LeftOut("No finished stages are recorded (train.demo records them; stages=FOLDER).")
    longest = max(*inputs.seconds.values(), 1e-9)
    rows = []
    for name, taken in inputs.seconds.items():
        rows.append([escape(name), f"{taken:.1f}", f'<i style="width:{100 * taken / longest:.1f}%"></i>'])
    rows.append(["total", f"{sum(inputs.seconds.values()):.1f}", ""])
    return table(["stage", "seconds", ""], rows, "bars")


def _settings(inputs: ReportInputs) -> str:
    html = ""
    for run in inputs.runs:
        if (path := run.folder / "config.yaml").is_file():
            text = escape(path.read_text(encoding="utf-8"))
            html += f"<details><summary>All settings of {escape(run.name)}</summary><pre>{text}</pre></details>"
    if not html:
        raise LeftOut(f"{inputs.runs[0].folder} has no config.yaml.")
    return html


def _making(inputs: ReportInputs) -> str:
    versions = {"python": platform.python_version()}
    versions |= {package: importlib.metadata.version(package) for package in PACKAGES}
    versions["platform"] = f"{platform.system()} {platform.machine()}"
    return f"<pre>{escape(inputs.command)}</pre>{fact_list(versions)}{''.join(map(note, inputs.unreadable))}"


SECTIONS: tuple[tuple[str, str, Callable[[ReportInputs], str]], ...] = (
    ("health", "Health", health),
    ("timeline", "What happened when", timelines),
    ("differences", "Differences of config", differences),
    ("scores", "Scores", scores),
    ("prompts", "Drawn from prompts", prompts),
    ("curves", "Training", _curves),
    ("noise", "Noise levels", _noise),
    ("speed", "Speed", _speed),
    ("previews", "Pictures during training", _previews),
    ("examples", "Best and worst", best_and_worst),
    ("drawings", "Held-out prompts", partial(by_split, answer="drawn")),
    ("captions", "Captions of held-out pictures", partial(by_split, answer="caption")),
    ("codec", "What the VAE keeps", codec),
    ("heldout", "Held-out losses", heldout),
    ("seconds", "Seconds by stage", _seconds),
    ("settings", "Config", _settings),
    ("making", "How this page was made", _making),
)
