"""Saving while training continues: tensors are staged in host memory, and a background thread writes them (P5).

The loop waits only for the copy to the host, and for an earlier save that is still being written. A failed write harms
no earlier checkpoint: `failed` puts it into the next step's vote, `settle` counts it alike on every rank, the next
interval tries again, and several failures in a row end the run.
Rejected: DCP's async_save, whose stager fails on CPU and whose executor would hide errors of our retention.
"""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from train.checkpoints import checkpoint
from train.checkpoints.checkpoint import CheckpointConfig, CheckpointError, State
from train.checkpoints.listing import read_listing
from train.checkpoints.run_folder import RunFolder
from train.checkpoints.staging import Staging
from train.console import say
from train.distributed.ranks import Ranks

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint will hold: the live tensors, and further files (name -> content; rank 0's are written)."""

    step: int
    tensors: State
    extra: dict[str, bytes]


class Saver:
    """Writes the snapshots of one run, one at a time. Its methods are collective, for the main thread only.

    `saved_step` is the step of the newest checkpoint known to be complete, 0 for none; `seconds` is how long the last
    write took, None before any.
    """

    def __init__(
        self,
        folder: RunFolder,
        config: CheckpointConfig,
        ranks: Ranks,
        on_failure: Callable[[int, str], None] = lambda step, words: None,  # of a write; called on every rank
    ) -> None:
        self.saved_step = 0
        self.seconds: float | None = None
        self._folder, self._config, self._ranks, self._on_failure = folder, config, ranks, on_failure
        self._background = ranks.in_background()
        self._staging = Staging(ranks.device)
        self._thread: threading.Thread | None = None
        self._step = 0  # that the thread is writing
        self._error: Exception | None = None
        self._failures_in_a_row = 0

    @property
    def failed(self) -> bool:
        """Return whether a write has failed that `settle` has not handled yet."""
        return self._error is not None and self._thread is not None and not self._thread.is_alive()

    def start(self, snapshot: Snapshot) -> None:
        """Stage a snapshot and start writing it; waits for an earlier one first.

        Raises CheckpointError if too many writes in a row have failed, RunTakenOver if a later attempt owns the run.
        """
        self.settle()
        staged = self._staging.copy(snapshot.tensors)
        self._step = snapshot.step
        self._thread = threading.Thread(target=self._write, args=(snapshot, staged), name="saver", daemon=True)
        self._thread.start()

    def settle(self, tolerate: bool = True) -> None:
        """Wait for the current write, if any, and handle its outcome; raises as `start` does.

        With `tolerate` False, as at the end of a run, a single failure raises.
        """
        if self._thread is None:
            return
        self._thread.join()
        error, self._thread, self._error = self._error, None, None
        if error is None:
            self._failures_in_a_row, self.saved_step = 0, self._step
            return
        self._failures_in_a_row += 1
        self._on_failure(self._step, str(error))
        most = self._config.max_failures_in_a_row if tolerate else 1
        if not isinstance(error, CheckpointError) or self._failures_in_a_row >= most:
            raise error
        if self._ranks.is_first:
            log.warning("%s; the next save tries again (failure %d of %d)", error, self._failures_in_a_row, most)

    def _write(self, snapshot: Snapshot, staged: State) -> None:
        """Write the checkpoint and apply retention; the body of the thread, which runs on every rank."""
        start = time.monotonic()
        try:
            if self._ranks.device.type == "cuda":  # a new thread's is GPU 0, where each peer would open a context
                torch.cuda.set_device(self._ranks.device)
            path = checkpoint.save(self._folder, snapshot.step, staged, snapshot.extra, self._background)
            self.seconds = time.monotonic() - start
            checkpoint.retain(self._folder.checkpoints, self._config, self._background)
            if self._ranks.is_first:
                size = sum(file.num_bytes for file in read_listing(path).values())
                say(f"saved {path}: {size / 1e6:,.1f} MB in {self.seconds:.1f} s")
        except OSError as error:  # from `retain`, the same on every rank
            self._error = CheckpointError(f"checkpoints that are no longer kept were not removed: {error}")
        except Exception as error:  # the main thread raises it
            self._error = error
