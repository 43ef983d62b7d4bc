"""Measure the data side on one core: shards to packed batches against webdataset's own pipeline, and encoding.

usage: python -m bench.loader [--pairs 3000] [--texts 6000] [--rounds 5] [--images 150] [--core 0] [--folder DIR]

Our loader goes all the way from local shards to packed batches with their noise, checks every record's checksum,
contents and token ids, and is exact; webdataset reads the same shards, shuffles as many documents, and decodes the same
arrays into batches. They take turns; ratios are of the medians. Encoding is measured without its VAE (an instant
stand-in, like a fast GPU): read, decode, resize, tokenize and write, against Pillow's plain decode and resize of the
same pictures. The last line is one JSON object.
"""

import argparse
import io
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from PIL import Image

from data.dataset import DataConfig, open_data
from data.documents import document_sizes, encode_record
from data.lanes import Lane
from data.loader import Loader, draw_images
from data.manifest import LatentSpec, Manifest, shard_entry
from data.packing import PackedSequence
from data.raw import read_raw
from data.shard_index import index_path
from data.shards import BadRecords, index_shard, write_shard
from data.source import SourceConfig
from data.storage import Store
from data.tokenizer import Tokenizer, train_tokenizer
from model.vae import VaeConfig, build_vae
from train.encoding.encoder import Encoder, EncoderConfig
from train.streams import open_streams

