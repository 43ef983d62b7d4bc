"""metrics.jsonl: one JSON object a row, each with its `step`; appended while training runs, cut on resume."""

import errno
import json
import logging
import os
from pathlib import Path
from typing import Any

from data.durable import write_durably
from data.strict_json import dumps, loads

log = logging.getLogger(__name__)


class MetricsFile:
    """`<folder>/metrics.jsonl`, written by one process."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "metrics.jsonl"
        self.dropped: list[dict[str, Any]] = []  # the rows that the last `cut` dropped
        self._unwritten: list[str] = []

    def append(self, row: dict[str, Any]) -> None:
        """Append a row. `row["step"]` is required.

        A full disk does not stop training: rows wait in memory, a warning says so, and the next call retries.
        """
        assert "step" in row, row
        self._unwritten.append(dumps(row) + "\n")
        try:
            append_bytes(self.path, "".join(self._unwritten).encode())
            self._unwritten.clear()
        except OSError as error:
            log.warning("metrics.jsonl: %d rows wait in memory: %s", len(self._unwritten), error)

    def has_rows_after(self, step: int) -> bool:
        """Return whether the file holds a row of a later step."""
        return any((_step_of(line) or 0) > step for line in self._lines())

    def cut(self, last_step: int, *, evaluated: bool = True) -> None:
        """Drop the rows after `last_step`, which the resumed run will write again, and a last line torn by a kill.

        Unless `evaluated`, also the held-out losses of that step: the checkpoint lacks them because the run was
        stopped, but a later attempt may have written them. A kill leaves the old file or the new one.
        """
        self.dropped = []
        if not self.path.exists():
            return
        kept, unreadable = [], 0
        for line in self._lines():
            step = _step_of(line)
            if step is None:
                unreadable += 1
            elif step < last_step or (step == last_step and (evaluated or b'"heldout' not in line)):
                kept.append(line)
            else:
                self.dropped.append(loads(line))
        if unreadable:
            log.warning("%s: dropped %d unreadable line(s), torn by a kill", self.path, unreadable)
        write_durably(self.path, b"".join(kept))

    def close(self) -> None:
        """Log how many rows a full disk cost."""
        if self._unwritten:
            log.error("metrics.jsonl: %d rows were never written", len(self._unwritten))

    def _lines(self) -> list[bytes]:
        return self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else []


def append_bytes(path: Path, content: bytes) -> None:
    """Append all of `content`, lines, or nothing: what a full disk cut short is taken back.

    A last line that a kill cut short gets an end, or it would take the next one with it.
    """
    with path.open("a+b", buffering=0) as stream:
        if before := stream.seek(0, os.SEEK_END):
            stream.seek(-1, os.SEEK_END)
            content = content if stream.read(1) == b"\n" else b"\n" + content
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
