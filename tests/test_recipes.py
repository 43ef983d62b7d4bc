"""bench.recipes: its commands are accepted by their programs and differ, equal seconds, pages, a toy of it whole."""

import json
from pathlib import Path
from typing import Any

import pytest

from bench import recipes_page
from bench.comparison import SECONDS, Run
from bench.comparison_page import COLUMNS
from bench.recipes import (
    BEST,
    CASES,
    EMA,
    FACTORS,
    PAPER,
    WINNERS,
    WITHOUT,
    RecipesConfig,
    main,
    run_of,
    trained_as,
)
from tests.test_objectives import accepted

RATIOS = {name.removesuffix(SECONDS): 1.25 for name in CASES}


def scored_from(config: RecipesConfig, name: str) -> Run:
    return run_of(config, RATIOS, trained_as(name), 0)


def test_every_case_is_commands_that_their_programs_accept(tmp_path: Path) -> None:
    """No two of them train alike, and a case of one factor departs from the paper's recipe in that alone."""
    config, recipes = RecipesConfig(folder=str(tmp_path), steps=100), {}
    for name in CASES:
        run = scored_from(config, name)
        parsed, score = accepted(run.training), run.scoring(name)
        weights = next(argument for argument in score if argument.startswith("weights="))
        recipes[name] = (parsed.model, parsed.diffusion, parsed.loss, parsed.optim, str(parsed.data), weights)
        assert parsed.optim.steps == (80 if name.endswith(SECONDS) else 100) == config.steps_of(name, RATIOS)
        assert parsed.data.lanes * parsed.data.sequence_length == 12 * 128
        assert f"checkpoint={parsed.run_dir}" in score
    found = list(recipes.values())
    assert all(recipe not in found[:i] for i, recipe in enumerate(found))
    for name in (PAPER, "v", "flow-logit", EMA, BEST):
        accepted(scored_from(config, name).scoring(name))
    for name in FACTORS:
        changed = [part != other for part, other in zip(recipes[name], recipes[PAPER], strict=True)]
        assert sum(changed) == 1, name


def test_the_base_is_the_papers_recipe_at_another_width(tmp_path: Path) -> None:
    from tests.test_paper import preset

    base = accepted(run_of(RecipesConfig(folder=str(tmp_path)), {}, PAPER, 0).training)
    paper = preset("0.16b")
    assert base.diffusion == paper.diffusion and base.loss == paper.loss and base.data.order == paper.data.order
    for name in ("optimizer", "schedule", "weight_decay", "beta1", "beta2", "clip_norm"):
        assert getattr(base.optim, name) == getattr(paper.optim, name), name
    assert base.optim.min_learning_rate / base.optim.learning_rate == pytest.approx(1.5e-5 / 3e-4)
    assert (base.model.patches, base.model.untied) == (paper.model.patches, paper.model.untied)
    assert not (base.model.timestep_after_patches or base.model.transformer.rope_2d or base.model.transformer.qk_norm)


def test_the_winners_but_for_one_have_the_papers_choice_there(tmp_path: Path) -> None:
    assert {name.removeprefix(WITHOUT) for name in CASES if name.startswith(WITHOUT)} == set(WINNERS)
    assert all(CASES[WITHOUT + name] == tuple(w for w in WINNERS if w != name) for name in WINNERS)
    assert trained_as(EMA) == PAPER and trained_as(WITHOUT + EMA) == BEST == trained_as(BEST)


def test_a_page_compares_by_seed() -> None:
    keys = [*recipes_page.LOSSES.values(), *("/".join(share) for share in COLUMNS.values())]
    case: dict[str, Any] = {
        "seeds": [0, 1],
        "steps": 9,
        "train_cpu_s": [7.0, 9.0],
        **{key: [0.25, 0.5] for key in keys},
    }
    other = {**case, "seeds": [1, 0], "x0_error": [0.5, 0.75]}  # less 0.5 and 0.25 of the same seeds: 0 and 0.5
    record: dict[str, Any] = {"command": "x", "steps": 9, "seeds": 2, "prompts": 4, "date": "", "machine": ""}
    record |= {"versions": {}, "step_over_paper": {"unet": [1.5, 1.25, 2.0]}}
    record["cases"] = {PAPER: case, "muon": other, BEST: case, WITHOUT + "muon": other}
    text = "\n".join(recipes_page.paragraphs(record))
    assert "unet 1.50 (1.25 to 2.00)" in text and "| paper | 2 | 9 | 8 | 0.3750 |" in text
    differs = f"| +0.250 [{0.25 - 12.71 * 0.25:+.3f}, {0.25 + 12.71 * 0.25:+.3f}] |"
    assert text.count(differs) == 2 and "less `best`" in text


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_toy_bench_runs_through_and_does_not_repeat_itself(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    toy = [f"folder={tmp_path}", "smoke=true", "steps=12", "prompts=2", "seeds=1", f"page={tmp_path}/page.md"]
    toy.append("only=[paper,ema,unet-seconds,best,best-without-ema]")
    assert main(toy) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(record["cases"]) == ["paper", EMA, BEST, WITHOUT + EMA, "unet-seconds"] and not record["errors"]
    assert record["step_over_paper"].keys() == {"unet", BEST}
    cases = record["cases"]
    assert cases[EMA]["train_cpu_s"] == cases[PAPER]["train_cpu_s"] and cases[PAPER]["train_cpu_s"][0] > 1
    assert cases[EMA]["text_loss"] != cases[PAPER]["text_loss"]
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("evaluation.json")}
    assert len(written) == 5 and main(toy) == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("evaluation.json")} == written
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == record
