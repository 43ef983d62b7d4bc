"""Programs as a benchmark starts them: their output in a log, one thread each, their CPU time on an account."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data.durable import write_durably

HERE = Path(__file__).resolve().parent.parent
Command = tuple[str, ...]


def program(name: str, ranks: int = 1) -> Command:
    """Return the start of the command of a program with the demo's config."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)) if ranks > 1 else ()
    return (sys.executable, *launcher, "-m", f"train.{name}", f"config={HERE}/configs/demo/{name}.yaml")


def run_once(commands: Mapping[str, Command], logs: Path, **start_with: Any) -> None:
    """Run the commands that have not ended well before, in order; `logs` keeps their output and a mark of each."""
    for name, command in commands.items():
        mark = logs / f"{name.replace(' ', '-')}.done"
        if not mark.exists():
            print(f"{logs.parent.name}: {name}", file=sys.stderr)
            run(command, mark.with_suffix(".log"), **start_with)
            mark.touch()


def run(command: Command, log: Path, account: Path | None = None, **start_with: Any) -> None:
    """Run a program to its end; add its CPU-seconds to those in `account`, also if it fails or is interrupted.

    Raises RuntimeError as `expect_success` does.
    """
    process = start(command, log, **start_with)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if account is not None:
        spent = cpu_seconds(account) + used.ru_utime + used.ru_stime
        write_durably(account, f"{spent:.1f}".encode())
    expect_success(process.returncode, log)


def cpu_seconds(account: Path) -> float:
    """Return what `run` has added up; 0 for nothing so far."""
    return float(account.read_text(encoding="utf-8")) if account.exists() else 0.0


def start(
    command: Command, log: Path, cwd: Path | None = None, environment: Mapping[str, str] | None = None
) -> subprocess.Popen:
    """Start a program with one thread unless the environment says otherwise, its output appended to `log`."""
    variables = {"OMP_NUM_THREADS": "1", **os.environ, **(environment or {}), "PYTHONPATH": str(HERE)}
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a", encoding="utf-8") as file:
        print("$", *command, file=file, flush=True)
        return subprocess.Popen(command, cwd=cwd, stdout=file, stderr=file, env=variables)


def expect_success(status: int, log: Path) -> None:
    """Raise RuntimeError with a failed program's status and last line."""
    if status:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        raise RuntimeError(f"status {status}, {lines[-1].strip()} (see {log})")
