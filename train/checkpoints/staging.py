"""The copy of a rank's shards in host memory that a background save writes, while training changes the live ones.

All buffers are cut from one block, taken at the first save and kept, whose size is the sum of theirs. On a CUDA machine
the block is page-locked, so that the copies overlap. Rejected: `pin_memory=True`, whose allocator rounds each buffer up
to a power of two (105 GiB for the 75 GiB of a 7B model's states on one GPU); buffers registered one by one, which share
pages.
"""

import weakref

import torch
from torch.distributed.device_mesh import DeviceMesh

from train.checkpoints.checkpoint import State
from train.distributed.local_shards import is_sharded, local
from train.distributed.process import wait_for
from train.nested import leaves

ALIGNMENT = 64  # bytes: a line of the CPU's cache
PORTABLE = 1  # cudaHostRegisterPortable: locked for every device of this process


class Staging:
    """Buffers for one state; every state staged must have the same names, shapes and dtypes."""

    def __init__(self, device: torch.device) -> None:
        self.num_bytes = 0  # taken from the host
        self._device = device  # where the live tensors are
        self._buffers: dict[str, torch.Tensor] = {}
        self._host_meshes: dict[DeviceMesh, DeviceMesh] = {}

    def copy(self, state: State) -> State:
        """Return `state` with every tensor copied to the host, DTensors on a mesh of CPUs; waits for the device.

        Raises MemoryError if the memory cannot be page-locked.
        """
        live = {name: local(tensor) for name, tensor in leaves(state)}
        if not self._buffers:
            self._buffers = self._cut(live)
        assert self._buffers.keys() == live.keys()
        for name, tensor in live.items():
            self._buffers[name].copy_(tensor, non_blocking=True)
        wait_for(self._device)
        return self._like(state)

    def _cut(self, live: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return a buffer for each tensor: a storage of its own, as DCP copies views before it writes them."""
        sizes = {name: -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for name, tensor in live.items()}
        self.num_bytes = sum(sizes.values())
        block = torch.empty(self.num_bytes, dtype=torch.uint8)
        if self._device.type == "cuda" and self.num_bytes:
            _lock(block)
            weakref.finalize(self, _unlock, block.data_ptr()).atexit = False  # before its addresses are used again
        memory, start, buffers = block.numpy(), 0, {}
        for name, tensor in live.items():
            if tensor.numel():
                flat = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=start)
                buffers[name] = flat.view(tensor.shape)
            else:
                buffers[name] = torch.empty_like(tensor, device="cpu")
            start += sizes[name]
        return buffers

    def _like(self, state: State, prefix: str = "") -> State:
        copies: State = {}
        for key, value in state.items():
            name = f"{prefix}{key}"
            if isinstance(value, dict):
                copies[key] = self._like(value, f"{name}.")
                continue
            copies[key] = buffer = self._buffers[name]
            if is_sharded(value):
                mesh = self._on_host(value.device_mesh)
                copies[key] = value.from_local(buffer, mesh, value.placements, shape=value.shape, stride=value.stride())
        return copies

    def _on_host(self, mesh: DeviceMesh) -> DeviceMesh:
        """Return a mesh of the same ranks' CPUs; without process groups, as its tensors are only written."""
        if mesh not in self._host_meshes:
            names = mesh.mesh_dim_names
            self._host_meshes[mesh] = DeviceMesh("cpu", mesh.mesh, mesh_dim_names=names, _init_backend=False)
        return self._host_meshes[mesh]


def _lock(block: torch.Tensor) -> None:
    error = int(torch.cuda.cudart().cudaHostRegister(block.data_ptr(), block.nbytes, PORTABLE))
    if error:
        raise MemoryError(
            f"a save copies this rank's {block.nbytes / 2**30:.1f} GiB of states to page-locked host memory, which the "
            f"system refused (CUDA error {error}): give the rank more host memory, or use more ranks"
        )


def _unlock(address: int) -> None:
    torch.cuda.cudart().cudaHostUnregister(address)
