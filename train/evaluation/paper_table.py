"""The paper's row beside ours: Transfusion (Zhou et al. 2024), Table 7, its controlled runs of 0.5T tokens.

The row is that of the nearest number of parameters, and of the same patches. What was not measured,
or only in part, is a dash; where settings differ from the paper's, the table says so.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from model.modalities import text_name
from model.transfusion import Transfusion, TransfusionConfig
from train.evaluation.scores import Score

STEPS, GUIDANCE, SAMPLER = 250, 3.0, "ddpm"  # of the paper's ablations
SUITE = ("hellaswag", "piqa", "siqa", "winogrande", "arc_easy", "arc_challenge", "boolq")


class Column(NamedTuple):
    title: str
    score: str | None  # its name in evaluation.json; None: the mean of SUITE
    scale: float  # of ours, in the paper's unit
    needs: str  # what to give for it


COLUMNS = (
    Column("C4 PPL", "heldout/c4/perplexity", 1, "heldout.c4="),
    Column("Wikipedia PPL", "heldout/wikipedia/perplexity", 1, "heldout.wikipedia="),
    Column("Llama 2 suite, %", None, 100, f"choices.NAME= of all of {', '.join(SUITE)}"),
    Column("COCO CIDEr", "captioning/cider", 100, "captioning.pictures="),
    Column("COCO FID", "pictures/inception_fid", 1, "generation.inception=true"),
    Column("COCO CLIP", "pictures/clip_score", 1, "generation.clip="),
)
# By patches and size: the columns in order.
PAPER: dict[str, dict[str, tuple[float, ...]]] = {
    "linear": {
        "0.16B": (14.8, 8.8, 44.2, 6.2, 37.6, 20.0),
        "0.37B": (12.0, 7.0, 47.9, 11.1, 21.5, 22.4),
        "0.76B": (10.4, 6.0, 51.7, 16.0, 20.3, 24.0),
        "1.4B": (9.5, 5.4, 53.8, 19.1, 19.4, 24.3),
        "7B": (7.7, 4.3, 61.5, 27.2, 18.6, 25.9),
    },
    "unet": {
        "0.16B": (14.4, 8.5, 45.7, 15.3, 18.8, 23.9),
        "0.37B": (11.8, 6.9, 48.8, 21.1, 18.1, 24.9),
        "0.76B": (10.3, 5.9, 51.9, 25.4, 16.7, 25.4),
        "1.4B": (9.4, 5.4, 53.4, 28.1, 16.6, 25.7),
        "7B": (7.8, 4.3, 61.1, 33.7, 16.0, 26.5),
    },
}


def nearest_size(model: Transfusion) -> tuple[str, float]:
    """Return the paper's size nearest to a model, and the billions of parameters that decide it.

    Those are the embeddings' and, of one modality, the trunk's: the paper's sizes leave out patches and U-Nets.
    """
    kept = [
        parameter.numel()
        for name, parameter in model.named_parameters()
        if not name.startswith("patches.") and text_name(name) == name
    ]
    billions = sum(kept) / 1e9
    return min(PAPER["linear"], key=lambda size: abs(math.log(float(size[:-1]) / billions))), billions


def paper_table(model: Transfusion, results: Mapping[str, Any]) -> str:
    """Return the table of one evaluation, whose evaluation.json `results` is."""
    config, (size, billions) = model.config, nearest_size(model)
    scores = {name: Score(**score) for name, score in results["scores"].items()}
    ours, missing = [], []
    for column in COLUMNS:
        found = scores.get(column.score) if column.score is not None else _suite(scores)
        ours.append("–" if found is None else _with_interval(found, column.scale))
        if found is None:
            missing.append(f"{column.title}: {column.needs}")
    rows = [
        ("", *(column.title for column in COLUMNS)),
        (f"paper, {size}, {config.patches}", *(f"{value:g}" for value in PAPER[config.patches][size])),
        (f"this model, {billions:.2g}B", *ours),
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, *(f"not measured: {name}" for name in missing), *_differences(config, results)])


def _suite(scores: Mapping[str, Score]) -> Score | None:
    """Return the mean over SUITE; per character but for BoolQ, whose choices are two words."""
    kinds = {name: "accuracy" if name == "boolq" else "accuracy_per_character" for name in SUITE}
    found = [scores.get(f"choices/{name}/{kind}") for name, kind in kinds.items()]
    parts = [score for score in found if score is not None]
    if len(parts) < len(SUITE):
        return None
    # Each interval is 1.96 standard errors wide, nearly; those of independent sets add in squares.
    half = math.sqrt(sum(((score.high or 0) - (score.low or 0)) ** 2 for score in parts)) / (2 * len(SUITE))
    mean = sum(score.value for score in parts) / len(SUITE)
    return Score(mean, mean - half, mean + half, sum(score.items for score in parts))


def _with_interval(score: Score, scale: float) -> str:
    interval = ""
    if score.low is not None and score.high is not None:
        interval = f" [{scale * score.low:.1f}, {scale * score.high:.1f}]"
    return f"{scale * score.value:.1f}{interval}"


def _differences(config: TransfusionConfig, results: Mapping[str, Any]) -> list[str]:
    """Return a line for each setting that differs from the paper's."""
    settings = results["settings"]
    expected = {"sampler": SAMPLER, "steps": STEPS, "guidance": GUIDANCE}
    found = {**{name: settings[name] for name in expected}, "patch_size": config.patch_size}
    pairs = [(name, found[name], value) for name, value in {**expected, "patch_size": 2}.items()]
    lines = [f"differs: {name}={ours}, the paper {theirs}" for name, ours, theirs in pairs if ours != theirs]
    if results.get("guide") is not None:
        lines.append("differs: autoguidance, the paper classifier-free guidance")
    return lines
