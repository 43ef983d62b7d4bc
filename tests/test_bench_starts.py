"""bench.starts and bench.untied: commands are accepted by their programs, a toy of each runs through."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import untied
from bench.comparison_page import BELOW, difference
from bench.starts import CASES, LANGUAGE, StartsConfig, main, run_of
from tests.test_objectives import accepted

RATIOS = {"ffn": 1.25, "all": 2.0}


def test_every_case_is_commands_that_their_programs_accept(tmp_path: Path) -> None:
    """Of all cases: at equal steps or seconds, and no two of them train alike."""
    config, recipes = StartsConfig(folder=str(tmp_path), steps=100), []
    (export,) = run_of(config, RATIOS, LANGUAGE, 0).then
    for name in CASES:
        run = run_of(config, RATIOS, name, 0)
        train, score = accepted(run.training), accepted(run.scoring(name))
        assert (score.scenes is None) == (name == LANGUAGE)
        recipes.append((train.model, train.optim, train.init_from_llm, str(train.data)))
        if name.startswith("llm-"):
            assert train.init_from_llm == accepted(export).output
        assert train.optim.steps == {"ffn-seconds": 80, "all-seconds": 50}.get(name, 100)
        assert train.optim.steps == config.steps_of(name, RATIOS)
    assert all(recipe not in recipes[:i] for i, recipe in enumerate(recipes))


def test_a_difference_is_paired_by_seed_with_students_interval() -> None:
    case, other = {"seeds": [0, 2, 3], "x": [3.0, 5.0, 9.0]}, {"seeds": [0, 1, 2], "x": [1.0, 7.0, 5.0]}
    assert difference(case, other, "x") == "+1.0000 [-11.7100, +13.7100]"  # of 2 and 0: t = 12.71, s = sqrt(2)
    assert difference({"seeds": [1], "x": [8.0]}, other, "x") == "+1.0000"
    assert difference({"seeds": [4], "x": [8.0]}, other, "x") == "–"


def test_a_toy_of_untied_prints_what_its_parameters_are(capsys: pytest.CaptureFixture, monkeypatch: Any) -> None:
    """Images' own weights are more parameters, and none more of a token."""
    toy = "untied --widths 32 --layers 1 --head-width 16 --rows 1 --length 64 --rounds 1 --threads 1"
    monkeypatch.setattr(sys, "argv", toy.split())
    assert untied.main() == 0
    (found,) = json.loads(capsys.readouterr().out.splitlines()[-1])["widths"].values()
    counts = [found[kind]["parameters"] for kind in ("none", "ffn", "all")]
    assert counts[0]["all"] < counts[1]["all"] < counts[2]["all"] == counts[0]["all"] + counts[0]["trunk_of_a_token"]
    assert len({count["trunk_of_a_token"] for count in counts}) == 1 and found["none"]["step_over_none"] == 1
    assert 0.3 < found["image_share"] < 0.7


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_toy_bench_runs_through_and_does_not_repeat_itself(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    toy = [f"folder={tmp_path}", "smoke=true", "steps=4", "prompts=2", "seeds=1", f"page={tmp_path}/page.md"]
    assert main(toy) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(record["cases"]) == list(CASES) and not record["errors"]
    before, cases = record["cases"][LANGUAGE]["text_loss"], record["cases"]
    assert cases["llm-frozen-all"]["text_loss"] == pytest.approx(before, abs=1e-5)  # its text side is what it was
    assert cases["llm-free"]["text_loss"] != before and not cases[LANGUAGE]["judge"]
    assert cases["llm-lora"]["parameters"]["trained"] < cases["none"]["parameters"]["trained"] / 2
    page = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert "| llm-frozen-all |" in page and page.rstrip().endswith(BELOW)
    assert main(toy) == 0 and json.loads(capsys.readouterr().out.splitlines()[-1]) == record
