"""What a launcher tells a rank, what it learns of the rank's end, and what its own end means."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tests.say
from train.distributed import launcher
from train.distributed.launcher import ERROR_FILE, OUTLIVE, Place
from train.distributed.signals import StopKind, StopSignal

ROOT = Path(__file__).parent.parent
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in (*VARIABLES, "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"WORLD_SIZE": "4"}, "RANK is not set, WORLD_SIZE=4"),
        ({"RANK": "0"}, "RANK=0, WORLD_SIZE is not set"),
        ({"RANK": "", "WORLD_SIZE": ""}, "RANK is empty, WORLD_SIZE is empty"),
        ({"RANK": "first", "WORLD_SIZE": "2"}, "RANK='first': expected a number from 0"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE='0': expected a number from 1"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2, WORLD_SIZE=2"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": ""}, "LOCAL_RANK=''"),
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_PORT": "1"}, "MASTER_ADDR not set or empty"),
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a"}, "MASTER_PORT not set or empty"),
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "99999"}, "MASTER_PORT=99999"),
    ],
)
def test_variables_that_do_not_make_a_rank_are_named(
    environment: pytest.MonkeyPatch, variables: dict[str, str], words: str
) -> None:
    for name, value in variables.items():
        environment.setenv(name, value)
    with pytest.raises(ValueError, match="environment: ") as refusal:
        launcher.place()
        launcher.address()
    assert words in str(refusal.value)


def test_without_a_launcher_a_process_is_alone_unless_it_is_one_of_many_tasks(environment: pytest.MonkeyPatch) -> None:
    launcher.refuse_lone_task()
    assert launcher.place() == Place(0, 1, 0, 1)
    environment.setenv("SLURM_STEP_NUM_TASKS", "8")
    with pytest.raises(ValueError, match="of 8 of a Slurm step, but RANK is not set"):
        launcher.refuse_lone_task()
    for name, value in {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}.items():
        environment.setenv(name, value)
    launcher.refuse_lone_task()
    assert launcher.place() == Place(3, 8, 1, 1)


ORPHAN = """
import os, subprocess, sys, time
CHILD = '''
import os, time
from train.distributed.signals import StopKind, StopSignal
with StopSignal() as stop:
    print(os.getpid(), flush=True)
    deadline = time.monotonic() + 60
    while not stop.kind and time.monotonic() < deadline:
        time.sleep(0.01)
    print(int(stop.kind), stop.name, flush=True)
'''
subprocess.Popen([sys.executable, "-c", CHILD])
time.sleep(60)
"""


@pytest.mark.parametrize("variables", [{}, {OUTLIVE: "1"}, {"TORCHELASTIC_RUN_ID": ""}])
def test_the_end_of_torchrun_is_a_request_to_save_and_stop_unless_told_otherwise(variables: dict[str, str]) -> None:
    """P6: `kill -9` of it orphans its ranks. A rank of another parent, as under nohup, continues."""
    environment = {**os.environ, "TORCHELASTIC_RUN_ID": "x", **variables}
    if environment["TORCHELASTIC_RUN_ID"] == "":
        del environment["TORCHELASTIC_RUN_ID"]
    code = ORPHAN.replace("+ 60", "+ 1") if variables else ORPHAN
    with subprocess.Popen([sys.executable, "-c", code], stdout=-1, text=True, env=environment) as parent:
        parent.stdout.readline()  # it is watching
        parent.kill()
        said = parent.stdout.readline()
    assert said == ("0 None\n" if variables else f"1 the end of torchrun (pid {parent.pid})\n")


def test_a_parent_that_stays_asks_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    with StopSignal() as stop:
        assert stop.kind == StopKind.NONE


def test_the_last_words_under_torchrun_are_the_reason() -> None:
    """torchrun's report, which comes last, ends with what the rank said, not with where to read about tracebacks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", tests.say.__file__, "fail=run"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 1
    *_, last, border = done.stderr.strip().splitlines()
    assert re.search(r"train.say: this is run (?!None)\S+$", last) and set(border) == {"="}, done.stderr[-2000:]


@pytest.mark.parametrize(("fail", "last"), [("value", "times=1: expected another"), ("bug", "RuntimeError: a bug")])
def test_whatever_ends_a_rank_is_left_where_torchrun_looks(tmp_path: Path, fail: str, last: str) -> None:
    environment = {ERROR_FILE: str(tmp_path / "error.json"), "TORCHELASTIC_RUN_ID": "x"}
    assert tests.say.say(tmp_path, f"fail={fail}", **environment)[0] in (1, 2)
    left = json.loads((tmp_path / "error.json").read_text())["message"]["extraInfo"]["py_callstack"]
    assert left.strip().endswith(last)
