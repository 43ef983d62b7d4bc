"""Scores of a trained model on scenes: it draws them and describes them, and the judge compares with the truth.

(Held-out losses: train/heldout.py.) Items are divided among ranks and results gathered; they are the same for every
number of ranks up to the order of float additions.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.inputs import expand
from data.pictures import decode_picture
from data.raw import TAR, captions_of, picture_of
from data.scene_judge import Verdict, compare, score
from data.scenes import Shape, parse_caption
from data.shards import BadRecords, read_shard
from model.sampler_config import SamplerConfig
from train.distributed.ranks import Ranks
from train.inference.pipeline import Pipeline, Progress


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
    bad = BadRecords(max_fraction=0.0)
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
    numbers = range(ranks.rank, len(items), ranks.world_size)
    mine = [items[number] for number in numbers]
    pictures = pipeline.draw([item.caption for item in mine], sampler, seed, progress, numbers)
    drawn = [(picture, score(picture, item.shapes)) for item, picture in zip(mine, pictures, strict=True)]
    captions = pipeline.describe([item.picture for item in mine], sampler, seed, progress, numbers)
    described = [(text, compare(parse_caption(text), item.shapes)) for item, text in zip(mine, captions, strict=True)]
    return _in_order(ranks, drawn), _in_order(ranks, described)


def shares(items: Sequence[SceneItem], verdicts: Sequence[Verdict]) -> dict[str, float | None]:
    """Return the share of right answers: by goal for the split `seen`, of wholly right ones for the other splits."""

    def share(split: str, goal: str) -> float | None:
        right = [
            verdict.all_right if goal == "all" else getattr(verdict, goal)
            for item, verdict in zip(items, verdicts, strict=True)
            if item.split == split
        ]
        return sum(right) / len(right) if right else None

    scores = {goal: share("seen", goal) for goal in ("all", "colour", "shape", "position")}
    return {**scores, "all_unseen": share("unseen", "all"), "all_two_shapes": share("two_shapes", "all")}


def _in_order(ranks: Ranks, mine: list) -> list:
    """Return all ranks' results in the order of the items."""
    parts = ranks.gather(mine)
    total = sum(len(part) for part in parts)
    return [parts[i % len(parts)][i // len(parts)] for i in range(total)]
