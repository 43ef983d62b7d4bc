"""The run folder: what one training run owns on disk, and the proof that it still owns it.

    <run>/.lock           POSIX record lock of rank 0's process; a second copy is refused at once (P10)
    <run>/attempt.json    number and token of the newest start, which owns the folder (P5)
    <run>/tokenizer.*     copy of the tokenizer it trains with, so that the folder can be moved
    <run>/metrics.jsonl   one JSON object per row, each with its `step`
    <run>/events.jsonl    starts, stops and what went wrong (train/metrics_log.py)
    <run>/bad_updates.jsonl   skipped updates with the documents of their batches (train/optim/guard.py)
    <run>/checkpoints/    see train/checkpoints/checkpoint.py

The lock keeps out a second copy; the attempt also stops what no lock sees, or sees for too long: the late predecessor
of a requeued job, on a host that Slurm gave up.
"""

import json
import logging
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from data.durable import write_durably
from data.strict_json import dumps
from train.checkpoints.folder_lock import FolderLock, whoami
from train.checkpoints.metrics_file import MetricsFile, append_bytes
from train.distributed.ranks import Ranks
from train.distributed.shared_folder import require_shared

log = logging.getLogger(__name__)


class RunTakenOver(RuntimeError):
    """A later attempt owns the run folder; this one must end and write nothing more."""


class RunFolder:
    """The folder of a run. Construction, which is collective, creates and locks it and numbers this attempt.

    Raises the same OSError on every rank if the folder cannot be written, another process uses it, or the ranks do not
    see the same folder. Use as a context, or call `close()`.
    """

    def __init__(self, path: str | Path, ranks: Ranks) -> None:
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self._is_first = ranks.is_first
        self._lock: FolderLock | None = None
        self.metrics = MetricsFile(self.path)  # for rank 0 alone
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
            by = f"attempt {owner['attempt']} (pid {owner['pid']} on {owner['host']})" if owner else "another process"
            raise RunTakenOver(f"{self.path} was taken over from attempt {self.attempt} by {by}; this one must end")

    def _is_current(self) -> bool:
        """Return whether this attempt may still write; the next commit reports a damaged attempt.json."""
        try:
            return _read_attempt(self.path).get("token") == self._token
        except ValueError:
            return True

    def append_metrics(self, row: dict[str, Any]) -> None:
        """Append a row to metrics.jsonl (MetricsFile.append), on rank 0 alone."""
        if self._is_first and self._is_current():
            self.metrics.append(row)

    def append(self, name: str, rows: Iterable[dict[str, Any]]) -> None:
        """Append rows to another `.jsonl` file of the folder, on rank 0 only. On a full disk the rows are lost."""
        lines = "".join(dumps(row) + "\n" for row in rows)
        if not (self._is_first and lines and self._is_current()):
            return
        try:
            append_bytes(self.path / name, lines.encode())
        except OSError as error:
            log.warning("%s: rows lost: %s", name, error)

    def close(self) -> None:
        """Release the lock; other ranks have none. Logs how many rows of metrics a full disk cost."""
        self.metrics.close()
        if self._lock is not None:
            self._lock.close()

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _claim(self) -> tuple[int, str]:
        """Lock the folder and write the next attempt; rank 0 only."""
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self._lock = FolderLock(self.path)
            attempt, token = _read_attempt(self.path).get("attempt", 0) + 1, uuid.uuid4().hex
            record = {"attempt": attempt, "token": token, **whoami()}
            write_durably(self.path / "attempt.json", dumps(record).encode())
        except BlockingIOError:
            raise
        except OSError as error:
            self.close()
            raise OSError(
                f"run folder {self.path} is not writable ({error.strerror}: {error.filename}): "
                "give a folder on a writable disk with space, or correct its permissions"
            ) from None
        return attempt, token


def _read_attempt(folder: Path) -> dict[str, Any]:
    try:
        owner = json.loads((folder / "attempt.json").read_bytes())
        return {**owner, "attempt": int(owner["attempt"])}
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(f"{folder / 'attempt.json'} is damaged; delete it if no other run uses the folder") from None
