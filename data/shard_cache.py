"""Whole copies of remote shards on a local disk, shared by the node's processes, within a size limit.

data/durable.py is not used: a copy is a `.part` file under a lock, so that one process fetches it and the others wait.
Rejected: fsspec's caching file systems, which know neither a limit nor other processes.
"""

import errno
import fcntl
import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from data.remote import DiskError, FileVersion, Retries, download, is_remote


@contextmanager
def disk_errors() -> Iterator[None]:
    """Raise the local disk's errors as DiskError."""
    try:
        yield
    except OSError as error:
        raise DiskError(error.errno, error.strerror) from error


def write_at(descriptor: int, data: bytes, position: int) -> None:
    with disk_errors():
        while data:
            count = os.pwrite(descriptor, data, position)
            data, position = data[count:], position + count


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[int]:
    """Hold a file's lock against all processes and threads of the node; without `wait` raise OSError if it is held."""
    with disk_errors():
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        with disk_errors():
            fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            yield descriptor
        finally:
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing is not enough: a forked child may have it open
    finally:
        os.close(descriptor)


def unlink_if_free(path: Path, lock: Path) -> bool:
    """Remove a file unless its lock is held, and return whether it was removed."""
    try:
        with locked(lock, wait=False):
            path.unlink(missing_ok=True)
            return True
    except OSError:
        return False


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    folder: str  # on a local disk, shared by the node's processes and runs
    max_gib: float  # of all copies, > 0; the least recently used make room

    def __post_init__(self) -> None:
        if not self.folder or is_remote(self.folder):
            raise ValueError(f"cache folder={self.folder!r}: expected a folder on a local disk, such as /tmp/shards")
        if not 0 < self.max_gib < float("inf"):
            raise ValueError(f"cache max_gib={self.max_gib}: expected more than 0; leave the cache out instead")


class ShardCache:
    """Whole copies of one folder's remote files, shared by the node's processes; all folders share one limit.

    `<home>/<name>` is a whole copy of the version noted in `.<name>.lock`; the fetching process holds that lock and
    writes `.<name>.part`. Room is made under the folder's lock. Only home folders with our own prefix are ever counted
    or emptied.
    """

    def __init__(self, config: CacheConfig, root: str):
        self.folder, self.max_bytes = Path(config.folder), int(config.max_gib * 2**30)
        self.home = self.folder / f"transfusion-{hashlib.sha256(root.rstrip('/').encode()).hexdigest()[:16]}"

    def open(self, url: str, name: str, version: FileVersion, retries: Retries) -> tuple[int, FileVersion]:
        """Return a descriptor of the file's copy, fetched if needed, and its version; raise DiskError if it fails."""
        copy, part = self.home / name, self.home / f".{name}.part"
        with disk_errors():
            self.home.mkdir(parents=True, exist_ok=True)
        with locked(self.home / f".{name}.lock") as lock:  # others wait while one fetches
            with disk_errors(), suppress(FileNotFoundError):  # never fetched, or evicted
                descriptor = os.open(copy, os.O_RDONLY)
                if os.pread(lock, 1000, 0) == _note(version) and os.fstat(descriptor).st_size == version.bytes:
                    touch(descriptor)
                    return descriptor, version
                os.close(descriptor)
            with disk_errors():
                descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
            try:
                self._make_room(descriptor, version.bytes)
                version = download(url, partial(write_at, descriptor), retries)
                with disk_errors():
                    os.ftruncate(descriptor, version.bytes)  # the file may have changed since room was made
                    os.fsync(descriptor)  # without it, a crash could leave a copy of zeros
                    copy.unlink(missing_ok=True)  # before the note describes the new one
                    os.ftruncate(lock, 0)
                    os.pwrite(lock, _note(version), 0)
                    touch(descriptor)
                    os.replace(part, copy)
            except BaseException:
                os.close(descriptor)
                part.unlink(missing_ok=True)
                raise
            return descriptor, version

    def _make_room(self, descriptor: int, size: int) -> None:
        """Allocate a new file's disk space, evicting as many of the least recently used copies as it needs."""
        with locked(self.folder / "transfusion.lock"), disk_errors():
            used, copies = self._usage()
            while True:
                try:
                    if used + size > self.max_bytes:
                        raise OSError(errno.ENOSPC, f"downloads hold {used} of its {self.max_bytes} bytes")
                    if size:
                        os.posix_fallocate(descriptor, 0, size)
                    return
                except OSError as error:  # our limit, or a disk that others fill as well
                    if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not copies:
                        raise
                _, freed, path = copies.pop()
                path.unlink(missing_ok=True)  # processes that have it open keep reading
                used -= freed

    def _usage(self) -> tuple[int, list[tuple[int, int, Path]]]:
        """Return the bytes in use, and (last use, bytes, path) of copies, latest first; sweep dead downloads."""
        used, copies = 0, []
        for path in self.folder.glob("transfusion-*/*"):
            if path.suffix == ".lock" and path.name.startswith("."):
                continue
            with suppress(FileNotFoundError):  # another process may remove or rename it
                stat = path.stat()
                if not path.name.startswith("."):
                    copies.append((stat.st_mtime_ns, stat.st_size, path))
                elif unlink_if_free(path, path.with_suffix(".lock")):
                    continue
                used += stat.st_size
        return used, sorted(copies, reverse=True)


def _note(version: FileVersion) -> bytes:
    return f"{version.bytes} {version.changed}".encode()[:1000]


def touch(descriptor: int) -> None:
    """Set a copy's last use to now; the kernel's own clock for it has a resolution of 4 ms."""
    now = time.time_ns()
    os.utime(descriptor, ns=(now, now))
