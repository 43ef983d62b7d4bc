"""Encode raw data once, offline: pictures and captions to VAE moments and token ids, text to token ids.

Reads img2dataset-style .tar shards (picture + .txt or .json) or .jsonl/.txt text, writes one shard per input file with
its index and a sidecar, and manifest.json when all are there. Under torchrun the input files are split over the
ranks. Killed and started again, it skips what is done and the same bytes come out.
"""

import glob
import json
import os
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

from data.documents import document_sizes, encode_record
from data.manifest import FILE_NAME, FORMAT_VERSION, LatentSpec, Manifest, ShardEntry, shard_entry
from data.pictures import decode_picture, to_unit
from data.shards import (
    NAMES_KEPT,
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
from model.vae import load_vae, moments, stated_stats, stride_of, vae_hash
from train.config import load_config, run_program


@dataclass(frozen=True, kw_only=True)
class EncodeConfig:
    inputs: list[str] = field(default_factory=list)  # files or folders: .tar of pictures, or .jsonl/.txt text
    output: str = "runs/latents"  # folder for the shards and manifest.json
    tokenizer: str = "runs/tokenizer.model"  # SentencePiece model
    vae: str | None = None  # diffusers AutoencoderKL: a folder or a hub id; not needed for text
    resolution: int = 256  # pixels of the square pictures, a multiple of the VAE's stride
    batch_size: int = 32  # pictures a VAE batch
    # Where the mean and deviation come from by which training whitens latents. vae: the scaling that the VAE's config
    # states; measured: these pictures' latents; auto: vae where the config states other than 1, else measured.
    latent_stats: Literal["auto", "measured", "vae"] = "auto"
    stats_from: str | None = None  # encoded folder whose latent statistics to take over instead (for held-out data)
    max_bad_fraction: float = 0.01  # share of records that may be skipped, in [0, 1]
    device: str = "auto"  # auto, cpu, cuda or cuda:N

    def __post_init__(self) -> None:
        if self.resolution < 1 or self.batch_size < 1:
            raise ValueError(f"resolution={self.resolution}, batch_size={self.batch_size}: expected at least 1")
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"max_bad_fraction={self.max_bad_fraction}: expected a share in [0, 1]")
        if self.latent_stats not in ("auto", "measured", "vae"):
            raise ValueError(f"latent_stats={self.latent_stats}: expected auto, measured or vae")
        if self.stats_from is not None and self.latent_stats != "auto":
            raise ValueError(
                f"latent_stats={self.latent_stats} and stats_from={self.stats_from} both say where the statistics come "
                "from: leave one of them out"
            )


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
            device = _device(config.device)
            self.vae = load_vae(config.vae).to(device).eval()
            self.vae_hash = vae_hash(self.vae)
            self.channels = self.vae.config.latent_channels
            self.stride = stride_of(self.vae)
            if config.resolution % self.stride:
                raise ValueError(
                    f"resolution={config.resolution}: expected a multiple of the VAE's stride {self.stride}"
                )
        self.given_spec, self.stats_source = self._given_spec()
        self.sums = np.zeros((2, self.channels))  # of the present file's latents: first and second moments
        self.cells = 0

    def _given_spec(self) -> tuple[LatentSpec | None, str]:
        """Return the latent spec if its statistics are not to be measured, and in words where they come from."""
        if self.config.stats_from is not None:
            return self._spec_of(self.config.stats_from), f"from {self.config.stats_from}"
        if self.vae is None or self.config.latent_stats == "measured":
            return None, "measured"
        stats = stated_stats(self.vae)
        mean, std = tuple(stats.mean.tolist()), tuple(stats.std.tolist())
        if self.config.latent_stats == "auto" and set(mean) == {0.0} and set(std) == {1.0}:
            return None, "measured (the VAE states no scaling)"
        return LatentSpec(**self.spec_fields, mean=mean, std=std), "the VAE's own scaling"

    def _spec_of(self, folder: str) -> LatentSpec:
        """Return the latent spec of an encoded folder; raise ValueError for one of other latents."""
        theirs, ours = Manifest.load(Path(folder)).latent_spec, self.spec_fields
        if theirs is None or self.vae is None:
            raise ValueError(f"stats_from={folder}: both it and the inputs must hold pictures; leave it out for text")
        different = [name for name, value in ours.items() if getattr(theirs, name) != value]
        if different:
            found = ", ".join(f"{name} {getattr(theirs, name)} (here {ours[name]})" for name in different)
            raise ValueError(f"stats_from={folder} has other latents: {found}; encode both alike")
        return theirs

    @property
    def spec_fields(self) -> dict:
        """The latent spec but for the statistics."""
        names = ("vae_hash", "channels", "stride")
        return {**{name: getattr(self, name) for name in names}, "resolution": self.config.resolution}

    def origin(self, path: Path) -> dict:
        """What decides a shard's bytes: its input file, tokenizer and VAE. Statistics decide the manifest alone."""
        status = path.stat()  # tars are padded, so that size alone would miss an input that was replaced
        made_with = {"tokenizer": self.tokenizer.hash, "vae": self.vae_hash, "resolution": self.config.resolution}
        return {
            "format": FORMAT_VERSION,
            **made_with,
            "input_bytes": status.st_size,
            "input_mtime_ns": status.st_mtime_ns,
        }

    def records(self, path: Path, bad: BadRecords, progress: tqdm) -> Iterator[Record]:
        """Yield the encoded records of one input file; what is bad is counted and named."""
        self.sums[:], self.cells = 0, 0
        if path.suffix != ".tar":
            yield from self._texts(path, bad, progress)
            return
        batch: list[Picture] = []
        keys: set[str] = set()
        for record in read_shard(path, bad):
            key = record["__key__"].decode()
            where = f"{path}/{key}"
            try:
                if key in keys:
                    raise BadRecord("duplicate key", where)
                keys.add(key)
                pixels = decode_picture(record, self.config.resolution, where)
                batch.append(Picture(key, where, caption_of(record, where), record.get("json", b"{}"), pixels))
            except BadRecord as error:
                bad.add(error)
            if len(batch) == self.config.batch_size:
                yield from self._pictures(batch, bad, progress)
                batch = []
        if batch:
            yield from self._pictures(batch, bad, progress)

    def _texts(self, path: Path, bad: BadRecords, progress: tqdm) -> Iterator[Record]:
        for number, item in enumerate(read_text_file(path)):
            bad.seen += 1
            if isinstance(item, BadRecord):
                bad.add(item)
                continue
            progress.update()
            info = json.dumps({"source": path.name, "line": number + 1}).encode()
            key = path.stem.replace(".", "_")  # a key ends at the first dot
            yield encode_record(f"{key}-{number:08d}", [self.tokenizer.encode(item[0])], info)

    @torch.no_grad()
    def _pictures(self, batch: list["Picture"], bad: BadRecords, progress: tqdm) -> Iterator[Record]:
        pixels = torch.from_numpy(to_unit(np.stack([picture.pixels for picture in batch])))
        encoded = moments(self.vae, pixels.to(self.vae.device)).half().cpu().numpy()
        for picture, image_moments in zip(batch, encoded, strict=True):
            if not np.isfinite(image_moments).all():
                bad.add(BadRecord("non-finite latents", picture.where))
                continue
            mean, logvar = np.split(image_moments.astype(np.float64), 2)
            self.sums += np.stack([mean.sum((1, 2)), (mean**2 + np.exp(logvar)).sum((1, 2))])
            self.cells += mean[0].size
            progress.update()
            info = json.dumps({**_json_object(picture.info), "caption": picture.caption}).encode()
            yield encode_record(picture.key, [self.tokenizer.encode(picture.caption), image_moments], info)


