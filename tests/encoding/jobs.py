"""Small encoding jobs: raw pictures in, the command line, the files that come out."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data.documents import decode_document
from data.pictures import encode_png
from data.shards import Record, write_shard
from data.tokenizer import Tokenizer
from tests.sources import encoded_records

Contents = dict[str, bytes]
Encode = Callable[..., Contents]
Capsys = pytest.CaptureFixture[str]
OUT = Path("out")  # of a job, in the empty folder where each test runs


def pixels_of(number: int, size: tuple[int, int] = (32, 32)) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)


def picture_record(number: int, size: tuple[int, int] = (32, 32), **changes: bytes | None) -> Record:
    """A raw record of the img2dataset layout; a change of None leaves the member out."""
    members = {
        "png": encode_png(pixels_of(number, size)),
        "txt": f"a large red circle number {number}".encode(),
        "json": json.dumps({"id": number}).encode(),
        **changes,
    }
    return {"__key__": f"{number:05d}".encode(), **{k: v for k, v in members.items() if v is not None}}


def arguments(inputs: Path | str, output: Path, tokenizer: Tokenizer, **options: object) -> list[str]:
    """The command line of a small job; an option of None is left out."""
    given = inputs if isinstance(inputs, str) else f"[{inputs}]"
    settings = {"resolution": 32, "batch_size": 4, "device": "cpu", **options}
    named = [f"{name}={value}" for name, value in settings.items() if value is not None]
    return [f"inputs={given}", f"output={output}", f"tokenizer={tokenizer.path}", *named]


def raw_folder(folder: Path, shards: dict[str, list[Record]]) -> Path:
    folder.mkdir(parents=True)
    for name, records in shards.items():
        write_shard(folder / f"{name}.tar", records)
    return folder


def latents_in(folder: Path) -> np.ndarray:
    """The moments f16 [N, 2C, h, w] of an encoded folder of pairs."""
    return np.stack([decode_document(record, "here").segments[1].array for record in encoded_records(folder)])


def write_times() -> dict[str, int]:
    """When each file of the output was written, but for the manifest, which every job writes."""
    return {path.name: path.stat().st_mtime_ns for path in OUT.iterdir() if path.name != "manifest.json"}


def contents_of(folder: Path) -> Contents:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}
