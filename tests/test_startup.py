"""What a program imports before it knows that it has work to do: `--help` and a refused config come at once."""

import json
import resource
import subprocess
import sys

import pytest

from tests.test_imports import PROGRAMS, ROOT

# Each takes 0.3 s or more to import, and is imported where it is used. In order: DTensor, FSDP, DCP, the compiler.
HEAVY = ("torch.distributed.tensor", "torch.distributed.fsdp", "torch.distributed.checkpoint", "torch._dynamo")
HEAVY += ("sympy", "diffusers", "transformers", "wandb", "submitit", "webdataset", "torchdata", "scipy")
HEAVY += ("starlette", "uvicorn")
# A program runs as its command line does, in a fork of a process that has imported torch alone.
RUN = """
import json, os, runpy, sys
import torch
for name in sys.argv[1].split(","):
    if os.fork():
        os.wait()
        continue
    statuses = []
    for argument in ("no_such_key=1", "--help"):
        sys.argv = [name, argument]
        try:
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            statuses.append(end.code)
    print("\\nFOUND " + json.dumps([name, statuses, sorted(sys.modules)]), flush=True)
    os._exit(0)
"""


def test_no_program_imports_a_large_library_for_its_help_or_a_refusal() -> None:
    programs = [*(f"train.{name}" for name in sorted(PROGRAMS)), "slurm.launch"]
    command = [sys.executable, "-c", RUN, ",".join(programs)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    lines = [line.removeprefix("FOUND ") for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    assert len(lines) == len(programs), done.stderr
    for name, statuses, modules in map(json.loads, lines):
        assert statuses == [2, 0], (name, statuses, done.stderr)
        assert not set(HEAVY) & set(modules), name
    assert done.stdout.count("options (key: type = default):") == len(programs)


def test_programs_without_tensors_do_not_import_torch() -> None:
    """They answer in a third of a second."""
    for name in ("train.demo", "train.report", "train.scenes", "train.tokenizer", "slurm.launch"):
        code = f"import runpy, sys; import {name}; sys.exit('torch' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0, name


def cpu_seconds(*arguments: str) -> float:
    """Return the CPU time of a Python process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.slow
def test_help_takes_little_more_than_importing_torch() -> None:
    """CPU time, whatever else the machine does: 1.3 times that of the import; it was 2.2 with all libraries."""
    pairs = [(cpu_seconds("-m", "train.pretrain", "--help"), cpu_seconds("-c", "import torch")) for _ in range(3)]
    assert min(mine for mine, _ in pairs) < 1.7 * min(torch for _, torch in pairs), pairs
