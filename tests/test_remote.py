"""Bytes come as they are stored, however badly; what cannot come is named, and no secret with it."""

import logging
import os
import re
import threading
import time
from collections import deque
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from data.remote import FileVersion, Retries, file_version, is_remote, retried, shown
from data.storage import COPY_PREFIX, Store, local_copy
from tests.disks import small_disk
from tests.servers import DATA, SOON, Server, fork, kill, until


class PastTheEnd(Exception):
    """What botocore raises for a range that a file does not have."""

    response = {"ResponseMetadata": {"HTTPStatusCode": 416}}


class ShortFiles(MemoryFileSystem):
    """An object store whose answers end early, but for the end of a file, and that takes ranges as S3 does."""

    protocol = "short"

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.removeprefix("short://"))

    def cat_file(self, path: str, *, start: int, end: int) -> bytes:
        if start >= self.info(path)["size"]:
            raise OSError(path) from PastTheEnd
        return super().cat_file(path, start, end)[: 200_000 if start < 800_000 else None]


def copied(url: str, folder: Path, retries: Retries = SOON) -> bytes:
    """Fetch a file, of which nothing may be left."""
    try:
        with local_copy(url, folder, retries) as path:
            return path.read_bytes()
    finally:
        assert list(folder.iterdir()) == []


def raise_(error: Exception) -> None:
    raise error


def test_urls_are_remote_and_local_names_are_not() -> None:
    for path in ("http://h/a", "HTTPS://h/a", "s3://b/a", "simplecache::s3://b/a", "zip://a::file:///b.zip"):
        assert is_remote(path), path
    for path in ("/a", "a b", "a:b", "a::b", "file:///a", "local://a", "pipe:curl http://h/a", "s3:/b", "/x/s3://b"):
        assert not is_remote(path), path


def test_what_is_shown_of_a_url_holds_no_secret() -> None:
    assert shown("https://user:pw@host:80/a.tar?X-Amz-Signature=abc&b=1") == "https://host:80/a.tar?…"
    assert shown("https://token@host/a") == "https://host/a"
    assert shown("ftp://user:pw@host/a cannot reach 'http://h/x?sig=1', again") == (
        "ftp://host/a cannot reach 'http://h/x?…', again"
    )
    for plain in ("abfs://container@account/x?.tar", "/data/a?.tar", "s3://bucket/a@b"):
        assert shown(plain) == plain


def test_a_version_changes_with_the_contents_and_only_then(tmp_path: Path, memory, server: Server) -> None:
    local, remote = tmp_path / "a.tar", f"{server.url}/a.tar"

    def versions() -> list[FileVersion]:
        paths = (str(local), f"file://{local}", remote, "memory://a.tar")
        first = [file_version(path, SOON) for path in paths]
        assert first == [file_version(path, SOON) for path in paths]
        return first

    local.write_bytes(b"one")
    os.utime(local, ns=(1, 1))
    memory.pipe("/a.tar", b"one")
    server.files["/a.tar"], server.etags["/a.tar"] = b"one", '"1"'
    before = versions()
    assert [version.bytes for version in before] == [3] * 4 and before[2].changed == '"1"'
    local.write_bytes(b"two")
    memory.pipe("/a.tar", b"two")
    server.etags["/a.tar"] = '"2"'
    assert not set(before) & set(versions())
    server.etags.clear()
    assert file_version(remote, SOON) == FileVersion(3, "")
    server.headers["last-modified"] = "Wed, 21 Oct 2015 07:28:00 GMT"
    assert file_version(remote, SOON) == FileVersion(3, "Wed, 21 Oct 2015 07:28:00 GMT")
    with pytest.raises(OSError):
        file_version("memory://", SOON)


def test_a_server_without_head_tells_versions_too(server: Server) -> None:
    server.files = {"/a": b"abc", "/empty": b""}
    server.etags["/a"], server.head = '"1"', False
    assert file_version(f"{server.url}/a", SOON) == FileVersion(3, '"1"')
    assert file_version(f"{server.url}/empty", SOON) == FileVersion(0, "")
    server.sized = False
    server.ranges = False
    with pytest.raises(ValueError, match="server does not tell its size; copy it to a local folder"):
        file_version(f"{server.url}/a", SOON)


