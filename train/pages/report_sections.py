"""The sections of the report, in the order of the page: each turns ReportInputs into HTML.

A section that has nothing to show raises LeftOut with the sentence to print in its place.
"""

import importlib.metadata
import math
import platform
from collections.abc import Callable
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.pictures import from_unit, to_unit
from data.scene_judge import Verdict, judge, score
from data.scenes import parse_caption
from model.autoencoders import load_latent_space
from model.latent_space import Pixels, to_raw
from model.log_snr_bins import BINS, EDGES, WIDTH
from train.config import to_yaml
from train.pages.metric_curves import Chart, draw_chart, draw_charts
from train.pages.page import block, card, fact_list, image, mark, note, read_picture, spread, table
from train.pages.report_inputs import ReportConfig, ReportInputs

SPLITS = {
    "seen": ("Trained combinations", "each in wordings that training never used for it"),
    "unseen": ("Unseen combinations", "of colour, shape and position, in neither size"),
    "two_shapes": ("Two shapes", "in pairs that training never showed together"),
}
# Scores compare only at equal values of these.
SETTINGS = (
    *("training_step", "sampler", "steps", "spacing", "eta", "guidance", "guidance_interval", "guidance_rescale"),
    *("guide", "clip_x0", "temperature", "top_p", "seed", "weights"),
)
PACKAGES = ("torch", "diffusers", "numpy", "sentencepiece", "webdataset", "torchdata")


class LeftOut(Exception):
    """A section has nothing to show; the message is printed in its place."""


def _scores(inputs: ReportInputs) -> str:
    scores = inputs.evaluation
    if scores is None:
        raise LeftOut(_absent(inputs.config, "evaluation", "evaluation.json"))
    html = note(
        "A picture is right when a judge that never sees the prompt finds the requested colour, shape and position "
        "in it; a caption is right when it names them. Training never used these wordings. Ranges: 95\u00a0% (Wilson)."
    )
    if not any(name.startswith("scenes/") for name in scores["scores"]):
        raise LeftOut("The evaluation had no scenes to judge (train.evaluate scenes=FOLDER).")
    tasks = {"text_to_image": ("Text → image", "drawn_verdict"), "image_to_text": ("Image → text", "caption_verdict")}
    for task, (title, verdict) in tasks.items():
        tiles = block("tiles", [_tile(inputs, scores["scores"], task, split, verdict) for split in SPLITS])
        html += f"<h3>{title}: all right</h3>{tiles}"
    settings = {**scores["settings"], "training_step": scores["step"]}
    settings |= {"seed": scores["seed"], "weights": scores["weights"]}
    if guide := scores.get("guide"):
        settings["guide"] = f"{guide['weights']} of step {guide['step']}"
    shown = {key.replace("_", " "): settings[key] for key in SETTINGS if settings.get(key) is not None}
    return html + fact_list(shown)


def _tile(inputs: ReportInputs, scores: dict[str, Any], task: str, split: str, verdict: str) -> str:
    """Return the share of right answers in large print, with the share of each attribute below."""
    score = scores.get(f"scenes/{task}/{'all' if split == 'seen' else f'all_{split}'}")
    if score is None:
        return ""
    name, what = SPLITS[split]
    share, count = score["value"], score["items"]
    verdicts = [example[verdict] for example in inputs.examples if example.get("split") == split]
    goals = ""
    for goal in verdicts[0] if verdicts else ():
        part = sum(verdict[goal] for verdict in verdicts) / len(verdicts)
        goals += f"<li>{escape(goal)}<span>{_percent(part)}</span></li>"
    interval = f"{100 * score['low']:.0f}–{100 * score['high']:.0f}\u00a0%"
    number = f"{round(share * count)} of {count}, {interval}"
    parts = [f"<span>{name}</span><b>{_percent(share)}</b>", note(number), note(what), f"<ul>{goals}</ul>"]
    return block("tile main" if split == "seen" else "tile", parts)


def _prompts(inputs: ReportInputs) -> str:
    if not inputs.samples:
        raise LeftOut(_absent(inputs.config, "samples", "results.jsonl"))
    drawn: dict[str, list[tuple[str, Verdict | None]]] = {}
    described = []
    for result in inputs.samples:
        prompt = result["prompt"]
        if prompt is None:
            path, texts = Path(result["images"][0]), " ".join(part["text"] for part in result["output"])
            described.append(card(image(read_picture(path.parent, path.name), texts), texts, {}))
            continue
        for name in [part["image"] for part in result["output"] if "image" in part]:
            pixels = _picture(inputs.config.samples, name)
            verdict = _judged(pixels, prompt)
            sign = "" if verdict is None else f"<figcaption>{mark(verdict.all_right)}</figcaption>"
            drawn.setdefault(prompt, []).append((f"<figure>{image(pixels, prompt)}{sign}</figure>", verdict))
    first = inputs.samples[0]
    html = note(
        f"Step {first.get('step', '?')}, seed {first.get('seed', '?')}; every picture drawn is shown, none chosen. "
        "✓ and ✗ are the judge's verdicts, given where it understands the prompt."
    )
    for prompt, pictures in drawn.items():
        verdicts = [verdict.all_right for _, verdict in pictures if verdict is not None]
        tally = note(f"{sum(verdicts)} of {len(verdicts)} right") if verdicts else ""
        row = block("row", [figure for figure, _ in pictures])
        html += block("prompt", [f"<div><p>{escape(prompt)}</p>{tally}</div>", row])
    return html + (f"<h3>Described pictures</h3>{block('cards', described)}" if described else "")


