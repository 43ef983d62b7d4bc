"""Run a function, or a program's `main`, on N real ranks: processes, gloo, the environment torchrun would give them.

Processes are forked from a server that has imported torch and run nothing, so that each starts in a tenth of a second
instead of the eight of importing torch and torch._dynamo (which fully_shard does); the server starts once per test
run. Forking the test process itself would hand on its OpenMP and autograd threads, which do not survive a fork. The
store is the parent's, as it is the agent's under torchrun, so no port has to be guessed.
"""

import multiprocessing
import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bench.job import PRELOADED, rank_environment
from train.config import run_program
from train.distributed.ranks import Ranks, init_ranks

_context = multiprocessing.get_context("forkserver")
# One server serves both: whoever is first to start a process starts it, and only then this list counts.
PRELOADED += ["diffusers.models.autoencoders.autoencoder_kl", "tests.frozen"]
_context.set_forkserver_preload(PRELOADED)


class RankProcesses:
    """`function(ranks, *args)` running on `world_size` ranks; `function` must be importable, `args` picklable."""

    def __init__(
        self,
        function: Callable[..., Any],
        world_size: int,
        *args: Any,
        timeout_s: float = 60.0,
        collective_timeout_s: float = 20.0,
    ) -> None:
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._deadline = time.monotonic() + timeout_s
        self.processes, self._results = [], []
        for rank in range(world_size):
            receiving, sending = _context.Pipe(duplex=False)
            environment = rank_environment(rank, world_size, self._store.port)
            process = _context.Process(target=_run, args=(function, args, environment, collective_timeout_s, sending))
            process.daemon = True
            process.start()
            sending.close()
            self.processes.append(process)
            self._results.append(receiving)

    def kill(self, rank: int, number: int = signal.SIGKILL) -> None:
        """Send a signal to one rank."""
        os.kill(self.processes[rank].pid, number)

    def wait(self) -> list[tuple[int | None, Any]]:
        """Return (exit status, result or traceback or None) of each rank; those still running at the deadline are
        killed and have status None."""
        outcomes = []
        for process, receiving in zip(self.processes, self._results, strict=True):
            answered = receiving.poll(max(0.0, self._deadline - time.monotonic()))
            result = _receive(receiving) if answered else None
            process.join(max(0.1, self._deadline - time.monotonic()))
            outcomes.append((process.exitcode, result))
            if process.exitcode is None:
                process.kill()
        return outcomes


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 60.0) -> list[Any]:
    """Return what `function(ranks, *args)` returned on each rank; fails with the tracebacks if any rank failed."""
    outcomes = RankProcesses(function, world_size, *args, timeout_s=timeout_s).wait()
    failed = [f"rank {rank}: status {status}\n{what}" for rank, (status, what) in enumerate(outcomes) if status != 0]
    assert not failed, "\n".join(failed)
    return [result for _, result in outcomes]


class ProgramRanks:
    """`main(argv)` of a program on `world_size` ranks, or started directly (None); leaving the context kills them.

    Each rank writes what it prints to `<log>.<rank>`, standard error too.
    """

    def __init__(
        self, main: Callable[[list[str]], int | None], argv: Sequence[str], world_size: int | None, log: Path
    ) -> None:
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.logs = [log.with_name(f"{log.name}.{rank}") for rank in range(world_size or 1)]
        self.processes = []
        for rank, path in enumerate(self.logs):
            environment = rank_environment(rank, world_size, self._store.port) if world_size else {}
            # Not daemonic: such a process may have no children, and loader workers are children.
            process = _context.Process(target=_run_program, args=(main, list(argv), environment, path))
            process.start()
            self.processes.append(process)

    def __enter__(self) -> "ProgramRanks":
        return self

    def __exit__(self, *_: object) -> None:
        self.signal(signal.SIGKILL)
        self.wait()

    def signal(self, number: int, rank: int | None = None) -> None:
        """Send a signal to one rank, or to all that still run."""
        for process in self.processes if rank is None else [self.processes[rank]]:
            if process.exitcode is None:
                os.kill(process.pid, number)

    def wait(self, timeout_s: float = 90.0) -> list[int | None]:
        """Return the exit status of each rank, None for one that still runs at the deadline."""
        deadline = time.monotonic() + timeout_s
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        return [process.exitcode for process in self.processes]

    @property
    def running(self) -> bool:
        return any(process.exitcode is None for process in self.processes)

    @property
    def output(self) -> str:
        """What all ranks have printed so far."""
        return "".join(path.read_text() for path in self.logs if path.exists())


def _run_program(main: Callable, argv: list[str], environment: dict[str, str], log: Path) -> None:
    _use_one_thread()
    os.environ.update(environment)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.argv = [main.__module__, *argv]
    run_program(main)


def _run(function: Callable, args: tuple, environment: dict[str, str], timeout_s: float, sending: Connection) -> None:
    _use_one_thread()
    os.environ.update(environment)
    try:
        ranks: Ranks = init_ranks(timeout_s=timeout_s, checkpoint_timeout_s=timeout_s, device="cpu")
        result = function(ranks, *args)
        ranks.close()
    except BaseException:  # reported to the parent, which fails the test
        sending.send_bytes(pickle.dumps(traceback.format_exc()))
        os._exit(1)
    sending.send_bytes(pickle.dumps(result))  # by value: the parent may outlive this process's shared memory
    sending.close()


def _use_one_thread() -> None:
    """Tensors are tiny: on busy cores threads only wait for each other. (The server read the variable at import.)"""
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


def _receive(receiving: Connection) -> Any:
    try:
        return pickle.loads(receiving.recv_bytes())
    except EOFError:  # the process died without a word
        return None