CHANNELS, GRID, PATCH, LENGTH = 8, (32, 32), 2, 4096  # the paper's: 256 patches an image, 4,096 tokens a sequence
LANES, RANKS = 16, 8
T = TypeVar("T")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3000, help="image-caption documents to make")
    parser.add_argument("--texts", type=int, default=6000, help="text documents to make")
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of each way")
    parser.add_argument("--images", type=int, default=150, help="pictures of 640x480 to encode")
    parser.add_argument("--core", type=int, default=None, help="core to run on; default: the last one")
    parser.add_argument("--folder", type=Path, help="where to make the data; default: a temporary folder")
    args = parser.parse_args()
    if min(args.pairs, args.texts) < 1024:
        parser.error(f"--pairs {args.pairs} --texts {args.texts}: expected at least 1024 each, one per lane")
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {args.core if args.core is not None else max(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        tokenizer = make_data(folder, args.pairs, args.texts)
        results = measure_reading(folder, tokenizer, args)
        results |= measure_packing(folder, tokenizer)
        results |= measure_encoding(folder, tokenizer, args.images, args.rounds)
    print(f"machine: one core of {os.cpu_count()}, {platform.machine()}; torch {torch.__version__}, {np.__version__=}")
    print(f"command: python -m bench.loader {' '.join(sys.argv[1:])}")
    print(json.dumps(results))


def make_data(folder: Path, pairs: int, texts: int) -> Tokenizer:
    """Write the paper's two kinds of data as encoded shards of random arrays, and a tokenizer."""
    rng = np.random.default_rng(0)
    path = folder / "tokenizer.model"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        train_tokenizer((f"a large red circle beside {i} small blue squares" for i in range(400)), path, 512)
    tokenizer = Tokenizer(path)
    captions = rng.integers(10, 60, pairs)
    lengths = np.clip(rng.lognormal(6, 1, texts), 8, 50_000).astype(int)

    def tokens(count: int) -> np.ndarray:
        return rng.integers(4, tokenizer.vocab_size, count, dtype=np.int32)

    noise = rng.normal(size=(64, 2 * CHANNELS, *GRID)).astype(np.float16)
    make_source(folder / "pairs", tokenizer, ([tokens(n), np.roll(noise[i % 64], i)] for i, n in enumerate(captions)))
    make_source(folder / "texts", tokenizer, ([tokens(n)] for n in lengths))
    return tokenizer


def make_source(
    folder: Path,
    tokenizer: Tokenizer,
    documents: Iterable[list[np.ndarray]],
    *,
    channels: int = CHANNELS,
    records: int = 1000,  # a shard
) -> None:
    if (folder / "manifest.json").exists():
        return
    folder.mkdir(exist_ok=True)
    documents, entries = list(documents), []
    for start in range(0, len(documents), records):
        shard = folder / f"{start // records:05d}.tar"
        numbered = enumerate(documents[start : start + records], start)
        write_shard(shard, (encode_record(f"{i:09d}", document, b"{}") for i, document in numbered))
        index = index_shard(shard, document_sizes, BadRecords(0))
        index.save(index_path(shard))
        entries.append(shard_entry(shard, index))
    zeros, ones = (0.0,) * channels, (1.0,) * channels
    spec = LatentSpec(vae_hash="bench", channels=channels, stride=8, resolution=256, mean=zeros, std=ones)
    Manifest(
        store=Store(str(folder)),
        tokenizer_hash=tokenizer.hash,
        vocab_size=tokenizer.vocab_size,
        latent_spec=spec,
        shards=tuple(entries),
    ).save()


def config_of(folder: Path, tokenizer: Tokenizer, *names: str, lanes: int = LANES) -> DataConfig:
    sources = {name: SourceConfig(path=str(folder / name)) for name in names}
    return DataConfig(sources=sources, tokenizer=str(tokenizer.path), lanes=lanes, sequence_length=LENGTH)


def measure_reading(folder: Path, tokenizer: Tokenizer, args: argparse.Namespace) -> dict[str, float]:
    """Measure documents and tokens per second, alternating ours and webdataset's."""
    ways = {
        f"{who} {what}": partial(way, folder, tokenizer, what)
        for what in ("pairs", "texts")
        for who, way in (("ours", read_ours), ("webdataset", read_webdataset))
    }
    per_s = {}
    for name, found in in_turns(ways, args.rounds).items():
        documents, tokens, _ = found[0]
        times = [elapsed for *_, elapsed in found]
        median = statistics.median(times)
        per_s[name] = documents / median, tokens / median
        print(
            f"{name:18} {documents / median:9,.0f} documents/s {tokens / median / 1e6:7.2f}M tokens/s  "
            f"(fastest {documents / min(times):,.0f}, slowest {documents / max(times):,.0f} documents/s)"
        )
    return {
        "latent_documents_per_s": round(per_s["ours pairs"][0]),
        "text_tokens_per_s": round(per_s["ours texts"][1]),
        "ratio_to_webdataset": round(per_s["ours pairs"][0] / per_s["webdataset pairs"][0], 3),
        "text_ratio_to_webdataset": round(per_s["ours texts"][0] / per_s["webdataset texts"][0], 3),
    }


def read_ours(folder: Path, tokenizer: Tokenizer, what: str) -> tuple[int, int, float]:
    """Return the documents and tokens of about one epoch, and the seconds it took from shards to packed batches."""
    config = config_of(folder, tokenizer, what)
    data = open_data(config, 0, PATCH)
    wanted = data.sources[0].manifest.records
    loader = Loader(data, config, rank=0, world_size=1, micro_batch_size=4)
    loader.next(600)
    documents = tokens = 0
    start = time.perf_counter()
    while documents < wanted:
        batch = loader.next(600)
        assert batch is not None, "no batch within ten minutes"
        documents += int(sum(micro.document_ids.amax(1).sum() for micro in batch.micro_batches))
        tokens += batch.num_tokens
    elapsed = time.perf_counter() - start
    loader.close()
    return documents, tokens, elapsed


def read_webdataset(folder: Path, tokenizer: Tokenizer, what: str) -> tuple[int, int, float]:
    """Return the same for webdataset's plain pipeline: read, shuffle, decode the arrays, batch."""
    import webdataset as wds

    members = ("tokens.npy", "moments.npy") if what == "pairs" else ("tokens.npy",)
    shards = sorted(str(path) for path in (folder / what).glob("*.tar"))
    dataset = wds.WebDataset(shards, shardshuffle=False).shuffle(1024).decode().to_tuple(*members)
    documents = tokens = 0
    start = time.perf_counter()
    for batch in dataset.batched(64, collation_fn=lambda samples: list(zip(*samples, strict=True))):
        if what == "pairs":
            torch.from_numpy(np.stack(batch[1]))
        documents += len(batch[0])
        tokens += sum(map(len, batch[0]))
    return documents, tokens, time.perf_counter() - start


def measure_packing(folder: Path, tokenizer: Tokenizer) -> dict[str, float]:
    """Measure the fill on the paper's mix and on pairs alone, attention's cost for each of 8 ranks, and the lanes'
    state."""
    config = config_of(folder, tokenizer, "pairs", "texts", lanes=1024)
    data = open_data(config, 0, PATCH)
    lanes = [Lane(number, data.sources, data.settings) for number in range(1024)]
    rows = [next_row(lane) for lane in lanes]
    pairs = np.array([row.num_attention_pairs for row in rows], dtype=np.float64).reshape(RANKS, -1).sum(1)
    print(f"attention pairs per rank, relative to their mean: {' '.join(f'{p:.3f}' for p in pairs / pairs.mean())}")
    alone = open_data(config_of(folder, tokenizer, "pairs", lanes=8), 0, PATCH)
    readers = [Lane(number, alone.sources, alone.settings) for number in range(8)]
    rows_of_pairs = [next_row(lane) for _ in range(8) for lane in readers]
    start = time.perf_counter()
    draws = [draw_images(0, 1, lane, row) for lane, row in enumerate(rows_of_pairs)]
    draws_us = 1e6 * (time.perf_counter() - start) / sum(len(drawn.u) for drawn in draws)
    print(f"noise: {draws_us:.0f} us per image, included in ours but not in webdataset's")
    return {
        "draws_us_per_document": round(draws_us, 1),
        "fill": fill_of(rows),
        "fill_pairs_only": fill_of(rows_of_pairs),
        "attention_imbalance_8_ranks": round(float(pairs.max() / pairs.mean()), 3),
        "state_bytes_1024_lanes": len(json.dumps({lane.number: lane.state().to_json() for lane in lanes})),
    }


def next_row(lane: Lane) -> PackedSequence:
    row = lane.next_row()
    assert row is not None, "sources repeat"
    return row


def fill_of(rows: list[PackedSequence]) -> float:
    return round(float(np.mean([np.mean(row.document_ids > 0) for row in rows])), 4)


def no_moments(pixels: torch.Tensor) -> torch.Tensor:
    """Encode in no time, so that only the CPU's part of encoding is measured."""
    return torch.zeros(len(pixels), 2 * CHANNELS, pixels.shape[2] // 8, pixels.shape[3] // 8, dtype=torch.float16)


def measure_encoding(folder: Path, tokenizer: Tokenizer, images: int, rounds: int) -> dict[str, float]:
    """Measure the encoder without its VAE against Pillow's plain decode, crop and resize."""
    files = make_pictures(images)
    raw = folder / "raw.tar"
    members = {"txt": b"a large red circle beside 3 small blue squares"}
    write_shard(raw, ({"__key__": f"{i:05d}".encode(), "jpg": d, **members} for i, d in enumerate(files)))
    small_vae = VaeConfig(latent_channels=CHANNELS, block_channels=(8, 8, 8, 8), layers_per_block=1, norm_groups=4)
    cast(Any, build_vae(small_vae)).save_pretrained(folder / "vae")
    config = EncoderConfig(tokenizer=str(tokenizer.path), vae=str(folder / "vae"), device="cpu", decode_threads=1)
    encoder = Encoder(config, has_pictures=True)
    cast(Any, encoder.space).encode = no_moments

    def ours() -> None:
        write_shard(folder / "encoded.tar", encoder.records(read_raw(raw, str(raw), bad := BadRecords(0)), bad))

    def pillow() -> None:
        for data in files:
            with Image.open(io.BytesIO(data)) as picture:
                picture.convert("RGB").resize((256, 256), Image.Resampling.LANCZOS, box=(80, 0, 560, 480))

    ways = {"ours": partial(seconds, ours), "Pillow": partial(seconds, pillow)}
    medians = {name: statistics.median(times) for name, times in in_turns(ways, rounds).items()}
    for name, median in medians.items():
        print(f"encode, {name:8} {images / median:7,.1f} pictures/s of 640x480 to 256x256")
    return {"encode_ratio_to_pillow": round(medians["Pillow"] / medians["ours"], 3)}


def make_pictures(count: int) -> list[bytes]:
    """Return JPEG files of 640x480: soft shapes and noise, about as costly to decode as photographs."""
    rng, files = np.random.default_rng(0), []
    for _ in range(count):
        small = rng.integers(0, 256, (15, 20, 3), dtype=np.uint8)
        picture = Image.fromarray(small).resize((640, 480), Image.Resampling.BICUBIC)
        noisy = np.asarray(picture).astype(np.int16) + rng.integers(-8, 9, (480, 640, 3))
        buffer = io.BytesIO()
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
        files.append(buffer.getvalue())
    return files


def seconds(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def in_turns(ways: Mapping[str, Callable[[], T]], rounds: int) -> dict[str, list[T]]:
    """Return what each way gives in each round but the first, which fills the page cache."""
    found = [{name: way() for name, way in ways.items()} for _ in range(rounds + 1)]
    return {name: [one[name] for one in found[1:]] for name in ways}


if __name__ == "__main__":
    open_streams()
    main()