def test_errors_that_may_pass_are_retried_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    errors: list[Exception] = [OSError("reset"), TimeoutError(), ConnectionRefusedError("no")]

    def action() -> str:
        return raise_(errors.pop(0)) if errors else "done"

    start = time.monotonic()
    with caplog.at_level(logging.WARNING):
        assert retried(action, "the thing", SOON) == "done"
    assert 0.05 < time.monotonic() - start < 5  # 10, 20 and 40 ms, each give or take a quarter
    assert len(caplog.messages) == 3
    assert re.fullmatch(r"the thing: OSError: reset; attempt 2 in 0.0 s", caplog.messages[0])
    errors[:] = [OSError("reset")] * 4
    with pytest.raises(OSError, match=r"the thing: OSError: reset; gave up after 4 attempts"):
        retried(action, "the thing", SOON)
    assert errors == []


def test_errors_that_stay_are_raised_at_once() -> None:
    for error in (FileNotFoundError(2, "x"), PermissionError(1, "x"), IsADirectoryError(1, "x"), KeyError("x")):
        errors = [error]  # another call would be an IndexError
        with pytest.raises(type(error)):
            retried(lambda errors=errors: raise_(errors.pop()), "the thing", SOON)


@pytest.mark.parametrize("status, kind, requests", [(404, FileNotFoundError, 1), (403, PermissionError, 2)])
def test_a_refusal_of_the_server_is_not_retried(server: Server, status: int, kind: type, requests: int) -> None:
    server.statuses.extend([status] * 9)
    with pytest.raises(kind, match=r"http://127[^?]*/a\?…"):
        file_version(f"{server.url}/a?sig=secret", SOON)
    assert len(server.requests) == requests  # 403 may be HEAD's alone
    server.statuses = deque([400])
    server.requests.clear()
    with pytest.raises(OSError, match=r"/a: HTTP 400 Bad Request$"):
        Store(server.url, retries=SOON).read("a", 0, 1)
    assert len(server.requests) == 1


