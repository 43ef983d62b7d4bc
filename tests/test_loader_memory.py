"""What a loader holds stays below the stated bound and does not grow with what it has read."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from data.dataset import open_data
from data.loader_memory import loader_bytes
from data.tokenizer import Tokenizer
from tests.sources import data_config, make_source, pairs, texts

READ = """
import ctypes, gc, resource, sys, torch
from data.loader_memory import loader_bytes
from data.dataset import open_data
from data.loader import Loader
from data.tokenizer import Tokenizer
from tests.sources import data_config

torch.set_num_threads(1)

def resident():
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

folder, tokenizer, documents = sys.argv[1], Tokenizer(sys.argv[2]), int(sys.argv[3])
config = data_config(tokenizer, {"a": folder}, lanes=8, sequence_length=1024, shuffle_block=1024, look_ahead=16)
data = open_data(config, 0, 2)
loader = Loader(data, config, rank=0, world_size=1, micro_batch_size=8)
before, seen, marks = resident(), 0, []
while seen < documents:
    batch = loader.next(60)
    seen += sum(int(micro.document_ids.max(1).values.sum()) for micro in batch.micro_batches)
    if seen > len(marks) * documents / 10:
        marks.append(resident() - before)
loader.close()
print(sum(loader_bytes(data, config, 1).values()), *marks)
"""


@pytest.mark.parametrize(
    ("size", "documents"),
    [("small", 30_000), ("large", 1500), pytest.param("small", 100_000, marks=pytest.mark.slow)],
)
def test_memory_stays_below_the_bound_and_flat_however_many_documents_are_read(
    tmp_path: Path, tokenizer: Tokenizer, size: str, documents: int
) -> None:
    """Read for real, in a process of its own, with ten looks: many small documents for the one, large for the other."""
    if size == "small":
        contents = texts(4000, lengths=(1, 20)) + pairs(1000)
    else:
        contents = texts(100, lengths=(1, 9000)) + pairs(300, grids=[(32, 32)], channels=8)
    folder = make_source(tmp_path / "a", tokenizer, contents, shard_sizes=[len(contents) // 2] * 2)
    command = [sys.executable, "-c", READ, str(folder), str(tokenizer.path), str(documents)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    bound, *marks = map(int, done.stdout.split())
    if size == "large":  # below, what Python itself takes shows
        assert max(marks) < bound, marks
    assert max(marks[5:]) - max(marks[1:5]) < (4 << 20) + (0 if size == "small" else bound // 4), (bound, marks)


def test_the_bound_grows_with_what_it_counts(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Each part with its setting; ranks share the lanes, and the one with most counts."""
    folder = make_source(tmp_path / "a", tokenizer, pairs(40, grids=[(8, 8)]), shard_sizes=[30, 10])
    config = data_config(tokenizer, {"a": folder}, lanes=10)
    data = open_data(config, 0, 2)
    whole = loader_bytes(data, config, 1)
    largest = max(entry.largest_record for entry in data.sources[0].manifest.shards)
    assert whole["pending documents"] == 10 * 4 * 4 * largest and largest > 2 * 4 * 64
    assert whole["read ahead"] == 0  # a local disk
    assert loader_bytes(data, config, 3)["pending documents"] == 4 * 4 * 4 * largest
    assert loader_bytes(data, replace(config, look_ahead=8), 1)["pending documents"] == 2 * whole["pending documents"]
    more = loader_bytes(data, replace(config, prefetch_steps=8), 1)
    assert more["packed ahead"] == pytest.approx(2 * whole["packed ahead"])
    assert loader_bytes(data, replace(config, num_workers=2), 1)["packed ahead"] > 1.3 * whole["packed ahead"]
    per_row = whole["packed ahead"] / 60
    row = 64 * (2 * 8 + 6 * 4) + 256 * 2 * (2 * 2 + 2 * 4)  # ids and labels, the rest; 64 patches of 2x2 cells
    assert row <= per_row < 1.5 * row
    for kind, cell in {"latents": 2 * (2 + 4), "pixels": 3 * (1 + 4)}.items():  # without posterior noise
        images = pairs(40, grids=[(8, 8)], kind=kind)
        other = make_source(tmp_path / kind, tokenizer, images, shard_sizes=[30, 10], kind=kind)
        config = data_config(tokenizer, {"a": other}, lanes=10)
        per_row = loader_bytes(open_data(config, 0, 2), config, 1)["packed ahead"] / 60
        row = 64 * (2 * 8 + 6 * 4) + 256 * cell
        assert row <= per_row < 1.5 * row, kind
