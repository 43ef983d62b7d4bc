"""The report's sections on evaluations: every score with its interval, scenes in large print, held-out losses."""

import re
from html import escape
from itertools import pairwise
from typing import Any

import numpy as np

from train.evaluation.scores import perplexity
from train.nested import leaves
from train.pages.page import block, fact_list, note, table
from train.pages.report_inputs import EvaluationInputs, LeftOut, ReportInputs
from train.pages.svg_chart import Chart, Curve, draw_chart, number

SPLITS = {
    "seen": ("Trained combinations", "each in wordings that training never used for it"),
    "unseen": ("Unseen combinations", "of colour, shape and position, in neither size"),
    "two_shapes": ("Two shapes", "in pairs that training never showed together"),
}
TASKS = {"text_to_image": ("Text → image", "drawn_verdict"), "image_to_text": ("Image → text", "caption_verdict")}
ABOUT = (
    "A picture is right when a judge that never sees the prompt finds the requested colour, shape and position in it; "
    "a caption is right when it names them. Training never used these wordings. Ranges: 95\u00a0%."
)
# Scores compare only at equal values of these.
SETTINGS = (
    *("training_step", "sampler", "steps", "spacing", "eta", "guidance", "image_guidance", "guidance_interval"),
    *("guidance_rescale", "guide", "clip_x0", "temperature", "top_p", "seed", "weights", "checkpoint"),
)
NOT_SETTINGS = ("scores.", "heldout.", "text_to_image.", "image_to_text.", "seconds", "checkpoint", "data.")
SHARE = re.compile("(scenes|edits|questions|choices)/.*")  # the scores that are shares of right answers


def scores(inputs: ReportInputs) -> str:
    """Return the tiles of the judge's scores, all scores in one table, and what they depend on."""
    done = [one for one in inputs.evaluations if one.facts]
    if not done:
        raise LeftOut(absent(inputs, "evaluation", "evaluation.json"))
    html = ""
    for one in done:
        if any(name.startswith("scenes/") for name in one.scores):
            html += f"<h3>{escape(one.name)}</h3>" if len(done) > 1 else ""
            html += "".join(_tiles(one, task) for task in TASKS)
    if html:
        html = note(ABOUT) + html
    html += f"<h3>All scores</h3>{_table(done)}" if any(one.scores for one in done) else ""
    for one in done:
        html += (f"<h4>{escape(one.name)}</h4>" if len(done) > 1 else "") + fact_list(_settings(one.facts))
    return html + (_different(done) if len(done) > 1 else "")


def _tiles(one: EvaluationInputs, task: str) -> str:
    title, verdict = TASKS[task]
    tiles = [_tile(one, task, split, verdict) for split in SPLITS]
    return f"<h4>{title}: all right</h4>{block('tiles', tiles)}"


def _tile(one: EvaluationInputs, task: str, split: str, verdict: str) -> str:
    """Return the share of right answers in large print, with the share of each attribute below."""
    score = one.scores.get(f"scenes/{task}/{'all' if split == 'seen' else f'all_{split}'}")
    if score is None:
        return ""
    name, what = SPLITS[split]
    verdicts = [example[verdict] for example in one.examples if example.get("split") == split and verdict in example]
    goals = ""
    for goal in verdicts[0] if verdicts else ():
        part = sum(verdict[goal] for verdict in verdicts) / len(verdicts)
        goals += f"<li>{escape(goal)}<span>{_percent(part)}</span></li>"
    share, count = score["value"], score["items"]
    counted = f"{round(share * count)} of {count}, {_interval(score, True)}"
    parts = [f"<span>{name}</span><b>{_percent(share)}</b>", note(counted), note(what), f"<ul>{goals}</ul>"]
    return block("tile main" if split == "seen" else "tile", parts)


def _table(done: list[EvaluationInputs]) -> str:
    """Return a row for each score; of several evaluations, whether their intervals lie apart."""
    rows, several = [], len(done) > 1
    for name in dict.fromkeys(name for one in done for name in one.scores):
        share = SHARE.fullmatch(name) is not None
        found = [one.scores.get(name) for one in done]
        cells = [f"<code>{escape(name)}</code>"]
        for score in found:
            if score is None or not isinstance(score.get("value"), int | float):
                cells.append("—")
                continue
            value = _percent(score["value"]) if share else number(score["value"])
            items = f" <small>{score['items']:,}</small>" if isinstance(score.get("items"), int) else ""
            cells.append(f"<b>{value}</b> <small>{_interval(score, share)}</small>{items}")
        rows.append([*cells, _apart(found)] if several else cells)
    head = ["score", *(escape(one.name) if several else "value, 95\u00a0% interval, items" for one in done)]
    about = note("The interval is of 95\u00a0%, then follows the number of items. Apart: no two intervals overlap.")
    return (about if several else "") + table(head + (["intervals"] if several else []), rows, "scores")


