"""Encode raw data once, offline: pictures and captions to VAE moments and token ids, text to token ids.

Reads img2dataset-style .tar shards (picture + .txt or .json) or .jsonl/.txt text, writes one shard per input file with
its index and a sidecar, and manifest.json when all are there. Under torchrun the input files are split over the
ranks. Killed and started again, it skips what is done and the same bytes come out.
"""

import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from model.vae import load_vae, moments, vae_hash
from tqdm import tqdm

from data.documents import document_sizes, encode_record
from data.manifest import FILE_NAME, LatentSpec, Manifest, shard_entry
from data.pictures import decode_picture, to_unit
from data.shards import (
    BadRecord,
    BadRecords,
    Record,
    ShardIndex,
    atomic_write,
    index_path,
    index_shard,
    read_shard,
    write_shard,
)
from data.texts import SUFFIXES, caption_of, list_inputs, read_text_file
from data.tokenizer import Tokenizer
from train.config import load_config, run_program


@dataclass(frozen=True, kw_only=True)
class EncodeConfig:
    inputs: list[str] = field(default_factory=list)  # files or folders: .tar of pictures, or .jsonl/.txt text
    output: str = "runs/latents"  # folder for the shards and manifest.json
    tokenizer: str = "runs/tokenizer.model"  # SentencePiece model
    vae: str | None = None  # diffusers AutoencoderKL: a folder or a hub id; not needed for text
    resolution: int = 256  # pixels of the square pictures, a multiple of the VAE's stride
    batch_size: int = 32  # pictures a VAE batch
    stats_from: str | None = None  # encoded folder whose latent statistics to take over (for held-out data)
    max_bad_fraction: float = 0.01  # share of records that may be skipped, in [0, 1]
    device: str = "auto"  # auto, cpu, cuda or cuda:N

    def __post_init__(self) -> None:
        if self.resolution < 1 or self.batch_size < 1:
            raise ValueError(f"resolution={self.resolution}, batch_size={self.batch_size}: expected at least 1")
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"max_bad_fraction={self.max_bad_fraction}: expected a share in [0, 1]")


CONFIG = EncodeConfig


class Encoder:
    """The tokenizer and VAE at work on one input file after another."""

    def __init__(self, config: EncodeConfig, has_pictures: bool):
        self.config = config
        self.tokenizer = Tokenizer(config.tokenizer)
        self.vae, self.vae_hash, self.stride, self.channels = None, None, 1, 0
        if has_pictures:
            if config.vae is None:
                raise ValueError("inputs hold .tar shards of pictures: give vae=FOLDER or a hub id")
            device = config.device
            if device == "auto":
                device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
            self.vae = load_vae(config.vae).to(device).eval()
            self.vae_hash = vae_hash(self.vae)
            self.channels = self.vae.config.latent_channels
            self.stride = 2 ** (len(self.vae.config.block_out_channels) - 1)
            if config.resolution % self.stride:
                raise ValueError(
                    f"resolution={config.resolution}: expected a multiple of the VAE's stride {self.stride}"
                )
        self.sums = np.zeros((2, self.channels))
        self.cells = 0

    @property
    def fingerprint(self) -> dict:
        """What decides a shard's bytes besides its input file."""
        return {"tokenizer": self.tokenizer.hash, "vae": self.vae_hash, "resolution": self.config.resolution}

    def records(self, path: Path, bad: BadRecords, progress: tqdm) -> Iterator[Record]:
        """Yield the encoded records of one input file; what is bad is counted and named."""
        self.sums[:], self.cells = 0, 0
        if path.suffix != ".tar":
            yield from self._texts(path, bad, progress)
            return
        batch: list[tuple[str, str, bytes, np.ndarray]] = []
        for record in read_shard(path, bad):
            where = f"{path}/{record['__key__'].decode(errors='replace')}"
            try:
                pixels = decode_picture(record, self.config.resolution, where)
                caption = caption_of(record, where)
            except BadRecord as error:
                bad.add(error)
                bad.check()
                continue
            batch.append((record["__key__"].decode(errors="replace"), caption, record.get("json", b"{}"), pixels))
            if len(batch) == self.config.batch_size:
                yield from self._pictures(batch, progress)
                batch = []
        if batch:
            yield from self._pictures(batch, progress)

    def _texts(self, path: Path, bad: BadRecords, progress: tqdm) -> Iterator[Record]:
        for number, item in enumerate(read_text_file(path)):
            bad.seen += 1
            if isinstance(item, BadRecord):
                bad.add(item)
                bad.check()
                continue
            progress.update()
            info = json.dumps({"source": path.name, "line": number + 1}).encode()
            yield encode_record(f"{path.stem}-{number:08d}", self.tokenizer.encode(item[0]), None, info)

    @torch.no_grad()
    def _pictures(self, batch: list[tuple[str, str, bytes, np.ndarray]], progress: tqdm) -> Iterator[Record]:
        pixels = torch.from_numpy(to_unit(np.stack([pixels for *_, pixels in batch])))
        encoded = moments(self.vae, pixels.to(self.vae.device)).float().cpu().numpy().astype(np.float16)
        mean, logvar = np.split(encoded.astype(np.float64), 2, axis=1)
        self.sums += np.stack([mean.sum((0, 2, 3)), (mean**2 + np.exp(logvar)).sum((0, 2, 3))])
        self.cells += mean[:, 0].size
        for (key, caption, info, _), image_moments in zip(batch, encoded, strict=True):
            progress.update()
            info = json.dumps({**_json_object(info), "caption": caption}).encode()
            yield encode_record(key, self.tokenizer.encode(caption), image_moments, info)