@dataclass(frozen=True)
class Picture:
    """One record on its way to the VAE."""

    key: str
    where: str
    caption: str
    info: bytes  # the record's JSON
    pixels: np.ndarray  # uint8 [H, W, 3]


def main(argv: list[str]) -> int | None:
    config = load_config(CONFIG, argv)
    inputs, output = list_inputs(config.inputs, SUFFIXES), Path(config.output)
    encoder = Encoder(config, has_pictures=check_inputs(inputs, output))
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    bad, start = BadRecords(config.max_bad_fraction), time.monotonic()
    mine = inputs[rank::world_size]
    with tqdm(desc="encode", unit="record", mininterval=1, disable=rank > 0) as progress:
        for done, path in enumerate(mine):
            progress.set_postfix_str(f"file {done + 1}/{len(mine)}{_eta(start, done, len(mine))}")
            encode_file(encoder, path, output, bad, progress)
            bad.check()
    for name in bad.names:
        print(f"encode: skipped {name}")
    sidecars = [read_sidecar(encoder, path, output) for path in inputs]
    if None in sidecars:
        print(f"encode: rank {rank} is done; the last rank writes {output / FILE_NAME}")
        return
    skipped = sum((Counter(sidecar["skipped"]) for sidecar in sidecars), Counter())
    bad = BadRecords(config.max_bad_fraction, sum(sidecar["seen"] for sidecar in sidecars), skipped, bad.names)
    bad.check(final=True)
    manifest = build_manifest(encoder, sidecars, output)
    if encoder.vae is not None:
        print(f"encode: latent statistics: {encoder.stats_source}")
    print(f"encode: {manifest.records} records in {len(manifest.shards)} shards in {output}; skipped {bad.summary()}")


