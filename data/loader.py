"""Lanes -> PackedBatch: workers, prefetch, pinned memory, the lanes' states, the random draws of each lane.

Workers own lanes and yield rows; a thread of the main process draws their noise (cheaper than sending it), collates
them into micro-batches and keeps a step or two ready, so that a rank waiting for data can still answer its peers.
The saved state is the lanes' own and does not depend on the number of workers; torchdata's loader only runs the
workers, and its own state is not used.
"""

import errno
import os
import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from data.dataset import DataConfig, DataSet
from data.documents import seed_from
from data.lane_state import LaneState, Position
from data.lanes import Lane, lanes_of_rank
from data.packing import ImageDraws, PackedBatch, PackedSequence, collate, pack

SHARED_MEMORY = Path("/dev/shm")  # holds the workers' semaphores; rows go through pipes


@dataclass
class StepBatch:
    """One rank's share of a step, and the states of its lanes after it."""

    step: int  # from 1: the batch of the model's step-th update
    micro_batches: list[PackedBatch]
    lane_states: dict[int, LaneState]
    documents: dict[int, list[Position]]  # of each lane's row, in the order of rows
    num_skipped: int  # documents skipped so far, each counted once a lane
    ended: bool  # no lane of this rank had anything left

    @property
    def num_text_targets(self) -> int:
        return sum(batch.num_text_targets for batch in self.micro_batches)

    @property
    def num_images(self) -> int:
        return sum(batch.num_images for batch in self.micro_batches)

    @property
    def num_tokens(self) -> int:
        """Tokens that are not padding."""
        return sum(batch.input_ids.numel() - batch.num_padding for batch in self.micro_batches)


def draw_images(seed: int, step: int, lane: int, row: PackedSequence) -> ImageDraws:
    """Draw u, noise and, of moments, posterior noise of a row's images on the CPU from (seed, step, lane).

    A clean copy has its original's.
    """
    generator = torch.Generator().manual_seed(seed_from("images", seed, step, lane))
    is_copy = [image.role == "copy" for image in row.images]
    u = torch.rand(is_copy.count(False), generator=generator)
    noise: list[torch.Tensor] = []
    posterior_noise: list[torch.Tensor | None] = []
    for image, copied in zip(row.images, is_copy, strict=True):
        if copied:
            noise.append(noise[-1])
            posterior_noise.append(posterior_noise[-1])
            continue
        is_posterior = image.kind == "moments"
        drawn = torch.randn((1 + is_posterior, image.channels, *image.grid), generator=generator)
        noise.append(drawn[0])
        posterior_noise.append(drawn[1] if is_posterior else None)
    return ImageDraws(u[(~torch.tensor(is_copy, dtype=torch.bool)).cumsum(0) - 1], noise, posterior_noise)


@dataclass
class LaneRow:
    lane: int
    row: PackedSequence | None  # None: the lane has ended
    state: LaneState  # after this row
    documents: list[Position]  # in this row


class LaneRows(IterableDataset):
    """Yield, step by step, the rows of the lanes that this process or worker owns."""

    def __init__(self, data: DataSet, lanes: range, states: dict[int, LaneState]):
        self.data, self.lanes, self.states = data, lanes, states

    def __iter__(self) -> Iterator[list[LaneRow]]:
        worker = get_worker_info()
        numbers = self.lanes[worker.id :: worker.num_workers] if worker else self.lanes
        data = self.data
        lanes = [Lane(number, data.sources, data.settings, self.states.get(number)) for number in numbers]
        while True:
            yield [LaneRow(lane.number, lane.next_row(), lane.state(), lane.documents) for lane in lanes]


