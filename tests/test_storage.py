"""Bytes come as they are stored, from wherever and however badly; what cannot come is named, and no secret with it."""

import gc
import gzip
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from data.inputs import expand
from data.remote import FileVersion, Retries, file_version, is_remote, retried, shown, warn_once
from data.shard_cache import CacheConfig
from data.storage import COPY_PREFIX, OPEN_FILES, READERS, Store, local_copy
from tests.disks import small_disk

TAR = (".tar",)
SOON = Retries(attempts=4, first_delay_s=0.01, stall_s=0.3)
DATA = bytes(range(256)) * 4096  # 1 MiB in which no two neighbouring spans are alike


class Server(ThreadingHTTPServer):
    """A web server on this machine that can be told to misbehave; `requests` are (method, path, Range)."""

    daemon_threads = True
    request_queue_size = 128  # of connections at once; another would wait a second

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.etags: dict[str, str] = {}
        self.headers: dict[str, str] = {}  # sent with each good answer
        self.statuses: deque[int] = deque()  # of the next answers, instead of the file
        self.cuts: deque[int] = deque()  # bytes after which the next bodies end
        self.stalls: deque[float] = deque()  # seconds before the next bodies
        self.ranges = True  # False: Range is ignored
        self.head = True  # False: HEAD is refused
        self.sized = True  # False: Content-Length is left out
        self.compresses = False  # True: whoever takes gzip gets it
        self.after_get: Callable[[], None] = lambda: None
        self.requests: list[tuple[str, str, str | None]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def gets(self) -> list[str | None]:
        return [span for method, _, span in self.requests if method == "GET"]

    def handle_error(self, request, client_address) -> None:
        """Be silent about clients that hang up."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else a kept connection waits 40 ms for each answer
    server: Server

    def do_HEAD(self) -> None:
        self.answer(405 if not self.server.head else None)

    def do_GET(self) -> None:
        self.answer(None)
        self.server.after_get()

    def answer(self, status: int | None) -> None:
        server, path, span = self.server, self.path.partition("?")[0], self.headers.get("Range")
        server.requests.append((self.command, self.path, span))
        if status is None and server.statuses:
            status = server.statuses.popleft()
        if status is not None or path not in server.files:
            return self.send(status or 404, b"no", {})
        whole = server.files[path]
        headers = {"ETag": server.etags[path]} if path in server.etags else {}
        if server.compresses and "gzip" in self.headers["Accept-Encoding"]:
            return self.send(200, gzip.compress(whole), {"Content-Encoding": "gzip"})
        if span and server.ranges:
            first, last = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", span).groups())
            if first >= len(whole):
                return self.send(416, b"", {"Content-Range": f"bytes */{len(whole)}"})
            body = whole[first : last + 1]
            headers["Content-Range"] = f"bytes {first}-{first + len(body) - 1}/{len(whole)}"
            return self.send(206, body, headers)
        return self.send(200, whole, headers)

    def send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        good = status in (200, 206) and self.command == "GET"
        self.send_response(status)
        for name, value in {**headers, **self.server.headers}.items():
            self.send_header(name, value)
        if self.server.sized:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if good and self.server.stalls:
            time.sleep(self.server.stalls.popleft())
        if good and self.server.cuts:
            body = body[: self.server.cuts.popleft()]
            self.close_connection = True
        if self.command != "HEAD":
            self.wfile.write(body)
        self.close_connection |= not self.server.sized

    def log_message(self, format: str, *args: object) -> None:
        """Be silent."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


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


@pytest.fixture
def memory() -> Iterator[fsspec.AbstractFileSystem]:
    files = fsspec.filesystem("memory")
    yield files
    files.store.clear()
    files.pseudo_dirs[:] = [""]


def fork(action: Callable[[], None]) -> int:
    """Run an action in a forked child, which ends with 0 if it holds; return its pid."""
    if (pid := os.fork()) == 0:
        try:
            action()
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
        finally:
            os._exit(1)
    return pid


def wait(pid: int, limit_s: float = 10) -> int:
    """Return a child's exit code; one that hangs is killed, and -9."""
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def cached(root: str, folder: Path, max_bytes: int) -> Store:
    return Store(root, cache=CacheConfig(folder=str(folder), max_gib=max_bytes / 2**30), retries=SOON)


def open_in(folder: Path) -> int:
    """Count this process's open files in a folder, also those that are no longer there."""
    return sum(os.path.realpath(link).startswith(f"{folder}/") for link in Path("/proc/self/fd").iterdir())


def copies(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*/*") if not path.name.startswith(".")}


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


def test_files_folders_globs_and_braces_are_found_in_order(tmp_path: Path) -> None:
    for name in ("b.tar", "a.tar", "c.jsonl", "c.jsonl.gz", "stats.json", "sub/d.tar", "sub/sub/e.tar"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.tar").mkdir()

    def names(*inputs: str, suffixes: tuple[str, ...] = (".tar", ".jsonl.gz")) -> str:
        found = expand([f"{tmp_path}/{name}" for name in inputs], suffixes)
        return " ".join(os.path.relpath(file, tmp_path) for file in found)

    assert names("") == "a.tar b.tar c.jsonl.gz"
    assert names("sub/d.tar", "a.tar") == "sub/d.tar a.tar"
    assert names("*", "sub") == "a.tar b.tar c.jsonl.gz sub/d.tar"
    assert names("[b-z].tar") == "b.tar"
    assert names("?.tar") == "a.tar b.tar"
    assert names("**/*.tar") == "a.tar b.tar sub/d.tar sub/sub/e.tar"
    assert names("{b,a}.tar", "sub/{sub/e,d}.tar") == "b.tar a.tar sub/sub/e.tar sub/d.tar"
    assert names("{a..b}.t*r") == "a.tar b.tar"
    assert names("", suffixes=(".jsonl",)) == "c.jsonl"
    assert expand([f"file://{tmp_path}/a.tar"], TAR) == [f"{tmp_path}/a.tar"]


def test_what_else_lies_in_a_folder_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture, memory) -> None:
    """By kind, count and example; a suffix may be of any case, and what file managers write is none of the files."""
    for name in ("b.tar", "C.TAR", "a.tar.gz", "d.parquet", "e.parquet", "._b.tar", "README", "new\nline.md"):
        (tmp_path / name).touch()
    (tmp_path / "folder.tar").mkdir()
    (tmp_path / "gone.tar").symlink_to("nowhere")
    found = [f"{tmp_path}/C.TAR", f"{tmp_path}/b.tar"]
    others = (
        "2 .parquet (such as 'd.parquet'), 2 that are no files (such as 'folder.tar/'), 1 file of macOS or "
        "Windows (such as '._b.tar'), 1 without suffix (such as 'README'), 1 .tar.gz (such as 'a.tar.gz') and 1 of "
        "other kinds"
    )
    for name in (str(tmp_path), f"{tmp_path}/*"):
        warn_once.cache_clear()
        caplog.clear()
        assert expand([name], TAR, quiet=True) == found and not caplog.messages
        assert expand([name], TAR) == found
        (message,) = caplog.messages
        if name == str(tmp_path):  # a glob leaves out hidden files itself
            assert message == f"input {name}: reading 2 files; left out, as none of .tar: {others}"
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "new\nline.md").touch()
    with pytest.raises(ValueError, match=r"no .tar files in .*sub'\], but 1 .md \(such as 'new\\nline.md'\)$"):
        expand([f"{tmp_path}/sub"], TAR)
    memory.pipe("/x/a.Tar", b"1")
    memory.pipe("/x/sub/b.tar", b"1")
    caplog.clear()
    assert expand(["memory:///x"], TAR) == ["memory:///x/a.Tar"]
    assert "left out, as none of .tar: 1 that are no files (such as 'sub/')" in caplog.text


