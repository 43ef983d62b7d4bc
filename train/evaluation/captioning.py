"""Captions of pictures, scored with CIDEr against several references, and written for COCO's own scorer.

Pictures and references come from COCO's annotations (captions_val2014.json), from Karpathy's split of them
(dataset_coco.json), or from raw tars with captions as train.encode reads them. Ranks divide the pictures; their number
changes no caption on a CPU.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from data.durable import atomic_write
from data.inputs import expand
from data.pictures import decode_picture, encode_png
from data.raw import TAR, captions_of, picture_of
from data.shards import BadRecords, read_shard
from data.storage import Location
from model.sampler_config import SamplerConfig
from train.distributed.ranks import Ranks
from train.evaluation.cider import cider, tokens_of
from train.evaluation.part import Bar, Part
from train.evaluation.scores import bootstrap
from train.inference.pipeline import Pipeline

SHOWN = 16  # of the best and of the worst captions, among the examples


@dataclass(frozen=True, kw_only=True)
class CaptioningConfig:
    # Pictures to describe: the folder in which the names of `annotations` lie or, without those, raw tars with
    # captions. null: none.
    pictures: Location | None = None
    annotations: Location | None = None  # captions_val2014.json or alike, or Karpathy's dataset_coco.json
    split: str | None = None  # of Karpathy's file: test, val, restval or train; null: test
    max_pictures: int | None = None  # the first so many, >= 1; null: all

    def __post_init__(self) -> None:
        if self.max_pictures is not None and self.max_pictures < 1:
            raise ValueError(f"captioning.max_pictures={self.max_pictures}: expected at least 1, or null for all")
        if self.annotations is not None and self.pictures is None:
            raise ValueError("captioning.annotations without captioning.pictures: give the folder of the pictures")
        if self.split is not None and self.annotations is None:
            raise ValueError(f"captioning.split={self.split}: expected null; only Karpathy's file has splits")


@dataclass(frozen=True)
class Captioned:
    """A picture with its captions, one or more."""

    image_id: int
    references: tuple[str, ...]
    where: str  # its file, or its record
    data: bytes | None = None  # None: what the file holds

    def pixels(self, resolution: int) -> np.ndarray:
        """Return uint8 [resolution, resolution, 3], cropped as in training; raise BadRecord for a damaged picture."""
        data = Path(self.where).read_bytes() if self.data is None else self.data
        return decode_picture(data, [(resolution, resolution)], self.where)


def read_captioned(config: CaptioningConfig) -> Iterator[Captioned]:
    """Yield the pictures in order; raise ValueError or FileNotFoundError for what cannot be read."""
    assert config.pictures is not None
    if config.annotations is None:
        yield from islice(_of_tars(config.pictures), config.max_pictures)
        return
    path, folder = Path(config.annotations), Path(config.pictures)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        listed = _of_coco(content, folder) if "annotations" in content else _of_karpathy(content, config.split, folder)
        if config.split is not None and "annotations" in content:
            raise ValueError(f"captioning.split={config.split}: expected null; only Karpathy's file has splits")
        found = list(islice(listed, config.max_pictures))
    except (KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"captioning.annotations={path}: expected COCO's captions_*.json or Karpathy's dataset_coco.json "
            f"({type(error).__name__}: {error})"
        ) from None
    if missing := [item.where for item in found if not Path(item.where).is_file()]:
        raise FileNotFoundError(
            f"captioning.pictures={folder}: {len(missing)} of {len(found)} pictures are not there, such as {missing[0]}"
        )
    yield from found


def _of_coco(content: dict[str, Any], folder: Path) -> Iterator[Captioned]:
    captions: dict[int, list[str]] = {}
    for annotation in content["annotations"]:
        captions.setdefault(int(annotation["image_id"]), []).append(annotation["caption"].strip())
    for image in content["images"]:
        if image["id"] in captions:
            yield Captioned(image["id"], tuple(captions[image["id"]]), str(folder / image["file_name"]))


def _of_karpathy(content: dict[str, Any], split: str | None, folder: Path) -> Iterator[Captioned]:
    wanted = split or "test"
    splits = {image["split"] for image in content["images"]}
    if wanted not in splits:
        raise ValueError(f"captioning.split={wanted}: the file has {', '.join(sorted(splits))}")
    for image in content["images"]:
        if image["split"] == wanted:
            beside, below = folder / image["filename"], folder / image.get("filepath", "") / image["filename"]
            references = tuple(sentence["raw"].strip() for sentence in image["sentences"])
            image_id = image.get("cocoid", image["imgid"])  # Flickr's have no cocoid
            yield Captioned(image_id, references, str(below if below.is_file() else beside))


def _of_tars(folder: str) -> Iterator[Captioned]:
    bad, number = BadRecords(max_fraction=0.0), 0
    for path in expand([folder], (TAR,)):
        for record in read_shard(Path(path), bad):
            where = f"{path}/{record['__key__'].decode()}"
            yield Captioned(number, tuple(captions_of(record, where)), where, picture_of(record, where))
            number += 1
    bad.check(final=True)


def evaluate_captioning(
    pipeline: Pipeline,
    config: CaptioningConfig,
    sampler: SamplerConfig,
    seed: int,
    output: Path,
    ranks: Ranks,
    bar: Bar,
) -> Part:
    """Describe each picture and score `captioning/cider`; write captions.json and references.json. Collective.

    Both are in COCO's forms, and pycocoevalcap scores the one against the other. The score is pycocoevalcap's: papers
    print 100 times that.
    """
    size, rank, side = ranks.world_size, ranks.rank, pipeline.latent_spec.resolution
    items = [
        item if number % size == rank else replace(item, data=b"") for number, item in enumerate(read_captioned(config))
    ]
    if not items:
        raise ValueError(f"captioning.pictures={config.pictures}: no pictures with captions")
    listed = repr([(item.image_id, item.references) for item in items])
    fingerprint = hashlib.sha256(listed.encode()).hexdigest()[:16]
    ranks.require_alike({"captioning (contents)": fingerprint})
    numbers, mine = range(rank, len(items), size), []
    with bar("captions", len(numbers)) as progress:
        for start in range(0, len(numbers), pipeline.batch_size):
            chunk = numbers[start : start + pipeline.batch_size]
            pictures = [items[number].pixels(side) for number in chunk]
            mine += pipeline.describe(pictures, sampler, seed, progress.update, chunk)
    parts = ranks.gather([" ".join(caption.split()) for caption in mine])
    captions = [parts[number % size][number // size] for number in range(len(items))]
    references = [[tokens_of(reference) for reference in item.references] for item in items]
    scores = cider([tokens_of(caption) for caption in captions], references)
    order = np.argsort(-scores, kind="stable").tolist()
    shown = sorted({*order[:SHOWN], *order[-SHOWN:]})
    pictures_shown = ranks.gather({n: encode_png(items[n].pixels(side)) for n in shown if n % size == rank})
    examples = []
    if ranks.is_first:
        _write_coco(output, items, captions)
        files = _write_pictures(output, {number: data for part in pictures_shown for number, data in part.items()})
        for number in shown:
            line = {"true": files[number], "caption": captions[number], "references": items[number].references}
            examples.append({**line, "score": float(scores[number]), "score_name": "cider"})
    data = {"pictures": config.pictures, "annotations": config.annotations, "split": config.split}
    data |= {"fingerprint": fingerprint, "items": len(items)}
    return Part({"captioning/cider": bootstrap(scores)}, examples, data)


def _write_coco(output: Path, items: list[Captioned], captions: list[str]) -> None:
    """Write captions in COCO's result form and the references in that of its annotations."""
    results = [{"image_id": item.image_id, "caption": caption} for item, caption in zip(items, captions, strict=True)]
    pairs = [(item.image_id, reference) for item in items for reference in item.references]
    annotations = [{"id": i, "image_id": image, "caption": text} for i, (image, text) in enumerate(pairs)]
    images = [{"id": item.image_id} for item in items]
    references = {"info": {}, "licenses": [], "type": "captions", "images": images, "annotations": annotations}
    for name, content in (("captions.json", results), ("references.json", references)):
        with atomic_write(output / name) as file:
            file.write(json.dumps(content).encode())


def _write_pictures(output: Path, pictures: dict[int, bytes]) -> dict[int, str]:
    """Write PNG files; return their places relative to `output`."""
    (output / "pictures").mkdir(exist_ok=True)
    files = {number: f"pictures/captioned-{number:05d}.png" for number in pictures}
    for number, data in pictures.items():
        with atomic_write(output / files[number]) as file:
            file.write(data)
    return files
