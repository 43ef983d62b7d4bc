"""What the launcher must know of each program: where it writes, how it uses several tasks, how far it has come.

Everything else comes from `python -m PROGRAM --resolve`: programs are never imported.
"""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from omegaconf import OmegaConf

from train.config import CHECK, RESOLVE


@dataclass(frozen=True, kw_only=True)
class Program:
    """A program of train/ that a job can run."""

    writes: tuple[str, ...] = ("output",)  # options; the first that is set names its folder or file
    # one: a single task. group: the ranks of one process group, which end together. workers: independent tasks; the
    # elements of an array are more of them.
    tasks: Literal["one", "group", "workers"] = "one"
    unit: str = "steps"  # of its progress
    progress: Callable[[Path], int] | None = None  # progress saved in its folder; None: unknown

    def folder(self, config: dict[str, Any]) -> Path:
        """Return the absolute path that a resolved config says it writes."""
        return Path(next(config[name] for name in self.writes if config[name])).absolute()

    def jobs_folder(self, config: dict[str, Any]) -> Path:
        """Return where its jobs' code, config, logs and records go: inside a run's folder, or next to the output."""
        folder = self.folder(config)
        return folder / "slurm" if self.writes == ("run_dir",) else folder.with_name(f"{folder.name}.slurm")


def newest_checkpoint(run_dir: Path) -> int:
    """Return the step of the newest committed checkpoint, 0 without any."""
    names = (re.fullmatch(r"step-(\d+)", path.name) for path in (run_dir / "checkpoints").glob("step-*"))
    return max((int(name[1]) for name in names if name), default=0)


def finished_shards(output: Path) -> int:
    """Return how many input files have been encoded."""
    return sum(1 for _ in output.glob("*.tar.json"))


def last_row(output: Path) -> int:
    """Return the last logged step of a program that works in `<output>.partial`, 0 without any."""
    try:
        lines = (output.with_name(f"{output.name}.partial") / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return json.loads(lines[-1])["step"] if lines else 0
    except (OSError, ValueError):  # not there yet, or being written
        return 0


PROGRAMS = {
    "train.scenes": Program(),
    "train.tokenizer": Program(),
    "train.vae": Program(tasks="group", progress=last_row),
    "train.encode": Program(
        writes=("verify", "index", "output"), tasks="workers", unit="shards", progress=finished_shards
    ),
    "train.pretrain": Program(writes=("run_dir",), tasks="group", progress=newest_checkpoint),
    "train.sample": Program(tasks="group"),
    "train.evaluate": Program(tasks="group"),
    "train.export": Program(),
    "train.report": Program(),
}


def find_program(name: str) -> Program:
    """Return the entry of a program; raises ValueError for one that no job can run."""
    if name not in PROGRAMS:
        raise ValueError(f"program={name}: expected one of {', '.join(PROGRAMS)}")
    return PROGRAMS[name]


def resolve(name: str, arguments: Sequence[str], *, check: bool = False) -> str:
    """Return a program's resolved config, as YAML; `check` makes it inspect its input too.

    Raises ValueError with the program's own message.
    """
    command = [sys.executable, "-m", name, *arguments, CHECK if check else RESOLVE]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="surrogateescape", check=False)
    if done.returncode:
        raise ValueError(done.stderr.strip().removeprefix(f"{name}: ") or f"{name} ended with {done.returncode}")
    return done.stdout


def read_resolved(resolved: str) -> dict[str, Any]:
    """Return a resolved config (YAML) as a mapping."""
    return cast(dict[str, Any], OmegaConf.to_container(OmegaConf.create(resolved)))
