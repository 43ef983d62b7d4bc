"""Sending jobs with slurm.launch, and reading what became of them."""

import json
import re
import subprocess
import sys
from pathlib import Path

from bench import ranks
from data.tokenizer import Tokenizer
from tests.runs import rows, settings
from tests.slurm.cluster import wait_for

ROOT = Path(__file__).parent.parent.parent
STEPS = 120


def training(run_dir: Path, tokenizer: Tokenizer, sources: dict[str, Path]) -> list[str]:
    """Return the options of a training that takes some seven seconds on two ranks, once started."""
    changes = {"optim__steps": STEPS, "checkpoint__interval_steps": 20, "log__interval_steps": 1}
    return settings(run_dir, tokenizer, sources, **changes)


def launch(*argv: object, status: int = 0) -> tuple[list[str], str]:
    """Run slurm.launch; return the ids of the jobs it submitted and what it printed."""
    command = [sys.executable, "-m", "slurm.launch", "env.OMP_NUM_THREADS=1", *map(str, argv)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == status, done.stdout + done.stderr
    return re.findall(r"^job (\d+): ", done.stdout, re.MULTILINE), done.stdout + done.stderr


def attempts(jobs: Path, job_id: str) -> list[dict]:
    """Return the attempts of a job's record."""
    return json.loads((jobs / job_id / "job.json").read_text())["attempts"]


def wait_for_step(run_dir: Path, step: int, log: Path, timeout_s: float = 60) -> None:
    """Wait until a run has logged a step."""
    wait_for(lambda: rows(run_dir) and rows(run_dir)[-1]["step"] >= step, timeout_s, lambda: tail(log))


def tail(log: Path) -> str:
    """Return the end of a log, for a failure's message."""
    return log.read_text()[-3000:] if log.exists() else f"no {log}"


def processes(program: str) -> list[int]:
    """Return the processes on this machine, and so on all nodes, that run a program."""
    return ranks.processes(lambda process: f"\0-m\0{program}\0".encode() in (process / "cmdline").read_bytes())
