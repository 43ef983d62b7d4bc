"""Where bytes come from: local files or URLs.

`local_copy` fetches a file to be read from start to end, a `Store` reads spans of a data set's files in any order. What
the bytes mean is decided in data/shards.py.
"""

import fcntl
import itertools
import os
import re
import secrets
import socket
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from queue import SimpleQueue
from typing import Annotated
from urllib.parse import quote

from data.remote import (
    RETRIES,
    DiskError,
    FileVersion,
    Retries,
    download,
    file_version,
    filesystem,
    is_http,
    is_remote,
    local_name,
    read_range,
    shown,
    warn_once,
)
from data.shard_cache import CacheConfig, ShardCache, disk_errors, touch, unlink_if_free, write_at

Location = Annotated[str, "path"]  # a file, a folder or a URL; train/config_layers.py expands ~ and $NAME
OPEN_FILES = 64  # descriptors a store keeps
READERS = 16  # threads that read ahead, for all stores of a process
CACHE_PAUSE_S = 600  # how long the cache is left alone after its disk failed
COPY_PREFIX = "transfusion-copy~"  # of local_copy's files: PREFIX host ~ pid ~ random ~ name


@contextmanager
def local_copy(path: str, folder: Path | None = None, retries: Retries = RETRIES) -> Iterator[Path]:
    """Yield a local file's own path, or that of a remote file's temporary copy in `folder` (default: the system's).

    The copy's name ends like the file's. Raises OSError unless the file can be fetched whole.
    """
    if not is_remote(path):
        yield Path(local_name(path))
        return
    _sweep_copies(folder := Path(folder or tempfile.gettempdir()))
    name = re.sub(r"[^\w.-]", "_", path.partition("?")[0].rpartition("/")[2])[-100:]
    copy = folder / f"{COPY_PREFIX}{socket.gethostname()}~{os.getpid()}~{secrets.token_hex(4)}~{name}"
    descriptor = os.open(copy, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with suppress(OSError):  # a disk without locks, where copies are not swept either
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # held while the copy is used
        download(path, partial(write_at, descriptor), retries)
        yield copy
    finally:
        copy.unlink(missing_ok=True)
        os.close(descriptor)


@lru_cache(64)
def _sweep_copies(folder: Path) -> None:
    """Remove, once per process, copies that killed processes of this host left in a folder."""
    for path in folder.glob(f"{COPY_PREFIX}{socket.gethostname()}~*"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > 60:  # its owner may be about to lock a younger one
                unlink_if_free(path, path)


class Store:
    """The files of one data set's folder, local or remote; remote ones through a cache if one is given.

    Safe to share between threads and to fork at any time. Only files directly in the folder: a name with a slash or a
    leading dot is a ValueError. Reading raises OSError; `forget` then makes the next read start afresh.
    """

    def __init__(self, root: str, *, cache: CacheConfig | None = None, retries: Retries = RETRIES, max_ahead: int = 64):
        self.is_remote = is_remote(root)
        self.root = root if self.is_remote else local_name(root)
        self._retries, self._max_ahead = retries, max_ahead
        self._cache = ShardCache(cache, root) if cache is not None and self.is_remote else None
        self._dropped: set[str] = set()  # see `drop_copy`
        self._cache_from = 0.0  # monotonic time before which the cache is not used
        self._versions: dict[str, FileVersion] = {}  # of remote files, as they were when first read
        self._files: dict[str, _File] = {}
        self._clock = itertools.count()
        self._touched = 0  # the clock when copies in use were last marked so
        self._process = _Process()
        if self.is_remote:
            filesystem(root)  # refuses an unknown scheme or a missing package now

    def path(self, name: str) -> str:
        """Return a file's path or URL for messages, without a URL's secrets."""
        return shown(self._url(name))

    def size(self, name: str) -> int | None:
        """Return a file's present size in bytes, None if there is no such file."""
        try:
            return file_version(self._url(name), self._retries).bytes
        except FileNotFoundError:
            return None

    def read_all(self, name: str) -> bytes:
        """Return a small file's contents, bypassing the cache."""
        if not self.is_remote:
            return Path(self._url(name)).read_bytes()
        data = bytearray()

        def write(chunk: bytes, position: int) -> None:
            data[position:] = chunk

        download(self._url(name), write, self._retries)
        return bytes(data)

    def read(self, name: str, offset: int, length: int) -> bytes:
        """Return `length` bytes at `offset`, fewer only at the file's end, as os.pread does."""
        file = self._files.get(name)  # without a lock: this happens for every record
        if file is None and (file := self._open(name)) is None:
            return self._read_remote(name, offset, length)
        file.used = next(self._clock)
        return os.pread(file.descriptor, length, offset)

    def prefetch(self, name: str, offset: int, length: int) -> None:
        """Start fetching what `read` will return for the same arguments; a hint that never fails or waits."""
        if (file := self._files.get(name)) is not None:
            with suppress(OSError, AttributeError):  # AttributeError: not on macOS
                os.posix_fadvise(file.descriptor, offset, length, os.POSIX_FADV_WILLNEED)
        elif self.is_remote and self._cache is None:
            once = replace(self._retries, attempts=1)  # `read` will retry
            process = self._of_process()
            future: Future[bytes] = Future()
            with process.lock:
                if (name, offset, length) in process.ahead:
                    return
                process.ahead[name, offset, length] = future
                if len(process.ahead) > self._max_ahead:
                    process.ahead.popitem(last=False)[1].cancel()
            _readers(process.pid).put((future, lambda: read_range(self._url(name), offset, length, once)))

    def drop_copy(self, name: str) -> bool:
        """Remove the cached copy of a file whose contents are wrong; return whether there was one.

        Only once per file and process: a file that is wrong at its source would be fetched again for every record.
        """
        if self._cache is None or name in self._dropped:
            return False
        self._dropped.add(name)
        with self._of_process().lock:
            self._files.pop(name, None)
        with suppress(OSError):
            (self._cache.home / name).unlink()
            return True
        return False

    def forget(self) -> None:
        """Drop open files, versions and what was read ahead, without disturbing reads in progress."""
        process = self._of_process()
        with process.lock:
            self._files.clear()
            self._versions.clear()
            while process.ahead:
                process.ahead.popitem()[1].cancel()

    def _url(self, name: str) -> str:
        if not name or "/" in name or name.startswith("."):
            raise ValueError(f"file name {name!r}: expected that of a file directly in {shown(self.root)}")
        if not self.is_remote:
            return os.path.join(self.root, name)
        folder, mark, query = self.root.partition("?") if is_http(self.root) else (self.root, "", "")
        folder += "" if folder.endswith("/") else "/"
        return f"{folder}{quote(name) if is_http(folder) else name}{mark}{query}"

    def _of_process(self) -> "_Process":
        if self._process.pid != os.getpid():  # after a fork: the lock may be held, and the reader threads are gone
            self._process = _Process()
        return self._process

    def _read_remote(self, name: str, offset: int, length: int) -> bytes:
        process = self._of_process()
        with process.lock:
            future = process.ahead.pop((name, offset, length), None)
        if future is not None and not future.cancel():  # if cancelled, no reader had begun it: read here
            with suppress(OSError, CancelledError):
                return future.result()
        return read_range(self._url(name), offset, length, self._retries)

    def _open(self, name: str) -> "_File | None":
        """Open a file or its cached copy; None if it must be read from its source."""
        descriptor = self._open_copy(name) if self.is_remote else os.open(self._url(name), os.O_RDONLY)
        if descriptor is None:
            return None
        with self._of_process().lock:
            while len(self._files) >= OPEN_FILES:
                del self._files[min(self._files, key=lambda other: self._files[other].used)]
            return self._files.setdefault(name, _File(descriptor, next(self._clock)))

    def _open_copy(self, name: str) -> int | None:
        if self._cache is None or time.monotonic() < self._cache_from:
            return None
        url = self._url(name)
        if (version := self._versions.get(name)) is None:
            version = self._versions[name] = file_version(url, self._retries)
        if version.bytes > self._cache.max_bytes:
            return None
        try:
            self._tend_copies()
            descriptor, self._versions[name] = self._cache.open(url, name, version, self._retries)
            return descriptor
        except DiskError as error:
            self._cache_from = time.monotonic() + CACHE_PAUSE_S
            warn_once(f"cache {self._cache.folder}: {error.strerror}; reading {shown(self.root)} without it")
            return None

    def _tend_copies(self) -> None:
        """Mark open copies as used, and close evicted ones, which frees their disk space."""
        with self._of_process().lock, disk_errors():
            for name, file in sorted(self._files.items(), key=lambda item: item[1].used):
                if os.fstat(file.descriptor).st_nlink == 0:
                    del self._files[name]
                elif file.used >= self._touched:
                    touch(file.descriptor)
            self._touched = next(self._clock)


@dataclass
class _Process:
    """What a store may use only in the process that created it."""

    pid: int = field(default_factory=os.getpid)
    lock: threading.Lock = field(default_factory=threading.Lock)
    ahead: OrderedDict[tuple[str, int, int], Future] = field(default_factory=OrderedDict)


@dataclass(slots=True)
class _File:
    """An open file, closed with its last reference, so that no thread reads from a descriptor that was reused."""

    descriptor: int
    used: int  # when it was last, by the store's clock

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        close(self.descriptor)


@lru_cache(1)
def _readers(pid: int) -> SimpleQueue:
    """Start this process's threads that read ahead; daemons, so that an exit does not wait for unused reads."""
    tasks: SimpleQueue = SimpleQueue()

    def work() -> None:
        while True:
            future, action = tasks.get()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(action())
                except Exception as error:  # result() raises it in the thread that wants the bytes
                    future.set_exception(error)

    for _ in range(READERS):
        threading.Thread(target=work, name="storage-ahead", daemon=True).start()
    return tasks
