"""Seconds to the first step after a kill: train.pretrain killed with -9 behind a save, and started again.

Part of bench/checkpoint.py. The processes are started afresh, as on a cluster, so that imports count.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

import torch.distributed as dist

from bench.first_step import STARTED
from bench.loader import make_data
from bench.ranks import rank_environment

Parts = dict[str, dict[str, float]]
LATE_S = 600
SAVED_STEP = 2


def measure_restarts(options: argparse.Namespace, folder: Path) -> dict:
    """Return the seconds from the ranks' start to the end of their first step, in parts; of the slowest rank.

    `restart_over_import` is the CPU time before the first step over that of the import alone.
    """
    tokenizer = make_data(folder / "data", 32, 32)
    run = folder / "restarted"
    command = [
        f"run_dir={run}",
        f"data.tokenizer={tokenizer.path}",
        f"data.sources.texts.path={folder / 'data' / 'texts'}",
        *(
            f"data.{name}"
            for name in (f"lanes={options.ranks}", f"sequence_length={options.length}", "shuffle_block=8")
        ),
        *(f"model.transformer.{name}" for name in (f"width={options.width}", f"layers={options.layers}")),
        f"model.transformer.heads={options.width // 64}",
        "optim.ema_half_lives=[1000]",
        f"checkpoint.interval_steps={SAVED_STEP}",
        "micro_batch_size=1",
        "parallel.dtype=float32",
        "device=cpu",
    ]
    saved = run / "checkpoints" / f"step-{SAVED_STEP:08d}"
    with Started(command, options.ranks, folder) as first:
        from_scratch = first.slowest()
        first.wait_until(saved.exists)
    size = sum(file.stat().st_size for file in saved.iterdir())
    rounds: list[Parts] = []
    for _ in range(options.rounds):
        with Started(command, options.ranks, folder) as again:
            rounds.append(again.slowest())
        for newer in saved.parent.glob("*step-*"):
            if newer != saved:
                shutil.rmtree(newer)
    over_import = [sum(cpu_s(one, part) for part in one if part != "step") / cpu_s(one, "import") for one in rounds]
    return {
        "restart_bytes": size,
        "restart": summary(rounds),
        "restart_over_import": round(statistics.median(over_import), 3),
        "from_scratch": summary([from_scratch]),
    }


def cpu_s(parts: Parts, part: str) -> float:
    return parts[part]["cpu_s"]


class Started:
    """Ranks of train.pretrain, each in a fresh process; leaving the context kills them with -9."""

    def __init__(self, command: Sequence[str], world_size: int, folder: Path) -> None:
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._results = [folder / f"parts-{rank}.json" for rank in range(world_size)]
        self._processes = []
        for rank, result in enumerate(self._results):
            result.unlink(missing_ok=True)
            environment = os.environ | rank_environment(rank, world_size, self._store.port)
            environment |= {"OMP_NUM_THREADS": "1", STARTED: str(time.time())}
            program = [sys.executable, "-m", "bench.first_step", str(result), *command]
            self._processes.append(subprocess.Popen(program, env=environment, stdout=subprocess.DEVNULL))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
            process.wait()

    def wait_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + LATE_S
        while not condition():
            statuses = [process.poll() for process in self._processes]
            if statuses.count(None) < len(statuses) or time.monotonic() > deadline:
                raise RuntimeError(f"train.pretrain: expected ranks that run, found statuses {statuses}")
            time.sleep(0.02)

    def slowest(self) -> Parts:
        """Wait for the first step of every rank; return the parts of the rank that took longest."""
        self.wait_until(lambda: all(path.exists() for path in self._results))
        found = [json.loads(path.read_text(encoding="utf-8")) for path in self._results]
        return max(found, key=lambda parts: sum(part["wall_s"] for part in parts.values()))


def summary(rounds: Sequence[Parts]) -> dict[str, dict[str, float]]:
    """Return medians over the rounds, by kind of seconds and part; `total` is their sum."""
    found: dict[str, dict[str, float]] = {}
    for kind in ("wall_s", "cpu_s"):
        seconds = {part: statistics.median(parts[part][kind] for parts in rounds) for part in rounds[0]}
        found[kind] = {part: round(value, 3) for part, value in {**seconds, "total": sum(seconds.values())}.items()}
    return found