def check_inputs(inputs: list[Path], output: Path) -> bool:
    """Make the output folder; return whether the inputs are pictures. Raises for what cannot be encoded together."""
    has_pictures = any(path.suffix == ".tar" for path in inputs)
    if has_pictures and any(path.suffix != ".tar" for path in inputs):
        raise ValueError("inputs mix .tar shards with text files: encode them into two folders")
    names = [path.stem for path in inputs]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"two input files are called {twice}: their shards would overwrite each other; rename one")
    for path in inputs:
        if path.resolve() == (output / f"{path.stem}.tar").resolve():
            raise ValueError(f"output={output}: the shard of {path} would overwrite it; choose another folder")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"output={output}: cannot write there ({error.strerror}); choose a writable folder") from None
    if not os.access(output, os.W_OK):
        raise PermissionError(f"output={output}: cannot write there; choose a writable folder")
    return has_pictures


def encode_file(encoder: Encoder, path: Path, output: Path, bad: BadRecords, progress: tqdm) -> None:
    """Write one input file's shard, index and, last, sidecar, unless they are there; add to `bad` what was skipped."""
    shard, sidecar = output / f"{path.stem}.tar", _sidecar(output, path)
    contents = read_sidecar(encoder, path, output)
    if contents is None:
        # What vouches for the old contents goes first; a killed run's temporary files go too.
        for stale in (output / FILE_NAME, sidecar, *output.glob(f"{glob.escape(shard.name)}*.tmp-*")):
            stale.unlink(missing_ok=True)
        of_file = BadRecords(max_fraction=1)
        write_shard(shard, encoder.records(path, of_file, progress))
        index = index_shard(shard, document_sizes)
        index.save(index_path(shard))
        contents = {
            "origin": encoder.origin(path),
            "entry": asdict(shard_entry(shard, index)),
            "statistics": {"cells": encoder.cells, "sums": encoder.sums.tolist()},
            "seen": of_file.seen,
            "skipped": dict(sorted(of_file.reasons.items())),
        }
        with atomic_write(sidecar) as file:
            file.write(json.dumps(contents).encode())
        bad.names += of_file.names[: NAMES_KEPT - len(bad.names)]
    bad.seen += contents["seen"]
    bad.reasons.update(contents["skipped"])


def read_sidecar(encoder: Encoder, path: Path, output: Path) -> dict | None:
    """Return an input file's sidecar, None unless its shard and index are there, whole, and made as we would now."""
    try:
        contents = json.loads(_sidecar(output, path).read_text())
        if contents["origin"] != encoder.origin(path):
            return None
        entry = ShardEntry(**contents["entry"])
        shard = output / entry.name
        ShardIndex.load(index_path(shard), entry.index_crc32)
        return contents if shard.stat().st_size == entry.bytes else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def build_manifest(encoder: Encoder, sidecars: list[dict], output: Path) -> Manifest:
    """Write manifest.json from the sidecars of all input files."""
    entries = [ShardEntry(**sidecar["entry"]) for sidecar in sidecars]
    if not any(entry.records for entry in entries):
        raise ValueError(f"nothing could be encoded from {len(sidecars)} input files")
    manifest = Manifest(
        folder=output,
        tokenizer_hash=encoder.tokenizer.hash,
        vocab_size=encoder.tokenizer.vocab_size,
        latent_spec=_latent_spec(encoder, [s["statistics"] for s in sidecars]) if encoder.vae is not None else None,
        shards=tuple(entry for entry in entries if entry.records),
    )
    manifest.save()
    return manifest


def _latent_spec(encoder: Encoder, statistics: list[dict]) -> LatentSpec:
    if encoder.given_spec is not None:
        return encoder.given_spec
    cells = sum(s["cells"] for s in statistics)
    first, second = sum(np.array(s["sums"]) for s in statistics) / cells
    std = np.sqrt(np.maximum(second - first**2, 0))
    return LatentSpec(**encoder.spec_fields, mean=tuple(first.tolist()), std=tuple(std.tolist()))


def _sidecar(output: Path, path: Path) -> Path:
    return output / f"{path.stem}.tar.json"


def _json_object(data: bytes) -> dict:
    try:
        value = json.loads(data)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _device(name: str) -> torch.device:
    """Return the device of this process; raise ValueError for one that is not there."""
    if name == "auto":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device={name}: expected auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={name}, but torch finds no CUDA device; use device=auto or device=cpu")
    return device


def _eta(start: float, done: int, total: int) -> str:
    return f", {(time.monotonic() - start) / done * (total - done):.0f} s left" if done else ""


if __name__ == "__main__":
    run_program(main)
