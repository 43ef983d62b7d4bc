"""Ranks as processes: started, signalled, awaited. The one rig of the benchmarks and the tests.

Each rank gets the environment that torchrun would give it. It is forked from a server that has imported torch and run
nothing, so a start takes a tenth of a second instead of the eight of those imports. (Forking the caller itself would
copy its OpenMP and autograd threads, which do not survive a fork.) The rendezvous store belongs to the caller, as it
belongs to the agent under torchrun, so no port has to be guessed.
"""

import gc
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

import torch
import torch.distributed as dist

from train.config import run_program

Main = Callable[[list[str]], int | None]
PRELOADED = [
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint.state_dict",
    "torch._dynamo",
    "diffusers.models.autoencoders.autoencoder_kl",
    "train.pretrain",
    "bench.trajectory",
    "bench.loader",
]


class Processes:
    """One process per rank, which runs `function(*arguments[rank])`; leaving the context kills those still running.

    A rank writes stdout and stderr to `<log>.<rank>`, or to the caller's own (None). `environment` is set on every
    rank, in addition to torchrun's variables; without `torchrun` nothing tells them that they belong together.
    """

    def __init__(
        self,
        function: Callable[..., object],
        arguments: Sequence[tuple],
        log: Path | None,
        *,
        torchrun: bool = True,
        environment: Mapping[str, str] | None = None,
        daemon: bool = False,  # a daemonic process ends with the caller, but may start none of its own (loader workers)
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)  # no effect once the server runs
        self.started, world_size = time.monotonic(), len(arguments)
        self.logs = [log.with_name(f"{log.name}.{rank}") for rank in range(world_size)] if log else []
        self.processes = []
        if torchrun:
            self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        for rank in range(world_size):
            variables = rank_environment(rank, world_size, self._store.port) if torchrun else {}
            variables |= {"OMP_NUM_THREADS": "1", **(environment or {})}
            work = (function, arguments[rank], variables, self.logs[rank] if log else None)
            process = context.Process(target=_run, args=work, daemon=daemon)
            process.start()
            self.processes.append(process)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.signal(signal.SIGKILL)
        self.wait()

    @property
    def statuses(self) -> list[int | None]:
        """Return each rank's exit status: minus the signal that killed it, None while it runs."""
        return [process.exitcode for process in self.processes]

    @property
    def running(self) -> bool:
        return None in self.statuses

    @property
    def output(self) -> str:
        """What all ranks have printed so far."""
        return "".join(path.read_text(encoding="utf-8", errors="replace") for path in self.logs if path.exists())

    def signal(self, number: int, rank: int | None = None) -> None:
        """Send a signal to one rank, or to all, as far as they still run."""
        for process in self.processes if rank is None else [self.processes[rank]]:
            if process.exitcode is None and process.pid is not None:
                os.kill(process.pid, number)

    def wait(self, timeout_s: float = 90.0, ranks: Sequence[int] | None = None) -> list[int | None]:
        """Return all statuses once some ranks, or all, have ended, or at the deadline."""
        deadline = time.monotonic() + timeout_s
        for rank in range(len(self.processes)) if ranks is None else ranks:
            self.processes[rank].join(max(0.0, deadline - time.monotonic()))
        return self.statuses

    def leftovers(self) -> list[int]:
        """Return the processes that still print to these logs: ranks and what they started."""
        names = {str(path) for path in self.logs}
        return processes(lambda process: os.readlink(process / "fd" / "1") in names)


class ProgramRanks(Processes):
    """A program's `main(argv)` on `world_size` ranks, or as a plain process (None)."""

    def __init__(
        self,
        main: Main,
        argv: Sequence[str],
        world_size: int | None,
        log: Path,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        arguments = [(main, list(argv))] * (world_size or 1)
        super().__init__(become_program, arguments, log, torchrun=world_size is not None, environment=environment)


def processes(matches: Callable[[Path], bool]) -> list[int]:
    """Return the processes of this machine of which `matches(/proc/PID)` is true."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it ended while we looked, or is another user's
            if matches(process):
                found.append(int(process.name))
    return found


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """Return what torchrun tells a rank on this machine, with the rendezvous store at `port`."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


def become_program(main: Main, argv: list[str]) -> None:
    """Run a program as its command line does, in a process of its own."""
    sys.argv = [main.__module__, *argv]
    run_program(main)


def _run(function: Callable[..., object], arguments: tuple, environment: dict[str, str], log: Path | None) -> None:
    gc.freeze()  # else the collector would go through all of torch's objects, and copy the pages that hold them
    torch.set_num_threads(1)  # tensors are tiny: threads only wait for each other
    os.environ.update(environment)
    if log is not None:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
    function(*arguments)
