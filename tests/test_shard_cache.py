"""Whole copies of remote files: fetched once for all, within a limit, and never in the way."""

import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from data.shard_cache import CacheConfig
from data.storage import Store
from tests.disks import small_disk
from tests.servers import DATA, SOON, Server, fork, kill, open_in, until, wait


def cached(root: str, folder: Path, max_bytes: int) -> Store:
    return Store(root, cache=CacheConfig(folder=str(folder), max_gib=max_bytes / 2**30), retries=SOON)


def copies(folder: Path) -> set[str]:
    """The files in a cache but for locks: whole copies by their names, others as `.NAME.part`."""
    return {path.name for path in folder.glob("*/*") if path.suffix != ".lock"}


def test_a_cache_config_that_cannot_work_is_refused() -> None:
    for folder in ("", "s3://bucket/x"):
        with pytest.raises(ValueError, match="expected a folder on a local disk"):
            CacheConfig(folder=folder, max_gib=1)
    for size in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"max_gib=.*: expected more than 0"):
            CacheConfig(folder="x", max_gib=size)


def test_a_file_is_fetched_once_for_all_reads_and_runs(tmp_path: Path, server: Server) -> None:
    server.files["/a"] = DATA
    for root in (server.url, f"{server.url}/"):
        store = cached(root, tmp_path, 1 << 30)
        store.prefetch("a", 0, 10)
        for offset in (0, 1000, len(DATA) - 3, len(DATA) + 3):
            assert store.read("a", offset, 10) == DATA[offset : offset + 10]
            store.prefetch("a", offset, 10)
        assert len(server.gets()) == 1
    assert copies(tmp_path) == {"a"}
    assert store.read_all("a") == DATA and len(server.gets()) == 2
    with pytest.raises(FileNotFoundError):
        store.read("none", 0, 1)


