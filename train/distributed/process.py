"""This process as the operating system and CUDA see it: open files, the allocator's settings, waiting for the device.

Here because every program's ranks need it however they were started: under torchrun, under Slurm or alone.
"""

import os
import resource

import torch

# All versions of torch read the first; a user's setting under any name stands.
ALLOCATOR_NAMES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
ALLOCATOR = "expandable_segments:True"  # segments grow in place: batches of other shapes do not fragment the memory
OTHER_FILES = 64  # that a rank has open at least besides its connections to peers
# Shards, caches and NCCL's sockets come on top. Not more, as some programs close every number up to the limit.
MOST_FILES = 1 << 16


def set_allocator() -> str:
    """Set the CUDA allocator's default unless the user set it; return the setting as NAME=VALUE.

    Must run before CUDA starts in this process.
    """
    if not any(name in os.environ for name in ALLOCATOR_NAMES):
        os.environ[ALLOCATOR_NAMES[0]] = ALLOCATOR
    return next(f"{name}={os.environ[name]}" for name in ALLOCATOR_NAMES if name in os.environ)


def allow_open_files(world_size: int, connections_per_peer: int) -> None:
    """Raise this process's limit on open files; raise ValueError if it cannot hold the connections to all peers."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = hard == resource.RLIM_INFINITY
    needed = OTHER_FILES + connections_per_peer * (world_size - 1)
    if not unlimited and hard < needed:
        raise ValueError(
            f"this machine allows a process {hard} open files, and one of {world_size} ranks needs at least {needed}, "
            f"as it has {connections_per_peer} connections to each other rank: raise the hard limit (ulimit -Hn, "
            "LimitNOFILE of slurmd or of the container), or use fewer ranks"
        )
    most = max(needed, MOST_FILES)
    wanted = most if unlimited else min(hard, most)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def wait_for(device: torch.device) -> None:
    """Wait until `device` has done all work given to it: a clock read before would leave that work out."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
