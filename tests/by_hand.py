"""Ranks as a person starts them, each with a command of its own and without torchrun's agent."""

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from slurm.srun import free_port
from tests.ranks import ProgramRanks
from train.config import run_program
from train.distributed import rendezvous


@dataclass
class Ended:
    status: int | None  # None: it had to be killed
    words: list[str]  # its lines

    @property
    def last(self) -> str:
        return self.words[-1] if self.words else ""


def by_hand(
    commands: Sequence[tuple[Callable, list[str]]], log: Path, changes: dict[str, str] | None = None, **of_all: str
) -> list[Ended]:
    """Run one program a rank as a person starts them, without torchrun's agent; `changes` to the variables of rank 1.

    Fails where they take longer than 40 seconds.
    """
    ProgramRanks(_nothing, [], None, log).wait()  # the server that forks, with its imports, is there
    environment = {
        "WORLD_SIZE": str(len(commands)),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port(str(log))),
    }
    processes, logs = [], [log.with_name(f"{log.name}-{rank}") for rank in range(len(commands))]
    for rank, (main, argv) in enumerate(commands):
        own = {**environment, "RANK": str(rank), **of_all, **((changes or {}) if rank else {})}
        process = multiprocessing.get_context("forkserver").Process(target=_run, args=(main, argv, own, logs[rank]))
        process.start()
        processes.append(process)
    deadline, ended = time.monotonic() + 40, []
    for process, path in zip(processes, logs, strict=True):
        process.join(max(0.1, deadline - time.monotonic()))
        status = process.exitcode
        process.kill()
        lines = path.read_text().splitlines() if path.exists() else []
        ended.append(Ended(status, lines))
    return ended


def _nothing(argv: list[str]) -> None:
    return None


def _run(main: Callable, argv: list[str], environment: dict[str, str], log: Path) -> None:
    os.environ.update(environment)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.argv = [main.__module__, *argv]
    rendezvous.ANSWER_S = 4.0  # in this process alone
    run_program(main)


def assert_refused(ended: list[Ended], *words: str) -> None:
    """Each rank ends with status 2, the words in its last line, and without a traceback."""
    for rank, end in enumerate(ended):
        assert end.status == 2, (rank, end)
        assert "train." in end.last and [word for word in words if word not in end.last] == [], (rank, end.last, words)
        assert not [line for line in end.words if line.startswith("Traceback")], (rank, end.words)
