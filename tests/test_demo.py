"""The demo's stages are commands that their programs accept; finished ones are skipped, interrupted ones resumed."""

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
from train.config import load_config, to_yaml
from train.demo import STAGES, DemoConfig, Stage
from train.pretrain_config import PretrainConfig

ROOT = Path(__file__).parent.parent
BAND = ROOT / "bench" / "results" / "bands" / "demo.json"


@pytest.mark.parametrize("smoke", [False, True])
def test_every_stage_is_a_command_that_its_program_accepts(monkeypatch: pytest.MonkeyPatch, smoke: bool) -> None:
    """Config files and keys exist and have the right types, at full and at toy length."""
    monkeypatch.chdir(ROOT)
    for stage in STAGES:
        command = stage.command(DemoConfig(smoke=smoke))
        program, *arguments = command[command.index("-m") + 1 :]
        assert load_config(importlib.import_module(program).CONFIG, arguments)
        assert Path(arguments[0].removeprefix("config=")) == stage.config_file.relative_to(ROOT)


def pretrain(folder: Path, **factors: float) -> None:
    """Write what a real run of the demo logged, its metrics multiplied by `factors`."""
    run = next(iter(json.loads(BAND.read_text(encoding="utf-8"))["runs"].values()))
    values = {name: [value * factors.get(name, 1) for value in of_run] for name, of_run in run.items()}
    rows = [dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = load_config(PretrainConfig, [f"config={ROOT}/configs/demo/pretrain.yaml"])
    (folder / "config.yaml").write_text(to_yaml(config))


def test_the_time_left_follows_the_pace_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that took 80 s for a quarter of the work needs four minutes for the rest."""
    monkeypatch.setattr(demo, "STAGES", [Stage("one", 4.0), Stage("two", 6.0), Stage("three", 30.0)])
    assert "about 4 min to" in demo._time_left({"one": 20.0, "two": 60.0}, smoke=False)
    assert demo._time_left({}, smoke=False) == "", "there is no pace yet"


def test_finished_stages_are_skipped_and_those_after_a_changed_one_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Also if the demo was interrupted in between. At the end it says whether its losses are as they should be."""
    folder = tmp_path / "runs" / "demo"
    pretrain(folder / "pretrain")
    (folder / "evaluation").mkdir(parents=True)
    scores = {key: {} for key in ("scores", "heldout")}
    (folder / "evaluation" / "evaluation.json").write_text(json.dumps(scores))
    (tmp_path / "configs" / "demo").mkdir(parents=True)
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "__init__.py").touch()
    for name in ("one", "two", "three"):
        (tmp_path / "train" / f"{name}.py").write_text(
            "import os, sys\nfrom pathlib import Path\n"
            f"open('runs/demo/{name}', 'a').write('x')\nsys.exit(os.path.exists('fail') and '{name}' == 'two')"
        )
        (tmp_path / "configs" / "demo" / f"{name}.yaml").write_text("a: 1")
    monkeypatch.setattr(demo, "HERE", tmp_path)
    monkeypatch.setattr(demo, "STAGES", [Stage("one", 1.0), Stage("two", 1.0), Stage("three", 1.0)])

    def runs(status: int) -> list[int]:
        assert demo.main([f"root={tmp_path}"]) == status
        return [len((folder / name).read_text()) for name in ("one", "two", "three")]

    assert runs(0) == [1, 1, 1]
    assert "losses: within the band of demo" in capsys.readouterr().out.splitlines()[-1]
    pretrain(folder / "pretrain", image_loss=1.5)
    assert runs(0) == [1, 1, 1], "all are finished"
    last = capsys.readouterr().out.splitlines()[-1]
    assert "outside the band" in last and "image loss is above" in last and "text loss" not in last
    assert demo.main([f"root={tmp_path}", "smoke=true"]) == 0
    assert "report" in (printed := capsys.readouterr().out) and "band" not in printed
    (tmp_path / "configs" / "demo" / "one.yaml").write_text("a: 2")
    (tmp_path / "fail").touch()
    assert runs(1) == [2, 2, 1], "one has changed, two fails"
    assert runs(1) == [2, 3, 1], "one is finished"
    (tmp_path / "fail").unlink()
    assert runs(0) == [2, 4, 2], "three was run before one changed"
    summary = json.loads((folder / "demo.json").read_text())
    assert summary["seconds"].keys() == {"one", "two", "three", "total"}


def test_ctrl_c_lets_the_running_stage_end_in_its_own_time(tmp_path: Path) -> None:
    """P6: the terminal sends SIGINT to both; the stage takes a while to save, and its status is the demo's."""
    stage = """
import pathlib, sys, time
try:
    pathlib.Path("started").touch()
    time.sleep(60)
except KeyboardInterrupt:
    time.sleep(0.3)
    pathlib.Path("saved").touch()
    sys.exit(130)
"""
    program = "import sys; from pathlib import Path; from train.demo import _run; sys.exit(_run(sys.argv[1:], Path()))"
    command = [sys.executable, "-c", program, "python", "-c", stage]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    started = subprocess.Popen(command, cwd=tmp_path, env=environment, start_new_session=True)
    while not (tmp_path / "started").exists():
        time.sleep(0.01)
        assert started.poll() is None
    os.killpg(started.pid, signal.SIGINT)
    assert started.wait(30) == 130 and (tmp_path / "saved").exists()