def _curves(inputs: ReportInputs) -> str:
    figures = draw_charts(inputs.rows, inputs.recipe.optim.clip_norm if inputs.recipe else None)
    if not figures:
        raise LeftOut(f"Fewer than two rows in {inputs.config.run}/metrics.jsonl yet: nothing to draw.")
    return block("charts", figures)


def _previews(inputs: ReportInputs) -> str:
    sheets = sorted((Path(inputs.config.run) / "previews").glob("step-*.png"))
    if not sheets:
        raise LeftOut("The run has saved no preview sheets (preview.interval_steps of train.pretrain).")
    figures = []
    for path in spread(sheets, inputs.config.num_previews):
        step = path.stem.removeprefix("step-").lstrip("0") or "0"
        sheet = image(read_picture(path.parent, path.name), f"pictures at step {step}", width=360)
        figures.append(f"<figure>{sheet}<figcaption>step {escape(step)}</figcaption></figure>")
    about = f"The same prompts and the same noise each time. {len(figures)} of {len(sheets)} sheets."
    return note(about) + block("sheets", figures)


def _by_split(inputs: ReportInputs, answer: str) -> str:
    """Return, for each split, every failure and then some right answers: pictures `drawn`, or each `caption`."""
    verdict = f"{answer}_verdict"

    def show(example: dict[str, Any]) -> str:
        prompt, failed, below = example["prompt"], not all(example[verdict].values()), ""
        pixels = _picture(inputs.config.evaluation, example["drawn" if answer == "drawn" else "true"])
        if failed and answer == "caption":
            below = note(f"true: {prompt}")
        elif failed and pixels is not None:
            below = note(f"judge sees {_seen(pixels)}")
        text = prompt if answer == "drawn" else example["caption"]
        return card(image(pixels, prompt), text, example[verdict], below)

    examples = [example for example in inputs.examples if "split" in example]
    if not examples:
        raise LeftOut(_absent(inputs.config, "evaluation", "examples.jsonl"))
    html = ""
    for split in dict.fromkeys(example["split"] for example in examples):
        name, what = SPLITS.get(split, (split, ""))
        of_split = [example for example in examples if example["split"] == split]
        right = [example for example in of_split if all(example[verdict].values())]
        failed = [example for example in of_split if not all(example[verdict].values())]
        some = spread(right, inputs.config.num_right)
        html += f"<h3>{escape(name)}: {len(right)} of {len(of_split)} right</h3>{note(what)}"
        headings = {f"Every failure: {len(failed)}": failed, f"Right: {len(some)} of {len(right)} shown": some}
        for heading, shown in headings.items():
            html += f"<h4>{heading}</h4>{block('cards', list(map(show, shown)))}" if shown else ""
    return html


def _codec(inputs: ReportInputs) -> str:
    config = inputs.config
    name = config.vae or (inputs.recipe.vae if inputs.recipe else None)
    if name in (None, Pixels.hash):
        raise LeftOut("No VAE is named (vae=FOLDER, or vae in the run's config), or pictures are kept as such.")
    examples = [example for example in inputs.examples if "true" in example]
    if not examples:
        raise LeftOut("Its pictures come from the evaluation's examples, and there are none yet.")
    try:
        space = load_latent_space(name)
    except (FileNotFoundError, ValueError) as error:
        raise LeftOut(f"The VAE could not be loaded: {error}") from None
    cards, verdicts = [], []
    for example in spread(examples, config.num_reconstructions):
        prompt, original = example["prompt"], _picture(config.evaluation, example["true"])
        if original is None:
            continue
        stored = space.encode(torch.from_numpy(to_unit(original[None])))
        copy = from_unit(space.decode(to_raw(stored[:, : space.channels])).numpy())[0]  # of moments, the mean
        pair = block("pair", [image(original, "original"), image(copy, "reconstruction")])
        verdict = _judged(copy, prompt)
        verdicts += [] if verdict is None else [verdict.all_right]
        difference = np.abs(copy.astype(np.float64) - original).mean()
        below = note(f"mean absolute error {difference:.1f} of 255")
        cards.append(card(pair, prompt, {} if verdict is None else vars(verdict), below))
    about = "Original above, its reconstruction from the latent mean below; no drawing can be better than these."
    about += f" The judge finds {sum(verdicts)} of {len(verdicts)} reconstructions right." if verdicts else ""
    return note(about) + block("cards", cards)