def main(argv: list[str]) -> int | None:
    config = load_config(CONFIG, argv)
    inputs = list_inputs(config.inputs, SUFFIXES)
    has_pictures = any(path.suffix == ".tar" for path in inputs)
    if has_pictures and any(path.suffix != ".tar" for path in inputs):
        raise ValueError("inputs mix .tar shards with text files: encode them into two folders")
    names = [path.stem for path in inputs]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"two input files are called {twice}: their shards would overwrite each other")
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    encoder = Encoder(config, has_pictures)
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    bad, start = BadRecords(config.max_bad_fraction), time.monotonic()
    mine = inputs[rank::world_size]
    with tqdm(desc="encode", unit="record", mininterval=1, disable=rank > 0) as progress:
        for done, path in enumerate(mine):
            progress.set_postfix_str(f"file {done + 1}/{len(mine)}{_eta(start, done, len(mine))}")
            encode_file(encoder, path, output, bad, progress)
    bad.check(final=True)
    for name in bad.names:
        print(f"encode: skipped {name}")
    manifest = build_manifest(encoder, inputs, output)
    if manifest is None:
        print(f"encode: rank {rank} is done; the last rank writes {output / FILE_NAME}")
        return
    print(f"encode: {manifest.records} records in {len(manifest.shards)} shards in {output}; skipped {bad.summary()}")


def encode_file(encoder: Encoder, path: Path, output: Path, bad: BadRecords, progress: tqdm) -> None:
    """Write one input file's shard, index and, last, sidecar; do nothing when they are there and up to date."""
    sidecar, shard = _sidecar(output, path), output / f"{path.stem}.tar"
    origin = {**encoder.fingerprint, "input_bytes": path.stat().st_size}
    if sidecar.is_file() and shard.is_file() and json.loads(sidecar.read_text())["origin"] == origin:
        return
    write_shard(shard, encoder.records(path, bad, progress))
    index = index_shard(shard, document_sizes)
    index.save(index_path(shard))
    statistics = {"cells": encoder.cells, "sums": encoder.sums.tolist()}
    entry = asdict(shard_entry(shard, index))
    with atomic_write(sidecar) as file:
        file.write(json.dumps({"origin": origin, "entry": entry, "statistics": statistics}).encode())


def build_manifest(encoder: Encoder, inputs: list[Path], output: Path) -> Manifest | None:
    """Write manifest.json from the sidecars; None while some are missing (another rank will do it)."""
    sidecars = [_sidecar(output, path) for path in inputs]
    if not all(path.is_file() for path in sidecars):
        return None
    contents = [json.loads(path.read_text()) for path in sidecars]
    entries = [shard_entry(output / c["entry"]["name"], ShardIndex.load(index_path(output / c["entry"]["name"])))
               for c in contents]  # fmt: skip
    manifest = Manifest(
        folder=output,
        tokenizer_hash=encoder.tokenizer.hash,
        vocab_size=encoder.tokenizer.vocab_size,
        latent_spec=_latent_spec(encoder, [c["statistics"] for c in contents]) if encoder.vae is not None else None,
        shards=tuple(entry for entry in entries if entry.records),
    )
    if not manifest.records:
        raise ValueError(f"nothing could be encoded from {len(inputs)} input files")
    manifest.save()
    return manifest


def _latent_spec(encoder: Encoder, statistics: list[dict]) -> LatentSpec:
    spec = dict(
        vae_hash=encoder.vae_hash,
        channels=encoder.channels,
        stride=encoder.stride,
        resolution=encoder.config.resolution,
    )
    if encoder.config.stats_from is not None:
        theirs = Manifest.load(Path(encoder.config.stats_from)).latent_spec
        if theirs is None or {name: getattr(theirs, name) for name in spec} != spec:
            raise ValueError(f"stats_from={encoder.config.stats_from} was encoded otherwise: {theirs}, here {spec}")
        return theirs
    cells = sum(s["cells"] for s in statistics)
    first, second = sum(np.array(s["sums"]) for s in statistics) / max(cells, 1)
    return LatentSpec(**spec, mean=tuple(first.tolist()), std=tuple(np.sqrt(second - first**2).tolist()))


def _sidecar(output: Path, path: Path) -> Path:
    return output / f"{path.stem}.tar.json"


def _json_object(data: bytes) -> dict:
    try:
        value = json.loads(data)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _eta(start: float, done: int, total: int) -> str:
    return f", {(time.monotonic() - start) / done * (total - done):.0f} s left" if done else ""


if __name__ == "__main__":
    run_program(main)
