"""Say a name, then write it into a file of that name; or fail in the way that is asked for."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from train.config import load_config, run_program


@dataclass(frozen=True, kw_only=True)
class SayConfig:
    name: Annotated[str, "path"] = "nobody"  # what to say; of the file
    times: int = 1  # how often
    fail: str = ""  # how to fail
    status: int = 0  # of the end


CONFIG = SayConfig


def main(argv: list[str]) -> int | None:
    config = load_config(CONFIG, argv)
    failures = {
        "value": ValueError("times=1: expected another"),
        "file": FileNotFoundError("data folder a does not exist"),
        "run": ValueError(f"this is run {os.environ.get('TORCHELASTIC_RUN_ID')}"),
        "bug": RuntimeError("a bug"),
        "interrupt": KeyboardInterrupt(),
    }
    if config.fail:
        raise failures[config.fail]
    for _ in range(config.times):
        print(config.name)
    Path(config.name).write_text(config.name, encoding="utf-8")
    return config.status or None


def say(folder: Path, *arguments: str, stdout: int | Path = subprocess.PIPE, **environment: str) -> tuple:
    """Run this program in a folder; return its exit status and what it printed to stdout and to stderr."""
    # Without PYTHONSAFEPATH, `slurm` would be tests/slurm.
    variables = {"PYTHONPATH": str(Path(__file__).parents[1]), "PYTHONSAFEPATH": "1", "PATH": "/usr/bin:/bin"}
    to = os.open(stdout, os.O_WRONLY | os.O_CREAT) if isinstance(stdout, Path) else stdout
    command = [sys.executable, __file__, *arguments]
    env = variables | environment
    done = subprocess.run(command, cwd=folder, env=env, stdout=to, stderr=subprocess.PIPE, timeout=60, check=False)
    if to >= 0:
        os.close(to)
    return done.returncode, (done.stdout or b"").decode(), done.stderr.decode()


if __name__ == "__main__":
    run_program(main, lasting="LASTING" in os.environ)
