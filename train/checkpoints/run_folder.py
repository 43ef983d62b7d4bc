"""The run folder: what one training run owns on disk, and the proof that it is still ours.

    <run>/.lock           POSIX record lock of rank 0's process; a second copy is refused at once
    <run>/attempt.json    number and token of the newest start; whoever wrote it last owns the folder (P5)
    <run>/tokenizer.model copy of the one that it trains with, so that the folder can be moved
    <run>/metrics.jsonl   one JSON object a row, each with its `step`
    <run>/bad_updates.jsonl   skipped updates with the documents of their batches (train/optim/guard.py)
    <run>/checkpoints/    see train/checkpoints/checkpoint.py

The lock covers a second copy; the attempt covers what no lock sees, or sees for too long: the late predecessor of a
requeued job, on a host that Slurm gave up. A record lock rather than flock, which forked loader workers would go on
holding after a `kill -9` of the rank itself; its price: this process must open `.lock` only once.
"""

import errno
import fcntl
import json
import logging
import os
import re
import socket
import time
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from data.durable import write_durably
from train.distributed.ranks import Ranks
from train.distributed.shared_folder import require_shared

TOKENIZER_FILE = "tokenizer.model"

log = logging.getLogger(__name__)


class RunTakenOver(RuntimeError):
    """A later attempt owns the run folder; this one must end without writing anything more."""


class RunFolder:
    """The folder of a run, created, locked and numbered on construction, which is collective.

    Raises the same OSError on every rank if the folder cannot be written, another process holds it, or the ranks do
    not see one folder. Use as a context, or call `close()`.
    """

    def __init__(self, path: str | Path, ranks: Ranks) -> None:
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self._is_first = ranks.is_first
        self._lock: int | None = None
        self._unwritten: list[str] = []
        self.attempt, self._token = ranks.on_first(self._claim)
        try:
            require_shared(self.path, "run_dir", ranks)
        except OSError:
            self.close()
            raise

    def assert_current(self) -> None:
        """Raise RunTakenOver unless this attempt is still the newest; called right before each commit."""
        owner = _read_attempt(self.path)
        if owner.get("token") != self._token:
            by = f"attempt {owner['attempt']} (pid {owner['pid']} on {owner['host']})" if owner else "nobody we know"
            raise RunTakenOver(
                f"{self.path} was taken over from attempt {self.attempt} by {by}; this process writes nothing more"
            )

    def _is_current(self) -> bool:
        """Return whether this attempt may still write; a damaged attempt.json is the next commit's to complain of."""
        try:
            return _read_attempt(self.path).get("token") == self._token
        except ValueError:
            return True

    def append_metrics(self, row: dict[str, Any]) -> None:
        """Append a row to metrics.jsonl; does nothing but on rank 0. `row["step"]` is required.

        A full disk does not stop training: rows wait in memory, a warning says so, and the next call retries.
        """
        assert "step" in row, row
        if not (self._is_first and self._is_current()):
            return
        self._unwritten.append(json.dumps(row) + "\n")
        try:
            _append(self.path / "metrics.jsonl", "".join(self._unwritten).encode())
        except OSError as error:
            log.warning("metrics.jsonl: %d rows wait in memory: %s", len(self._unwritten), error)
            return
        self._unwritten.clear()

    def append(self, name: str, rows: Iterable[dict[str, Any]]) -> None:
        """Append rows to another `.jsonl` file of the folder, on rank 0 alone. A full disk costs the rows."""
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        if not (self._is_first and lines and self._is_current()):
            return
        try:
            _append(self.path / name, lines.encode())
        except OSError as error:
            log.warning("%s: rows lost: %s", name, error)

    def has_rows_after(self, step: int) -> bool:
        """Return whether metrics.jsonl holds a row of a later step."""
        path = self.path / "metrics.jsonl"
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        return any((_step_of(line) or 0) > step for line in lines)

    def cut_metrics(self, last_step: int, *, evaluated: bool = True) -> None:
        """Drop the rows after `last_step`, which the resumed run will write again; does nothing but on rank 0.

        Unless `evaluated`, also the held-out losses of that step: a stop kept the checkpoint from having them, and an
        attempt since then may have written them already.
        Rewritten beside and renamed, so a kill leaves the old file or the new one. A torn last line, left by a kill
        in the middle of a write, goes too.
        """
        path = self.path / "metrics.jsonl"
        if not self._is_first or not path.exists():
            return
        kept, unreadable = [], 0
        for line in path.read_bytes().splitlines(keepends=True):
            step = _step_of(line)
            if step is None:
                unreadable += 1
            elif step < last_step or (step == last_step and (evaluated or b'"heldout/' not in line)):
                kept.append(line)
        if unreadable:
            log.warning("%s: dropped %d unreadable line(s), left by a kill in the middle of a write", path, unreadable)
        write_durably(path, b"".join(kept))

    def close(self) -> None:
        """Release the lock; other ranks have none. Says how many rows of metrics a full disk cost."""
        if self._unwritten:
            log.error("metrics.jsonl: %d rows were never written", len(self._unwritten))
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _claim(self) -> tuple[int, str]:
        """Lock the folder and write the next attempt; rank 0 only."""
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(self.path)
            attempt, token = _read_attempt(self.path).get("attempt", 0) + 1, uuid.uuid4().hex
            record = {"attempt": attempt, "token": token, **_whoami()}
            write_durably(self.path / "attempt.json", json.dumps(record).encode())
        except BlockingIOError:
            raise
        except OSError as error:
            self.close()
            raise OSError(
                f"run folder {self.path} is not writable ({error.strerror}: {error.filename}): "
                "give a folder on a writable disk with space, or correct its permissions"
            ) from None
        return attempt, token


def _lock(folder: Path) -> int:
    """Return the descriptor that holds the folder's lock; raises BlockingIOError naming the holder."""
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            log.warning("%s: no file locks here (%s); only attempt.json guards against a second copy", folder, error)
            return descriptor
        holder = os.pread(descriptor, 4096, 0).decode(errors="replace").strip() or "an unknown process"
        if _is_predecessor(holder):
            log.warning("%s: taken over from %s, an earlier attempt of this job", folder, holder)
            return descriptor
        os.close(descriptor)
        raise BlockingIOError(
            f"run folder {folder} is in use by {holder}: stop that run or wait for its end, or give another folder"
        ) from None
    who = _whoami()
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"pid {who['pid']} on {who['host']} since {who['started']}{_of_job()}\n".encode(), 0)
    return descriptor


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


def _read_attempt(folder: Path) -> dict[str, Any]:
    try:
        owner = json.loads((folder / "attempt.json").read_bytes())
        return {**owner, "attempt": int(owner["attempt"])}
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(f"{folder / 'attempt.json'} is damaged; delete it if no other run uses the folder") from None


def _append(path: Path, content: bytes) -> None:
    """Append all of `content` or nothing: what a full disk cut short is taken back."""
    with path.open("ab", buffering=0) as stream:
        before = stream.tell()
        try:
            written = stream.write(content)
            if written < len(content):
                raise OSError(errno.ENOSPC, f"{written} of {len(content)} bytes were written", str(path))
        except OSError:
            stream.truncate(before)
            raise


def _step_of(line: bytes) -> int | None:
    """Return the step of a row, or None for what is not a whole row."""
    if not line.endswith(b"\n"):
        return None
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _whoami() -> dict[str, Any]:
    return {"pid": os.getpid(), "host": socket.gethostname(), "started": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
