"""What the launcher tells this process (its rank, where ranks meet) and where the process reports why it ends.

torchrun and slurm/task.py set the same environment variables; so do people who start ranks with srun or by hand. If
only some of the variables are set, or one is empty, that is refused (P10): it never silently becomes a run of one rank.
"""

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from data.strict_json import dumps

SETTERS = "torchrun and slurm.launch set them all; without these, set them for each rank"
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"  # torchrun repeats its content in its last lines
OUTLIVE = "TRANSFUSION_OUTLIVE_LAUNCHER"  # 1: ranks continue after torchrun has died


@dataclass(frozen=True)
class Place:
    """Which of how many ranks this process is."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0  # on this machine
    local_world_size: int = 1


def place() -> Place:
    """Return this process's place; a process without RANK and WORLD_SIZE is alone.

    Raises ValueError naming the variables that are missing, empty or out of range.
    """
    given = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE")}
    if set(given.values()) != {None} and not all(given.values()):
        state = {None: " is not set", "": " is empty"}
        stated = ", ".join(f"{name}{state.get(value, f'={value}')}" for name, value in given.items())
        raise ValueError(f"environment: {stated}: expected both, or neither for a run of one process. {SETTERS}")
    found = Place(_count("RANK", 0), _count("WORLD_SIZE", 1), _count("LOCAL_RANK", 0), _count("LOCAL_WORLD_SIZE", 1))
    if found.rank >= found.world_size:
        raise ValueError(f"environment: RANK={found.rank}, WORLD_SIZE={found.world_size}: expected a smaller RANK")
    return found


def address() -> tuple[str, int]:
    """Return where the ranks meet, MASTER_ADDR and MASTER_PORT; raises ValueError naming what is missing."""
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if not host or not port:
        missing = [name for name, value in (("MASTER_ADDR", host), ("MASTER_PORT", port)) if not value]
        raise ValueError(
            f"environment: RANK={os.environ['RANK']}, but {' and '.join(missing)} not set or empty: expected rank 0's "
            f"host and a free port on it, the same on every rank. {SETTERS}"
        )
    if not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise ValueError(f"environment: MASTER_PORT={port}: expected a number in 1...65535")
    return host, int(port)


def has_agent() -> bool:
    """Return whether torchrun started this process: its agent hosts the store and ends all ranks when one fails."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def refuse_lone_task() -> None:
    """Raise ValueError in one of several srun tasks if RANK is not set: each would train a run of its own."""
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    if "RANK" not in os.environ and tasks.isdecimal() and int(tasks) > 1:
        raise ValueError(
            f"task {os.environ.get('SLURM_PROCID', '?')} of {tasks} of a Slurm step, but RANK is not set, so each task "
            "would run alone: start the job with python -m slurm.launch, or set RANK=$SLURM_PROCID, "
            "WORLD_SIZE=$SLURM_NTASKS, LOCAL_RANK=$SLURM_LOCALID, MASTER_ADDR and MASTER_PORT in each task"
        )


def watched_parent() -> int | None:
    """Return the pid of the torchrun that this rank must not outlive; None without torchrun, or if OUTLIVE is set."""
    is_worker = "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get(OUTLIVE, "0") in ("", "0")
    return os.getppid() if is_worker else None


def report_to_torchrun(reason: str) -> None:
    """Write why this rank ends to the file that torchrun repeats at the end of its report."""
    if not (path := os.environ.get(ERROR_FILE)):
        return
    message = {"message": reason, "extraInfo": {"py_callstack": reason, "timestamp": str(int(time.time()))}}
    try:
        Path(path).write_text(dumps({"message": message}), encoding="utf-8")
    except OSError as error:
        print(f"{ERROR_FILE}={path}: {error.strerror}", file=sys.stderr)


def _count(name: str, least: int) -> int:
    """Return a variable's value, `least` if it is not set."""
    value = os.environ.get(name, str(least))
    if not value.isdecimal() or int(value) < least:
        raise ValueError(f"environment: {name}={value!r}: expected a number from {least}. {SETTERS}")
    return int(value)
