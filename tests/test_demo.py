"""The demo's stages are commands that their programs understand; finished ones are reused, outdated ones made anew."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from train import demo
from train.config import load_config
from train.demo import DemoConfig, Stage, stages

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("smoke", [False, True])
def test_every_stage_is_a_command_that_its_program_accepts(monkeypatch: pytest.MonkeyPatch, smoke: bool) -> None:
    """Config files and keys exist and have the right types, at full and at toy length."""
    monkeypatch.chdir(ROOT)
    todo = stages(DemoConfig(smoke=smoke))
    names = [stage.name for stage in todo]
    assert len(set(names)) == len(names) and {"scenes", "vae", "pretrain", "sample", "evaluate", "report"} <= set(names)
    for stage in todo:
        place = stage.command.index("-m", 1 if stage.command[0] == "python" else 2)
        program = importlib.import_module(stage.command[place + 1])
        config = load_config(program.CONFIG, list(stage.command[place + 2 :]))
        made = [getattr(config, name, None) for name in ("output", "run_dir")]
        assert stage.output in made, f"{stage.name} makes {made}, and {stage.output} would be removed"


def _stage(name: str, output: str, code: str, work: float = 1.0) -> Stage:
    return Stage(name, work, output, ("python", "-c", code))


def test_the_time_left_is_told_at_the_pace_of_this_machine() -> None:
    """A machine that took 80 s for what is a quarter of the work needs four minutes for the rest."""
    done, todo = [_stage("one", "", "", 4.0), _stage("two", "", "", 6.0)], [_stage("three", "", "", 30.0)]
    assert "about 4 min to" in demo._time_left(done, todo, {"one": 20.0, "two": 60.0})
    assert demo._time_left([], done + todo, {}) == "", "there is no pace yet"


def _count(folder: Path, name: str) -> int:
    return len((folder / name).read_text()) if (folder / name).exists() else 0


def test_finished_stages_are_reused_and_those_after_a_changed_one_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when the demo was interrupted in between, and without removing what a stage can go on from."""
    folder = tmp_path / "runs" / "demo"
    (folder / "evaluation").mkdir(parents=True)
    scores = {key: {} for key in ("text_to_image", "image_to_text", "heldout")}
    (folder / "evaluation" / "evaluation.json").write_text(json.dumps(scores))

    def run(first: str, fail: bool = False) -> int:
        append = "import os, sys; open('runs/demo/{0}', 'a').write('x'); "
        todo = [
            _stage("one", "runs/demo/one", append.format("one") + f"'{first}'"),
            _stage("two", "runs/demo/two", append.format("two") + f"sys.exit(os.path.exists('{tmp_path}/fail'))"),
            _stage("three", "runs/demo/three", append.format("three")),
        ]
        monkeypatch.setattr(demo, "stages", lambda _: todo)
        (tmp_path / "fail").write_text("") if fail else (tmp_path / "fail").unlink(missing_ok=True)
        return demo.main([f"root={tmp_path}"])

    def made() -> list[int]:
        return [_count(folder, name) for name in ("one", "two", "three")]

    assert run("a") == 0 and made() == [1, 1, 1]
    assert run("a") == 0 and made() == [1, 1, 1], "reused"
    assert run("b", fail=True) == 1 and made() == [1, 1, 1], "one and two anew, three not reached"
    (folder / "three").write_text("old")
    assert run("b", fail=True) == 1 and made() == [1, 2, 3], "two goes on from what it has"
    assert run("b") == 0 and made() == [1, 3, 1], "three is of the old one, and made anew"
    summary = json.loads((folder / "demo.json").read_text())
    assert summary["seconds"].keys() == {"one", "two", "three", "total"}


def test_ctrl_c_lets_the_running_stage_end_in_its_own_time(tmp_path: Path) -> None:
    """P6: the terminal sends SIGINT to both; the stage takes a second to save, and its status is the demo's."""
    stage = """
import pathlib, sys, time
try:
    pathlib.Path("started").touch()
    time.sleep(60)
except KeyboardInterrupt:
    time.sleep(1)
    pathlib.Path("saved").touch()
    sys.exit(130)
"""
    program = "import sys; from pathlib import Path; from train.demo import _run; sys.exit(_run(sys.argv[1:], Path()))"
    command = [sys.executable, "-c", program, sys.executable, "-c", stage]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    started = subprocess.Popen(command, cwd=tmp_path, env=environment, start_new_session=True)
    while not (tmp_path / "started").exists():
        time.sleep(0.01)
        assert started.poll() is None
    os.killpg(started.pid, signal.SIGINT)
    assert started.wait(30) == 130 and (tmp_path / "saved").exists()


def test_the_smoke_has_the_same_stages_with_shorter_settings() -> None:
    for long, short in zip(stages(DemoConfig()), stages(DemoConfig(smoke=True)), strict=True):
        assert (long.name, long.output) == (short.name, short.output)
        assert short.command[: len(long.command)] == long.command
    assert demo._executable(("torchrun", "-m", "train.x", "config=c.yaml", "a=1")) == [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "-m",
        "train.x",
        f"config={ROOT}/c.yaml",
        "a=1",
    ]
