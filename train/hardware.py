"""GPUs by name: memory, speed, and how fast they talk. From the makers' data sheets; a rate there is a limit, not a
promise, so `REACHED` says what share of a bandwidth large messages see.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from train.distributed.launcher import place

REACHED = 0.8  # of a nominal bandwidth, by large NCCL messages


@dataclass(frozen=True)
class Gpu:
    name: str  # lower case; each of its words is in the device's name
    memory_gib: float  # as the driver reports it, a little below the name's number
    peak_tflops: float  # dense bf16 with f32 sums, TFLOP/s
    link_gb_per_s: float  # to GPUs of the same machine, one direction, GB/s: NVLink, or PCIe where there is none
    network_gb_per_s: float  # to other machines, its share of a usual machine's network, one direction, GB/s


# The first whose words are all in a name counts, so the longer names come first.
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
    """Return the bytes of memory of this rank's device: a GPU's whole, or its share of what the machine has free."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    return free // place().local_world_size


def find(name: str) -> Gpu | None:
    """Return the GPU of a short name (`h200`, `a100-40gb`) or of `torch.cuda.get_device_name()`, or None."""
    return next((gpu for gpu in GPUS if all(word in name.lower() for word in gpu.name.split())), None)
