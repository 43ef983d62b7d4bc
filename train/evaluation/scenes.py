"""Scores of a trained model on scenes: it draws them and describes them, and the judge compares with the truth.

Items are divided among ranks and results gathered; they are the same for every
number of ranks up to the order of float additions.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.durable import write_durably
from data.inputs import expand
from data.pictures import decode_picture, encode_png
from data.raw import TAR, captions_of, picture_of
from data.scene_judge import Verdict, compare, score
from data.scenes import Shape, parse_caption
from data.shards import BadRecords, read_shard
from model.sampler_config import SamplerConfig
from train.distributed.ranks import Ranks
from train.evaluation.part import Inputs, Part, dealt, in_order
from train.evaluation.scores import Score, share
from train.inference.pipeline import Pipeline, Progress

GOALS = ("all", "colour", "shape", "position", "all_unseen", "all_two_shapes")  # what shares are of


@dataclass(frozen=True)
class SceneItem:
    """One held-out scene: its caption, its true picture and the shapes in both."""

    split: str  # seen, unseen or two_shapes
    caption: str
    picture: np.ndarray  # uint8 [H, W, 3]
    shapes: tuple[Shape, ...]


def read_scenes(folder: Path, resolution: int, per_split: int) -> list[SceneItem]:
    """Read at most `per_split` scenes of each split, evenly spaced, from raw held-out shards."""
    splits: dict[str, list[SceneItem]] = {}
    bad = BadRecords(max_fraction=0.0, options=False)
    for path in expand([str(folder)], (TAR,)):
        for record in read_shard(Path(path), bad):
            where = f"{path}/{record['__key__'].decode()}"
            try:
                info = json.loads(record["json"])
                shapes = tuple(Shape(**shape) for shape in info["shapes"])
            except (KeyError, TypeError, ValueError):
                raise ValueError(
                    f"scenes={folder}: {where} is not a scene of train.scenes; use heldout.NAME=FOLDER for encoded data"
                ) from None
            picture = decode_picture(picture_of(record, where), [(resolution, resolution)], where)
            item = SceneItem(info["split"], captions_of(record, where)[0], picture, shapes)
            splits.setdefault(item.split, []).append(item)
    bad.check(final=True)
    counts = {split: min(per_split, len(items)) for split, items in splits.items()}
    return [items[i * len(items) // counts[split]] for split, items in splits.items() for i in range(counts[split])]


def describe_scenes(items: Sequence[SceneItem]) -> dict:
    """Return the number of scenes judged in each split, and a fingerprint of their captions and pictures."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(f"{item.split} {item.caption}\0".encode() + item.picture.tobytes())
    counts = Counter(item.split for item in items)
    return {"fingerprint": digest.hexdigest()[:16], "items": len(items), "items_of_split": dict(sorted(counts.items()))}


def judge(
    pipeline: Pipeline, items: Sequence[SceneItem], sampler: SamplerConfig, seed: int, ranks: Ranks, progress: Progress
) -> tuple[list[tuple[np.ndarray, Verdict]], list[tuple[str, Verdict]]]:
    """Draw each item's caption and describe its true picture; return both with the judge's verdicts. Collective."""
    numbers, mine = dealt(ranks, items)
    pictures = pipeline.draw([item.caption for item in mine], sampler, seed, progress, numbers)
    drawn = [(picture, score(picture, item.shapes)) for item, picture in zip(mine, pictures, strict=True)]
    captions = pipeline.describe([item.picture for item in mine], sampler, seed, progress, numbers)
    described = [(text, compare(parse_caption(text), item.shapes)) for item, text in zip(mine, captions, strict=True)]
    return in_order(ranks, drawn), in_order(ranks, described)


def shares(items: Sequence[SceneItem], verdicts: Sequence[Verdict]) -> dict[str, Score]:
    """Return the shares of right answers by GOALS, those that there are scenes for.

    The split `seen` has one for each attribute; of the other splits, only what is wholly right counts.
    """
    found = {}
    for goal in GOALS:
        of_split = goal.removeprefix("all_") if goal.startswith("all_") else "seen"
        right = [
            verdict.all_right if goal.startswith("all") else getattr(verdict, goal)
            for item, verdict in zip(items, verdicts, strict=True)
            if item.split == of_split
        ]
        if right:
            found[goal] = share(sum(right), len(right))
    return found


def evaluate_scenes(folder: str, per_split: int, inputs: Inputs) -> Part:
    """Judge at most `per_split` scenes of each split, drawn and described; write their pictures on rank 0. Collective.

    Scores are `scenes/text_to_image/GOAL` and `scenes/image_to_text/GOAL`.
    """
    pipeline, ranks = inputs.pipeline, inputs.ranks
    items = read_scenes(Path(folder), pipeline.latent_spec.resolution, per_split)
    data = describe_scenes(items)
    ranks.require_alike({"scenes (contents)": data["fingerprint"]})
    with inputs.bar("scenes", 2 * -(-len(items) // ranks.world_size)) as progress:
        drawn, described = judge(pipeline, items, inputs.sampler, inputs.seed, ranks, progress.update)
    examples = write_examples(inputs.output, items, drawn, described) if ranks.is_first else []
    tasks = {"text_to_image": [verdict for _, verdict in drawn], "image_to_text": [verdict for _, verdict in described]}
    scores = {
        f"scenes/{task}/{goal}": found
        for task, verdicts in tasks.items()
        for goal, found in shares(items, verdicts).items()
    }
    return Part(scores, examples, {"path": folder, **data})


def write_examples(
    output: Path, items: list[SceneItem], drawn: list[tuple[np.ndarray, Verdict]], described: list[tuple[str, Verdict]]
) -> list[dict[str, Any]]:
    """Write each scene's drawn and true pictures; return lines of examples.jsonl with its caption and both verdicts."""
    folder = output / "pictures"
    folder.mkdir(exist_ok=True)
    lines = []
    examples = zip(items, drawn, described, strict=True)
    for i, (item, (picture, drawn_verdict), (caption, caption_verdict)) in enumerate(examples):
        for name, pixels in (("drawn", picture), ("true", item.picture)):
            write_durably(folder / f"{i:04d}-{name}.png", encode_png(pixels))
        lines.append(
            {
                "split": item.split,
                "prompt": item.caption,
                "drawn": f"pictures/{i:04d}-drawn.png",
                "drawn_verdict": vars(drawn_verdict),
                "true": f"pictures/{i:04d}-true.png",
                "caption": caption,
                "caption_verdict": vars(caption_verdict),
            }
        )
    return lines
