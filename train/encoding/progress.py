"""How far an encoding job is: bytes of input done by all workers, this worker's speed, what was skipped and why."""

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from tqdm import tqdm

from data.raw import RawDocument
from data.shards import BadRecords
from train.distributed.launcher import place
from train.encoding.sidecar import sidecar_path


class Task(Protocol):
    """A file to encode."""

    bytes: int
    shard: Path


class Progress:
    """A bar on the first rank, a line now and then where nobody watches; a context."""

    def __init__(self, tasks: Sequence[Task], bad: BadRecords):
        self._bytes = {sidecar_path(task.shard).name: task.bytes for task in tasks}
        self._folder, self._bad = tasks[0].shard.parent, bad
        self._of_file, self._present, self._partial = BadRecords(1), 0, 0
        self._pictures = self._texts = 0
        self._start = self._shown = time.monotonic()
        self._interval_s = 1 if sys.stderr.isatty() and len(tasks) < 10_000 else 30  # a look lists the folder
        self._bar = tqdm(
            desc="encode",
            initial=self._done()[0],
            total=sum(self._bytes.values()),
            unit="B",
            unit_scale=True,
            smoothing=0,
            disable=place().rank > 0,
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._show()
        self._bar.close()

    def begins(self, task: Task, of_file: BadRecords) -> None:
        """Note which file is being encoded, and where its bad records are counted."""
        self._of_file, self._present, self._partial = of_file, task.bytes, 0

    def add(self, document: RawDocument) -> None:
        """Count a document of the present file that was read."""
        self._partial = min(self._partial + document.input_bytes, self._present)
        pictures = sum(isinstance(segment, bytes) for segment in document.segments)
        self._pictures += pictures
        self._texts += pictures == 0
        self._show_in_time()

    def is_done(self) -> None:
        """Note that the present file's sidecar counts from here on."""
        self._of_file, self._partial = BadRecords(1), 0
        self._show_in_time()

    def waits_for(self, count: int) -> None:
        """Say that all that is left is being done by others."""
        self._show(f", waiting for {count} files that other workers encode")

    def _show_in_time(self) -> None:
        if time.monotonic() - self._shown >= self._interval_s:
            self._show()

    def _show(self, more: str = "") -> None:
        self._shown = time.monotonic()
        done, files = self._done()
        self._bar.n = min(done + self._partial, self._bar.total)
        seconds = self._shown - self._start
        count, unit = (self._pictures, "images") if self._pictures else (self._texts, "texts")
        speed = f"{count / seconds:,.1f} {unit}/s"
        reasons, failed = self._bad.reasons + self._of_file.reasons, self._bad.failed + self._of_file.failed
        skipped = BadRecords(1, reasons=reasons, failed=failed).summary()
        self._bar.set_postfix_str(f"{files}/{len(self._bytes)} files, here {speed}, skipped {skipped}{more}")

    def _done(self) -> tuple[int, int]:
        """Return bytes and number of the input files that have a sidecar, whoever made it."""
        sizes = [self._bytes.get(entry.name) for entry in os.scandir(self._folder)]
        sizes = [size for size in sizes if size is not None]
        return sum(sizes), len(sizes)
