"""The files of an encoding job: which there are, and in which order a worker claims them."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.raw import input_name
from data.remote import file_version
from train.distributed.launcher import place
from train.encoding.encoder import Encoder
from train.encoding.leases import Leases
from train.encoding.sidecar import Sidecar

WAIT_S = 2.0  # between checks of what other workers do


@dataclass(frozen=True)
class Task:
    """One input file and the shard it becomes."""

    source: str
    shard: Path
    bytes: int  # of the input
    origin: dict[str, Any]  # what decides the shard's bytes
    chat: str | None = None  # and those of conversations: the hash of the chat template

    def sidecar(self) -> Sidecar | None:
        """Return the shard's sidecar if the task is done."""
        found = Sidecar.read(self.shard, self.origin)
        return found if found is not None and found.words.chat in (None, self.chat) else None


def list_tasks(encoder: Encoder, sources: Sequence[str], output: Path) -> list[Task]:
    """Return all tasks, done or not; asks for each input's version, of many remote ones at a time."""
    chat = encoder.tokenizer.chat_hash
    with ThreadPoolExecutor(32) as pool:
        versions = list(pool.map(file_version, sources))
    return [
        Task(source, output / f"{input_name(source)}.tar", version.bytes, encoder.origin(version), chat)
        for source, version in zip(sources, versions, strict=True)
    ]


def claimed(tasks: Sequence[Task], leases: Leases, waits_for: Callable[[int], None]) -> Iterator[Task]:
    """Yield the tasks that this worker claims, until all are done by some worker.

    Workers start at different places, so that they rarely compete for a file. `waits_for` gets the number of tasks
    under way elsewhere when nothing else is left.
    """
    start = int(_worker_share() * len(tasks))
    left = [*tasks[start:], *tasks[:start]]
    while left:
        others = []
        for task in left:
            if task.sidecar() is not None:
                continue
            if not leases.claim(task.shard.stem):
                others.append(task)
                continue
            if task.sidecar() is None:  # not finished between the two checks
                yield task
            leases.release(task.shard.stem)
        if others:
            waits_for(len(others))
            time.sleep(WAIT_S)
        left = others


def _worker_share() -> float:
    """Return this worker's position among all, in [0, 1): by rank and array task; 0 for one that knows of no others."""
    rank, ranks = place().rank, place().world_size
    if "SLURM_ARRAY_TASK_ID" in os.environ:
        first, last = (int(os.environ.get(f"SLURM_ARRAY_TASK_{end}", "0")) for end in ("MIN", "MAX"))
        rank += ranks * (int(os.environ["SLURM_ARRAY_TASK_ID"]) - first)
        ranks *= max(1, last - first + 1)
    elif ranks == 1:
        return 0.0
    return rank % ranks / ranks
