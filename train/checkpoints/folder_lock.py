"""The lock of a folder that one process writes: `<folder>/.lock`, a POSIX record lock.

A record lock rather than flock, which forked workers would keep holding after a `kill -9` of their parent. Its price:
the process must open `.lock` only once, for closing any descriptor of the file releases the lock.
"""

import errno
import fcntl
import logging
import os
import re
import socket
import time
from pathlib import Path
from typing import Any

LOCK_FILE = ".lock"

log = logging.getLogger(__name__)


class FolderLock:
    """Held from construction to `close` or the end of the process; raises BlockingIOError naming the holder."""

    def __init__(self, folder: Path, name: str = LOCK_FILE) -> None:
        """`name` is the lock's file, for programs that write into a folder beside its owner."""
        self._descriptor: int | None = os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                log.warning("%s: no file locks here (%s): a second copy would go unnoticed for a while", folder, error)
                return
            holder = os.pread(self._descriptor, 4096, 0).decode(errors="replace").strip() or "an unknown process"
            if _is_predecessor(holder):
                log.warning("%s: taken over from %s, an earlier attempt of this job", folder, holder)
                return
            self.close()
            raise BlockingIOError(f"folder {folder} is in use by {holder}: stop it, or give another folder") from None
        who = whoami()
        os.ftruncate(self._descriptor, 0)
        owner = f"pid {who['pid']} on {who['host']} since {who['started']}{_of_job()}\n"
        os.pwrite(self._descriptor, owner.encode(), 0)

    def close(self) -> None:
        """Release the lock."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def whoami() -> dict[str, Any]:
    """Return this process's id, host and the time."""
    return {"pid": os.getpid(), "host": socket.gethostname(), "started": time.strftime("%Y-%m-%dT%H:%M:%S%z")}


def _of_job() -> str:
    """Return which Slurm job this is and how often it was requeued, "" outside of one."""
    job, requeues = (os.environ.get(f"SLURM_{name}") for name in ("JOB_ID", "RESTART_COUNT"))
    return f", job {job} requeued {requeues or 0} times" if job else ""


def _is_predecessor(holder: str) -> bool:
    """Return whether the holder of the lock is an earlier attempt of this very job.

    Slurm has given it up, with the host it runs on; its lock may last as long as that host is silent.
    """
    theirs, mine = (re.search(r", job (\S+) requeued (\d+) times", words) for words in (holder, _of_job()))
    return bool(theirs and mine and theirs[1] == mine[1] and int(theirs[2]) < int(mine[2]))