def test_a_busy_server_is_asked_again_and_no_secret_is_logged(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    server.files["/a"] = DATA
    server.statuses.extend([503, 429, 500])
    with caplog.at_level(logging.WARNING):
        assert Store(f"{server.url}?sig=secret", retries=SOON).read("a", 7, 3) == DATA[7:10]
    said = [message.split("; ")[0].rpartition(": ")[2][:8] for message in caplog.messages]
    assert said == ["HTTP 503", "HTTP 429", "HTTP 500"]
    assert [path for _, path, _ in server.requests] == ["/a?sig=secret"] * 4
    server.statuses.extend([503] * 4)
    with pytest.raises(OSError, match="HTTP 503 Service Unavailable; gave up after 4 attempts") as caught:
        Store(f"{server.url}?sig=secret", retries=SOON).read("a", 7, 3)
    assert "secret" not in caplog.text + str(caught.value)


@pytest.mark.usefixtures("server")  # for its environment without a proxy
def test_a_server_that_is_not_there_is_an_error_in_the_end() -> None:
    with pytest.raises(OSError, match=r"http://127.0.0.1:9/a: ClientConnectorError: .*; gave up after 4 attempts"):
        Store("http://127.0.0.1:9", retries=SOON).read("a", 0, 1)


def test_a_local_file_is_its_own_copy(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1")
    for name in (f"{tmp_path}/a", f"file://{tmp_path}/a"):
        with local_copy(name) as path:
            assert path == tmp_path / "a"
    assert (tmp_path / "a").exists()


def test_a_remote_file_is_copied_whole_and_removed(tmp_path: Path, memory, server: Server) -> None:
    memory.pipe("/x/a.jsonl.gz", DATA)
    server.files = {"/a.jsonl.gz": DATA, "/empty.tar": b""}
    for url in ("memory://x/a.jsonl.gz", f"{server.url}/a.jsonl.gz?x=/y.z", "simplecache::memory://x/a.jsonl.gz"):
        with local_copy(url, tmp_path, SOON) as path:
            assert path.read_bytes() == DATA and path.name.endswith(".jsonl.gz") and path.parent == tmp_path
        with pytest.raises(KeyError), local_copy(url, tmp_path, SOON):
            raise KeyError
    assert copied(f"{server.url}/empty.tar", tmp_path) == b""
    with pytest.raises(FileNotFoundError):
        copied(f"{server.url}/none", tmp_path)


def test_a_cut_download_goes_on_where_it_stopped(tmp_path: Path, server: Server) -> None:
    server.files["/a"] = DATA
    server.cuts.extend(range(100_000, 700_000, 100_000))  # more cuts than attempts, but each brings some
    assert copied(f"{server.url}/a", tmp_path) == DATA
    starts = [int(re.match(r"bytes=(\d+)", span)[1]) for span in server.gets()]
    assert len(starts) == 5 and starts == sorted(set(starts))  # 100 + 200 + 300 + 400 thousand, and the rest
    server.ranges = False
    server.cuts = deque([100_000, 50_000, 200_000])
    assert copied(f"{server.url}/a", tmp_path) == DATA


def test_an_object_stores_short_answers_are_no_whole_file(tmp_path: Path, memory) -> None:
    fsspec.register_implementation("short", ShortFiles, clobber=True)
    memory.pipe("/a", DATA)
    assert copied("short:///a", tmp_path) == DATA
    store = Store("short:///", retries=SOON)
    assert store.read_all("a") == DATA
    assert store.read("a", len(DATA) - 3, 9) == DATA[-3:] and store.read("a", len(DATA), 9) == b""


def test_a_download_that_brings_nothing_gives_up(tmp_path: Path, server: Server) -> None:
    server.files["/a"] = DATA
    server.cuts.extend([1000] + [0] * 9)
    with pytest.raises(OSError, match="gave up after 4 attempts"):
        copied(f"{server.url}/a", tmp_path)


def test_a_file_that_changes_under_way_is_never_mixed(tmp_path: Path, server: Server) -> None:
    server.files["/a"], server.etags["/a"] = DATA, '"1"'
    server.cuts.append(100_000)

    def change() -> None:
        server.files["/a"], server.etags["/a"] = DATA[::-1], '"2"'

    server.after_get = change
    assert copied(f"{server.url}/a", tmp_path) == DATA[::-1]


def test_a_stalled_server_is_left_and_asked_again(tmp_path: Path, server: Server) -> None:
    server.files["/a"] = DATA
    released = threading.Event()
    server.stalls.append(released)
    assert copied(f"{server.url}/a", tmp_path, Retries(attempts=20, first_delay_s=0.01, stall_s=0.3)) == DATA
    assert len(server.gets()) > 1
    released.set()


def test_bytes_come_as_stored_although_the_server_calls_them_compressed(tmp_path: Path, server: Server) -> None:
    server.files["/a.gz"], server.headers["Content-Encoding"] = b"no gzip at all", "gzip"
    assert copied(f"{server.url}/a.gz", tmp_path) == b"no gzip at all"
    assert Store(server.url, retries=SOON).read("a.gz", 3, 4) == b"gzip"
    server.headers.clear()
    server.compresses = True
    assert Store(server.url, retries=SOON).read("a.gz", 3, 4) == b"gzip"
    assert file_version(f"{server.url}/a.gz", SOON).bytes == 14


def test_a_full_disk_ends_a_copy_at_once(tmp_path: Path, server: Server) -> None:
    server.files["/a"] = DATA
    with small_disk(tmp_path / "disk", 64) as disk:
        with pytest.raises(OSError, match="No space left"):
            copied(f"{server.url}/a", disk)
        assert len(server.gets()) == 1


def test_copies_of_killed_processes_are_swept_and_no_others(tmp_path: Path, memory) -> None:
    memory.pipe("/a.tar", DATA)

    def hold() -> None:
        with local_copy("memory://a.tar", tmp_path):
            time.sleep(20)

    dead, living = fork(hold), fork(hold)
    until(lambda: len([path for path in tmp_path.iterdir() if path.stat().st_size == len(DATA)]) == 2)
    kill(dead)
    other_host = tmp_path / f"{COPY_PREFIX}elsewhere~1~00000000~a.tar"
    other_host.touch()
    for path in tmp_path.iterdir():
        os.utime(path, (1, 1))
    with local_copy("memory://a.tar", tmp_path) as copy:
        owners = {path.name.split("~")[2] for path in tmp_path.iterdir()}
        assert owners == {str(living), "1", str(os.getpid())} and copy.exists()
    kill(living)
