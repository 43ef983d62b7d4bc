"""A web server that misbehaves when told to, and forked processes."""

import gzip
import os
import re
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from data.remote import Retries

SOON = Retries(attempts=4, first_delay_s=0.01, stall_s=30)  # a busy machine is silent for seconds
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
        self.stalls: deque[threading.Event] = deque()  # that the next bodies wait for
        self.ranges = True  # False: Range is ignored
        self.head = True  # False: HEAD is refused
        self.sized = True  # False: Content-Length is left out
        self.compresses = False  # True: clients that accept gzip get it
        self.fail_every = 0  # above 0: each such answer is 503
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
        if server.fail_every and len(server.requests) % server.fail_every == 0:
            status = 503
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
            self.server.stalls.popleft().wait(60)
        if good and self.server.cuts:
            body = body[: self.server.cuts.popleft()]
            self.close_connection = True
        if self.command != "HEAD":
            self.wfile.write(body)
        self.close_connection |= not self.server.sized

    def log_message(self, format: str, *args: object) -> None:
        """Be silent."""


@contextmanager
def serving() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def fork(action: Callable[[], object]) -> int:
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
    return kill(pid)


def kill(pid: int) -> int:
    os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def open_in(folder: Path) -> int:
    """Count this process's open files in a folder, also those that are no longer there."""
    return sum(os.path.realpath(link).startswith(f"{folder}/") for link in Path("/proc/self/fd").iterdir())
