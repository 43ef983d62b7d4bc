"""GPUs by name: memory, speed and bandwidths, from the vendors' data sheets. Those are upper limits; `REACHED` is the
share of a bandwidth that large messages get.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from train.distributed.launcher import place

REACHED = 0.8  # share of a nominal bandwidth that large NCCL messages get
PROBE_SIDE, PROBE_PRODUCTS = 2048, 64  # 1.1 TFLOP: about 2 ms on an H100


@dataclass(frozen=True)
class Gpu:
    name: str  # lower case; all its words occur in the device's name
    memory_gib: float  # as the driver reports it, a little below the nominal size
    peak_tflops: float  # dense bf16 with f32 sums, TFLOP/s
    link_gb_per_s: float  # to GPUs of the same machine, one direction, GB/s: NVLink, or PCIe without it
    network_gb_per_s: float  # to other machines, its share of a typical machine's network, one direction, GB/s


# The first match counts, so longer names come first.
GPUS = (
    Gpu("gb200", 184.0, 2450, 900, 50),
    Gpu("b200", 178.0, 2250, 900, 50),
    Gpu("gh200", 94.5, 989, 450, 50),
    Gpu("h200", 139.7, 989, 450, 50),
    Gpu("h100 pcie", 79.1, 756, 64, 25),
    Gpu("h100 nvl", 93.1, 835, 64, 25),
    Gpu("h100", 79.1, 989, 450, 50),
    Gpu("a100 40g", 39.4, 312, 300, 25),
    Gpu("a100", 79.1, 312, 300, 25),
    Gpu("l40s", 44.4, 362, 32, 12.5),
    Gpu("4090", 23.5, 165, 32, 3),
)


def memory_of(device: torch.device) -> int:
    """Return this rank's memory in bytes: its whole GPU's, or its share of the machine's available memory."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    return free // place().local_world_size


def find(name: str) -> Gpu | None:
    """Return the GPU of a short name (`h200`, `a100-40gb`) or of `torch.cuda.get_device_name()`, or None."""
    return next((gpu for gpu in GPUS if all(word in name.lower() for word in gpu.name.split())), None)


def probe_seconds(device: torch.device) -> float:
    """Return the device's seconds for matrix products that are the same on every rank; 0 for a CPU.

    A slow GPU holds all ranks up alike inside their collectives, so that no clock around a step can name it.
    """
    if device.type != "cuda":
        return 0.0
    matrix = torch.linspace(-1, 1, PROBE_SIDE**2, device=device).to(torch.bfloat16).view(PROBE_SIDE, PROBE_SIDE)
    product = torch.empty_like(matrix)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.mm(matrix, matrix, out=product)  # the first may load a kernel
    start.record()
    for _ in range(PROBE_PRODUCTS):
        torch.mm(matrix, matrix, out=product)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000
