"""bench.objectives: its commands are accepted by their programs, a toy bench runs through."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from bench.objectives import CASES, ObjectivesConfig, main, run_of
from bench.objectives_page import paragraphs
from bench.scene_data import DATA, stages
from train.config import load_config


def accepted(command: tuple[str, ...]) -> Any:
    """Return the config that the command's program makes of its arguments."""
    at = next(i for i, argument in enumerate(command) if argument.startswith("train."))
    return load_config(importlib.import_module(command[at]).CONFIG, [*command[at + 1 :]])


def test_every_stage_and_case_is_a_command_that_its_program_accepts(tmp_path: Path) -> None:
    """Of all cases; and no two of them train alike."""
    config, trained = ObjectivesConfig(folder=str(tmp_path)), []
    for command in stages(tmp_path, DATA, ranks=2, smoke=False).values():
        assert accepted(command)
    for name in CASES:
        run = run_of(config, name, 0)
        trained.append(accepted(run.training))
        assert accepted(run.scoring(name))
    recipes = [(config.model, config.diffusion, str(config.data)) for config in trained]
    assert all(recipe not in recipes[:i] for i, recipe in enumerate(recipes))
    assert len({(config.data.lanes, config.data.sequence_length, config.optim.steps) for config in trained}) == 1


def test_a_page_has_a_table_a_space() -> None:
    goals = {goal: {"right": 3, "of": 4, "by_seed": [3]} for goal in ("all", "all_unseen", "all_two_shapes")}
    case: dict[str, Any] = {"text_to_image": goals, "image_to_text": goals, "x0_error": [0.25, 0.75]}
    case["x0_error_by_log_snr"] = {"-6..-4": [0.5, 1.5], "-4..-2": [0.125, 0.25]}
    record: dict[str, Any] = {"command": "x", "steps": 1, "seeds": 1, "prompts": 4, "date": "", "machine": ""}
    text = "\n".join(paragraphs({**record, "versions": {}, "cases": {"pixels-x0": case, "latents-v": case}}))
    assert "## Pixels" in text and "| pixels-x0 | 3 | 0.750 [0.30, 0.95] |" in text
    assert "| 0.2500, 0.7500 |" in text and "| latents-v | 1.00 | 0.1875 |" in text


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_toy_bench_runs_through_and_does_not_repeat_itself(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    toy = [f"folder={tmp_path}", "smoke=true", "steps=4", "prompts=2", "seeds=1", f"page={tmp_path}/page.md"]
    toy.append("only=[pixels-x0-v,latents-flow,captions-2000-three]")
    assert main(toy) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(record["cases"]) == ["pixels-x0-v", "latents-flow", "captions-2000-three"]
    for case in record["cases"].values():
        assert case["text_to_image"]["all"]["of"] == 2 and case["x0_error"][0] > 0
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("evaluation.json")}
    assert len(written) == 3 and main(toy) == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("evaluation.json")} == written
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == record
