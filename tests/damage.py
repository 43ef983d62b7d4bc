"""What a mutation is, and what can happen to any bytes."""

import random
from dataclasses import dataclass
from pathlib import Path

from data.manifest import Manifest
from tests.tars import BLOCK


@dataclass(frozen=True)
class Mutation:
    what: str
    data: bytes
    touched: frozenset[str] | None = frozenset()  # keys of records that may pass although changed; None: any
    refused: frozenset[str] = frozenset()  # keys of records that must not pass
    dropped: frozenset[str] = frozenset()  # keys of records that are not there any more


def flip(rng: random.Random, data: bytes) -> tuple[str, bytes, list[int]]:
    """Flip one bit or many; return what was done, the bytes and where."""
    places = [rng.randrange(len(data)) for _ in range(rng.choice([1, 1, 1, 2, 5, 50, 1000]))]
    flipped = bytearray(data)
    for place in places:
        flipped[place] ^= 1 << rng.randrange(8)
    return f"{len(places)} bits, first at {places[0]}", bytes(flipped), places


def cut(rng: random.Random, data: bytes) -> tuple[str, bytes]:
    ends = [rng.randrange(len(data)), rng.randrange(len(data)), rng.randrange(len(data) // BLOCK + 1) * BLOCK]
    end = rng.choice(ends)
    return f"cut at {end} of {len(data)}", data[:end]


def overwrite(rng: random.Random, data: bytes) -> tuple[str, bytes]:
    """Replace, remove or insert a run of bytes."""
    start, length = rng.randrange(len(data)), rng.choice([1, 3, 12, 511, 512, 2000])
    kept = rng.choice([0, length])
    filling = rng.choice([b"", bytes(length), b"\xff" * length, rng.randbytes(length), data[:length]])
    return f"{kept} bytes at {start} become {len(filling)}", data[:start] + filling + data[start + kept :]


def any_damage(rng: random.Random, data: bytes) -> tuple[str, bytes]:
    return rng.choice([cut, overwrite, lambda rng, data: flip(rng, data)[:2]])(rng, data)


def garble(folder: Path, records: dict[int, list[int]]) -> list[str]:
    """Flip a bit in the middle of records, by shard; return their names."""
    manifest, names = Manifest.load(folder), []
    for shard, numbers in records.items():
        path = Path(manifest.shard_path(shard))
        content = bytearray(path.read_bytes())
        for record in numbers:
            offset, length, _ = manifest.load_index(shard).spans[record].tolist()
            content[offset + length // 2] ^= 1
            names.append(f"{path}#{record}")
        path.write_bytes(content)
    return names
