"""What we ask Slurm and tell it: a few of its commands, each bounded in time."""

import re
import subprocess
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

ANSWER_S = 60  # how long a command may take; a busy controller answers late
PATIENCE_S, AGAIN_S = 3600, 5  # how long `patiently` goes on asking, and how often
AWAY = re.compile(r"contact slurm controller|timed out|connection refused|Zero Bytes", re.IGNORECASE)
EARLY_S = 90  # the controller looks at time limits every 30 s, and may warn up to a minute early
# States of a job that will not run again, as sacct and scontrol name them.
FINAL = frozenset(
    ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL", "NODE_FAIL", "PREEMPTED")
)


class SlurmError(OSError):
    """Slurm refused, or is not here."""


class SlurmBusy(SlurmError):
    """Slurm's controller does not answer now; it may later."""


def ask(*command: str) -> str:
    """Run a command of Slurm's and return what it prints. Raises SlurmError with its words."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_S, check=False)
    except FileNotFoundError:
        raise SlurmError(f"{command[0]} is not here: run this where Slurm is, or with cluster=local") from None
    except subprocess.TimeoutExpired:
        raise SlurmBusy(f"{' '.join(command)}: no answer within {ANSWER_S} s") from None
    if done.returncode:
        words = f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}"
        raise SlurmBusy(words) if AWAY.search(words) else SlurmError(words)
    return done.stdout


def patiently(question: Callable[[], T]) -> T:
    """Ask Slurm until it answers: a controller that restarts must not cost a requeue. Raises SlurmError."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            return question()
        except SlurmBusy:
            if time.monotonic() > deadline:
                raise
        time.sleep(AGAIN_S)


def describe(kind: str, name: str) -> dict[str, str]:
    """Return the fields that `scontrol show` has of a job or a partition, those of an array's first element."""
    lines = ask("scontrol", "show", kind, name, "--oneliner").splitlines()
    return dict(re.findall(r"(\S+?)=(\S*)", lines[0])) if lines else {}


def queue(job_id: str) -> list[tuple[str, str]]:
    """Return (state, reason) of a job that waits or runs, of an array of each such element; nothing once it ended."""
    try:
        lines = ask("squeue", "--noheader", "--array", "--format=%T %r", f"--jobs={job_id}").splitlines()
    except SlurmBusy:
        raise
    except SlurmError as error:
        if "Invalid job id" not in str(error):
            raise
        return []
    return [tuple(line.split(maxsplit=1)) for line in lines if line.strip()]


def final_state(job_id: str) -> str:
    """Return the state that accounting has of a job's newest run; of an array the worst of its elements'."""
    try:
        lines = ask("sacct", "--allocations", "--noheader", "--parsable2", f"--jobs={job_id}", "--format=State")
        found = [line.split()[0] for line in lines.splitlines() if line.strip()]
    except SlurmError:  # no accounting here
        try:
            found = [describe("job", job_id).get("JobState", "UNKNOWN")]
        except SlurmError:  # and the controller has forgotten it
            found = []
    return next((bad for bad in found if bad != "COMPLETED"), found[0] if found else "UNKNOWN")


def last_end(job_id: str) -> str:
    """Return how Slurm says that the run of a job before the present one ended; "" where it does not say."""
    try:
        options = ("--allocations", "--duplicates", "--noheader", "--parsable2")
        lines = ask("sacct", *options, f"--jobs={job_id}", "--format=State").split("\n")
    except SlurmError:
        return ""
    ended = [line.split()[0] for line in lines if line.strip() and not line.startswith(("RUNNING", "PENDING"))]
    return ended[-1] if ended else ""


def requeue(job_id: str) -> None:
    """Put a job that runs, or that its time limit ended, back into the queue. Raises SlurmError where it may not be.

    Slurm would revive one that was cancelled a moment ago, or while an earlier try of ours got no answer.
    """
    if not any(state == "RUNNING" or reason == "TimeLimit" for state, reason in queue(job_id)):
        raise SlurmError("Slurm has ended it meanwhile")
    ask("scontrol", "requeue", job_id)


def seconds_left(job_id: str) -> int | None:
    """Return the seconds to a running job's time limit, None without one."""
    left = ask("squeue", "--noheader", "--format=%L", f"--jobs={job_id}")
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", left.strip())
    if match is None:
        return None
    days, hours, minutes, rest = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + rest
