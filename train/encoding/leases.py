"""Leases: which worker does what in a shared folder. A lease is a file with a heartbeat.

A lease only avoids duplicate work. Its holder may be dead, stopped or cut off, so a claim is a hint, and doing the work
twice must be harmless. Staleness is judged by the local clock: a lease whose time stamp has not changed while watched
for `timeout_s` is stale, whatever the clocks of other machines say.
"""

import contextlib
import os
import socket
import threading
import time
from pathlib import Path


class Leases:
    """The leases of one process in `folder`; a context that releases them all at its end."""

    def __init__(self, folder: Path, timeout_s: float):
        self.folder, self.timeout_s = folder, timeout_s
        self._owner = f"{_machine()} {os.getpid()} {_start_time(os.getpid())}"
        self._held: set[str] = set()
        self._watched: dict[str, tuple[int, float]] = {}  # name -> its time stamp, when we first saw it
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> "Leases":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        for name in list(self._held):
            self.release(name)
        with contextlib.suppress(OSError):  # others still have leases
            self.folder.rmdir()

    def claim(self, name: str) -> bool:
        """Take the lease of `name` unless a process that seems alive has it."""
        for _ in range(100):  # the last other process to end removes the folder
            with contextlib.suppress(FileNotFoundError):
                return self._claim(name)
        return False

    def _claim(self, name: str) -> bool:
        path = self._path(name)
        with contextlib.suppress(FileExistsError):
            self.folder.mkdir()
        try:
            with open(path, "x", encoding="utf-8") as file:
                file.write(self._owner)
        except FileExistsError:
            if not self._is_stale(name):
                return False
            taken = path.with_name(f"{path.name}.{os.getpid()}-{socket.gethostname()}")
            taken.write_text(self._owner, encoding="utf-8")
            os.replace(taken, path)
        self._held.add(name)
        return True

    def held_by_others(self, prefix: str) -> list[str]:
        """Return the leases with this prefix that are not ours and whose holders seem alive."""
        names = [path.name.removesuffix(".lease") for path in self.folder.glob(f"{prefix}*.lease")]
        return [name for name in names if name not in self._held and not self._is_stale(name)]

    def release(self, name: str) -> None:
        """Release the lease of `name`, unless another process took it over."""
        self._held.discard(name)
        with contextlib.suppress(OSError):
            if self._path(name).read_text(errors="replace", encoding="utf-8") == self._owner:
                self._path(name).unlink()

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.lease"

    def _is_stale(self, name: str) -> bool:
        path = self._path(name)
        try:
            owner, stamp = path.read_text(errors="replace", encoding="utf-8"), path.stat().st_mtime_ns
        except OSError:  # just released
            return True
        host, _, process = owner.partition(" ")
        pid, _, started = process.partition(" ")
        if owner == self._owner or (host == _machine() and started != _start_time(pid)):
            return True  # so that a killed job that is restarted on its machine need not wait
        last, since = self._watched.get(name, (None, 0.0))
        if stamp != last:
            self._watched[name] = (stamp, time.monotonic())
            return False
        return time.monotonic() - since > self.timeout_s

    def _beat(self) -> None:
        while not self._stop.wait(self.timeout_s / 4):
            for name in list(self._held):
                with contextlib.suppress(OSError):
                    os.utime(self._path(name))


def _machine() -> str:
    """Return the scope of process ids: this host and, in a container, the container."""
    return f"{socket.gethostname()}/{os.stat('/proc/self/ns/pid').st_ino}"


def _start_time(pid: int | str) -> str:
    """Return when a process of this machine started, in ticks since boot; "" if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[19]
    except (OSError, IndexError):
        return ""
