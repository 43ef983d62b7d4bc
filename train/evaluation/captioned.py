"""Pictures with captions, to describe or to draw: from COCO's annotations, Karpathy's split of them, or raw tars.

The forms: captions_val2014.json, dataset_coco.json, tars as train.encode reads them. In order; tars are read lazily.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from xxhash import xxh3_64

from data.inputs import expand
from data.pictures import decode_picture
from data.raw import TAR, captions_of, picture_of
from data.shards import BadRecord, BadRecords, read_shard
from data.storage import Location
from train.evaluation.texts import OTHER_FORM, text_of

KARPATHY = "test"  # the split of Karpathy's file that is taken unless another is asked for


@dataclass(frozen=True, kw_only=True)
class CaptionedConfig:
    # The folder in which the names of `annotations` lie or, without those, raw tars with captions. null: none.
    pictures: Location | None = None
    annotations: Location | None = None  # captions_val2014.json or alike, or Karpathy's dataset_coco.json
    split: str | None = None  # of Karpathy's file: test, val, restval or train; null: test

    option = "pictures"  # under which it stands, for messages

    def __post_init__(self) -> None:
        if self.annotations is not None and self.pictures is None:
            raise ValueError(f"{self.option}.annotations without {self.option}.pictures: give their folder")
        if self.split is not None and self.annotations is None:
            raise ValueError(f"{self.option}.split={self.split}: expected null; only Karpathy's file has splits")

    @property
    def limit(self) -> int | None:
        """Return how many pictures to read, from the first; None: all."""
        return None


@dataclass(frozen=True)
class Captioned:
    """A picture with its captions, one or more."""

    image_id: int
    references: tuple[str, ...]
    where: str  # its file, or its record
    data: bytes | None = None  # None: what the file holds

    def digest(self) -> bytes:
        """Return what tells its picture from another: of a record its bytes' hash, of a file its name and size."""
        if self.data is not None:
            return xxh3_64(self.data).digest()
        return f"{Path(self.where).name} {Path(self.where).stat().st_size}".encode()

    def pixels(self, size: int | tuple[int, int]) -> np.ndarray:
        """Return uint8 [H, W, 3] of `size`, cropped as in training; raise BadRecord for a damaged picture."""
        data = Path(self.where).read_bytes() if self.data is None else self.data
        return decode_picture(data, [(size, size) if isinstance(size, int) else size], self.where)


def read_captioned(config: CaptionedConfig) -> Iterator[Captioned]:
    """Yield the pictures in order; raise ValueError or FileNotFoundError for what cannot be read."""
    assert config.pictures is not None
    if config.annotations is None:
        yield from islice(_of_tars(config.pictures), config.limit)
        return
    path, folder = Path(config.annotations), Path(config.pictures)
    with _other_form_refused(config):
        content = json.loads(path.read_text(encoding="utf-8"))
        is_coco = "annotations" in content
        splits = set() if is_coco else {text_of(image["split"]) for image in content["images"]}
    if is_coco and config.split is not None:
        raise ValueError(f"{config.option}.split={config.split}: expected null; only Karpathy's file has splits")
    if not is_coco and (wanted := config.split or KARPATHY) not in splits:
        raise ValueError(f"{config.option}.split={wanted}: the file has {', '.join(sorted(splits))}")
    with _other_form_refused(config):
        listed = _of_coco(content, folder) if is_coco else _of_karpathy(content, config.split or KARPATHY, folder)
        found = list(islice(listed, config.limit))
        if len({item.image_id for item in found}) < len(found):
            raise ValueError("two pictures have one id")
    if missing := [item.where for item in found if not Path(item.where).is_file()]:
        raise FileNotFoundError(
            f"{config.option}.pictures={folder}: {len(missing)} of {len(found)} pictures are not there, such as "
            f"{missing[0]}"
        )
    yield from found


@contextmanager
def _other_form_refused(config: CaptionedConfig) -> Iterator[None]:
    try:
        yield
    except OTHER_FORM as error:
        raise ValueError(
            f"{config.option}.annotations={config.annotations}: expected COCO's captions_*.json or Karpathy's "
            f"dataset_coco.json ({type(error).__name__}: {error})"
        ) from None


def _of_coco(content: dict[str, Any], folder: Path) -> Iterator[Captioned]:
    captions: dict[int, list[Any]] = {}
    for annotation in content["annotations"]:
        captions.setdefault(int(annotation["image_id"]), []).append(annotation["caption"])
    for image in content["images"]:
        if (image_id := int(image["id"])) in captions:
            yield _captioned(image_id, captions[image_id], folder / image["file_name"])


def _of_karpathy(content: dict[str, Any], split: str, folder: Path) -> Iterator[Captioned]:
    for image in content["images"]:
        if image["split"] == split:
            beside, below = folder / image["filename"], folder / image.get("filepath", "") / image["filename"]
            image_id = int(image["cocoid"] if "cocoid" in image else image["imgid"])  # Flickr's have no cocoid
            captions = [sentence["raw"] for sentence in image["sentences"]]
            yield _captioned(image_id, captions, below if below.is_file() else beside)


def _captioned(image_id: int, captions: list[Any], path: Path) -> Captioned:
    """Leave out captions without a word; raise ValueError if none is left."""
    references = tuple(text for text in (text_of(caption).strip() for caption in captions) if text)
    if not references:
        raise ValueError(f"picture {image_id} has no caption")
    return Captioned(image_id, references, str(path))


def _of_tars(folder: str) -> Iterator[Captioned]:
    bad, number = BadRecords(max_fraction=0.0, options=False), 0
    for path in expand([folder], (TAR,)):
        for record in read_shard(Path(path), bad):
            bad.check(final=True)  # also where no more than the first pictures are read
            where = f"{path}/{record['__key__'].decode()}"
            try:
                found = tuple(captions_of(record, where)), where, picture_of(record, where)
            except BadRecord as error:
                raise ValueError(error.plain) from None
            yield Captioned(number, *found)
            number += 1
    bad.check(final=True)