def _heldout(inputs: ReportInputs) -> str:
    losses = (inputs.evaluation or {}).get("heldout")
    if not losses:
        raise LeftOut("No held-out losses were measured (train.evaluate heldout.NAME=FOLDER).")
    rows, charts = [], []
    for name, loss in losses.items():
        # null where the data has none of that kind; evaluations of earlier versions have not all of them
        kinds = [loss.get(kind) for kind in ("text_loss", "image_loss", "captioning_loss", "x0_error")]
        text, picture, caption, x0_error = (f"{value:.4f}" if value else "—" for value in kinds)
        perplexity = f"{math.exp(min(kinds[0], 100)):.3g}" if kinds[0] else "—"
        rows.append([escape(name), text, perplexity, picture, caption, x0_error])
        bins = loss.get("x0_error_by_log_snr", {})
        known = [(low, bins[of_bin]) for low, of_bin in zip(EDGES, BINS, strict=False) if of_bin in bins]
        points = [(low + WIDTH / 2, found["error"]) for low, found in known if found["images"]]
        chart = Chart(f"x0-{len(rows)}", "Error of x0", f"{name}: mean squared, by noise level", "log", "log SNR")
        charts += [figure] if (figure := draw_chart(chart, points)) else []
    about = (
        "Each held-out document once, caption first; the captioning loss is that of captions after their picture. Text "
        "in nats a target; images as mean squared error of the prediction over all timesteps, so they are not "
        "comparable with the curve above where its timesteps are capped. The error of x0, the clean image that a "
        "prediction implies, is the mean over bins of log SNR, at noise levels that are the same in every run."
    )
    head = ["data", "text loss", "perplexity", "image loss", "captioning loss", "x0 error"]
    return note(about) + table(head, rows, "losses") + (block("charts", charts) if charts else "")


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
    if inputs.recipe is None:
        raise LeftOut(f"{inputs.config.run} has no config.yaml.")
    return f"<details><summary>All settings of the run</summary><pre>{escape(to_yaml(inputs.recipe))}</pre></details>"


def _making(inputs: ReportInputs) -> str:
    versions = {"python": platform.python_version()}
    versions |= {package: importlib.metadata.version(package) for package in PACKAGES}
    versions["platform"] = f"{platform.system()} {platform.machine()}"
    return f"<pre>{escape(inputs.command)}</pre>{fact_list(versions)}{''.join(map(note, inputs.unreadable))}"


def _absent(config: ReportConfig, what: str, file: str) -> str:
    """Say why an input is missing and which program writes it."""
    folder, program = getattr(config, what), {"evaluation": "train.evaluate", "samples": "train.sample"}[what]
    if folder is None:
        return f"No folder is named ({what}=FOLDER, written by {program})."
    return f"{Path(folder) / file} is not there yet, or empty; {program} writes it."


def _picture(folder: str | None, name: str) -> np.ndarray | None:
    """Read a picture that a record of the program writing to `folder` names."""
    assert folder is not None  # else there would be no records
    return read_picture(Path(folder), name)


def _judged(pixels: np.ndarray | None, prompt: str) -> Verdict | None:
    """Judge a picture by its prompt; None without a picture or where the prompt is not a scene's caption."""
    scene = parse_caption(prompt)
    if pixels is None or scene is None or pixels.shape[0] != pixels.shape[1]:
        return None
    return score(pixels, scene)


def _seen(pixels: np.ndarray) -> str:
    """Say what the judge finds in a picture."""
    found = [f"{shape.colour} {shape.shape}, {shape.position}" for shape in judge(pixels)]
    return "; ".join(found) if 0 < len(found) <= 2 else f"{len(found)} shapes"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}\u00a0%"


SECTIONS: tuple[tuple[str, str, Callable[[ReportInputs], str]], ...] = (
    ("scores", "Scores", _scores),
    ("prompts", "Drawn from prompts", _prompts),
    ("curves", "Training", _curves),
    ("previews", "Pictures during training", _previews),
    ("drawings", "Held-out prompts", partial(_by_split, answer="drawn")),
    ("captions", "Captions of held-out pictures", partial(_by_split, answer="caption")),
    ("codec", "What the VAE keeps", _codec),
    ("heldout", "Held-out losses", _heldout),
    ("seconds", "Seconds by stage", _seconds),
    ("settings", "Config", _settings),
    ("making", "How this page was made", _making),
)
