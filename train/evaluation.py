"""What a trained model can do, as numbers: the judge's verdicts on scenes, and the losses on held-out shards.

Work is split over ranks by item, results are gathered and are the same for every number of ranks up to the order of
float additions. An evaluation records sampler, steps, guidance and seed: without them its scores mean nothing.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from data.dataset import DataConfig, open_data
from data.lanes import SourceConfig
from data.loader import Loader
from data.manifest import Manifest
from data.pictures import decode_picture
from data.raw import TAR, caption_of, picture_of
from data.scenes import Shape, Verdict, compare, parse_caption, score
from data.shards import BadRecords, read_shard
from data.storage import expand
from model.diffusion import DiffusionConfig
from model.sampler import SamplerConfig
from train.distributed import Ranks
from train.generation import Generation, Progress
from train.recipe import PretrainConfig
from train.step import micro_step

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
    for path in expand([str(folder)], (TAR,)):
        for record in read_shard(Path(path), BadRecords(max_fraction=0.0)):
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
                caption_of(record, where),
                decode_picture(picture_of(record, where), [(resolution, resolution)], where),
                shapes,
            )
            splits.setdefault(item.split, []).append(item)
    counts = {split: min(per_split, len(items)) for split, items in splits.items()}
    return [items[i * len(items) // counts[split]] for split, items in splits.items() for i in range(counts[split])]


def judge_drawings(
    generation: Generation,
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
    generation: Generation,
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


@torch.no_grad()
def heldout_losses(
    generation: Generation, recipe: PretrainConfig, sources: dict[str, str], ranks: Ranks, lanes: int = 8
) -> dict[str, float | None]:
    """Return text loss (nats a text target) and noise error (mean squared, an image) over held-out shards.

    None where there is nothing to measure. Each document once, captions first, no dropout; noise and timesteps
    depend on the recipe's seed alone.
    """
    order = {"caption_first": 1.0, "caption_dropout": 0.0}
    config = DataConfig(
        sources={name: SourceConfig(path=path, repeat=False) for name, path in sources.items()},
        tokenizer=str(generation.tokenizer.path),
        lanes=lanes,
        sequence_length=recipe.data.sequence_length,
        look_ahead=recipe.data.look_ahead,
        order=type(recipe.data.order)(**order),
    )
    data = open_data(config, recipe.seed, recipe.model.patch_size)
    if data.latent_spec is not None and data.latent_spec.vae_hash != generation.vae_hash:
        raise ValueError(
            f"held-out data {', '.join(sources.values())} holds latents of VAE {data.latent_spec.vae_hash}, the model "
            f"was trained on those of {generation.vae_hash}; encode it with that VAE"
        )
    loader = Loader(data, config, rank=ranks.rank, world_size=ranks.world_size, micro_batch_size=lanes)
    sums = torch.zeros(4, dtype=torch.float64)
    while True:
        batch = loader.next(timeout_seconds=600)
        if batch is None:
            raise ValueError(f"no held-out data for 600 s from {', '.join(sources.values())}")
        if batch.ended:
            break
        for micro_batch in batch.micro_batches:
            loss = micro_step(
                generation.model,
                micro_batch.to(ranks.device),
                stats=generation.stats,
                diffusion=_uncapped(recipe.diffusion),
                image_weight=1.0,
                global_text_targets=1,
                global_images=1,
            )
            counts = (micro_batch.num_text_targets, micro_batch.num_images)
            sums += torch.tensor([loss.text_nll.item(), loss.image_error.item(), *counts], dtype=torch.float64)
    loader.close()
    dist.all_reduce(sums, group=ranks.vote_group)
    text_nll, image_error, targets, images = sums.tolist()
    return {
        "text_loss": text_nll / targets if targets else None,
        "image_loss": image_error / images if images else None,
    }


def check_disjoint(recipe: PretrainConfig, sources: dict[str, str]) -> None:
    """Raise ValueError if a held-out folder shares a shard with the training data."""
    trained = {}
    for source in recipe.data.sources.values():
        manifest = Manifest.load(source.path)
        trained.update({(e.bytes, e.index_crc32): manifest.shard_path(i) for i, e in enumerate(manifest.shards)})
    for name, path in sources.items():
        for shard in Manifest.load(path).shards:
            twin = trained.get((shard.bytes, shard.index_crc32))
            if twin is not None:
                raise ValueError(f"held-out source {name}: {path}/{shard.name} is training data too ({twin})")


def _uncapped(diffusion: DiffusionConfig) -> DiffusionConfig:
    return replace(diffusion, before_caption_max_timestep=None, timestep_sampling="uniform", min_snr_gamma=None)


def _in_order(ranks: Ranks, mine: list) -> list:
    """Return all ranks' results in the order of the items that were dealt out."""
    parts = ranks.gather(mine)
    total = sum(len(part) for part in parts)
    return [parts[i % len(parts)][i // len(parts)] for i in range(total)]
