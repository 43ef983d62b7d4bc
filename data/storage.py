"""Where bytes come from: local files or URLs.

Names are strings, for a URL is no path. `expand` finds files, `local_copy` fetches one to read from its start to its
end, a `Store` reads spans of a data set's files in any order. What the bytes mean is data/shards' affair.
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

Location = Annotated[str, "path"]  # of a file or folder, or its URL; train/config_layers.py expands ~ and $NAME in it
OPEN_FILES = 64  # descriptors a store keeps
READERS = 16  # threads that read ahead, for all stores of a process
CACHE_PAUSE_S = 600  # without the cache, once its disk has failed
COPY_PREFIX = "transfusion-copy~"  # of local_copy's files: PREFIX host ~ pid ~ random ~ name


@contextmanager
def local_copy(path: str, folder: Path | None = None, retries: Retries = RETRIES) -> Iterator[Path]:
    """Give a local file as it is, a remote one as a copy in `folder` (default: the temporary one) while in use.

    The copy's name ends as the file's. Raises OSError for a file that cannot be had whole.
    """
    if not is_remote(path):
        yield Path(local_name(path))
        return
    folder = Path(folder or tempfile.gettempdir())
    _sweep_copies(folder)
    name = re.sub(r"[^\w.-]", "_", path.partition("?")[0].rpartition("/")[2])[-100:]
    copy = folder / f"{COPY_PREFIX}{socket.gethostname()}~{os.getpid()}~{secrets.token_hex(4)}~{name}"
    descriptor = os.open(copy, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with suppress(OSError):  # a disk without locks: then nobody sweeps there
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # held as long as somebody uses the copy
        download(path, partial(write_at, descriptor), retries)
        yield copy
    finally:
        copy.unlink(missing_ok=True)
        os.close(descriptor)


@lru_cache(64)
def _sweep_copies(folder: Path) -> None:
    """Remove, once a process, the copies that killed processes of this host left in a folder."""
    for path in folder.glob(f"{COPY_PREFIX}{socket.gethostname()}~*"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > 60:  # a younger one's owner may be about to lock it
                unlink_if_free(path, path)


class Store:
    """The files of one data set's folder, local or remote; remote ones through a cache if one is given.

    Threads may share it, and a fork may come at any time. Only files directly in the folder: a name with a slash or a
    leading dot is a ValueError. Reading raises OSError; after one `forget` lets the next read start afresh.
    """

    def __init__(self, root: str, *, cache: CacheConfig | None = None, retries: Retries = RETRIES, max_ahead: int = 64):
        self.is_remote = is_remote(root)
        self.root = root if self.is_remote else local_name(root)
        self._retries, self._max_ahead = retries, max_ahead
        self._cache = ShardCache(cache, root) if cache is not None and self.is_remote else None
        self._dropped: set[str] = set()  # names, see `drop_copy`
        self._cache_from = 0.0  # monotonic time before which the cache rests
        self._versions: dict[str, FileVersion] = {}  # of remote files, as they were when first read
        self._files: dict[str, _File] = {}
        self._clock = itertools.count()
        self._touched = 0  # the clock when the cache was last told which copies are in use
        self._process = _Process()
        if self.is_remote:
            filesystem(root)  # an unknown scheme or a missing package is refused now

    def path(self, name: str) -> str:
        """Return where a file is, for messages: without a URL's secrets."""
        return shown(self._url(name))

    def size(self, name: str) -> int | None:
        """Return a file's present size in bytes, None where there is none."""
        try:
            return file_version(self._url(name), self._retries).bytes
        except FileNotFoundError:
            return None

    def read_all(self, name: str) -> bytes:
        """Return a small file's contents, past the cache."""
        if not self.is_remote:
            return Path(self._url(name)).read_bytes()
        data = bytearray()

        def write(chunk: bytes, position: int) -> None:
            data[position:] = chunk

        download(self._url(name), write, self._retries)
        return bytes(data)

    def read(self, name: str, offset: int, length: int) -> bytes:
        """Return `length` bytes at `offset`, fewer only where the file ends, as os.pread does."""
        file = self._files.get(name)  # no lock: this is every record's way
        if file is None and (file := self._open(name)) is None:
            return self._read_remote(name, offset, length)
        file.used = next(self._clock)
        return os.pread(file.descriptor, length, offset)

    def prefetch(self, name: str, offset: int, length: int) -> None:
        """Begin to fetch what `read` will be asked for with the same arguments; a hint that never fails or waits."""
        if (file := self._files.get(name)) is not None:
            with suppress(OSError, AttributeError):  # AttributeError: not on macOS
                os.posix_fadvise(file.descriptor, offset, length, os.POSIX_FADV_WILLNEED)
        elif self.is_remote and self._cache is None:
            once = replace(self._retries, attempts=1)  # the reader will try harder
            process, future = self._of_process(), Future()
            with process.lock:
                if (name, offset, length) in process.ahead:
                    return
                process.ahead[name, offset, length] = future
                if len(process.ahead) > self._max_ahead:
                    process.ahead.popitem(last=False)[1].cancel()
            _readers(process.pid).put((future, lambda: read_range(self._url(name), offset, length, once)))

    def drop_copy(self, name: str) -> bool:
        """Remove the cached copy of a file whose contents are wrong; say whether there was one to remove.

        Once for each file and process: a file that is wrong at its source would be fetched for each of its records.
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
        """Drop open files, sizes and what was read ahead; reads that are under way are not disturbed."""
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
        if self._process.pid != os.getpid():  # forked: the lock may be held, the readers are gone
            self._process = _Process()
        return self._process

    def _read_remote(self, name: str, offset: int, length: int) -> bytes:
        process = self._of_process()
        with process.lock:
            future = process.ahead.pop((name, offset, length), None)
        if future is not None and not future.cancel():  # cancelled: nobody has begun, so this thread can as well
            with suppress(OSError, CancelledError):
                return future.result()
        return read_range(self._url(name), offset, length, self._retries)

    def _open(self, name: str) -> "_File | None":
        """Open a file or its cached copy; None where it is to be read from its source."""
        if not self.is_remote:
            descriptor = os.open(self._url(name), os.O_RDONLY)
        elif self._cache is None or (descriptor := self._open_copy(name)) is None:
            return None
        with self._of_process().lock:
            while len(self._files) >= OPEN_FILES:
                del self._files[min(self._files, key=lambda other: self._files[other].used)]
            return self._files.setdefault(name, _File(descriptor, next(self._clock)))

    def _open_copy(self, name: str) -> int | None:
        if time.monotonic() < self._cache_from:
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
        """Mark open copies as used, and close evicted ones: their disk space is free only then."""
        with self._of_process().lock, disk_errors():
            for name, file in sorted(self._files.items(), key=lambda item: item[1].used):
                if os.fstat(file.descriptor).st_nlink == 0:
                    del self._files[name]
                elif file.used >= self._touched:
                    touch(file.descriptor)
            self._touched = next(self._clock)


@dataclass
class _Process:
    """What a store may use only in the process that made it."""

    pid: int = field(default_factory=os.getpid)
    lock: threading.Lock = field(default_factory=threading.Lock)
    ahead: OrderedDict[tuple[str, int, int], Future] = field(default_factory=OrderedDict)


class _File:
    """An open file; closed when its last user lets go, so that no thread reads from a number that was given away."""

    __slots__ = ("descriptor", "used")

    def __init__(self, descriptor: int, used: int):
        self.descriptor, self.used = descriptor, used

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        close(self.descriptor)


@lru_cache(1)
def _readers(pid: int) -> SimpleQueue:
    """Start this process's threads that read ahead; daemons, for no exit should wait for what nobody will use."""
    tasks: SimpleQueue = SimpleQueue()

    def work() -> None:
        while True:
            future, action = tasks.get()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(action())
                except Exception as error:  # raised again by result(), in the thread that wants the bytes
                    future.set_exception(error)

    for _ in range(READERS):
        threading.Thread(target=work, name="storage-ahead", daemon=True).start()
    return tasks