def _apart(found: list[dict[str, Any] | None]) -> str:
    """Return whether all intervals lie apart, so that the difference is not one of chance."""
    ends = [
        (score["low"], score["high"]) for score in found if score and None not in (score.get("low"), score.get("high"))
    ]
    if len(ends) < 2:
        return ""
    ends.sort()
    return "apart" if all(a[1] < b[0] for a, b in pairwise(ends)) else "overlap"


def _interval(score: dict[str, Any], share: bool) -> str:
    low, high = score.get("low"), score.get("high")
    if low is None or high is None:
        return ""
    return f"{100 * low:.0f}–{100 * high:.0f}\u00a0%" if share else f"{number(low)}–{number(high)}"


def _settings(facts: dict[str, Any]) -> dict[str, Any]:
    settings = {**facts.get("settings", {}), "training_step": facts.get("step")}
    settings |= {name: facts.get(name) for name in ("checkpoint", "seed", "weights")}
    if guide := facts.get("guide"):
        settings["guide"] = f"{guide['weights']} of step {guide['step']}"
    return {key.replace("_", " "): settings[key] for key in SETTINGS if settings.get(key) is not None}


def _different(done: list[EvaluationInputs]) -> str:
    """Return what is not the same in all evaluations, as scores compare only where the rest is."""
    facts = [{n: v for n, v in leaves(one.facts) if not n.startswith(NOT_SETTINGS)} for one in done]
    data = [{n: v for n, v in leaves({"data": one.facts.get("data", {})}) if n.endswith("fingerprint")} for one in done]
    facts = [mine | of_data for mine, of_data in zip(facts, data, strict=True)]
    names = dict.fromkeys(name for mine in facts for name in mine)
    rows = [
        [f"<code>{escape(name)}</code>", *(escape(str(mine.get(name, "—"))[:60]) for mine in facts)]
        for name in names
        if any(mine.get(name) != facts[0].get(name) for mine in facts)
    ]
    if not rows:
        return note("They were measured with the same settings on the same data.")
    head = ["differs", *(escape(one.name) for one in done)]
    return f"<h3>Differences between the evaluations</h3>{table(head, rows, 'texts')}"


def heldout(inputs: ReportInputs) -> str:
    rows, charts = [], []
    several = len(inputs.evaluations) > 1
    for one in inputs.evaluations:
        for name, loss in (one.facts.get("heldout") or {}).items():
            # null where the data has none of that kind; earlier versions wrote 0, or not all of them
            kinds = [loss.get(kind) for kind in ("text_loss", "image_loss", "captioning_loss", "x0_error")]
            text, *others = (f"{value:.4f}" if value else "—" for value in kinds)
            label = f"{one.name}: {name}" if several else name
            rows.append([escape(label), text, f"{perplexity(kinds[0]):.3g}" if kinds[0] else "—", *others])
            charts.append(_by_level(label, loss.get("x0_error_by_log_snr", {})))
    if not rows:
        raise LeftOut("No held-out losses were measured (train.evaluate heldout.NAME=FOLDER).")
    about = (
        "Each held-out document once, caption first; the captioning loss is that of captions after their picture. Text "
        "in nats a target; images as mean squared error of the prediction over all timesteps, so they are not "
        "comparable with the curve above where its timesteps are capped. The error of x0, the clean image that a "
        "prediction implies, is the mean over bins of log SNR, at noise levels that are the same in every run."
    )
    head = ["data", "text loss", "perplexity", "image loss", "captioning loss", "x0 error"]
    drawn = [chart for chart in charts if chart]
    return note(about) + table(head, rows, "losses") + (block("charts", drawn) if drawn else "")


def _by_level(name: str, bins: dict[str, dict[str, Any]]) -> str:
    """Return the error of x0 at the middle of each bin of log SNR that held images."""
    points = []
    for of_bin, found in bins.items():
        ends = re.fullmatch(r"(-?\d+)\.\.(-?\d+)", of_bin)
        if ends and found["images"]:
            points.append(((int(ends[1]) + int(ends[2])) / 2, found["error"]))
    places, values = np.array(sorted(points), dtype=np.float64).reshape(-1, 2).T
    chart = Chart("Error of x0", f"{name}: mean squared, by noise level", "log", "log SNR")
    return draw_chart(chart, [Curve("", places, values, exact=True)])


def absent(inputs: ReportInputs, what: str, file: str) -> str:
    """Say why an input is missing and which program writes it."""
    if what == "evaluation":
        program, folders = "train.evaluate", [str(one.folder) for one in inputs.evaluations]
    else:
        program, folders = "train.sample", [inputs.config.samples] if inputs.config.samples else []
    if not folders:
        return f"No folder is named ({what}=FOLDER, written by {program})."
    return f"{folders[0]}/{file} is not there yet, or empty; {program} writes it."


def _percent(share: float) -> str:
    return f"{100 * share:.1f}\u00a0%"
