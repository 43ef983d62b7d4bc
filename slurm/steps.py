"""Running a program's tasks: by srun on the nodes of a job, or as processes of this machine where there is no Slurm.

Either returns when all tasks have ended, with the highest exit status, 128 + N for one that signal N killed.
"""

import os
import signal
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Sequence

OTHERS_END_S = 120  # that the other ranks of a group get to end by themselves, once one has
PORTS = range(12_000, 32_000)  # below those that systems hand out to outgoing connections


def run_by_srun(command: Sequence[str], environment: dict[str, str], *, together: bool) -> int:
    """Run `python COMMAND` as a step of this job, once a task; `together`: when one ends, the others must soon.

    Signals are the tasks' own affair: Slurm sends them to every task, and srun only waits.
    """
    options = [
        "--unbuffered",
        "--input=none",
        "--mpi=none",  # or every task looks for libraries that we do not need
        "--export=ALL",  # also in a job that was submitted with --export=NONE
        "--kill-on-bad-exit=0",  # a rank that saved and left must not kill those a moment behind
        f"--wait={OTHERS_END_S if together else 0}",
    ]
    environment = {**os.environ, **environment}
    if "SLURM_CPUS_PER_TASK" in environment:  # which srun does not take over from sbatch since 22.05
        environment["SRUN_CPUS_PER_TASK"] = environment["SLURM_CPUS_PER_TASK"]
    done = subprocess.run(["srun", *options, sys.executable, *command], env=environment, check=False)
    return _status(done.returncode)


def run_here(command: Sequence[str], environments: Sequence[dict[str, str]], *, together: bool) -> int:
    """Run `python COMMAND` once an environment on this machine; a signal that asks to stop is passed on.

    Ctrl-C in a terminal reaches the tasks by itself, and is left to them.
    """
    processes = [
        subprocess.Popen([sys.executable, *command], env={**os.environ, **environment}, stdin=subprocess.DEVNULL)
        for environment in environments
    ]

    def pass_on(number: int, _frame: object) -> None:
        for process in processes:
            process.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, pass_on)
    signal.signal(signal.SIGINT, lambda *_: None)
    deadline = None
    while None in [process.poll() for process in processes]:  # each, also those behind one that runs
        if together and deadline is None and any(process.returncode is not None for process in processes):
            deadline = time.monotonic() + OTHERS_END_S
        if deadline is not None and time.monotonic() > deadline:
            pass_on(signal.SIGKILL, None)
        time.sleep(0.1)
    return max(_status(process.returncode) for process in processes)


def free_port(seed: str) -> int:
    """Return a TCP port that is free on this machine; two jobs, of other seeds, begin to look at other ones."""
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


def _status(returncode: int) -> int:
    return 128 - returncode if returncode < 0 else returncode