def test_a_local_folder_needs_no_cache(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(DATA)
    assert cached(str(tmp_path), tmp_path / "cache", 1 << 30).read("a", 1, 9) == DATA[1:10]
    assert not (tmp_path / "cache").exists()


def test_processes_and_threads_that_race_fetch_each_file_once(tmp_path: Path, server: Server) -> None:
    server.files = {f"/{number}": DATA[number:] for number in range(4)}
    started = threading.Event()
    server.stalls.extend([started] * 4)

    def child() -> None:
        store = cached(server.url, tmp_path, 1 << 30)
        with ThreadPoolExecutor(4) as pool:
            found = pool.map(lambda number: store.read(str(number), 5, 9), (0, 0, 0, 0, 1, 2, 3))
        assert list(found) == [DATA[number + 5 : number + 14] for number in (0, 0, 0, 0, 1, 2, 3)]

    children = [fork(child) for _ in range(4)]
    until(lambda: len(server.gets()) == 1)
    started.set()
    assert [wait(pid) for pid in children] == [0] * 4
    assert len(server.gets()) == 4


def test_the_longest_unused_files_make_room(tmp_path: Path, server: Server) -> None:
    server.files = {f"/{name}": name.encode() * 1000 for name in "abcd"}
    stranger = tmp_path / "mine" / "z"
    stranger.parent.mkdir()
    stranger.write_bytes(DATA)
    server.files["/x/a"] = b"a" * 1000
    other = cached(f"{server.url}/x", tmp_path, 3000)
    assert other.read("a", 0, 1) == b"a"
    store = cached(server.url, tmp_path, 3000)
    for name in "bc":
        assert store.read(name, 0, 1) == name.encode()
    assert store.read("b", 1, 1) == b"b"  # open, so its last use is known only here
    assert store.read("d", 0, 1) == b"d"
    assert copies(tmp_path) == {"b", "c", "d", "z"}
    assert other.read("a", 9, 1) == b"a"  # still open
    assert store.read("a", 0, 1) == b"a"
    assert copies(tmp_path) == {"a", "b", "d", "z"}
    assert stranger.read_bytes() == DATA


def test_an_evicted_file_is_closed_when_another_is_opened(tmp_path: Path, server: Server) -> None:
    server.files = {f"/{name}": name.encode() * 1000 for name in "abc"}
    store = cached(server.url, tmp_path, 1000)
    for name in "abcabc":
        assert store.read(name, 0, 1) == name.encode()
    assert open_in(tmp_path) == 2  # the last one opened, and the one that it evicted
    assert len(server.gets()) == 6


def test_a_file_larger_than_the_cache_is_read_where_it_is(tmp_path: Path, server: Server) -> None:
    server.files = {"/large": DATA, "/small": b"small"}
    store = cached(server.url, tmp_path, 1000)
    assert store.read("large", 5, 10) == DATA[5:15]
    assert store.read("small", 0, 5) == b"small"
    assert server.gets() == ["bytes=5-14", "bytes=0-4"] and copies(tmp_path) == {"small"}


def test_a_changed_file_is_fetched_again(tmp_path: Path, server: Server) -> None:
    server.files["/a"], server.etags["/a"] = b"old", '"1"'
    store = cached(server.url, tmp_path, 1000)
    assert store.read("a", 0, 9) == b"old"
    server.files["/a"], server.etags["/a"] = b"new", '"2"'
    assert store.read("a", 0, 9) == b"old"
    store.forget()
    assert store.read("a", 0, 9) == b"new"
    next(path for path in tmp_path.glob("*/a")).write_bytes(b"torn off")
    store.forget()
    assert store.read("a", 0, 9) == b"new"
    assert len(server.gets()) == 3


def test_a_file_that_changes_while_it_is_fetched_is_kept_as_what_it_is(tmp_path: Path, server: Server) -> None:
    server.files["/a"], server.etags["/a"] = DATA, '"1"'
    server.cuts.append(1000)

    def change() -> None:
        server.files["/a"], server.etags["/a"] = b"short", '"2"'

    server.after_get = change
    for _ in range(2):
        assert cached(server.url, tmp_path, 1 << 30).read("a", 0, 9) == b"short"
    assert len(server.gets()) == 2


def test_a_cache_without_room_costs_a_warning_and_nothing_else(
    tmp_path: Path, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    server.files = {"/a": DATA[:40_000], "/large": DATA[:200_000]}
    blocked = tmp_path / "file"
    blocked.touch()
    with small_disk(tmp_path / "disk", 64) as disk, caplog.at_level(logging.WARNING):
        for folder, problem in ((disk, "No space left on device"), (blocked, "Not a directory")):
            caplog.clear()
            store = cached(server.url, folder, 1 << 30)
            for name in ("large", "a"):
                for offset in (0, 5):
                    assert store.read(name, offset, 10) == DATA[offset : offset + 10]
                    store.prefetch(name, offset, 10)
            assert caplog.messages == [f"cache {folder}: {problem}; reading {server.url} without it"]
        assert copies(disk) == set()  # a disk that failed is left alone for a while
        assert cached(server.url, disk, 1 << 30).read("a", 0, 9) == DATA[:9] and copies(disk) == {"a"}


def test_a_disk_that_others_fill_is_shared_with_them(tmp_path: Path, server: Server) -> None:
    server.files = {"/a": DATA[:40_000], "/b": DATA[:50_000]}
    with small_disk(tmp_path / "disk", 64) as disk:
        store = cached(server.url, disk, 1 << 30)
        for name in "ab":
            assert store.read(name, 0, 9) == DATA[:9]
            store.forget()  # an open file keeps its disk space
        assert copies(disk) == {"b"}


def test_a_killed_download_is_taken_over_and_swept(tmp_path: Path, server: Server) -> None:
    server.files = {"/a": DATA, "/b": DATA}
    room = len(DATA) * 3 // 2
    server.stalls.append(threading.Event())
    config = CacheConfig(folder=str(tmp_path), max_gib=room / 2**30)
    pid = fork(lambda: Store(server.url, cache=config, retries=SOON).read("a", 0, 9))
    until(lambda: len(server.gets()) == 1 and not server.stalls)
    began = time.monotonic()
    # The other's download holds the room and is alive, so this file is read where it is.
    assert cached(server.url, tmp_path, room).read("b", 1, 9) == DATA[1:10]
    assert copies(tmp_path) == {".a.part"}
    kill(pid)
    assert cached(server.url, tmp_path, room).read("b", 1, 9) == DATA[1:10]
    assert copies(tmp_path) == {"b"}
    assert cached(server.url, tmp_path, room).read("a", 1, 9) == DATA[1:10]
    assert copies(tmp_path) == {"a"} and time.monotonic() - began < 20


def test_a_failed_download_leaves_nothing_and_the_next_read_tries_again(tmp_path: Path, server: Server) -> None:
    server.files["/a"] = DATA
    store = cached(server.url, tmp_path, 1 << 30)
    server.cuts.extend([0] * 4)
    with pytest.raises(OSError, match="gave up after 4 attempts"):
        store.read("a", 0, 9)
    assert copies(tmp_path) == set()
    assert store.read("a", 0, 9) == DATA[:9]


def test_a_child_forked_during_a_download_holds_no_lock(tmp_path: Path, server: Server) -> None:
    server.files["/a"] = DATA
    store = cached(server.url, tmp_path, 1 << 30)
    released = threading.Event()
    server.stalls.append(released)
    thread = threading.Thread(target=store.read, args=("a", 0, 9))
    thread.start()
    until(lambda: len(server.gets()) == 1)
    pid = fork(lambda: time.sleep(60))
    released.set()
    thread.join()
    store.forget()
    start = time.monotonic()
    assert store.read("a", 0, 9) == DATA[:9] and time.monotonic() - start < 30
    kill(pid)


def test_a_forked_reader_shares_the_parents_copies(tmp_path: Path, server: Server) -> None:
    server.files = {"/a": DATA, "/b": DATA}
    store = cached(server.url, tmp_path, 1 << 30)
    assert store.read("a", 0, 9) == DATA[:9]

    def child() -> None:
        assert store.read("a", 1, 9) == store.read("b", 1, 9) == DATA[1:10]

    pid = fork(child)
    assert wait(pid) == 0
    assert store.read("b", 0, 9) == DATA[:9] and len(server.gets()) == 2
