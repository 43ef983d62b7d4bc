"""One task of a job: set the variables that torchrun would set, and become the program.

slurm/job.py runs `srun python -m slurm.task PROGRAM key=value ...`. The program replaces this process, so that it
receives Slurm's signals and returns its exit status itself. Rank 0 writes to the job's console log, every other rank
to a file of its own; not through srun, whose end or full pipe would block the program.
"""

import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from slurm.job import CONSOLE, LOGS
from slurm.network import gloo_interface, interfaces


def environment(given: Mapping[str, str], node_folder: str, present: list[str]) -> dict[str, str]:
    """Return the variables to add to `given`, the environment from Slurm and slurm/job.py.

    They are torchrun's RANK and so on, thread counts, the network interface of those `present`, and compile caches in
    `node_folder`, which is on a local disk: on a shared file system hundreds of ranks would wait for each other's
    locks.
    """
    node, local_rank = int(given["SLURM_NODEID"]), given["SLURM_LOCALID"]
    own = {
        "RANK": given["SLURM_PROCID"],
        "WORLD_SIZE": given["SLURM_NTASKS"],
        "LOCAL_RANK": local_rank,
        "LOCAL_WORLD_SIZE": str(tasks_by_node(given["SLURM_STEP_TASKS_PER_NODE"])[node]),
    }
    defaults = {  # unless the submitting environment sets them
        "NCCL_DEBUG": "WARN",  # why a collective failed, and little else
        "PYTHONUNBUFFERED": "1",  # a log's last line is what happened last
        "TORCHINDUCTOR_CACHE_DIR": f"{node_folder}/inductor",
        "TRITON_CACHE_DIR": f"{node_folder}/triton",
    }
    if "SLURM_CPUS_PER_TASK" in given:  # Slurm binds a task to its CPUs: they are all this rank's
        defaults["OMP_NUM_THREADS"] = given["SLURM_CPUS_PER_TASK"]
    # gloo carries votes and checkpoints over the same network, if it is clear which that is.
    if name := gloo_interface(given.get("NCCL_SOCKET_IFNAME", ""), present):
        defaults["GLOO_SOCKET_IFNAME"] = name
    return own | {name: value for name, value in defaults.items() if name not in given}


def tasks_by_node(counts: str) -> list[int]:
    """Return the number of tasks of each node from Slurm's short form: "8(x3),4" is [8, 8, 8, 4]."""
    tasks: list[int] = []
    for part in counts.split(","):
        count, _, times = part.partition("(x")
        tasks += [int(count)] * int(times.rstrip(")") or 1)
    return tasks


def main(argv: list[str]) -> None:
    rank = int(os.environ["SLURM_PROCID"])
    log = os.environ.get(CONSOLE) if rank == 0 else f"{os.environ[LOGS]}/rank-{rank}.log"
    if log is not None:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
    node_folder = Path(tempfile.gettempdir()) / f"transfusion-{os.getuid()}"
    os.environ.update(environment(os.environ, str(node_folder), interfaces()))
    os.execv(sys.executable, [sys.executable, "-m", *argv])


if __name__ == "__main__":
    main(sys.argv[1:])
