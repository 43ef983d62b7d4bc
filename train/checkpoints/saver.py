"""A checkpoint while training goes on: staged on the host, then hashed, written and committed by a background thread.

The loop waits only for the copy to the host (and for an earlier save that is still being written). A write that fails
harms nothing saved before: `failed` puts it into the next step's vote, `settle` counts it alike on every rank, the
next interval tries again, and several in a row end the run (P5). The buffers are kept from save to save, pinned where
the model is on CUDA: one copy of the rank's shards in host memory.
Rejected: DCP's async_save, whose stager fails on CPU and whose executor swallows what its retention would raise.
"""

import logging
import threading
import time
from dataclasses import dataclass

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from train.checkpoints import checkpoint
from train.checkpoints.checkpoint import CheckpointConfig, CheckpointError, State
from train.checkpoints.run_folder import RunFolder
from train.checkpoints.storage import read_listing
from train.console import say
from train.distributed.ranks import Ranks

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint will hold: the live tensors, and the files beside them (name -> content; rank 0's count)."""

    step: int
    tensors: State
    extra: dict[str, bytes]


class Saver:
    """Write the snapshots of one run, one at a time. Methods are collective and belong to the main thread.

    `saved_step` is the step of the newest checkpoint that is known to be whole, 0 for none; `seconds` what writing the
    last one took, None before any.
    """

    def __init__(self, folder: RunFolder, config: CheckpointConfig, ranks: Ranks) -> None:
        self.saved_step = 0
        self.seconds: float | None = None
        self._folder, self._config, self._ranks = folder, config, ranks
        self._background = ranks.in_background()
        self._buffers: dict[str, torch.Tensor] = {}
        self._host_meshes: dict[DeviceMesh, DeviceMesh] = {}
        self._thread: threading.Thread | None = None
        self._step = 0  # that the thread writes
        self._error: Exception | None = None
        self._failures_in_a_row = 0

    @property
    def failed(self) -> bool:
        """Return whether a write has failed that `settle` does not know of yet."""
        return self._error is not None and not self._thread.is_alive()

    def start(self, snapshot: Snapshot) -> None:
        """Stage a snapshot and begin to write it; waits for an earlier one first.

        Raises CheckpointError when too many writes in a row have failed, RunTakenOver when the run is not ours.
        """
        self.settle()
        staged = self._staged(snapshot.tensors)
        if self._ranks.device.type == "cuda":
            torch.cuda.synchronize()
        self._step = snapshot.step
        self._thread = threading.Thread(target=self._write, args=(snapshot, staged), name="saver", daemon=True)
        self._thread.start()

    def settle(self, tolerate: bool = True) -> None:
        """Wait for the write under way, if any, and judge how it ended; see `start` for what it raises.

        With `tolerate` False, as at the end of a run, the first failure counts.
        """
        if self._thread is None:
            return
        self._thread.join()
        error, self._thread, self._error = self._error, None, None
        if error is None:
            self._failures_in_a_row, self.saved_step = 0, self._step
            return
        self._failures_in_a_row += 1
        most = self._config.max_failures_in_a_row if tolerate else 1
        if not isinstance(error, CheckpointError) or self._failures_in_a_row >= most:
            raise error
        if self._ranks.is_first:
            log.warning("%s; the next save tries again (failure %d of %d)", error, self._failures_in_a_row, most)

    def _write(self, snapshot: Snapshot, staged: State) -> None:
        """Write and retain; the body of the thread, on every rank at once."""
        start = time.monotonic()
        try:
            path = checkpoint.save(self._folder, snapshot.step, staged, snapshot.extra, self._background)
            self.seconds = time.monotonic() - start
            checkpoint.retain(self._folder.checkpoints, self._config, self._background)
            if self._ranks.is_first:
                size = sum(file.num_bytes for file in read_listing(path).values())
                say(f"saved {path}: {size / 1e6:,.1f} MB in {self.seconds:.1f} s")
        except OSError as error:  # of retention, the same on every rank
            self._error = CheckpointError(f"checkpoints that are no longer kept were not removed: {error}")
        except Exception as error:  # whatever it is, the main thread raises it
            self._error = error

    def _staged(self, state: State, prefix: str = "") -> State:
        """Return `state` with every tensor copied to the host, DTensors on a mesh of CPUs."""
        return {
            key: self._staged(value, f"{prefix}{key}.") if isinstance(value, dict) else self._copy(prefix + key, value)
            for key, value in state.items()
        }

    def _copy(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if name not in self._buffers:
            self._buffers[name] = torch.empty_like(local, device="cpu", pin_memory=local.is_cuda)
        buffer = self._buffers[name].copy_(local, non_blocking=True)
        if not isinstance(tensor, DTensor):
            return buffer
        mesh = self._on_host(tensor.device_mesh)
        return DTensor.from_local(buffer, mesh, tensor.placements, shape=tensor.shape, stride=tensor.stride())

    def _on_host(self, mesh: DeviceMesh) -> DeviceMesh:
        """Return the mesh of the same ranks for tensors in host memory; its groups are made at the first save."""
        if mesh.device_type != "cpu" and mesh not in self._host_meshes:
            self._host_meshes[mesh] = DeviceMesh("cpu", mesh.mesh, mesh_dim_names=mesh.mesh_dim_names)
        return self._host_meshes.get(mesh, mesh)
