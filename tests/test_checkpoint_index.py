"""The index of a checkpoint: the same bytes under every Python; old pickles are read, false ones refused (P4, P11)."""

import base64
import json
import os
import pickle
import time
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from xxhash import xxh3_64_hexdigest

from train.checkpoints import checkpoint
from train.checkpoints.index import parse_index
from train.checkpoints.run_folder import RunFolder
from train.checkpoints.storage import read_index
from train.distributed.ranks import alone

STATE = {
    "model": {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)},
    "optimizer": {"a": {"step": torch.tensor(3.0)}},
}
FILE, NUM_BYTES = "__0_0.distcp", 4731

# Of STATE, as earlier trainers wrote it under Python 3.11.2, which pickles the member of an enum as a call of getattr.
OF_3_11_2 = zlib.decompress(base64.b64decode(
    "eNp9U99v0zAQzli7bqxFFQPBI0KaWCQUuk2CZ1TG6KK2qO1eQMhyEqd2lyYhdiY2CQkeNjTJbzP/L+f8aDo2yJNz99333X0+/6j9TmpG9sltESUu"
    "tTzGRcKcVBDPcilxT+KIhcKaE4E9LLCS6/3yeK3Mn+q72pFbXGBBkMdcgRZAnWjMI48EFlbUkI8nJORRMgYZPCW3Se7HSRSTRDDCNbydwz9WwQy5"
    "I+tZn0o2/CDCYn8P4nIr752ThOGAnWPBolDJTTQlAgX4LEqFRrUKFMznEU9dqJG6kutOygLBQg6MAMdCJICFBh6h/kEfvR+O+m8n6GDQHb7rDQ41"
    "zZPJcNT9gLrDwaR3eDw8HhcgdakJhXJkjbNzohad1sb691rZ9+zVy0xWrrk0DU+4+pIpdfXPP41pRL7PiQBXtm3DNgqGutbIYgvW1MGpU3ruKLqR"
    "E9AmfaCdo20YNjNt97Ue8ekVfabbpc+BpHaRUVATOnpZ1L3SgkV8v8LkMu0oFmwOPSQWBktJfFvv4Q0J8y5+syQ3F8ypbMYBDkOSoHKPaEPWs6mU"
    "XMFgM31DP8kVR5+O5MaiEUU/g/W6lV8KWHhuaMViyFbpbi/0yLfK4lX/a6i0CsvitiHXctNveA5Tv/jvI/FZQPgZdDBXsomKC+2FflQptRISwHqe"
    "EhRjQTUMdVAnI3TBwpmWDkg4hVzfXEsdSgqzKAzNbIPOqkuBbFxkORV0BgU0/bvqqKwy7ywZNYuSJcP0E9Z7ubm0kksTVAMj5qmBbHAM4+RH2C6v"
    "OMKFpWAHrLheylOS8OxR1netjtWBmPUHzFO8OA=="
))  # fmt: skip

# Of STATE, as every trainer writes it.
WRITTEN = (
    '{"version":1,"tensors":{'
    '"model.a":{"dtype":"float32","size":[2,3],"shards":[["__0_0.distcp",0,1577,[0,0],[2,3]]]},'
    '"model.b":{"dtype":"bfloat16","size":[4],"shards":[["__0_0.distcp",1577,1577,[0],[4]]]},'
    '"optimizer.a.step":{"dtype":"float32","size":[],"shards":[["__0_0.distcp",3154,1577,[],[]]]}}}'
)


def _saved(path: Path) -> Path:
    with RunFolder(path, alone()) as run:
        return checkpoint.save(run, 7, STATE, {}, alone())


def _parse(content: bytes, name: str = "index.json") -> Metadata:
    return parse_index(content, name, {FILE: NUM_BYTES})


def _replace_index(folder: Path, name: str, content: bytes) -> None:
    """Give a checkpoint the index that it was written with, a right checksum too."""
    (folder / "index.json").unlink()
    (folder / name).write_bytes(content)
    listing = json.loads((folder / "checksums.json").read_text())
    del listing["files"]["index.json"]
    listing["files"][name] = {"bytes": len(content), "xxh3": xxh3_64_hexdigest(content)}
    (folder / "checksums.json").write_text(json.dumps(listing))


def test_the_index_is_these_bytes_under_every_python(tmp_path: Path) -> None:
    assert (_saved(tmp_path) / "index.json").read_text() == WRITTEN


def test_pickled_indices_of_earlier_checkpoints_say_the_same(tmp_path: Path) -> None:
    """P4: this Python's own pickle, which is that of 3.11.4 and later, and that of 3.11.2."""
    index, folder = _parse(WRITTEN.encode()), _saved(tmp_path / "run")
    assert _parse(OF_3_11_2, ".metadata") == index == read_index(folder)
    _replace_index(folder, ".metadata", pickle.dumps(replace(index, storage_meta=StorageMeta())))
    assert read_index(folder) == index and checkpoint.entries(folder) == {"model", "optimizer"}
    loaded = {"model": {name: torch.zeros_like(tensor) for name, tensor in STATE["model"].items()}}
    assert checkpoint.latest(folder.parent, alone()) == folder
    checkpoint.load(folder, loaded, alone())
    assert all(torch.equal(loaded["model"][name], tensor) for name, tensor in STATE["model"].items())


