"""Pictures drawn from captions, compared with the pictures that have them: Fréchet distances, CMMD, CLIP score.

Samples are numbered; a sample's noise depends on the seed and its number. They are drawn, and turned into features, in
batches of `batch_size` consecutive numbers, whoever computes them, so the number of ranks changes no bit of a picture
and scores only in the order of float additions. Pictures are written as they are made, and an interrupted evaluation
goes on with those that are missing.
"""

import hashlib
import importlib.util
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from data.durable import write_durably
from data.pictures import decode_picture, encode_png
from data.storage import Location
from train.distributed.ranks import Ranks
from train.distributed.shared_folder import require_shared
from train.evaluation.captioned import CaptionedConfig, read_captioned
from train.evaluation.drawn_folder import begin
from train.evaluation.features import Batch, FeatureModels, Features
from train.evaluation.part import Inputs, Part
from train.evaluation.scores import Score, bootstrap

DRAWN, REFERENCES = "drawn", "references"  # folders of pictures in the output
SETTINGS = "settings.json"  # beside the drawn pictures: what they depend on


@dataclass(frozen=True, kw_only=True)
class GenerationConfig(CaptionedConfig):
    samples: int | None = None  # captions to draw, from the first: one of each picture, >= 2; null: all
    # Vision models by name, folders or hub ids (DINOv2, CLIP, SigLIP): each gives the Fréchet distance of its features.
    models: dict[str, Location] = field(default_factory=dict)
    clip: Location | None = None  # folder or hub id of a CLIP model, for the CLIP score and CMMD; null: neither
    inception: bool = False  # the Inception FID too, which needs torch-fidelity and torchvision

    option = "generation"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples is not None and self.samples < 2:
            raise ValueError(f"generation.samples={self.samples}: expected at least 2, or null for all")
        wants = bool(self.models or self.clip or self.inception)
        if wants != (self.pictures is not None):
            raise ValueError(
                f"generation.pictures={self.pictures}: expected pictures with captions together with what compares "
                "them: generation.models.NAME=, generation.clip= or generation.inception=true"
            )

    @property
    def limit(self) -> int | None:
        return self.samples


@dataclass(frozen=True)
class Listed:
    """What to draw, known to every rank."""

    captions: list[str]
    fingerprint: str  # of captions and reference pictures


def evaluate_generation(config: GenerationConfig, inputs: Inputs) -> Part:
    """Draw the captions and compare with the references. Collective.

    Scores are `pictures/frechet_NAME`, `pictures/cmmd`, `pictures/clip_score`, `pictures/inception_fid`. Raises
    ValueError, before anything is drawn, for models that cannot be used and for a folder that holds pictures of other
    settings.
    """
    pipeline, output, ranks = inputs.pipeline, inputs.output, inputs.ranks
    if config.inception:
        require_fidelity()
    size = (pipeline.grid[0] * pipeline.space.stride, pipeline.grid[1] * pipeline.space.stride)
    models = FeatureModels.load(config.models, config.clip, ranks.device)
    listed = ranks.on_first(lambda: list_captions(config))
    settings = {**inputs.drawn_by, "captions": listed.fingerprint}
    ranks.on_first(lambda: begin(output / DRAWN, output / DRAWN / SETTINGS, settings))
    require_shared(output / DRAWN, "output", ranks)
    _draw(listed.captions, inputs)
    batches = of_rank(batches_of(len(listed.captions), pipeline.batch_size), ranks)
    kept = {"fingerprint": listed.fingerprint, "size": size, "models": models.described}
    references = _references(config, models, kept, batches, inputs)
    with inputs.bar("features", sum(map(len, batches))) as progress:
        pictures = _with_progress(_read(output / DRAWN, batches, size), progress)
        drawn = models.measure(pictures, listed.captions, jackknife=True, ranks=ranks)
    scores = models.distances(drawn, references, ranks)
    if drawn.clip_scores is not None:
        scores["clip_score"] = bootstrap(drawn.clip_scores)
    if config.inception:
        count = len(listed.captions)
        scores["inception_fid"] = ranks.on_first(lambda: inception_fid(output, count, ranks.device))
    data = {"path": config.pictures, "items": len(listed.captions), **kept}
    examples = _examples(listed.captions, drawn.clip_scores) if ranks.is_first else []
    return Part({f"pictures/{name}": score for name, score in scores.items()}, examples, data)


def list_captions(config: GenerationConfig) -> Listed:
    """Return each picture's first caption, and a fingerprint; raise ValueError for too few."""
    digest, captions = hashlib.sha256(), []
    for item in read_captioned(config):
        captions.append(item.references[0])
        digest.update(f"{captions[-1]}\0".encode() + item.digest())
    if (expected := config.samples or 2) > len(captions):
        raise ValueError(
            f"generation.samples={config.samples}: {config.pictures} holds {len(captions)} captioned pictures, "
            f"expected at least {expected}; leave samples out for all"
        )
    return Listed(captions, digest.hexdigest()[:16])


