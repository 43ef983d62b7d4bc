"""The progress of an encoding job: input bytes done by all workers, this worker's speed, what was skipped and why."""

import os
import sys
import time
from collections.abc import Sequence

from tqdm import tqdm

from data.raw_document import RawDocument
from data.shards import BadRecords
from train.console import plural
from train.distributed.launcher import place
from train.encoding.sidecar import sidecar_path
from train.encoding.tasks import Task


class Progress:
    """A progress bar on rank 0, or an occasional line without a terminal."""

    def __init__(self, tasks: Sequence[Task], bad: BadRecords):
        self._bytes = {sidecar_path(task.shard).name: task.bytes for task in tasks}
        self._folder, self._bad = tasks[0].shard.parent, bad
        self._of_file, self._current, self._partial = BadRecords(1), 0, 0
        self._pictures = self._texts = 0
        self._start = self._shown = time.monotonic()
        self._interval_s = 1 if sys.stderr.isatty() and len(tasks) < 10_000 else 30  # each update lists the folder
        self._bar = tqdm(desc="encode", initial=self._done()[0], total=sum(self._bytes.values()), unit="B",
                         unit_scale=True, smoothing=0, disable=place().rank > 0)  # fmt: skip

    def close(self) -> None:
        self._show()
        self._bar.close()

    def begins(self, task: Task, of_file: BadRecords) -> None:
        """Note the file now being encoded, and where its bad records are counted."""
        self._of_file, self._current, self._partial = of_file, task.bytes, 0

    def add(self, document: RawDocument) -> None:
        """Count a document read from the current file."""
        self._partial = min(self._partial + document.input_bytes, self._current)
        pictures = sum(isinstance(segment, bytes) for segment in document.segments)
        self._pictures += pictures
        self._texts += pictures == 0
        self._show_in_time()

    def is_done(self) -> None:
        """Note that the current file is counted through its sidecar from now on."""
        self._of_file, self._partial = BadRecords(1), 0
        self._show_in_time()

    def waits_for(self, count: int) -> None:
        """Show that other workers are encoding all remaining files."""
        self._show(f", waiting for {plural(count, 'file')} that other workers encode")

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
        """Return bytes and number of the input files that have a sidecar, from any worker."""
        sizes = [self._bytes[entry.name] for entry in os.scandir(self._folder) if entry.name in self._bytes]
        return sum(sizes), len(sizes)