class _Call:
    """Pickled as the call of a function."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> tuple:
        return self.call[0], self.call[1:]


def test_nothing_that_a_pickled_index_names_is_called(tmp_path: Path) -> None:
    """P11: even with a right checksum; `getattr` and DCP's classes, which an index may name, are not called either."""
    folder = _saved(tmp_path / "run")
    _replace_index(folder, ".metadata", pickle.dumps(_Call(os.mkdir, str(tmp_path / "executed"))))
    assert checkpoint.verify(folder, alone()) == []
    with pytest.raises(ValueError, match=r"\.metadata was not written .*mkdir does not belong .* use another"):
        checkpoint.load(folder, STATE, alone())
    assert not (tmp_path / "executed").exists()
    called = pickle.loads(pickle.dumps(_Call(getattr, Metadata, "__name__")))
    assert called == "Metadata", "Python itself would"
    for content in (pickle.dumps(_Call(getattr, Metadata, "__name__")), pickle.dumps(Metadata({})), OF_3_11_2[:-40]):
        with pytest.raises(ValueError, match="expected the metadata of tensors only"):
            _parse(content, ".metadata")
    shared = pickle.loads(pickle.dumps(_parse(WRITTEN.encode())))
    shared.state_dict_metadata["model.b"].chunks *= 100_000  # one record, named again and again: a few bytes each
    with pytest.raises(ValueError, match="shards"):
        _parse(pickle.dumps(shared), ".metadata")


def _with(tensor: str = "model.a", **changes: Any) -> str:
    index = json.loads(WRITTEN)
    index["tensors"][tensor].update(changes)
    return json.dumps(index)


def _shard(file: Any = FILE, start: Any = 0, length: Any = 1577, offsets: Any = (0, 0), sizes: Any = (2, 3)) -> list:
    return [file, start, length, offsets, sizes]


LIES = {
    "no index": ["null", "[]", "3", '"x"', "{}", '{"version": 1}', '{"version": 1, "tensors": []}', "", "{", "\xff"],
    "newer": [WRITTEN.replace('"version":1', '"version":2')],
    "nested": ["[" * 1_000_000, '{"version":' * 100_000],
    "long number": [WRITTEN.replace("1577", "9" * 100_000, 1)],
    "twice": [WRITTEN.replace("model.b", "model.a"), WRITTEN.replace('{"dtype"', '{"size":[],"dtype"', 1)],
    "no tensor": [json.dumps({"version": 1, "tensors": {"a": entry}}) for entry in (None, 3, [], {}, "x", [{}])],
    "dtype": [_with(dtype=dtype) for dtype in (None, 3, [], "_C", "nn", "load", "Tensor", "float33")],
    "size": [_with(size=size) for size in (None, 3, [2], [2, 4], [-2, -3], [2.0, 3.0], [True, 6], [2, 3, 1 << 63])],
    "dimensions": [_with(size=[1] * 100_000, shards=[_shard(offsets=[0] * 100_000, sizes=[1] * 100_000)])],
    "shards": [_with(shards=shards) for shards in (None, 3, {}, [], [[]], ["abcde"], [_shard()[:4]], [_shard()] * 2)],
    "file": [_with(shards=[_shard(file)]) for file in (None, [], "../x", "/etc/passwd", "x.distcp", "checksums.json")],
    "place": [
        _with(shards=[_shard(start=start, length=length)])
        for start, length in ((-1, 1577), (3155, 1577), (0, 4732), (0, 23), (0, 1e3), (True, 1577), (10**30, 1577))
    ],
    "part": [
        _with(shards=[_shard(offsets=offsets, sizes=sizes)])
        for offsets, sizes in (([0], [2]), ([1, 0], [2, 3]), ([0, 0], [1, 3]), ([0, -1], [2, 4]), ([0, 0], [2, None]))
    ],
    "same bytes again": [_with(size=[8, 3], shards=[_shard(offsets=[row, 0], sizes=[2, 3]) for row in range(0, 8, 2)])],
}


@pytest.mark.parametrize("what", LIES)
def test_an_index_that_no_trainer_writes_is_refused_at_once(what: str) -> None:
    """Before anything is allocated or read by it, with what was found and what was expected."""
    start = time.process_time()
    for content in LIES[what]:
        with pytest.raises(ValueError) as refusal:
            _parse(content.encode("latin1"))
        assert len(str(refusal.value)) < 1000, content[:200]
    assert time.process_time() - start < 2
