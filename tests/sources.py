"""Small encoded data sets, made through the real writer, and the documents in them.

    make_source(folder, tokenizer, pairs(20) + texts(10), shard_sizes=[7, 13, 10])

Everything is a function of the arguments, so two calls give the same bytes.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data.dataset import DataConfig
from data.documents import ImageKind, ImageSegment, Role, document_sizes, encode_record
from data.manifest import LatentSpec, Manifest, shard_entry
from data.shard_index import index_path
from data.shards import BadRecords, Record, index_shard, read_shard, write_shard
from data.source import SourceConfig
from data.storage import Store
from data.tokenizer import Tokenizer

Content = tuple[np.ndarray | None, ...]  # a document's segments: token ids int32 [len], images as their kind is kept


def texts(count: int, *, lengths: tuple[int, int] = (1, 40), seed: int = 0, vocab_size: int = 270) -> list[Content]:
    """Return text documents of random token ids and of lengths in the closed range `lengths`."""
    rng = np.random.default_rng((seed, 0))
    sizes = rng.integers(lengths[0], lengths[1] + 1, count)
    return [(rng.integers(4, vocab_size, size, dtype=np.int32), None) for size in sizes]


def pairs(
    count: int,
    *,
    grids: Sequence[tuple[int, int]] = ((4, 4),),
    lengths: tuple[int, int] = (1, 8),
    seed: int = 0,
    channels: int = 2,
    kind: ImageKind = "moments",
) -> list[Content]:
    """Return image-caption documents; every picture differs, grids take turns. Pixels have three channels."""
    rng = np.random.default_rng((seed, 1))
    captions = texts(count, lengths=lengths, seed=seed + 1000)

    def image(grid: tuple[int, int]) -> np.ndarray:
        if kind == "pixels":
            return rng.integers(0, 256, (3, *grid), dtype=np.uint8)
        return rng.normal(size=(2 * channels if kind == "moments" else channels, *grid)).astype(np.float16)

    return [(tokens, image(grids[i % len(grids)])) for i, (tokens, _) in enumerate(captions)]


def make_source(
    folder: Path,
    tokenizer: Tokenizer,
    documents: Sequence[Content],
    *,
    shard_sizes: Sequence[int] | None = None,
    vae_hash: str = "a" * 16,
    kind: ImageKind = "moments",
    roles: Sequence[Role] = (),
) -> Path:
    """Write `documents` as an encoded data set of shards of the given sizes (one shard when None).

    `roles` are those of the segments of each.
    """
    folder.mkdir(parents=True)
    sizes = list(shard_sizes or [len(documents)])
    assert sum(sizes) == len(documents), (sizes, len(documents))
    entries, first = [], 0
    for number, size in enumerate(sizes):
        shard = folder / f"{number:05d}.tar"
        contents = enumerate(documents[first : first + size], start=first)
        encode = partial(encode_record, info=b"{}", kind=kind, roles=roles)
        records = (encode(f"{i:06d}", _segments(content)) for i, content in contents)
        write_shard(shard, records)
        index = index_shard(shard, document_sizes, BadRecords(0))
        index.save(index_path(shard))
        entries.append(shard_entry(shard, index))
        first += size
    first_image = next((part for content in documents for part in _segments(content) if part.ndim == 3), None)
    channels = None if first_image is None else ImageSegment(first_image, kind).channels
    Manifest(
        store=Store(str(folder)),
        tokenizer_hash=tokenizer.hash,
        vocab_size=tokenizer.vocab_size,
        latent_spec=latent_spec(channels, vae_hash, kind) if channels is not None else None,
        shards=tuple(entries),
    ).save()
    return folder


def interleaved(
    count: int, *, grid: tuple[int, int] = (4, 4), images: int = 3, lengths: tuple[int, int] = (0, 29), seed: int = 0
) -> list[Content]:
    """Return documents of texts and 1 to `images` images in turn; an empty text leaves two images in a row."""
    rng = np.random.default_rng((seed, 2))
    documents = []
    for _ in range(count):
        parts: list[np.ndarray] = []
        for _ in range(rng.integers(1, images + 1)):
            parts += [rng.integers(4, 270, rng.integers(lengths[0], lengths[1] + 1), dtype=np.int32)]
            parts += [rng.normal(size=(4, *grid)).astype(np.float16)]
        documents.append((*parts, rng.integers(4, 270, max(1, lengths[1]), dtype=np.int32)))
    return documents


def _segments(content: Content) -> list[np.ndarray]:
    return [part for part in content if part is not None]


def encoded_records(folder: Path) -> list[Record]:
    """Return all records of an encoded data set, in the order of its manifest."""
    return [r for shard in Manifest.load(folder).shards for r in read_shard(folder / shard.name, BadRecords(0))]


def latent_spec(channels: int, vae_hash: str = "a" * 16, kind: ImageKind = "moments") -> LatentSpec:
    """Return the spec of latents that are standard normal already."""
    mean, std = (0.0,) * channels, (1.0,) * channels
    stride = 1 if kind == "pixels" else 8
    return LatentSpec(vae_hash=vae_hash, channels=channels, stride=stride, resolution=32, mean=mean, std=std, kind=kind)


def data_config(tokenizer: Tokenizer, sources: dict[str, Path | SourceConfig], **changes: Any) -> DataConfig:
    """Return the config of a small data set: four lanes of 64 tokens unless `changes` says otherwise."""
    settings = {"lanes": 4, "sequence_length": 64, "shuffle_block": 8, "look_ahead": 4, **changes}
    named = {k: v if isinstance(v, SourceConfig) else SourceConfig(path=str(v)) for k, v in sources.items()}
    return DataConfig(sources=named, tokenizer=str(tokenizer.path), **settings)