@pytest.mark.skipif(os.geteuid() != 0, reason="takes another user's rights")
def test_files_that_may_not_be_read_are_refused_before_work() -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        os.chmod(name, 0o755)
        for file, mode in (("a.tar", 0o644), ("b.tar", 0o600)):
            Path(name, file).touch(mode)
        os.seteuid(65534)
        try:
            with pytest.raises(PermissionError, match=r"1 files are not readable, such as '.*b.tar'; allow it"):
                expand([name], TAR)
        finally:
            os.seteuid(0)


def test_a_name_that_exists_is_no_pattern(tmp_path: Path) -> None:
    for name in ("a[1].tar", "{x,y}.tar", "*.tar", "b.tar", "open{.tar", "[z]/1.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
        assert expand([f"{tmp_path}/{name}"], TAR) == [f"{tmp_path}/{name}"]
    assert expand([f"{tmp_path}/[z]"], TAR) == [f"{tmp_path}/[z]/1.tar"]


def test_remote_files_folders_and_globs_keep_their_protocol(memory, server: Server) -> None:
    for name in ("b.tar", "a.tar", "notes.md", "sub/c.tar"):
        memory.pipe(f"/x/{name}", b"1")
    found = ["memory:///x/a.tar", "memory:///x/b.tar"]
    assert expand(["memory:///x"], TAR) == expand(["memory:///x/*"], TAR) == found
    assert expand(["memory:///x/**/*.tar"], TAR) == [*found, "memory:///x/sub/c.tar"]
    assert expand(["memory:///x/{b,a}.tar"], TAR) == found[::-1]
    assert expand(["simplecache::memory:///x/a.tar"], TAR) == ["simplecache::memory:///x/a.tar"]
    server.files = {f"/d/{number:03}.tar": b"1" for number in range(12)}
    server.statuses.append(503)
    urls = [f"{server.url}/d/{number:03}.tar?key=v.txt" for number in range(12)]
    assert expand([f"{server.url}/d/{{000..011}}.tar?key=v.txt"], TAR, SOON) == urls


def test_inputs_that_are_no_files_are_refused(tmp_path: Path, memory, server: Server) -> None:
    (tmp_path / "a.parquet").touch()
    (tmp_path / "sub.tar").mkdir()
    memory.pipe("/x/a.md", b"1")
    server.files["/a.md"] = b"1"
    missing = {
        f"{tmp_path}/none": "input .*none does not exist",
        f"{tmp_path}/{{none,nil}}.tar": "input .*/none.tar does not exist",
        f"{tmp_path}/*.tar": r"input .*\*.tar matches no file",
        "memory://x/none": "input memory://x/none does not exist",
        "memory://x/*.tar": r"input memory://x/\*.tar matches no file",
        f"{server.url}/none.tar?token=secret": r"input http://.*/none.tar\?… does not exist$",
    }
    for name, message in missing.items():
        with pytest.raises(FileNotFoundError, match=message) as caught:
            expand([name], TAR, SOON)
        assert "secret" not in str(caught.value)
    (tmp_path / "gone.tar").symlink_to("nowhere")
    refused = {
        os.devnull: "null: expected a file or folder, found a device, a pipe or a broken link",
        f"{tmp_path}/gone.tar": "gone.tar: expected a file or folder, found a device, a pipe or a broken link",
        f"{tmp_path}/a.parquet": "a.parquet: expected one of .tar, .txt, or a folder of them",
        f"{server.url}/a.md": "a.md: expected one of .tar, .txt, or a folder of them",
        "memory://x/a.md": "a.md: expected one of .tar, .txt, or a folder of them",
        str(tmp_path): r"no .tar, .txt files in \['.*'\]",
        f"{tmp_path}/*.par*": r"no .tar, .txt files in \['.*'\]",
        "memory://x": r"no .tar, .txt files in \['memory://x'\]",
        f"{server.url}/": "lists no files; name them, with braces",
        f"{server.url}/*.tar": "lists no files; name them, with braces",
        f"{tmp_path}/{{a": "braces do not match",
        "simplecache::memory://x/*.md": "chain of URLs cannot be listed",
        "pipe:cat a.tar": "commands are not run",
        "pipe:curl http://h/a.tar": "commands are not run",
        "pipe::http://h/a.tar": "Protocol not known: pipe; expected a local path",
        "nothing://h/a.tar": "Protocol not known: nothing; expected a local path",
    }
    for name, message in refused.items():
        with pytest.raises(ValueError, match=message):
            expand([name], (".tar", ".txt"), SOON)
    with pytest.raises(ValueError, match=r"no .tar files in inputs=\[\] \(none given\)"):
        expand([], TAR)


def test_a_file_named_twice_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.tar").touch()
    memory.pipe("/x/a.tar", b"1")
    for inputs in (["a.tar", "./a.tar"], ["*.tar", str(tmp_path)], ["{a,a}.tar"], ["memory:///x", "memory:///x/a.tar"]):
        with pytest.raises(ValueError, match=r"a.tar is named 2 times, expected once"):
            expand(inputs, TAR)


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
        if errors:
            raise errors.pop(0)
        return "done"

    start = time.monotonic()
    with caplog.at_level(logging.WARNING):
        assert retried(action, "the thing", SOON) == "done"
    assert 0.05 < time.monotonic() - start < 0.5  # 10, 20 and 40 ms, each give or take a quarter
    assert len(caplog.messages) == 3
    assert re.fullmatch(r"the thing: OSError: reset; attempt 2 in 0.0 s", caplog.messages[0])
    errors[:] = [OSError("reset")] * 4
    with pytest.raises(OSError, match=r"the thing: OSError: reset; gave up after 4 attempts"):
        retried(action, "the thing", SOON)
    assert errors == []


def test_errors_that_stay_are_raised_at_once() -> None:
    for error in (FileNotFoundError(2, "x"), PermissionError(1, "x"), IsADirectoryError(1, "x"), KeyError("x")):
        calls = []

        def action(error: Exception = error, calls: list[int] = calls) -> None:
            calls.append(1)
            raise error

        with pytest.raises(type(error)):
            retried(action, "the thing", SOON)
        assert len(calls) == 1


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
    assert [message.split("; ")[0].rpartition(": ")[2][:8] for message in caplog.messages] == [
        "HTTP 503",
        "HTTP 429",
        "HTTP 500",
    ]
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
        assert list(tmp_path.iterdir()) == []
    with local_copy(f"{server.url}/empty.tar", tmp_path, SOON) as path:
        assert path.read_bytes() == b""
    with pytest.raises(FileNotFoundError), local_copy(f"{server.url}/none", tmp_path, SOON):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_cut_download_goes_on_where_it_stopped(tmp_path: Path, server: Server) -> None:
    server.files["/a"] = DATA
    server.cuts.extend(range(100_000, 700_000, 100_000))  # more cuts than attempts, but each brings some
    with local_copy(f"{server.url}/a", tmp_path, SOON) as path:
        assert path.read_bytes() == DATA
    starts = [int(re.match(r"bytes=(\d+)", span)[1]) for span in server.gets()]
    assert len(starts) == 5 and starts == sorted(set(starts))  # 100 + 200 + 300 + 400 thousand, and the rest


def test_a_cut_download_goes_on_with_a_server_that_ignores_ranges(tmp_path: Path, server: Server) -> None:
    server.files["/a"], server.ranges = DATA, False
    server.cuts.extend([100_000, 50_000, 200_000])
    with local_copy(f"{server.url}/a", tmp_path, SOON) as path:
        assert path.read_bytes() == DATA


def test_an_object_stores_short_answers_are_no_whole_file(tmp_path: Path, memory) -> None:
    fsspec.register_implementation("short", ShortFiles, clobber=True)
    memory.pipe("/a", DATA)
    with local_copy("short:///a", tmp_path, SOON) as path:
        assert path.read_bytes() == DATA
    store = Store("short:///", retries=SOON)
    assert store.read_all("a") == DATA
    assert store.read("a", len(DATA) - 3, 9) == DATA[-3:] and store.read("a", len(DATA), 9) == b""


def test_a_download_that_brings_nothing_gives_up(tmp_path: Path, server: Server) -> None:
    server.files["/a"] = DATA
    server.cuts.extend([1000] + [0] * 9)
    with pytest.raises(OSError, match="gave up after 4 attempts"), local_copy(f"{server.url}/a", tmp_path, SOON):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_changes_under_way_is_never_mixed(tmp_path: Path, server: Server) -> None:
    server.files["/a"], server.etags["/a"] = DATA, '"1"'
    server.cuts.append(100_000)

    def change() -> None:
        server.files["/a"], server.etags["/a"] = DATA[::-1], '"2"'

    server.after_get = change
    with local_copy(f"{server.url}/a", tmp_path, SOON) as path:
        assert path.read_bytes() == DATA[::-1]


def test_a_stalled_server_is_left_and_asked_again(tmp_path: Path, server: Server) -> None:
    server.files["/a"] = DATA
    server.stalls.append(1.0)
    start = time.monotonic()
    with local_copy(f"{server.url}/a", tmp_path, SOON) as path:
        assert path.read_bytes() == DATA
    assert time.monotonic() - start < 0.9


def test_bytes_come_as_stored_although_the_server_calls_them_compressed(tmp_path: Path, server: Server) -> None:
    server.files["/a.gz"], server.headers["Content-Encoding"] = b"no gzip at all", "gzip"
    with local_copy(f"{server.url}/a.gz", tmp_path, SOON) as path:
        assert path.read_bytes() == b"no gzip at all"
    assert Store(server.url, retries=SOON).read("a.gz", 3, 4) == b"gzip"
    server.headers.clear()
    server.compresses = True
    assert Store(server.url, retries=SOON).read("a.gz", 3, 4) == b"gzip"
    assert file_version(f"{server.url}/a.gz", SOON).bytes == 14


def test_a_full_disk_ends_a_copy_at_once(tmp_path: Path, server: Server) -> None:
    server.files["/a"] = DATA
    with small_disk(tmp_path / "disk", 64) as disk:
        with pytest.raises(OSError, match="No space left"), local_copy(f"{server.url}/a", disk, SOON):
            pass
        assert len(server.gets()) == 1 and list(disk.iterdir()) == []


def test_copies_of_killed_processes_are_swept_and_no_others(tmp_path: Path, memory) -> None:
    memory.pipe("/a.tar", DATA)

    def hold() -> None:
        with local_copy("memory://a.tar", tmp_path):
            time.sleep(20)

    dead, living = fork(hold), fork(hold)
    until(lambda: len([path for path in tmp_path.iterdir() if path.stat().st_size == len(DATA)]) == 2)
    os.kill(dead, signal.SIGKILL)
    wait(dead)
    other_host = tmp_path / f"{COPY_PREFIX}elsewhere~1~00000000~a.tar"
    other_host.touch()
    for path in tmp_path.iterdir():
        os.utime(path, (1, 1))
    with local_copy("memory://a.tar", tmp_path) as copy:
        owners = {path.name.split("~")[2] for path in tmp_path.iterdir()}
        assert owners == {str(living), "1", str(os.getpid())} and copy.exists()
    os.kill(living, signal.SIGKILL)
    wait(living)


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
    server.files["/a"], server.ranges = DATA, False
    store = Store(server.url, retries=SOON)
    for sized in (True, False):
        server.sized = sized
        for offset, length in ((0, 10), (300_001, 20), (len(DATA) - 3, 20), (len(DATA) + 3, 20), (0, len(DATA))):
            assert store.read("a", offset, length) == DATA[offset : offset + length]


def test_a_body_that_is_cut_short_is_asked_for_again(server: Server) -> None:
    server.files["/a"] = DATA
    store = Store(server.url, retries=SOON)
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
    store, wrong = Store(str(tmp_path)), []

    def read(seed: int) -> None:
        for turn in range(4000):
            name = names[(turn * seed) % len(names)]
            if store.read(name, 0, 3) != name.encode():
                wrong.append(name)
            if turn % 1000 == 0:
                store.forget()

    threads = [threading.Thread(target=read, args=(seed,)) for seed in (1, 3, 5, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert 0 < open_in(tmp_path) <= OPEN_FILES
    store.forget()
    assert open_in(tmp_path) == 0


def test_the_least_recently_used_file_is_closed(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    for number in range(OPEN_FILES + 1):
        (tmp_path / str(number)).write_text("old")
        store.read("0", 0, 3)
        store.read(str(number), 0, 3)
    for number in range(OPEN_FILES + 1):
        (tmp_path / str(number)).unlink()
    assert store.read("0", 0, 3) == b"old"
    with pytest.raises(FileNotFoundError):
        store.read("1", 0, 3)


def test_what_was_read_ahead_is_not_asked_for_again(server: Server) -> None:
    server.files["/a"] = DATA
    store = Store(server.url, retries=SOON)
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
    server.files["/a"] = DATA
    store = Store(server.url, retries=SOON, max_ahead=3)
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
    fsspec_of_threads = (
        "import sys, threading; from data.remote import filesystem;"
        "gate, bad, loops = threading.Barrier(16), [], set()\n"
        "def ask():\n"
        "    gate.wait()\n"
        "    try:\n"
        "        files, _ = filesystem('http://127.0.0.1:9/a')\n"
        "        loops.add(files.loop)\n"
        "    except BaseException as error:\n"
        "        bad.append(error)\n"
        "threads = [threading.Thread(target=ask) for _ in range(16)]\n"
        "[t.start() for t in threads]; [t.join() for t in threads]\n"
        "sys.exit(str(bad) if bad or None in loops else 0)"
    )
    for _ in range(3):
        subprocess.run([sys.executable, "-c", fsspec_of_threads], check=True, timeout=60)


def test_what_no_reader_has_begun_is_read_at_once(server: Server) -> None:
    server.files["/a"] = DATA
    store = Store(server.url, retries=SOON)
    server.stalls.extend([0.25] * READERS)
    for offset in range(READERS + 1):
        store.prefetch("a", offset, 1)
    until(lambda: len(server.stalls) == 0)
    start = time.monotonic()
    assert store.read("a", READERS, 1) == DATA[READERS : READERS + 1]
    assert time.monotonic() - start < 0.15


def test_what_failed_ahead_is_asked_for_again(server: Server) -> None:
    server.files["/a"] = DATA
    store = Store(server.url, retries=SOON)
    server.statuses.append(503)
    store.prefetch("a", 5, 9)
    until(lambda: len(server.requests) == 1)
    assert store.read("a", 5, 9) == DATA[5:14] and len(server.requests) == 2


def test_reading_ahead_never_fails_and_never_waits(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    server.files["/a"] = DATA
    store = Store(server.url, retries=SOON)
    server.stalls.extend([0.2] * 20)
    start = time.monotonic()
    for offset in range(20):
        store.prefetch("a", offset, 1)
    for name in ("none", "../a", ""):
        store.prefetch(name, 0, 1)
    store.prefetch("a", -1, -1)
    assert time.monotonic() - start < 0.1
    server.stalls.clear()
    server.statuses.extend([503] * 3)
    assert [store.read("a", offset, 1) for offset in range(20)] == [DATA[i : i + 1] for i in range(20)]
    with pytest.raises(FileNotFoundError):
        store.read("none", 0, 1)


def test_a_fork_after_a_remote_read_can_read(server: Server, memory) -> None:
    server.files["/a"] = DATA
    memory.pipe("/x/a", DATA)
    stores = [Store(server.url, retries=SOON), Store("memory://x", retries=SOON)]
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
        gc.collect()  # would close, in a set of sockets that both share, what the parent goes on using
        os.write(writing, b".")
        assert store.read("a", 1, 9) == DATA[1:10]

    def parent() -> None:
        store = Store(server.url, retries=Retries(stall_s=5))
        assert store.read("a", 0, 9) == DATA[:9]
        pid = fork(lambda: child(store))
        assert os.read(reading, 1) == b"."
        began = time.monotonic()
        assert store.read("a", 2, 9) == DATA[2:11]
        assert time.monotonic() - began < 3  # it had not to wait until a stall was noticed
        assert wait(pid) == 0

    assert wait(fork(parent)) == 0  # a process whose connections no other test has used
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
    server.stalls.extend([0.05] * 4)

    def child() -> None:
        store = cached(server.url, tmp_path, 1 << 30)
        threads = [threading.Thread(target=store.read, args=("0", 5, 9)) for _ in range(3)]
        for thread in threads:
            thread.start()
        for number in range(4):
            assert store.read(str(number), 5, 9) == DATA[number + 5 : number + 14]
        for thread in threads:
            thread.join()

    children = [fork(child) for _ in range(4)]
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
        assert copies(disk) == set() and not list(
            disk.glob("*/.*.part")
        )  # a disk that failed is left alone for a while
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
    server.stalls.append(5.0)
    config = CacheConfig(folder=str(tmp_path), max_gib=room / 2**30)
    pid = fork(lambda: Store(server.url, cache=config, retries=Retries(stall_s=20)).read("a", 0, 9))
    until(lambda: len(server.gets()) == 1 and not server.stalls)
    began = time.monotonic()
    # The other's download holds the room and is alive, so this file is read where it is.
    assert cached(server.url, tmp_path, room).read("b", 1, 9) == DATA[1:10]
    assert list(tmp_path.glob("*/.a.part")) and copies(tmp_path) == set()
    os.kill(pid, signal.SIGKILL)
    wait(pid)
    assert cached(server.url, tmp_path, room).read("b", 1, 9) == DATA[1:10]
    assert not list(tmp_path.glob("*/.*.part")) and copies(tmp_path) == {"b"}
    assert cached(server.url, tmp_path, room).read("a", 1, 9) == DATA[1:10]
    assert copies(tmp_path) == {"a"} and time.monotonic() - began < 4


def test_a_failed_download_leaves_nothing_and_the_next_read_tries_again(tmp_path: Path, server: Server) -> None:
    server.files["/a"] = DATA
    store = cached(server.url, tmp_path, 1 << 30)
    server.cuts.extend([0] * 4)
    with pytest.raises(OSError, match="gave up after 4 attempts"):
        store.read("a", 0, 9)
    assert copies(tmp_path) == set() and not list(tmp_path.glob("*/.*.part"))
    assert store.read("a", 0, 9) == DATA[:9]


def test_a_child_forked_during_a_download_holds_no_lock(tmp_path: Path, server: Server) -> None:
    server.files["/a"] = DATA
    store = cached(server.url, tmp_path, 1 << 30)
    server.stalls.append(0.1)
    thread = threading.Thread(target=store.read, args=("a", 0, 9))
    thread.start()
    until(lambda: len(server.gets()) == 1)
    pid = fork(lambda: time.sleep(20))
    thread.join()
    store.forget()
    start = time.monotonic()
    assert store.read("a", 0, 9) == DATA[:9] and time.monotonic() - start < 5
    os.kill(pid, signal.SIGKILL)
    wait(pid)


def test_a_forked_reader_shares_the_parents_copies(tmp_path: Path, server: Server) -> None:
    server.files = {"/a": DATA, "/b": DATA}
    store = cached(server.url, tmp_path, 1 << 30)
    assert store.read("a", 0, 9) == DATA[:9]

    def child() -> None:
        assert store.read("a", 1, 9) == store.read("b", 1, 9) == DATA[1:10]

    pid = fork(child)
    assert wait(pid) == 0
    assert store.read("b", 0, 9) == DATA[:9] and len(server.gets()) == 2
