"""How a rank uses its machine's CPU: threads and memory. Set once, before the first tensor of any size.

What the user's environment already says is never overridden. Tried and dropped, as nothing was gained: see
bench/README.md.
"""

import ctypes
import os

import torch

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h
REUSED = 32 << 20  # bytes; what glibc allows at most
KEPT = (1 << 31) - 1  # bytes of free memory at the top of the heap that stay with the process; mallopt takes an int
GROWTH = 64 << 20  # bytes by which the heap grows


def settle_cpu(local_world_size: int, computes: bool) -> None:
    """Set this rank's threads, and the allocator if it `computes` on the CPU.

    Raises ValueError for an OMP_NUM_THREADS that is no number of threads.
    """
    _set_threads(local_world_size)
    if computes and not _user_set_malloc():
        _keep_memory()


def describe_cpu() -> str:
    """Return one line for the start of a program: the threads of a rank, and who chose them and the allocator."""
    threads = torch.get_num_threads()
    chosen = "OMP_NUM_THREADS" if _asked_threads() == threads else "cores / ranks"
    malloc = f"as {' and '.join(names)} say" if (names := _user_set_malloc()) else "keeps freed memory"
    return f"CPU: {threads} thread{'s' * (threads != 1)} a rank ({chosen}), malloc {malloc}"


def _set_threads(local_world_size: int) -> None:
    """Divide the machine's cores among its ranks, unless OMP_NUM_THREADS is set.

    torchrun sets OMP_NUM_THREADS=1 if the user set nothing, so with several ranks 1 counts as unset: else two ranks on
    32 cores would use two cores.
    """
    asked = _asked_threads()
    if asked is None or (asked == 1 and local_world_size > 1):
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_world_size))


def _asked_threads() -> int | None:
    """Return the threads that OMP_NUM_THREADS asks for, None if it is unset or empty; raise ValueError for nonsense.

    OpenMP itself ignores what it cannot read. It takes a list too, 4,2, whose first number is of the outermost threads.
    """
    value = os.environ.get("OMP_NUM_THREADS", "").strip()
    if not value:
        return None
    if not all(number.strip().isdecimal() and int(number) for number in value.split(",")):
        raise ValueError(f"OMP_NUM_THREADS={value}: expected a whole number of threads, 1 or more; correct or unset it")
    return int(value.split(",")[0])


def _user_set_malloc() -> list[str]:
    """Return the environment's variables that configure malloc."""
    names = [name for name in os.environ if name.startswith("MALLOC_")]
    return names + ["GLIBC_TUNABLES"] * ("glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""))


def _keep_memory() -> None:
    """Let glibc reuse what was freed instead of returning it: each step would fault the same pages in again."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt is not None:
        for option, value in ((M_MMAP_THRESHOLD, REUSED), (M_TRIM_THRESHOLD, KEPT), (M_TOP_PAD, GROWTH)):
            mallopt(option, value)
