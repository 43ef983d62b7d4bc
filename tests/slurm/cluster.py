"""A real Slurm cluster on this machine, as up.sh makes it: what tests ask it and do to it."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Container
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
FINAL = frozenset(("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY"))


def run(*command: object, check: bool = True) -> str:
    """Run a command, within a minute, and return what it prints."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=60, check=False)
    assert not check or done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


def wait_for(condition: Callable[[], object], timeout_s: float, what: Callable[[], str] | str) -> None:
    """Poll until a condition holds; fails with what is the matter."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what if isinstance(what, str) else what()}"
        time.sleep(0.2)


@dataclass(frozen=True)
class Cluster:
    """The cluster that up.sh brought up in SLURM_TEST_DIR."""

    nodes: tuple[str, ...]

    @classmethod
    def find(cls) -> "Cluster | str":
        """Return the cluster, or why there is none; never one that people use, as tests end every job they find."""
        folder = Path(os.environ.get("SLURM_TEST_DIR", "/nonexistent"))
        if not (folder / ".transfusion-slurm").exists() or os.environ.get("SLURM_CONF") != str(folder / "slurm.conf"):
            return "no test cluster: make test-slurm brings one up where Slurm can be installed"
        if shutil.which("sinfo") is None:
            return "Slurm is not installed: make test-slurm installs it where it can"
        nodes = run("sinfo", "-h", "-N", "-o", "%N", check=False).split()
        return cls(tuple(sorted(set(nodes)))) if nodes else f"the cluster in {folder} does not answer"

    def submit(self, script: str, *options: object) -> str:
        """Submit a batch script's text; return the job's id."""
        command = ["sbatch", "--parsable", *map(str, options)]
        done = subprocess.run(command, input=f"#!/bin/bash\n{script}\n", capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def state(self, job_id: str) -> str:
        """Return the state of a job's newest run: what the queue says, or accounting once it is over."""
        queued = run("squeue", "-h", "-j", job_id, "-o", "%T", check=False).split()
        return queued[0] if queued else (self.history(job_id) or ["UNKNOWN"])[-1]

    def history(self, job_id: str) -> list[str]:
        """Return how each run of a job ended, in order, as accounting has it."""
        lines = run("sacct", "-D", "-X", "-n", "-P", "-j", job_id, "-o", "State").splitlines()
        return [line.split()[0] for line in lines if line]

    def wait(self, job_id: str, states: Container[str] = FINAL, timeout_s: float = 90) -> str:
        """Wait until a job is in one of some states; return which."""
        wait_for(lambda: self.state(job_id) in states, timeout_s, lambda: f"job {job_id} is {self.state(job_id)}")
        return self.state(job_id)

    def signal(self, job_id: str, name: str) -> None:
        """Send a signal to a job's tasks, as Slurm warns them."""
        run("scancel", f"--signal={name}", job_id)

    def node(self, what: str, name: str) -> None:
        """`kill` or `start` a node: a power cut, and its return."""
        run("bash", HERE / "node.sh", what, name)

    def cancel(self, job_id: str) -> None:
        run("scancel", job_id)

    def requeue(self, job_id: str) -> None:
        run("scontrol", "requeue", job_id)

    def freeze(self, name: str) -> None:
        """Kill a node's slurmd and stop what its jobs run: a node that is out of reach, and not dead."""
        self._signal_tasks(name, signal.SIGSTOP)
        pid = (Path(os.environ["SLURM_TEST_DIR"]) / "run" / f"slurmd-{name}.pid").read_text()
        os.kill(int(pid), signal.SIGKILL)

    def thaw(self, name: str) -> None:
        """Let what `freeze` stopped go on."""
        self._signal_tasks(name, signal.SIGCONT)

    def _signal_tasks(self, node: str, number: int) -> None:
        """Send a signal to every Python process that a job runs on a node."""
        for process in Path("/proc").glob("[0-9]*"):
            try:
                words = (process / "environ").read_bytes().split(b"\0")
                if f"SLURMD_NODENAME={node}".encode() in words and b"python" in (process / "cmdline").read_bytes():
                    os.kill(int(process.name), number)
            except OSError:  # it ended while we looked
                continue

    def set_down(self, name: str) -> None:
        """Tell the controller of a node's death, which it would find out by itself after half a minute."""
        run("scontrol", "update", f"nodename={name}", "state=down", "reason=test")

    def clear(self) -> None:
        """End every job, and bring every node back."""
        run("scancel", "--user=root", check=False)
        for name in self.nodes:
            if not self._is_on(name):  # with what it may have left frozen
                self.node("kill", name)
                self.node("start", name)
            elif "down" in self._node_state(name) or "drain" in self._node_state(name):
                self.node("start", name)
        # A task that ignores SIGTERM lives on for KillWait.
        wait_for(lambda: not run("squeue", "-h", "-o", "%i").strip(), 60, lambda: run("squeue"))
        idle = {"idle"}
        wait_for(lambda: {*map(self._node_state, self.nodes)} == idle, 60, lambda: run("sinfo", "-N", "-l"))

    def _node_state(self, name: str) -> str:
        return run("sinfo", "-h", "-n", name, "-p", "main", "-o", "%T").strip()

    def _is_on(self, name: str) -> bool:
        """Say whether a node's slurmd runs, which the controller learns late."""
        pid_file = Path(os.environ["SLURM_TEST_DIR"]) / "run" / f"slurmd-{name}.pid"
        return pid_file.exists() and (Path("/proc") / pid_file.read_text().strip() / "environ").exists()
