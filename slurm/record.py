"""What became of a job: one JSON file, with an entry for each attempt to run it.

    <jobs>/<job id>/job.json   written whole by rename, by the job's supervisor alone

An attempt whose supervisor was killed with it has no end of its own; the next attempt writes it, from what Slurm says.
"""

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from data.durable import atomic_write

BY_SLURM = "ended by Slurm: "
# Reasons that say little against the job: who is preempted three times while it starts may be lucky the fourth time.
INNOCENT_SHARE = 10  # so many of those count as one of its own faults
INNOCENT = ("stopped by preemption or a request", f"{BY_SLURM}PREEMPTED", f"{BY_SLURM}REQUEUED")


@dataclass
class Attempt:
    """One start of a job on its nodes."""

    number: int  # 1 ...
    nodes: list[str]
    tasks: int
    began: str  # local time, ISO 8601
    at: int | None  # progress when it began: step of the newest checkpoint, finished shards; None: not known
    ended: str | None = None
    gained: int | None = None  # how far it came beyond `at`
    status: int | None = None  # the highest exit status of its tasks; None: Slurm ended the supervisor too
    reason: str | None = None  # why it ended, for people

    def end(self, at: int | None, status: int | None, reason: str) -> None:
        """Note how it ended, and how far it came."""
        self.ended, self.status, self.reason = now(), status, reason
        self.gained = None if at is None or self.at is None else max(0, at - self.at)


@dataclass
class Record:
    """A job's file."""

    path: Path
    job: str  # id; of an array's element ARRAY_INDEX
    program: str
    config: str  # file of the resolved config
    code: str = str(Path(__file__).parent.parent)  # folder that the program is imported from
    attempts: list[Attempt] = field(default_factory=list)

    @classmethod
    def open(cls, path: Path, job: str, program: str, config: str) -> "Record":
        """Read the record of an earlier attempt, or begin one."""
        try:
            attempts = [Attempt(**attempt) for attempt in json.loads(path.read_text(encoding="utf-8"))["attempts"]]
        except (OSError, ValueError, KeyError, TypeError):  # the first attempt, or a disk that was full
            attempts = []
        path.parent.mkdir(parents=True, exist_ok=True)
        return cls(path, job, program, config, attempts=attempts)

    def begin(self, attempt: Attempt) -> Attempt:
        """Append an attempt and write the record."""
        self.attempts.append(attempt)
        self.write()
        return attempt

    def idle(self) -> int:
        """Return how many attempts in a row, up to the last, gained nothing; those of Slurm's making count a tenth."""
        own, innocent = 0, 0
        for attempt in reversed(self.attempts):
            if attempt.ended is None or attempt.gained:
                break
            own += attempt.reason not in INNOCENT
            innocent += attempt.reason in INNOCENT
        return own + innocent // INNOCENT_SHARE

    def is_latest(self, attempt: Attempt) -> bool:
        """Return whether no later attempt has begun: a node that Slurm gave up may come to itself long after."""
        return attempt.number >= len(Record.open(self.path, self.job, self.program, self.config).attempts)

    def write(self) -> bool:
        """Replace the file and return True; a disk that is full costs the record, not the job."""
        entries = {name: value for name, value in asdict(self).items() if name != "path"}
        try:
            with atomic_write(self.path) as file:
                file.write((json.dumps(entries, indent=1) + "\n").encode())
        except OSError as error:
            say(f"{self.path} was not written: {error}")
            return False
        return True


def say(words: str) -> None:
    """Print a line into the console log."""
    try:
        print(f"slurm: {words}", flush=True)
    except OSError:  # a full disk; training went on all the same, and so must the requeue
        return


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
