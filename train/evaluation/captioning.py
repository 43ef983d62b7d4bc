"""Captions of pictures, scored with CIDEr against several references, and written for COCO's own scorer.

Ranks divide the batches of consecutive pictures, so that their number changes no caption.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from data.durable import write_durably
from data.pictures import encode_png
from data.strict_json import dumps
from train.evaluation.captioned import Captioned, CaptionedConfig, read_captioned
from train.evaluation.cider import cider, tokens_of
from train.evaluation.generation import batches_of
from train.evaluation.part import Inputs, Part, fingerprint_of
from train.evaluation.scores import bootstrap

SHOWN = 16  # of the best and of the worst captions, among the examples


@dataclass(frozen=True, kw_only=True)
class CaptioningConfig(CaptionedConfig):
    max_pictures: int | None = None  # the first so many, >= 1; null: all

    option = "captioning"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_pictures is not None and self.max_pictures < 1:
            raise ValueError(f"captioning.max_pictures={self.max_pictures}: expected at least 1, or null for all")

    @property
    def limit(self) -> int | None:
        return self.max_pictures


def evaluate_captioning(config: CaptioningConfig, inputs: Inputs) -> Part:
    """Describe each picture and score `captioning/cider`; write captions.json and references.json. Collective.

    Both are in COCO's forms, and pycocoevalcap scores the one against the other. The score is pycocoevalcap's: papers
    print 100 times that.
    """
    pipeline, ranks = inputs.pipeline, inputs.ranks
    side, count = pipeline.latent_spec.resolution, pipeline.batch_size

    def is_mine(number: int) -> bool:
        return number // count % ranks.world_size == ranks.rank

    items = [item if is_mine(number) else replace(item, data=b"") for number, item in enumerate(read_captioned(config))]
    if not items:
        raise ValueError(f"captioning.pictures={config.pictures}: no pictures with captions")
    fingerprint = fingerprint_of("captioning", [(item.image_id, item.references) for item in items], ranks)
    batches = batches_of(len(items), count)[ranks.rank :: ranks.world_size]
    mine: list[tuple[int, str]] = []
    with inputs.bar("captions", sum(map(len, batches))) as progress:
        for batch in batches:
            pictures = [items[number].pixels(side) for number in batch]
            described = pipeline.describe(pictures, inputs.sampler, inputs.seed, progress.update, batch)
            mine += zip(batch, (" ".join(caption.split()) for caption in described), strict=True)
    captions = [caption for _, caption in sorted(pair for part in ranks.gather(mine) for pair in part)]
    references = [[tokens_of(reference) for reference in item.references] for item in items]
    scores = cider([tokens_of(caption) for caption in captions], references)
    order = np.argsort(-scores, kind="stable").tolist()
    shown = sorted({*order[:SHOWN], *order[-SHOWN:]})
    pictures_shown = ranks.gather({n: encode_png(items[n].pixels(side)) for n in shown if is_mine(n)})
    examples = []
    if ranks.is_first:
        _write_coco(inputs.output, items, captions)
        encoded = {number: data for part in pictures_shown for number, data in part.items()}
        files = _write_pictures(inputs.output, encoded)
        for number in shown:
            references_of = items[number].references
            line = {"prompt": references_of[0], "true": files[number], "references": references_of}
            examples.append(
                {**line, "caption": captions[number], "score": float(scores[number]), "score_name": "cider"}
            )
    paths = {"pictures": config.pictures, "annotations": config.annotations, "split": config.split}
    data = {**paths, "fingerprint": fingerprint, "items": len(items)}
    return Part({"captioning/cider": bootstrap(scores)}, examples, data)


def _write_coco(output: Path, items: list[Captioned], captions: list[str]) -> None:
    """Write captions in COCO's result form and the references in that of its annotations."""
    results = [{"image_id": item.image_id, "caption": caption} for item, caption in zip(items, captions, strict=True)]
    pairs = [(item.image_id, reference) for item in items for reference in item.references]
    annotations = [{"id": i, "image_id": image, "caption": text} for i, (image, text) in enumerate(pairs)]
    images = [{"id": item.image_id} for item in items]
    references = {"info": {}, "licenses": [], "type": "captions", "images": images, "annotations": annotations}
    for name, content in (("captions.json", results), ("references.json", references)):
        write_durably(output / name, dumps(content).encode())


def _write_pictures(output: Path, pictures: dict[int, bytes]) -> dict[int, str]:
    """Write PNG files; return their places relative to `output`."""
    (output / "pictures").mkdir(exist_ok=True)
    files = {number: f"pictures/captioned-{number:05d}.png" for number in pictures}
    for number, data in pictures.items():
        write_durably(output / files[number], data)
    return files
