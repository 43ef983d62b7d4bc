"""The launcher: what it says of this process's place among its peers, and where it looks for why a rank ended.

torchrun and slurm/task.py set the same variables, people who start ranks by hand or by srun set them too. A variable
that is empty or missing among the others is a mistake of whoever set them, never a run of one rank.
"""

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

SETTERS = "torchrun and slurm.launch set them all; started otherwise, each rank needs its own"
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"  # what torchrun repeats in its last lines
OUTLIVE = "TRANSFUSION_OUTLIVE_LAUNCHER"  # 1: ranks go on when torchrun is gone


@dataclass(frozen=True)
class Place:
    """Which of how many ranks this process is."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0  # on this machine
    local_world_size: int = 1


def place() -> Place:
    """Return what the environment says; a process without RANK and WORLD_SIZE is alone.

    Raises ValueError naming the variables that are missing, empty or out of range.
    """
    if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
        return Place(0, 1, _number("LOCAL_RANK", 0, 0), _number("LOCAL_WORLD_SIZE", 1, 1))
    wrong = [
        f"{name} is {'empty' if name in os.environ else 'not set'}"
        for name in ("RANK", "WORLD_SIZE")
        if not os.environ.get(name)
    ]
    if wrong:
        there = "".join(f", {name}={os.environ[name]}" for name in ("RANK", "WORLD_SIZE") if os.environ.get(name))
        raise ValueError(
            f"environment: {', '.join(wrong)}{there}: expected both, or neither for a run of one process (unset RANK "
            f"WORLD_SIZE). {SETTERS}"
        )
    found = Place(
        _number("RANK", 0, 0),
        _number("WORLD_SIZE", 1, 1),
        _number("LOCAL_RANK", 0, 0),
        _number("LOCAL_WORLD_SIZE", 1, 1),
    )
    if found.rank >= found.world_size:
        raise ValueError(
            f"environment: RANK={found.rank}, WORLD_SIZE={found.world_size}: expected the former below the latter"
        )
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
    """Return whether torchrun started this process: its agent keeps the store, and ends all ranks when one fails."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def refuse_lone_task() -> None:
    """Raise ValueError for one of several tasks of srun that nobody told its rank: each would train by itself."""
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    if "RANK" not in os.environ and tasks.isdecimal() and int(tasks) > 1:
        raise ValueError(
            f"task {os.environ.get('SLURM_PROCID', '?')} of {tasks} of a Slurm step, but RANK is not set, so each "
            "would run alone: start it with python -m slurm.launch, or set RANK=$SLURM_PROCID, "
            "WORLD_SIZE=$SLURM_NTASKS, LOCAL_RANK=$SLURM_LOCALID, MASTER_ADDR and MASTER_PORT in each task"
        )


def watched_parent() -> int | None:
    """Return the pid of the torchrun that this rank must not outlive; None: there is none, or it may."""
    is_worker = "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get(OUTLIVE, "0") in ("", "0")
    return os.getppid() if is_worker else None


def leave_word(reason: str) -> None:
    """Write why this rank ends where torchrun looks, whose report then ends with it instead of burying it."""
    path = os.environ.get(ERROR_FILE)
    if not path:
        return
    message = {"message": reason, "extraInfo": {"py_callstack": reason, "timestamp": str(int(time.time()))}}
    try:
        Path(path).write_text(json.dumps({"message": message}), encoding="utf-8")
    except OSError as error:
        print(f"{ERROR_FILE}={path}: {error.strerror}", file=sys.stderr)


def _number(name: str, default: int, least: int) -> int:
    value = os.environ.get(name, str(default))
    if not value.isdecimal() or int(value) < least:
        raise ValueError(f"environment: {name}={value!r}: expected a number from {least}. {SETTERS}")
    return int(value)
