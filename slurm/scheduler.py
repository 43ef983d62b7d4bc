"""Slurm's own commands, as functions with a time limit and typed errors."""

import re
import subprocess
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

ANSWER_S = 60  # limit of one command; a busy controller answers late
PATIENCE_S, AGAIN_S = 3600, 5  # how long `patiently` keeps asking, and how often
AWAY = re.compile(r"contact slurm controller|timed out|connection refused|Zero Bytes", re.IGNORECASE)
EARLY_S = 90  # the controller checks time limits every 30 s and may warn up to a minute early


class SlurmError(OSError):
    """Slurm refused, or is not installed here."""


class SlurmBusy(SlurmError):
    """Slurm's controller does not answer now; it may later."""


def ask(*command: str) -> str:
    """Run a Slurm command and return its output. Raises SlurmError with its message."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_S, check=False)
    except FileNotFoundError:
        raise SlurmError(f"{command[0]} is not here: run this where Slurm is, or use torchrun without it") from None
    except subprocess.TimeoutExpired:
        raise SlurmBusy(f"{' '.join(command)}: no answer within {ANSWER_S} s") from None
    if done.returncode:
        words = f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}"
        raise SlurmBusy(words) if AWAY.search(words) else SlurmError(words)
    return done.stdout


def patiently(question: Callable[[], T]) -> T:
    """Ask Slurm until it answers: a restart of the controller must not cost a requeue. Raises SlurmError."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            return question()
        except SlurmBusy:
            if time.monotonic() > deadline:
                raise
        time.sleep(AGAIN_S)


def describe(kind: str, name: str) -> dict[str, str]:
    """Return the fields that `scontrol show` prints of a job or a partition."""
    lines = ask("scontrol", "show", kind, name, "--oneliner").splitlines()
    return dict(re.findall(r"(\S+?)=(\S*)", lines[0])) if lines else {}


def queue(job_id: str) -> tuple[str, str] | None:
    """Return (state, reason) of a job that is queued or running; None once it has ended."""
    try:
        line = ask("squeue", "--noheader", "--array", "--format=%T %r", f"--jobs={job_id}").strip()
    except SlurmError as error:
        if "Invalid job id" not in str(error):
            raise
        return None
    state, _, reason = line.partition("\n")[0].partition(" ")
    return (state, reason.strip()) if state else None


def final_state(job_id: str) -> str:
    """Return the state that accounting has of a job's newest run."""
    try:
        words = ask("sacct", "--allocations", "--noheader", "--parsable2", f"--jobs={job_id}", "--format=State").split()
        return words[0] if words else "UNKNOWN"
    except SlurmError:  # no accounting here
        try:
            return describe("job", job_id).get("JobState", "UNKNOWN")
        except SlurmError:  # the controller has forgotten it
            return "UNKNOWN"


def last_end(job_id: str) -> str:
    """Return the state in which the previous run of a requeued job ended; "" if Slurm does not say."""
    try:
        options = ("--allocations", "--duplicates", "--noheader", "--parsable2")
        lines = ask("sacct", *options, f"--jobs={job_id}", "--format=State").split("\n")
    except SlurmError:
        return ""
    ended = [line.split()[0] for line in lines if line.strip() and not line.startswith(("RUNNING", "PENDING"))]
    return ended[-1] if ended else ""


def requeue(job_id: str) -> None:
    """Put a job that is running, or was ended by its time limit, back into the queue. Raises SlurmError if it may not.

    Without this check Slurm would revive a job that was cancelled a moment ago, or requeue twice when an earlier
    request took effect but its answer was lost.
    """
    found = queue(job_id)
    if found is None or (found[0] != "RUNNING" and found[1] != "TimeLimit"):
        raise SlurmError("Slurm has ended the job already")
    ask("scontrol", "requeue", job_id)


def seconds_left(job_id: str) -> int | None:
    """Return the seconds to a running job's time limit, None without one."""
    return seconds_of(ask("squeue", "--noheader", "--format=%L", f"--jobs={job_id}").strip())


def seconds_of(limit: str) -> int | None:
    """Return the seconds of a time limit in Slurm's notation; None if unlimited or in another notation."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+(?::\d+){0,2})", limit)
    if match is None:
        return None
    days, parts = int(match[1] or 0), [int(part) for part in match[2].split(":")]
    if match[1] is None and len(parts) < 3:  # MINUTES[:SECONDS]; else DAYS-HOURS[:MINUTES[:SECONDS]], or H:M:S
        parts.insert(0, 0)
    hours, minutes, seconds = [*parts, 0, 0][:3]
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds
