"""Start a program's tasks on the nodes of a job, and find the port where they meet."""

import os
import socket
import subprocess
import sys
import zlib
from collections.abc import Sequence

OTHERS_END_S = 120  # that the other ranks of a process group get to exit, once one has
PORTS = range(12_000, 32_000)  # below those that systems hand out to outgoing connections


def run_by_srun(command: Sequence[str], environment: dict[str, str], *, together: bool) -> int:
    """Run `python COMMAND` once per task and return the highest exit status, 128 + N for a task killed by signal N.

    `together`: the tasks form one process group; once one exits, the rest get OTHERS_END_S seconds.
    Slurm delivers signals to every task itself; srun only waits.
    """
    options = [
        "--unbuffered",
        "--input=none",
        "--mpi=none",  # or every task looks for libraries that we do not need
        "--export=ALL",  # even if the job was submitted with --export=NONE
        "--kill-on-bad-exit=0",  # a rank that saved and left must not kill those a moment behind
        f"--wait={OTHERS_END_S if together else 0}",
    ]
    environment = {**os.environ, **environment}
    if "SLURM_CPUS_PER_TASK" in environment:  # srun has not inherited it from sbatch since 22.05
        environment["SRUN_CPUS_PER_TASK"] = environment["SLURM_CPUS_PER_TASK"]
    status = subprocess.run(["srun", *options, sys.executable, *command], env=environment, check=False).returncode
    return 128 - status if status < 0 else status


def free_port(seed: str) -> int:
    """Return a free TCP port of this machine. The search starts at a place given by `seed`, so that two jobs on a node
    rarely compete."""
    start = zlib.crc32(seed.encode()) % len(PORTS)
    for number in range(len(PORTS)):
        port = PORTS[(start + number) % len(PORTS)]
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind(("", port))
            except OSError:
                continue
            return port
    raise OSError(f"no port of {PORTS.start} to {PORTS.stop - 1} is free on {socket.gethostname()}")
