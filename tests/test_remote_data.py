"""Remote training data: the same batches as from a disk, even from a failing server; reads that hang are named."""

import logging
import shutil
import threading
import time
from pathlib import Path

import fsspec
import pytest

from data.dataset import DataConfig, open_data
from data.lanes import Lane
from data.tokenizer import Tokenizer
from tests.servers import Server, until
from tests.sources import data_config, interleaved, make_source, pairs, texts
from tests.test_lanes import as_bytes
from tests.test_loader import run


@pytest.fixture
def folder(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    documents = pairs(30) + texts(20) + interleaved(10, lengths=(0, 12))
    return make_source(tmp_path / "data", tokenizer, documents, shard_sizes=[25, 20, 15])


@pytest.fixture
def server(server: Server, folder: Path) -> Server:
    server.files = {f"/{path.name}": path.read_bytes() for path in folder.iterdir()}
    server.etags = dict.fromkeys(server.files, '"1"')
    return server


def shards_fetched(server: Server) -> list[str]:
    return sorted(path for method, path, _ in server.requests if method == "GET" and path.endswith(".tar"))


def config_of(tokenizer: Tokenizer, path: str | Path, **changes: object) -> DataConfig:
    return data_config(tokenizer, {"a": path}, **changes)


def test_remote_data_gives_the_batches_of_local_data(
    tmp_path: Path, folder: Path, server: Server, tokenizer: Tokenizer
) -> None:
    """P3 over http and an object store; with read-ahead, with a cache, with workers, and resumed (P4)."""
    expected, states = run(config_of(tokenizer, folder), 6)
    store = fsspec.filesystem("memory")
    for path in folder.iterdir():
        store.pipe(f"/data/{path.name}", path.read_bytes())
    cases = [
        (server.url, {}),
        (server.url, {"read_ahead": 8}),
        (server.url, {"cache_dir": str(tmp_path / "cache"), "cache_gib": 1.0}),
        (server.url, {"num_workers": 2, "read_ahead": 4}),
        ("memory://data", {"read_ahead": 4}),
    ]
    for url, options in cases:
        assert run(config_of(tokenizer, url, **options), 6) == (expected, states), (url, options)
        found, after = run(config_of(tokenizer, url, **options), 2, 2, first_step=5, states=states[3])
        assert (found, after) == (expected[4:], states[4:]), (url, options)


def test_a_cache_asks_for_each_shard_once(tmp_path: Path, server: Server, tokenizer: Tokenizer) -> None:
    config = config_of(tokenizer, server.url, cache_dir=str(tmp_path / "cache"), cache_gib=1.0)
    for _ in range(2):
        run(config, 12, world_size=2)
    assert shards_fetched(server) == [f"/0000{i}.tar" for i in range(3)]


def test_a_copy_that_was_damaged_on_its_way_is_fetched_again(
    tmp_path: Path, server: Server, tokenizer: Tokenizer
) -> None:
    """Of the right length and version, and yet not the shard: checksums tell, and nothing is skipped."""
    config = config_of(tokenizer, server.url, cache_dir=str(tmp_path / "cache"), cache_gib=1.0)
    expected = run(config, 4)
    for copy in (tmp_path / "cache").glob("transfusion-*/*.tar"):
        data = bytearray(copy.read_bytes())
        data[::700] = bytes(len(data[::700]))
        copy.write_bytes(data)
    server.requests.clear()
    assert run(config, 4) == expected
    assert 1 <= len(shards_fetched(server)) == len(set(shards_fetched(server))) <= 3
    damaged = bytearray(server.files["/00001.tar"])
    damaged[::700] = bytes(len(damaged[::700]))
    server.files["/00001.tar"] = bytes(damaged)
    shutil.rmtree(tmp_path / "cache")
    server.requests.clear()
    _, states = run(config, 4)
    assert any(state.skipped for state in states[-1].values())
    assert shards_fetched(server).count("/00001.tar") <= 2  # not once a record


def test_errors_that_pass_are_tried_again_and_nothing_is_skipped(
    folder: Path, server: Server, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    expected = run(config_of(tokenizer, folder), 3)
    config = config_of(tokenizer, server.url)
    server.fail_every = 9
    assert run(config, 3) == expected
    assert "503" in caplog.text and "attempt 2 in" in caplog.text


def test_a_shard_that_vanishes_is_skipped_and_counted(server: Server, tokenizer: Tokenizer) -> None:
    """P7: a missing file is no matter of trying again; a resume skips the same."""
    data = open_data(config_of(tokenizer, server.url), 0, 2)
    lanes = [Lane(number, data.sources, data.settings) for number in range(4)]
    rows = [lane.next_row() for lane in lanes]
    del server.files["/00001.tar"]
    start = time.monotonic()
    rows = [lane.next_row() for _ in range(10) for lane in lanes]
    assert time.monotonic() - start < 20 and None not in rows
    skipped = [lane.state().skipped for lane in lanes]
    assert {reason for counts in skipped for reason in counts} == {"unreadable shard"}
    names = [name for lane in lanes for name in lane.state().skipped_names]
    assert all(f"{server.url}/00001.tar#" in name and "does not exist" in name for name in names)
    states = [lane.state() for lane in lanes]
    expected = [as_bytes(lane.next_row()) for lane in lanes]
    again = open_data(config_of(tokenizer, server.url), 0, 2)
    resumed = [Lane(number, again.sources, again.settings, states[number]) for number in range(4)]
    assert [as_bytes(lane.next_row()) for lane in resumed] == expected


def test_a_read_that_takes_too_long_is_named_while_it_takes(
    server: Server, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    """Lane, shard, record and byte; then again after twice the time."""
    data = open_data(config_of(tokenizer, server.url, read_warning_s=0.2), 0, 2)
    lane = Lane(3, data.sources, data.settings)
    released = threading.Event()
    server.stalls.append(released)
    with caplog.at_level(logging.WARNING):
        thread = threading.Thread(target=lane.next_row, daemon=True)
        thread.start()
        until(lambda: len(caplog.records) >= 2)
        words = [record.getMessage() for record in caplog.records]
        released.set()
        thread.join()
    assert all(w.startswith("lane 3: record ") and "no answer for" in w for w in words)
    offsets = {f"at byte {o}:" for shard in range(3) for o in data.sources[0].manifest.load_index(shard).spans[:, 0]}
    assert f"{server.url}/0000" in words[0] and any(offset in words[0] for offset in offsets)
