"""The report's sections of samples: drawn from prompts, best and worst, failures, what the VAE keeps."""

from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from data.pictures import from_unit, to_unit
from data.scene_judge import Verdict, judge, score
from data.scenes import parse_caption
from train.pages.page import block, card, image, mark, note, read_picture, spread
from train.pages.report_inputs import EvaluationInputs, LeftOut, ReportInputs
from train.pages.report_scores import SPLITS, absent
from train.pages.svg_chart import number


def prompts(inputs: ReportInputs) -> str:
    if not inputs.samples:
        raise LeftOut(absent(inputs, "samples", "results.jsonl"))
    drawn: dict[str, list[tuple[str, Verdict | None]]] = {}
    described = []
    for result in inputs.samples:
        prompt = result["prompt"]
        if prompt is None:
            path, texts = Path(result["images"][0]), " ".join(part["text"] for part in result["output"])
            described.append(card(image(read_picture(path.parent, path.name), texts), texts, {}))
            continue
        for name in [part["image"] for part in result["output"] if "image" in part]:
            assert inputs.config.samples is not None  # else there would be no results
            pixels = read_picture(Path(inputs.config.samples), name)
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


def best_and_worst(inputs: ReportInputs) -> str:
    """Return the examples with the highest and lowest scores, of each kind of score and each evaluation."""
    html, number_of = "", inputs.config.num_best
    for one in inputs.evaluations:
        scored = [example for example in one.examples if isinstance(example.get("score"), int | float)]
        for kind in dict.fromkeys(str(example.get("score_name", "score")) for example in scored):
            of_kind = [example for example in scored if str(example.get("score_name", "score")) == kind]
            of_kind.sort(key=lambda example: -example["score"])
            best = of_kind[: min(number_of, -(-len(of_kind) // 2))]
            worst = of_kind[len(best) :][-number_of:][::-1] if number_of else []
            title = f"{one.name}: {kind}" if len(inputs.evaluations) > 1 else kind
            html += f"<h3>{escape(title)}, of {len(of_kind):,} examples</h3>"
            for heading, shown in (("Best", best), ("Worst", worst)):
                cards = [_scored(one, example) for example in shown]
                html += f"<h4>{heading}</h4>{block('cards', cards)}" if cards else ""
    if not html:
        raise LeftOut("No evaluation has examples with scores of their own.")
    return note("By the score of each example; higher is better.") + html


def _scored(one: EvaluationInputs, example: dict[str, Any]) -> str:
    """Return a card with the example's pictures, those that it has, its texts and its score."""
    pictures = [name for name in ("drawn", "true") if isinstance(example.get(name), str)]
    shown = [image(read_picture(one.folder, example[name]), name) for name in pictures]
    texts = {name: example[name] for name in ("caption", "answer", "reference") if isinstance(example.get(name), str)}
    below = note(f"score {number(float(example['score']))}") + "".join(note(f"{n}: {t}") for n, t in texts.items())
    return card(
        block("pair", shown) if shown else "", str(example.get("prompt") or example.get("question") or ""), {}, below
    )


def by_split(inputs: ReportInputs, answer: str) -> str:
    """Return, for each split, every failure and then some right answers: pictures `drawn`, or each `caption`."""
    html, verdict = "", f"{answer}_verdict"
    for one in inputs.evaluations:
        examples = [example for example in one.examples if "split" in example and verdict in example]
        for split in dict.fromkeys(example["split"] for example in examples):
            name, what = SPLITS.get(split, (split, ""))
            name = f"{one.name}: {name}" if len(inputs.evaluations) > 1 else name
            of_split = [example for example in examples if example["split"] == split]
            right = [example for example in of_split if all(example[verdict].values())]
            failed = [example for example in of_split if not all(example[verdict].values())]
            some = spread(right, inputs.config.num_right)
            html += f"<h3>{escape(name)}: {len(right)} of {len(of_split)} right</h3>{note(what)}"
            headings = {f"Every failure: {len(failed)}": failed, f"Right: {len(some)} of {len(right)} shown": some}
            for heading, shown in headings.items():
                cards = [_judged_card(one, example, answer) for example in shown]
                html += f"<h4>{heading}</h4>{block('cards', cards)}" if cards else ""
    if not html:
        raise LeftOut(absent(inputs, "evaluation", "examples.jsonl"))
    return html


def _judged_card(one: EvaluationInputs, example: dict[str, Any], answer: str) -> str:
    prompt, verdict, below = example["prompt"], example[f"{answer}_verdict"], ""
    failed = not all(verdict.values())
    pixels = read_picture(one.folder, example["drawn" if answer == "drawn" else "true"])
    if failed and answer == "caption":
        below = note(f"true: {prompt}")
    elif failed and pixels is not None:
        below = note(f"judge sees {_seen(pixels)}")
    shown = image(pixels, prompt)
    if isinstance(example.get("before"), str):  # an edit's
        shown = block("pair", [image(read_picture(one.folder, example["before"]), "before"), shown])
    return card(shown, prompt if answer == "drawn" else example["caption"], verdict, below)


def codec(inputs: ReportInputs) -> str:
    config = inputs.config
    if config.vae is None:
        raise LeftOut("No VAE is named (vae=FOLDER).")
    pairs = [(one, example) for one in inputs.evaluations[:1] for example in one.examples if "true" in example]
    if not pairs:
        raise LeftOut("Its pictures come from the evaluation's examples, and there are none yet.")
    import torch  # with the next two, seconds that other pages need not wait

    from model.autoencoders import load_latent_space
    from model.latent_space import Pixels, to_raw

    if config.vae == Pixels.hash:
        raise LeftOut("Pictures are kept as such, without a VAE.")
    try:
        space = load_latent_space(config.vae)
    except (FileNotFoundError, ValueError) as error:
        raise LeftOut(f"The VAE could not be loaded: {error}") from None
    cards, verdicts = [], []
    for one, example in spread(pairs, config.num_reconstructions):
        prompt, original = example["prompt"], read_picture(one.folder, example["true"])
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
