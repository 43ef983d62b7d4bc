"""Following jobs to their end: what their logs say as they say it, and how the queue stands meanwhile."""

import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from slurm import scheduler
from slurm.scheduler import patiently

LOOK_S = 2.0  # between looks at the logs
BAR_S = 30.0  # between looks at a progress bar, which overwrites its line many times a second
ASK_S = 10.0  # between questions to the controller, which many others ask too
GONE_S = 20.0  # for accounting to hear of a job's end


@dataclass
class Watched:
    """A job that was submitted, and its console log; of an array that of the first element."""

    job_id: str
    name: str
    log: Path
    elements: int
    _file: TextIO | None = field(default=None, init=False)
    _line: str = field(default="", init=False)  # the last, not whole yet
    _bar_shown: float = field(default=0.0, init=False)

    def new_lines(self) -> list[str]:
        """Return what is new in the log: whole lines, and now and then where a progress bar stands."""
        if self._file is None:
            if not self.log.exists():
                return []
            self._file = self.log.open(encoding="utf-8", errors="replace")
        *lines, self._line = (self._line + self._file.read()).split("\n")
        if "\r" in self._line and time.monotonic() - self._bar_shown > BAR_S:
            self._bar_shown = time.monotonic()
            lines.append(self._line)
        return [state for line in lines if (state := line.rpartition("\r")[2])]  # of a bar its last one


def follow(jobs: Sequence[Watched]) -> int:
    """Print the jobs' logs until all have ended; return 0, or 1 where one did not end well.

    Ctrl-C ends the watching, not the jobs.
    """
    try:
        ends = [_follow(job) for job in jobs]
    except KeyboardInterrupt:
        print(
            f"\nlaunch: the jobs go on; scancel {' '.join(job.job_id for job in jobs)} would end them", file=sys.stderr
        )
        return 130
    return int(any(end != "COMPLETED" for end in ends))


def _follow(job: Watched) -> str:
    """Print one job's log until it has ended; return its final state."""
    said, asked, ended = "", 0.0, False
    while True:
        for line in job.new_lines():
            print(line, flush=True)
        if ended:
            break
        if time.monotonic() - asked >= ASK_S:
            asked = time.monotonic()
            present = patiently(lambda: scheduler.queue(job.job_id))
            words = _in_words(job, present)
            if words != said and present:
                print(f"launch: {job.name}: {words}", flush=True)
            said, ended = words, not present
        time.sleep(0 if ended else LOOK_S)
    end = _final_state(job.job_id)
    print(f"launch: job {job.job_id} ({job.name}) ended: {end}", flush=True)
    return end


def _in_words(job: Watched, present: Sequence[tuple[str, str]]) -> str:
    """Return how a job stands from (state, reason) of those of its elements that the queue has."""
    if job.elements == 1:
        state, reason = present[0] if present else ("ended", "None")
        return state.lower() + (f" ({reason})" if state == "PENDING" and reason != "None" else "")
    counts = Counter(state.lower() for state, _ in present)
    counts["ended"] = job.elements - len(present)
    return ", ".join(f"{count} {state}" for state, count in counts.items() if count)


def _final_state(job_id: str) -> str:
    deadline = time.monotonic() + GONE_S
    while (state := patiently(lambda: scheduler.final_state(job_id))) not in scheduler.FINAL:
        if time.monotonic() > deadline:
            break
        time.sleep(1)
    return state
