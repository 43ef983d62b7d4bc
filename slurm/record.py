"""The history of a job: one JSON file, with an entry for each attempt to run it.

    <jobs>/<job id>/job.json   replaced atomically, by the job's supervisor alone

A supervisor killed together with its attempt cannot record the end; the next attempt does, as Slurm reports it.
"""

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from data.durable import atomic_write

BY_SLURM = "ended by Slurm: "
# Ends that are not the job's fault: one preempted three times during startup may succeed the fourth time.
INNOCENT_SHARE = 10  # this many of them count as one failure of its own
INNOCENT = ("stopped by preemption or a request", f"{BY_SLURM}PREEMPTED", f"{BY_SLURM}REQUEUED")


@dataclass
class Attempt:
    """One start of a job on its nodes."""

    number: int  # 1 ...
    nodes: list[str]
    tasks: int
    began: str  # local time, ISO 8601
    at: int | None  # progress when it began: step of the newest checkpoint, finished shards; None: unknown
    ended: str | None = None
    gained: int | None = None  # progress beyond `at`
    status: int | None = None  # the highest exit status of its tasks; None: Slurm ended the supervisor too
    reason: str | None = None  # why it ended, for people

    def end(self, at: int | None, status: int | None, reason: str) -> None:
        """Set when and why it ended, and how far it came."""
        self.ended, self.status, self.reason = now(), status, reason
        self.gained = None if at is None or self.at is None else max(0, at - self.at)


@dataclass
class Record:
    """A job and its attempts; the contents of job.json."""

    path: Path
    job: str  # id; ARRAY_INDEX for an element of an array
    program: str
    config: str  # file of the resolved config
    code: str = str(Path(__file__).parent.parent)  # folder that the program is imported from
    attempts: list[Attempt] = field(default_factory=list)

    @classmethod
    def open(cls, path: Path, job: str, program: str, config: str) -> "Record":
        """Read the record of earlier attempts, or start an empty one."""
        try:
            attempts = [Attempt(**attempt) for attempt in json.loads(path.read_text(encoding="utf-8"))["attempts"]]
        except (OSError, ValueError, KeyError, TypeError):  # the first attempt, or an earlier one found the disk full
            attempts = []
        path.parent.mkdir(parents=True, exist_ok=True)
        return cls(path, job, program, config, attempts=attempts)

    def begin(self, attempt: Attempt) -> Attempt:
        """Append an attempt and write the record."""
        self.attempts.append(attempt)
        self.write()
        return attempt

    def idle(self) -> int:
        """Return how many of the last consecutive attempts gained nothing; those that Slurm ended count a tenth."""
        own, innocent = 0, 0
        for attempt in reversed(self.attempts):
            if attempt.ended is None or attempt.gained:
                break
            own += attempt.reason not in INNOCENT
            innocent += attempt.reason in INNOCENT
        return own + innocent // INNOCENT_SHARE

    def is_latest(self, attempt: Attempt) -> bool:
        """Return whether no later attempt has begun: a node that Slurm gave up may wake long afterwards."""
        return attempt.number >= len(Record.open(self.path, self.job, self.program, self.config).attempts)

    def write(self) -> bool:
        """Replace the file and return True; False if it cannot be written, which must not end the job."""
        entries = {name: value for name, value in asdict(self).items() if name != "path"}
        try:
            with atomic_write(self.path) as file:
                file.write((json.dumps(entries, indent=1) + "\n").encode())
        except OSError as error:
            say(f"{self.path} was not written: {error}")
            return False
        return True


def say(words: str) -> None:
    """Print a line to the console log."""
    try:
        print(f"slurm: {words}", flush=True)
    except OSError:  # a full disk, which must not prevent the requeue
        return


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
