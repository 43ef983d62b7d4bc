"""A contestant in a process of its own, which waits for orders on a pipe, so that one at a time runs.

Started as `python -m bench.peers.worker NAME WORK`, with WORK as JSON. Each line of its input is an order, each line of
its output the answer, both JSON. Peak memory is the kernel's high-water mark of a process that did nothing else.
"""

import importlib
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from bench.peers.works import Work
from train.streams import open_streams

ROOT = Path(__file__).parents[2]
CONTESTANTS = {"ours": "Ours", "plain": "Plain", "transfusion_pytorch": "TransfusionPytorch", "gemm": "Gemm"}


def memory_mib(name: str) -> float:
    """Return a line of /proc/self/status: VmRSS or VmHWM."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:"))


def serve(name: str, work: Work, orders: IO[str], answers: IO[str]) -> None:
    """Obey until the orders end."""

    def answer(**found: Any) -> None:
        print(json.dumps(found), file=answers, flush=True)

    contestant_type = getattr(importlib.import_module(f"bench.peers.{name}"), CONTESTANTS[name])
    imported = memory_mib("VmRSS")
    contestant = contestant_type(work)
    answer(**contestant.describe(), imports_mib=imported)
    for line in orders:
        order = json.loads(line)
        start = time.perf_counter()
        if order["do"] == "train":
            contestant.train()
        else:
            contestant.draw(order["pictures"], order["evaluations"])
        answer(seconds=time.perf_counter() - start, peak_mib=memory_mib("VmHWM"))
    contestant.close()


@dataclass
class Worker:
    """The other side: one contestant with one work."""

    name: str
    log: Path
    process: subprocess.Popen[str]

    @classmethod
    def start(cls, name: str, work: Work, log: Path, threads: int, python: str = sys.executable) -> "Worker":
        command = [python, "-m", "bench.peers.worker", name, json.dumps(work.arguments())]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONUTF8": "1"}
        with log.open("w", encoding="utf-8") as errors:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        return cls(name, log, process)

    def answer(self) -> dict[str, Any]:
        """Wait for the answer to the last order; the first comes when the contestant is ready."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            tail = self.log.read_text(encoding="utf-8", errors="replace")[-2000:]
            raise RuntimeError(f"{self.name} ended with status {self.process.wait()}:\n{tail}")
        return json.loads(line)

    def order(self, **order: Any) -> dict[str, Any]:
        """Give an order and wait for its answer."""
        assert self.process.stdin is not None
        print(json.dumps(order), file=self.process.stdin, flush=True)
        return self.answer()

    def close(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(timeout=30)
        self.process.stdout.close()


if __name__ == "__main__":
    # Whatever a contestant prints goes to the log; the answers have the pipe for themselves.
    open_streams()
    pipe = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    serve(sys.argv[1], Work(**json.loads(sys.argv[2])), sys.stdin, pipe)