def batches_of(count: int, batch_size: int) -> list[range]:
    """Return the batches of consecutive sample numbers in which pictures are drawn and looked at."""
    return [range(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]


def of_rank(batches: list[range], ranks: Ranks) -> list[range]:
    """Return this rank's share, consecutive ones."""
    first, last = (len(batches) * rank // ranks.world_size for rank in (ranks.rank, ranks.rank + 1))
    return batches[first:last]


def _draw(captions: list[str], inputs: Inputs) -> None:
    """Draw the batches of which a picture is missing, divided among ranks; wait for all of them. Collective."""
    pipeline, ranks, folder = inputs.pipeline, inputs.ranks, inputs.output / DRAWN
    batches = batches_of(len(captions), pipeline.batch_size)
    there = ranks.on_first(lambda: {path.name for path in folder.iterdir()})  # names not asked for are not cached
    missing = of_rank([batch for batch in batches if not there.issuperset(map(name_of, batch))], ranks)
    with inputs.bar("pictures", sum(map(len, missing))) as progress:
        for batch in missing:
            texts = [captions[number] for number in batch]
            pictures = pipeline.draw(texts, inputs.sampler, inputs.seed, progress.update, batch)
            _write(folder, zip(batch, pictures, strict=True))
    ranks.gather(None)


def _references(
    config: GenerationConfig, models: FeatureModels, settings: dict[str, Any], batches: list[range], inputs: Inputs
) -> Features:
    """Return the references' features, those of an earlier call with equal settings if the output holds them.

    Collective. For the Inception FID their pictures are written.
    """
    output, ranks, size = inputs.output, inputs.ranks, settings["size"]
    path, folder = output / "references.safetensors", output / REFERENCES
    if config.inception:
        ranks.on_first(lambda: folder.mkdir(exist_ok=True))
        for numbers, pictures in _read_references(config, batches, size):
            _write(folder, zip(numbers, pictures, strict=True))
    known = Features.read(path, settings, ranks.device)
    if all(ranks.gather(known is not None)) and known is not None:
        return known
    with inputs.bar("references", sum(map(len, batches))) as progress:
        found = models.measure(
            _with_progress(_read_references(config, batches, size), progress), None, jackknife=False, ranks=ranks
        )
    ranks.on_first(lambda: found.save(path, settings))
    return found


def _read_references(config: GenerationConfig, batches: list[range], size: tuple[int, int]) -> Iterator[Batch]:
    """Yield batches of reference pictures, cropped and resized to the size of drawn ones."""
    if not batches:
        return
    items = islice(read_captioned(config), batches[0].start, batches[-1].stop)
    for batch in batches:
        yield batch, [item.pixels(size) for item in islice(items, len(batch))]


def _read(folder: Path, batches: list[range], size: tuple[int, int]) -> Iterator[Batch]:
    """Yield batches of drawn pictures."""
    for batch in batches:
        paths = [folder / name_of(number) for number in batch]
        yield batch, [decode_picture(path.read_bytes(), [size], str(path)) for path in paths]


def _write(folder: Path, pictures: Iterable[tuple[int, np.ndarray]]) -> None:
    for number, pixels in pictures:
        write_durably(folder / name_of(number), encode_png(pixels))


def name_of(number: int) -> str:
    return f"{number:06d}.png"


def _with_progress(batches: Iterator[Batch], progress: tqdm) -> Iterator[Batch]:
    for batch in batches:
        yield batch
        progress.update(len(batch[0]))


def _examples(captions: list[str], scores: np.ndarray | None) -> list[dict[str, Any]]:
    """Return a line a sample, in the order of the numbers."""
    lines: list[dict[str, Any]] = [
        {"prompt": caption, "drawn": f"{DRAWN}/{name_of(number)}"} for number, caption in enumerate(captions)
    ]
    for line, score in zip(lines, [] if scores is None else scores.tolist(), strict=False):
        line |= {"score": score, "score_name": "clip_score"}
    return lines


def require_fidelity() -> None:
    """Raise ValueError where torch-fidelity cannot be used."""
    missing = [name for name in ("torch_fidelity", "torchvision") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"generation.inception=true: {' and '.join(missing)} not installed; expected `pip install torch-fidelity`, "
            "with the torchvision that fits this torch, or generation.models.dinov2=facebook/dinov2-large instead"
        )


def inception_fid(output: Path, count: int, device: torch.device) -> Score:
    """Return torch-fidelity's FID of the drawn pictures against the references; it has no interval."""
    from torch_fidelity import calculate_metrics

    found = calculate_metrics(
        input1=str(output / DRAWN),
        input2=str(output / REFERENCES),
        cuda=device.type == "cuda",
        fid=True,
        verbose=False,
    )
    return Score(float(found["frechet_inception_distance"]), None, None, count)
