"""Run train.pretrain as its command line does, and write down when it passed each part of its start.

usage: python -m bench.first_step RESULT key=value ...   (bench/restart.py starts it, with the ranks' environment)

Nothing is imported here that the program does not import itself, so `import` is the program's own.
"""

import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

STARTED = "BENCH_STARTED"  # environment: the wall clock when the process was started
# The last call of each part, by its name in train.pretrain. `memory`: an estimate, on the way to which torch imports
# FSDP and its compiler, whether or not they are used; `verify`: the checkpoint is found and its bytes checked; `batch`:
# the loader starts, and its first batch is there.
PARTS = {
    "open_training_data": "data",
    "check_memory": "memory",
    "init_ranks": "ranks",
    "find_resume_point": "verify",
    "load_resume_point": "load",
    "dry_run": "dry_run",
    "next_batch": "batch",
    "run_step": "step",
}


def main() -> None:
    result, *sys.argv[1:] = sys.argv[1:]
    program = importlib.import_module("train.pretrain")
    marks = [("import", time.time(), time.process_time())]

    def noted(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **settings: Any) -> Any:
            value = function(*arguments, **settings)
            marks.append((part, time.time(), time.process_time()))
            if part == "step" and not Path(result).exists():
                complete = Path(f"{result}.part")
                complete.write_text(json.dumps(parts(marks)), encoding="utf-8")
                complete.rename(result)
            return value

        return run

    for name, part in PARTS.items():
        setattr(program, name, noted(part, getattr(program, name)))
    importlib.import_module("train.config").run_program(program.main, lasting=True)


def parts(marks: list[tuple[str, float, float]]) -> dict[str, dict[str, float]]:
    """Return seconds by part up to the first step, by the wall clock and of CPU time."""
    found = {}
    wall, cpu = float(os.environ[STARTED]), 0.0
    for part, then, used in marks:
        found[part] = {"wall_s": then - wall, "cpu_s": used - cpu}
        wall, cpu = then, used
    return found


if __name__ == "__main__":
    main()
