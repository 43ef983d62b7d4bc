"""Spans of files come from wherever they are stored, read ahead or not, also after a fork."""

import gc
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest

from data.remote import Retries
from data.storage import OPEN_FILES, READERS, Store
from tests.servers import DATA, SOON, Server, fork, open_in, until, wait


def served(server: Server, **options: int) -> Store:
    """A store of one file, /a."""
    server.files["/a"] = DATA
    return Store(server.url, retries=SOON, **options)


def test_local_reads_are_preads(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(DATA)
    for root in (str(tmp_path), f"file://{tmp_path}"):
        store = Store(root)
        assert store.path("a") == f"{tmp_path}/a" and not store.is_remote
        assert store.size("a") == len(DATA) and store.size("b") is None
        assert store.read_all("a") == DATA
        store.prefetch("a", 0, 10)  # not open
        assert store.read("a", 10, 20) == DATA[10:30]
        store.prefetch("a", 0, 10)
        assert store.read("a", len(DATA) - 3, 20) == DATA[-3:]
        assert store.read("a", len(DATA) + 3, 20) == b""
        with pytest.raises(FileNotFoundError):
            store.read("b", 0, 1)
        with pytest.raises(FileNotFoundError):
            store.read_all("b")
        with pytest.raises(OSError):
            store.read("a", -1, 1)


def test_remote_reads_are_preads_too(memory, server: Server) -> None:
    memory.pipe("/x/a b#c%41.tar", DATA)
    server.files["/x/a%20b%23c%2541.tar"] = DATA
    for root in ("memory://x", f"{server.url}/x/", "simplecache::memory://x"):
        store = Store(root, retries=SOON)
        assert store.is_remote and store.size("none") is None
        assert store.size("a b#c%41.tar") == len(DATA)
        assert store.read_all("a b#c%41.tar") == DATA
        for offset, length in ((0, 1), (10, 20), (len(DATA) - 3, 20), (len(DATA) + 3, 20), (5, 0), (0, 2 * len(DATA))):
            assert store.read("a b#c%41.tar", offset, length) == DATA[offset : offset + length]
        for read in (store.read_all, lambda name, store=store: store.read(name, 0, 1)):
            with pytest.raises(FileNotFoundError, match="none does not exist"):
                read("none")
        with pytest.raises(OSError):
            store.read("a b#c%41.tar", -1, 1)


def test_a_server_that_ignores_ranges_does_not_fool_a_reader(server: Server) -> None:
    store, server.ranges = served(server), False
    for sized in (True, False):
        server.sized = sized
        for offset, length in ((0, 10), (300_001, 20), (len(DATA) - 3, 20), (len(DATA) + 3, 20), (0, len(DATA))):
            assert store.read("a", offset, length) == DATA[offset : offset + length]


def test_a_body_that_is_cut_short_is_asked_for_again(server: Server) -> None:
    store = served(server)
    server.cuts.extend([0, 10, 99])
    assert store.read("a", 1000, 100) == DATA[1000:1100]
    server.sized = False  # then only Content-Range tells
    server.cuts.append(50)
    assert store.read("a", 1000, 100) == DATA[1000:1100]
    assert len(server.requests) == 6


def test_only_files_directly_in_the_folder_have_names(tmp_path: Path) -> None:
    for store in (Store(str(tmp_path)), Store("memory://x")):
        for name in ("", ".", "..", "../a", "a/b", "/a", ".hidden"):
            with pytest.raises(ValueError, match="expected that of a file directly in"):
                store.read(name, 0, 1)
    with pytest.raises(ValueError, match="commands are not run"):
        Store("pipe:cat")
    with pytest.raises(ValueError, match="Protocol not known"):
        Store("nothing://x")


def test_after_forget_the_file_of_now_is_read(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    (tmp_path / "a").write_bytes(b"old")
    assert store.read("a", 0, 3) == b"old"
    (tmp_path / "b").write_bytes(b"new")
    os.replace(tmp_path / "b", tmp_path / "a")
    assert store.read("a", 0, 3) == b"old"  # the open one
    store.forget()
    assert store.read("a", 0, 3) == b"new"
    (tmp_path / "a").unlink()
    store.forget()
    with pytest.raises(FileNotFoundError):
        store.read("a", 0, 3)


def test_few_files_stay_open_and_threads_never_mix_them_up(tmp_path: Path) -> None:
    names = [f"{number:03}" for number in range(2 * OPEN_FILES)]
    for name in names:
        (tmp_path / name).write_text(name)
    store = Store(str(tmp_path))

    def read(seed: int) -> None:
        for turn in range(4000):
            name = names[(turn * seed) % len(names)]
            assert store.read(name, 0, 3) == name.encode()
            if turn % 1000 == 0:
                store.forget()

    with ThreadPoolExecutor() as pool:
        list(pool.map(read, (1, 3, 5, 7)))
    assert 0 < open_in(tmp_path) <= OPEN_FILES
    store.forget()
    assert open_in(tmp_path) == 0


def test_the_least_recently_used_file_is_closed(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    for number in range(OPEN_FILES + 1):
        (tmp_path / str(number)).write_text("old")
        store.read("0", 0, 3)
        store.read(str(number), 0, 3)
    for path in tmp_path.iterdir():
        path.unlink()
    assert store.read("0", 0, 3) == b"old"
    with pytest.raises(FileNotFoundError):
        store.read("1", 0, 3)


def test_what_was_read_ahead_is_not_asked_for_again(server: Server) -> None:
    store = served(server)
    for offset in range(0, 1000, 100):
        store.prefetch("a", offset, 100)
        store.prefetch("a", offset, 100)
    until(lambda: len(server.requests) == 10)
    for offset in range(0, 1000, 100):
        assert store.read("a", offset, 100) == DATA[offset : offset + 100]
    assert len(server.requests) == 10
    assert store.read("a", 0, 100) == DATA[:100] and len(server.requests) == 11  # used up
    store.prefetch("a", 0, 100)
    store.forget()
    server.files["/a"] = DATA[::-1]
    assert store.read("a", 0, 100) == DATA[::-1][:100]


def test_no_more_is_held_than_max_ahead(server: Server) -> None:
    store = served(server, max_ahead=3)
    for offset in range(5):
        store.prefetch("a", offset, 1)
        until(lambda offset=offset: len(server.requests) == offset + 1)
    for offset in (4, 3, 2):
        assert store.read("a", offset, 1) == DATA[offset : offset + 1]
    assert len(server.requests) == 5
    assert store.read("a", 0, 1) == DATA[:1] and store.read("a", 1, 1) == DATA[1:2]
    assert len(server.requests) == 7


def test_many_threads_may_meet_the_first_url_at_once(tmp_path: Path) -> None:
    """In fresh processes: none takes the event loop away from another."""
    program = """
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from data.remote import filesystem
def ask(gate):
    gate.wait()
    return filesystem("http://127.0.0.1:9/a")[0].loop
with ThreadPoolExecutor(16) as pool:
    assert None not in list(pool.map(ask, [Barrier(16)] * 16))
"""
    for _ in range(3):
        subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_what_no_reader_has_begun_is_read_at_once(server: Server) -> None:
    store = served(server)
    released = threading.Event()
    server.stalls.extend([released] * READERS)
    for offset in range(READERS + 1):
        store.prefetch("a", offset, 1)
    until(lambda: len(server.stalls) == 0)
    start = time.monotonic()
    assert store.read("a", READERS, 1) == DATA[READERS : READERS + 1]
    assert time.monotonic() - start < 20  # the others wait until they are released, or for 30 s
    released.set()


def test_what_failed_ahead_is_asked_for_again(server: Server) -> None:
    store = served(server)
    server.statuses.append(503)
    store.prefetch("a", 5, 9)
    until(lambda: len(server.requests) == 1)
    assert store.read("a", 5, 9) == DATA[5:14] and len(server.requests) == 2


def test_reading_ahead_never_fails_and_never_waits(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    store = served(server)
    released = threading.Event()
    server.stalls.extend([released] * 20)
    start = time.monotonic()
    for offset in range(20):
        store.prefetch("a", offset, 1)
    for name in ("none", "../a", ""):
        store.prefetch(name, 0, 1)
    store.prefetch("a", -1, -1)
    assert time.monotonic() - start < 20
    server.stalls.clear()
    released.set()
    server.statuses.extend([503] * 3)
    assert [store.read("a", offset, 1) for offset in range(20)] == [DATA[i : i + 1] for i in range(20)]
    with pytest.raises(FileNotFoundError):
        store.read("none", 0, 1)


def test_a_fork_after_a_remote_read_can_read(server: Server, memory) -> None:
    memory.pipe("/x/a", DATA)
    stores = [served(server), Store("memory://x", retries=SOON)]
    for store in stores:
        store.prefetch("a", 9, 9)
        assert store.read("a", 0, 9) == DATA[:9]

    def child() -> None:
        for store in stores:
            store.prefetch("a", 1, 9)
            assert store.read("a", 1, 9) == DATA[1:10]
            assert store.read("a", 9, 9) == DATA[9:18]  # begun in the parent, whose thread is not here

    with stores[0]._process.lock, fsspec.asyn.get_lock():  # as other threads might
        pid = fork(child)
    assert wait(pid) == 0
    assert stores[0].read("a", 9, 9) == DATA[9:18]


def test_a_fork_leaves_its_parents_connections_alone(server: Server) -> None:
    server.files["/a"] = DATA
    reading, writing = os.pipe()

    def child(store: Store) -> None:
        gc.collect()  # would close sockets that the parent still uses, in an epoll set that both share
        os.write(writing, b".")
        assert store.read("a", 1, 9) == DATA[1:10]

    def parent() -> None:
        store = Store(server.url, retries=Retries(stall_s=60))
        assert store.read("a", 0, 9) == DATA[:9]
        pid = fork(lambda: child(store))
        assert os.read(reading, 1) == b"."
        began = time.monotonic()
        assert store.read("a", 2, 9) == DATA[2:11]
        assert time.monotonic() - began < 30  # it had not to wait until a stall was noticed
        assert wait(pid, 90) == 0

    assert wait(fork(parent), 120) == 0  # a process whose connections no other test has used
    os.close(reading)
    os.close(writing)


def test_a_fork_reads_the_parents_open_files(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(DATA)
    (tmp_path / "b").write_bytes(DATA)
    store = Store(str(tmp_path))
    assert store.read("a", 0, 9) == DATA[:9]

    def child() -> None:
        assert store.read("a", 1, 9) == store.read("b", 1, 9) == DATA[1:10]

    with store._process.lock:
        pid = fork(child)
    assert wait(pid) == 0
