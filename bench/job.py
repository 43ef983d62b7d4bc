"""A training job as its user meets it: a command, a run folder, ranks that are started, signalled and end.

Ranks are real processes that run `python -m train.pretrain` in the environment torchrun would give them. They are
forked from a server that has imported torch and run nothing, so that a start costs a tenth of a second instead of the
eight of the imports; the rendezvous store is ours, as it is the agent's under torchrun. What is known of a run is read
from its folder alone, as a person would.
"""

import json
import multiprocessing
import os
import runpy
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from train.checkpoints import checkpoint
from train.distributed.ranks import alone

PRELOADED = [
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint.state_dict",
    "torch._dynamo",
    "train.pretrain",
    "bench.trajectory",
    "bench.loader",
]


class Attempt:
    """One start of a command on `world_size` ranks; leaving the context kills what still runs.

    Rank r writes what it prints, standard error too, to `<log>.<r>`.
    """

    def __init__(self, argv: Sequence[str], world_size: int, log: Path, environment: dict[str, str] | None = None):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)  # without effect once the server runs
        self.started, self.world_size = time.monotonic(), world_size
        self.logs = [log.with_name(f"{log.name}.{rank}") for rank in range(world_size)]
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._processes = []
        for rank, path in enumerate(self.logs):
            of_rank = {**rank_environment(rank, world_size, self._store.port), "OMP_NUM_THREADS": "1"}
            of_rank |= environment or {}
            # Not daemonic: such a process may have no children, and loader workers are children.
            process = context.Process(target=_pretrain, args=(list(argv), of_rank, path))
            process.start()
            self._processes.append(process)

    def __enter__(self) -> "Attempt":
        return self

    def __exit__(self, *_: object) -> None:
        self.signal(signal.SIGKILL)
        self.wait(10)

    @property
    def statuses(self) -> list[int | None]:
        """Return each rank's exit status: minus the signal that killed it, None while it runs."""
        return [process.exitcode for process in self._processes]

    @property
    def running(self) -> bool:
        return None in self.statuses

    def signal(self, number: int, ranks: Sequence[int] | None = None) -> None:
        """Send a signal to some ranks or to all, as far as they still run."""
        for rank in range(self.world_size) if ranks is None else ranks:
            if self._processes[rank].exitcode is None:
                os.kill(self._processes[rank].pid, number)

    def wait(self, timeout_s: float, ranks: Sequence[int] | None = None) -> list[int | None]:
        """Return the statuses once the ranks have ended, or at the deadline."""
        deadline = time.monotonic() + timeout_s
        for rank in range(self.world_size) if ranks is None else ranks:
            self._processes[rank].join(max(0.0, deadline - time.monotonic()))
        return self.statuses

    def output(self, rank: int | None = None) -> str:
        """Return what one rank, or all, have printed so far."""
        logs = self.logs if rank is None else [self.logs[rank]]
        return "".join(path.read_text(errors="replace", encoding="utf-8") for path in logs if path.exists())

    def leftovers(self) -> list[int]:
        """Return the processes that still print to this attempt's logs: ranks and what they started."""
        names, found = {str(path) for path in self.logs}, []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if os.readlink(process / "fd" / "1") in names:
                    found.append(int(process.name))
            except OSError:  # it ended while we looked
                continue
        return found


@dataclass
class Job:
    """A run folder and the command that trains in it."""

    run_dir: Path
    settings: dict[str, Any]  # of the command, by key
    logs: Path  # folder for what the ranks print
    attempts: int = 0
    _claim: str = ""  # attempt.json before the newest start

    def start(
        self, world_size: int, changes: dict[str, Any] | None = None, environment: dict[str, str] | None = None
    ) -> Attempt:
        """Run the command; `changes` replace some of its settings."""
        self.attempts += 1
        self._claim = self._attempt_json()
        return Attempt(self.argv(changes), world_size, self.logs / f"{self.attempts:03d}.log", environment)

    def argv(self, changes: dict[str, Any] | None = None) -> list[str]:
        given = {"run_dir": self.run_dir, **self.settings, **(changes or {})}
        return [f"{key}={value}" for key, value in given.items()]

    def claimed(self) -> bool:
        """Return whether an attempt has taken the run folder since the newest start."""
        return self._attempt_json() != self._claim

    def _attempt_json(self) -> str:
        path = self.run_dir / "attempt.json"
        return path.read_text(encoding="utf-8") if path.exists() else ""

    @property
    def metrics(self) -> Path:
        return self.run_dir / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.run_dir / "checkpoints"

    def rows(self) -> list[dict[str, Any]]:
        """Return the whole rows of training steps in metrics.jsonl."""
        return [row for row in self._all_rows() if "text_loss" in row]

    def evaluations(self) -> list[dict[str, Any]]:
        """Return the whole rows of evaluations in metrics.jsonl."""
        return [row for row in self._all_rows() if "text_loss" not in row]

    def _all_rows(self) -> list[dict[str, Any]]:
        lines = self.metrics.read_bytes().splitlines(keepends=True) if self.metrics.exists() else []
        return [json.loads(line) for line in lines if line.endswith(b"\n")]

    def last_step(self) -> int:
        """Return the step of the last whole row, 0 without any; cheap enough to be asked a thousand times a second."""
        try:
            with self.metrics.open("rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - 8192))
                lines = [line for line in file.read().splitlines(keepends=True) if line.endswith(b"\n")]
            return json.loads(lines[-1])["step"] if lines else 0
        except (FileNotFoundError, ValueError):  # not there yet; or one row of more than 8 KiB
            return 0

    def inode(self) -> int | None:
        """Return what tells this metrics.jsonl from the one that a resume puts in its place."""
        return self.metrics.stat().st_ino if self.metrics.exists() else None

    def saved(self) -> list[int]:
        """Return the steps whose checkpoints have their final names."""
        return [checkpoint.step_of(folder) for folder in checkpoint.saved(self.checkpoints)]

    def problems(self) -> dict[int, list[str]]:
        """Return what is wrong with each checkpoint that has its final name; an empty list means intact."""
        folders = checkpoint.saved(self.checkpoints)
        return {checkpoint.step_of(folder): checkpoint.verify(folder, alone()) for folder in folders}

    def newest_intact(self) -> int:
        """Return the step that the next start must go on from, 0 for none."""
        return max((step for step, problems in self.problems().items() if not problems), default=0)

    def folder_of(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:08d}"

    def being_written(self) -> dict[int, Path]:
        """Return the half-written checkpoints by step."""
        return {int(path.name.split("-")[2]): path for path in self.checkpoints.glob(".tmp-step-*")}


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """Return what torchrun would tell a rank on this machine, whose rendezvous store listens at `port`."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


def _pretrain(argv: list[str], environment: dict[str, str], log: Path) -> None:
    """Become `python -m train.pretrain ARGV`; runs in the new process."""
    torch.set_num_threads(1)  # tensors are tiny: threads only wait for each other
    os.environ.update(environment)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.argv = ["train/pretrain.py", *argv]
    sys.modules.pop("train.pretrain", None)  # imported for what it imports; it runs as a program of its own
    runpy.run_module("train.pretrain", run_name="__main__", alter_sys=True)
