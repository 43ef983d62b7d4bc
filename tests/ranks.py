"""Functions and programs on real ranks: processes over gloo, started by the rig of bench/ranks.py."""

import os
import pickle
import signal
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.ranks import Main, Processes, become_program
from slurm.srun import free_port
from train.distributed import rendezvous
from train.distributed.ranks import init_ranks


class FunctionRanks(Processes):
    """`function(ranks, *args)` on `world_size` ranks; `function` must be importable, `args` picklable."""

    def __init__(
        self,
        function: Callable[..., Any],
        world_size: int,
        *args: Any,
        timeout_s: float = 60.0,
        collective_timeout_s: float = 20.0,
    ) -> None:
        self._folder, self._timeout_s = tempfile.TemporaryDirectory(), timeout_s
        self._results = [Path(self._folder.name, f"result-{rank}") for rank in range(world_size)]
        arguments = [(function, args, collective_timeout_s, path) for path in self._results]
        super().__init__(_run_on_rank, arguments, Path(self._folder.name, "log"), daemon=True)

    def outcomes(self) -> list[tuple[int | None, Any]]:
        """Return (exit status, result or what was printed) of each rank; None is the status of one killed for being
        late."""
        statuses, found = self.wait(self._timeout_s), []
        self.signal(signal.SIGKILL)
        for status, result, log in zip(statuses, self._results, self.logs, strict=True):
            found.append((status, pickle.loads(result.read_bytes()) if status == 0 else log.read_text()))
        self._folder.cleanup()
        return found


def _run_on_rank(function: Callable[..., Any], args: tuple, timeout_s: float, path: Path) -> None:
    try:
        ranks = init_ranks(timeout_s=timeout_s, checkpoint_timeout_s=timeout_s, device="cpu")
        result = function(ranks, *args)
        ranks.close()
    except BaseException:  # the parent fails the test
        traceback.print_exc()
        os._exit(1)  # peers may be inside a collective: a tidy shutdown would wait for them
    path.write_bytes(pickle.dumps(result))


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 60.0) -> list[Any]:
    """Return what `function(ranks, *args)` returned on each rank; fails with the tracebacks if any rank failed."""
    outcomes = FunctionRanks(function, world_size, *args, timeout_s=timeout_s).outcomes()
    failed = [f"rank {rank}: status {status}\n{what}" for rank, (status, what) in enumerate(outcomes) if status != 0]
    assert not failed, "\n".join(failed)
    return [result for _, result in outcomes]


def run_without_torchrun(commands: Sequence[tuple[Main, list[str]]], log: Path, **environment: str) -> Processes:
    """Run one program per rank as people start them: each in a shell of its own, with `environment`, without an agent.

    Ranks that take longer than 40 seconds are killed.
    """
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port(str(log)))}
    arguments = [
        (*command, {"WORLD_SIZE": str(len(commands)), "RANK": str(rank), **meeting, **environment})
        for rank, command in enumerate(commands)
    ]
    with Processes(_become_impatient_program, arguments, log, torchrun=False) as run:
        run.wait(40)
    return run


def _become_impatient_program(main: Main, argv: list[str], environment: dict[str, str]) -> None:
    os.environ.update(environment)
    rendezvous.ANSWER_S = 4.0  # in this process alone
    become_program(main, argv)


def assert_ranks_refuse(
    commands: Sequence[tuple[Main, list[str]]], log: Path, *words: str, **environment: str
) -> Processes:
    """Run without torchrun: each rank exits 2, with the words in its last line and without a traceback."""
    run = run_without_torchrun(commands, log, **environment)
    for path, status in zip(run.logs, run.statuses, strict=True):
        lines = path.read_text().splitlines()
        assert status == 2, (path, status, lines)
        assert "train." in lines[-1] and [word for word in words if word not in lines[-1]] == [], (lines[-1], words)
        assert not [line for line in lines if line.startswith("Traceback")], lines
    return run


def children(pid: int | str = "self") -> list[int]:
    """Return the processes that a process, or this one, has started."""
    return [
        int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
    ]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