class Loader:
    """Hand one rank its StepBatch of each step, from `first_step` on, continuing from `states` (by lane)."""

    def __init__(
        self,
        data: DataSet,
        config: DataConfig,
        *,
        rank: int,
        world_size: int,
        micro_batch_size: int,
        first_step: int = 1,
        states: dict[int, LaneState] | None = None,
        pin_memory: bool = False,
        worker_init_fn: Callable[[int], None] | None = None,  # runs first in each loader process
        may_idle: bool = False,  # ranks without a lane get empty batches instead of a refusal
    ):
        self.data, self.config, self.pin_memory = data, config, pin_memory
        self._worker_init_fn = worker_init_fn
        self.lanes = lanes_of_rank(rank, world_size, config.lanes, may_idle)
        most = -(-config.lanes // world_size)  # rows of the rank with the most lanes: all ranks run as many micro-steps
        self.micro_batch_size = min(micro_batch_size, most)
        self.micro_steps = -(-most // self.micro_batch_size)
        self._rows = LaneRows(data, self.lanes, states or {})
        self._first_step = first_step
        self._ready: queue.Queue = queue.Queue(maxsize=config.prefetch_steps)
        self._workers: list[BaseProcess] = []
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._fill, name="loader", daemon=True)
        self._thread.start()

    def next(self, timeout_seconds: float) -> StepBatch | None:
        """Return the next step's batch, None if it is not ready in time; raise what the reader raised."""
        try:
            item = self._ready.get(timeout=timeout_seconds)
        except queue.Empty:
            return None
        if isinstance(item, BaseException):
            self._ready.put(item)  # the reader is gone: every later call raises the same
            raise item
        return item

    def close(self) -> None:
        """Stop reading and kill the workers: one that hangs in a read would keep this process from exiting."""
        self._closed.set()
        self._thread.join(timeout=5)
        for worker in self._workers:
            worker.kill()

    def _fill(self) -> None:
        try:
            for step, rows in enumerate(self._steps(), start=self._first_step):
                self._hand_over(self._collate(step, sorted(rows, key=lambda row: row.lane)))
                if self._closed.is_set():
                    return
        except BaseException as error:  # `next` raises it in the trainer's thread
            self._hand_over(error)

    def _hand_over(self, item: StepBatch | BaseException) -> None:
        while not self._closed.is_set():
            try:
                self._ready.put(item, timeout=0.2)
                return
            except queue.Full:
                continue

    def _steps(self) -> Iterator[list[LaneRow]]:
        """Yield the rows of all owned lanes, one step at a time, for any number of workers."""
        workers = min(self.config.num_workers, len(self.lanes))
        if not workers:
            yield from self._rows
            return
        from torchdata.stateful_dataloader import StatefulDataLoader

        # Each worker yields one item a step (all its lanes), and items come in the workers' order. Workers are forked
        # because open sources (caches, files) do not pickle.
        loader = StatefulDataLoader(
            self._rows,
            batch_size=None,
            num_workers=workers,
            multiprocessing_context="fork",
            worker_init_fn=self._worker_init_fn,
            prefetch_factor=self.config.prefetch_steps,
            snapshot_every_n_steps=1 << 40,
        )
        try:
            items = iter(loader)
        except OSError as error:
            raise shared_memory_full(workers) if error.errno == errno.ENOSPC else error from None
        self._workers = items._workers
        try:
            while True:
                yield [row for _ in range(workers) for row in next(items)]
        finally:
            items._shutdown_workers()  # the garbage collector may do it too late and hang

    def _collate(self, step: int, rows: list[LaneRow]) -> StepBatch:
        settings = self.data.settings
        empty = pack([], settings.sequence_length, settings.special.pad)
        size, missing = self.micro_batch_size, self.micro_steps * self.micro_batch_size - len(rows)
        sequences = [row.row or empty for row in rows] + [empty] * missing
        lanes = [row.lane for row in rows] + [0] * missing  # an empty sequence draws nothing
        draws = [draw_images(settings.seed, step, *each) for each in zip(lanes, sequences, strict=True)]
        sources = [[source for source, *_ in row.documents] for row in rows] + [[]] * missing
        parts = [slice(i, i + size) for i in range(0, len(sequences), size)]
        batches = [
            collate(sequences[part], draws[part], settings.patch_size, sources[part], len(self.data.sources))
            for part in parts
        ]
        return StepBatch(
            step=step,
            micro_batches=[batch.pin_memory() for batch in batches] if self.pin_memory else batches,
            lane_states={row.lane: row.state for row in rows},
            documents={row.lane: row.documents for row in rows},
            num_skipped=sum(len(row.state.skipped_documents) for row in rows),
            ended=all(row.row is None for row in rows),
        )


def shared_memory_full(workers: int) -> OSError:
    """Return the error that says how much shared memory there is and how to get more."""
    space = os.statvfs(SHARED_MEMORY)
    size, free = (blocks * space.f_frsize / 2**20 for blocks in (space.f_blocks, space.f_bavail))
    return OSError(
        f"{SHARED_MEMORY} is too small for data.num_workers={workers}: {size:.3g} MiB, {free:.3g} of them free. "
        "Free some, give the container more (docker run --shm-size=1g or --ipc=host; in Kubernetes an emptyDir of "
        "medium Memory mounted there), or use fewer workers; data.num_workers=0 needs none"
    )


def epochs(lane_states: dict[int, LaneState]) -> np.ndarray:
    """Return the epoch of each (lane, source), int64 [L, sources]; lanes advance independently."""
    return np.array([[cursor.epoch for cursor in state.cursors] for state in lane_states.values()])
