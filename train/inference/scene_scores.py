"""What a trained model can do, as numbers: the judge's verdicts on scenes. (Held-out losses: train/heldout.py.)

Work is split over ranks by item, results are gathered and are the same for every number of ranks up to the order of
float additions. An evaluation records sampler, steps, guidance and seed: without them its scores mean nothing.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.pictures import decode_picture
from data.raw import TAR, captions_of, picture_of
from data.scenes import Shape, Verdict, compare, parse_caption, score
from data.shards import BadRecords, read_shard
from data.storage import expand
from model.sampler import SamplerConfig
from train.distributed.ranks import Ranks
from train.inference.pipeline import Pipeline, Progress

GOALS = ("all", "colour", "shape", "position")


@dataclass(frozen=True)
class SceneItem:
    """One held-out scene: its caption, its drawn picture and what both show."""

    split: str  # seen, unseen or two_shapes
    caption: str
    picture: np.ndarray  # uint8 [H, W, 3]
    shapes: tuple[Shape, ...]


def read_scenes(folder: Path, resolution: int, per_split: int) -> list[SceneItem]:
    """Read at most `per_split` scenes of each split from raw held-out shards, spread evenly over them."""
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
                    f"scenes={folder}: {where} is no scene of train.scenes; use heldout.NAME=FOLDER for encoded data"
                ) from None
            item = SceneItem(
                info["split"],
                captions_of(record, where)[0],
                decode_picture(picture_of(record, where), [(resolution, resolution)], where),
                shapes,
            )
            splits.setdefault(item.split, []).append(item)
    bad.check(final=True)
    counts = {split: min(per_split, len(items)) for split, items in splits.items()}
    return [items[i * len(items) // counts[split]] for split, items in splits.items() for i in range(counts[split])]


def describe_scenes(items: Sequence[SceneItem]) -> dict:
    """Return how many scenes of each split are judged, and a fingerprint of their captions and pictures."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(f"{item.split} {item.caption}\0".encode() + item.picture.tobytes())
    counts = Counter(item.split for item in items)
    return {"fingerprint": digest.hexdigest()[:16], "items": len(items), "items_of_split": dict(sorted(counts.items()))}


def judge_drawings(
    generation: Pipeline,
    items: Sequence[SceneItem],
    sampler: SamplerConfig,
    seed: int,
    ranks: Ranks,
    progress: Progress,
) -> list[tuple[np.ndarray, Verdict]]:
    """Draw each item's caption and let the judge compare the picture with the scene it was written for."""
    numbers = range(ranks.rank, len(items), ranks.world_size)
    mine = [items[number] for number in numbers]
    pictures = generation.draw([item.caption for item in mine], sampler, seed, progress, numbers)
    return _in_order(
        ranks, [(picture, score(picture, item.shapes)) for item, picture in zip(mine, pictures, strict=True)]
    )


def judge_captions(
    generation: Pipeline,
    items: Sequence[SceneItem],
    sampler: SamplerConfig,
    seed: int,
    ranks: Ranks,
    progress: Progress,
) -> list[tuple[str, Verdict]]:
    """Describe each item's drawn picture and compare what the caption says with the scene."""
    numbers = range(ranks.rank, len(items), ranks.world_size)
    mine = [items[number] for number in numbers]
    captions = generation.describe([item.picture for item in mine], sampler, seed, progress, numbers)
    found = [(text, compare(parse_caption(text), item.shapes)) for item, text in zip(mine, captions, strict=True)]
    return _in_order(ranks, found)


def shares(items: Sequence[SceneItem], verdicts: Sequence[Verdict]) -> dict[str, float]:
    """Return the share of right answers: for trained combinations by goal, for the other splits all-right."""

    def share(split: str, goal: str) -> float | None:
        right = [
            verdict.all_right if goal == "all" else getattr(verdict, goal)
            for item, verdict in zip(items, verdicts, strict=True)
            if item.split == split
        ]
        return sum(right) / len(right) if right else None

    scores = {goal: share("seen", goal) for goal in GOALS}
    return {**scores, "all_unseen": share("unseen", "all"), "all_two_shapes": share("two_shapes", "all")}


def _in_order(ranks: Ranks, mine: list) -> list:
    """Return all ranks' results in the order of the items that were dealt out."""
    parts = ranks.gather(mine)
    total = sum(len(part) for part in parts)
    return [parts[i % len(parts)][i // len(parts)] for i in range(total)]
