"""Pictures with captions, to describe or to draw: from COCO's annotations, Karpathy's split of them, or raw tars.

The forms: captions_val2014.json, dataset_coco.json, tars as train.encode reads them. In order; tars are read lazily.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from xxhash import xxh3_64

from data.inputs import expand
from data.pictures import decode_picture
from data.raw import TAR, captions_of, picture_of
from data.shards import BadRecords, read_shard
from data.storage import Location


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
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        listed = _of_coco(content, folder) if "annotations" in content else _of_karpathy(content, config, folder)
        if config.split is not None and "annotations" in content:
            raise ValueError(f"{config.option}.split={config.split}: expected null; only Karpathy's file has splits")
        found = list(islice(listed, config.limit))
    except (KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{config.option}.annotations={path}: expected COCO's captions_*.json or Karpathy's dataset_coco.json "
            f"({type(error).__name__}: {error})"
        ) from None
    if missing := [item.where for item in found if not Path(item.where).is_file()]:
        raise FileNotFoundError(
            f"{config.option}.pictures={folder}: {len(missing)} of {len(found)} pictures are not there, such as "
            f"{missing[0]}"
        )
    yield from found


def _of_coco(content: dict[str, Any], folder: Path) -> Iterator[Captioned]:
    captions: dict[int, list[str]] = {}
    for annotation in content["annotations"]:
        captions.setdefault(int(annotation["image_id"]), []).append(annotation["caption"].strip())
    for image in content["images"]:
        if image["id"] in captions:
            yield Captioned(image["id"], tuple(captions[image["id"]]), str(folder / image["file_name"]))


def _of_karpathy(content: dict[str, Any], config: CaptionedConfig, folder: Path) -> Iterator[Captioned]:
    wanted = config.split or "test"
    splits = {image["split"] for image in content["images"]}
    if wanted not in splits:
        raise ValueError(f"{config.option}.split={wanted}: the file has {', '.join(sorted(splits))}")
    for image in content["images"]:
        if image["split"] == wanted:
            beside, below = folder / image["filename"], folder / image.get("filepath", "") / image["filename"]
            references = tuple(sentence["raw"].strip() for sentence in image["sentences"])
            image_id = image["cocoid" if "cocoid" in image else "imgid"]  # Flickr's have no cocoid
            yield Captioned(image_id, references, str(below if below.is_file() else beside))


def _of_tars(folder: str) -> Iterator[Captioned]:
    bad, number = BadRecords(max_fraction=0.0), 0
    for path in expand([folder], (TAR,)):
        for record in read_shard(Path(path), bad):
            where = f"{path}/{record['__key__'].decode()}"
            yield Captioned(number, tuple(captions_of(record, where)), where, picture_of(record, where))
            number += 1
    bad.check(final=True)
