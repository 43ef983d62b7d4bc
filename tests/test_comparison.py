"""What bench.objectives, bench.starts and bench.recipes share: choosing cases, finished runs, the page."""

import json
from pathlib import Path
from typing import Any

import pytest

from bench.comparison import ComparisonConfig, Run, compare
from bench.comparison_page import BELOW, rewrite
from bench.objectives import ObjectivesConfig
from bench.recipes import RecipesConfig
from bench.starts import LANGUAGE, StartsConfig


@pytest.mark.parametrize(
    ("schema", "only", "cases"),
    [
        (ObjectivesConfig, ["pixels-?0"], ["pixels-x0"]),
        (StartsConfig, ["llm-l*", "lang*"], [LANGUAGE, "llm-lora"]),
        (RecipesConfig, ["flow*"], ["flow", "flow-logit"]),
    ],
)
def test_a_case_that_does_not_exist_is_refused_with_the_list(
    schema: type[ComparisonConfig], only: list[str], cases: list[str]
) -> None:
    assert schema(only=only).cases == cases
    with pytest.raises(ValueError, match=f"only: frob fits no case; there are {schema.known[0]}, {schema.known[1]}"):
        schema(only=[*only, "frob"])


def test_what_starts_from_the_language_model_is_refused_without_it() -> None:
    with pytest.raises(ValueError, match="only: llm-lora starts from language; add language"):
        StartsConfig(only=["none", "llm-l*"])


def test_a_page_is_rewritten_down_to_what_people_wrote(tmp_path: Path) -> None:
    page, seen = tmp_path / "page.md", f"{BELOW}\n\nLatents are easier.\n"
    page.write_text(f"old tables\n{seen}", encoding="utf-8")
    rewrite(page, {"errors": {"v-0": "died"}}, ["# Title", "| new |"])
    assert page.read_text(encoding="utf-8") == f"# Title\n\n| new |\n\n- v-0 failed: died\n\n{seen}"
    page.unlink()
    rewrite(page, {"errors": {}}, ["# Title"])
    assert page.read_text(encoding="utf-8") == f"# Title\n\n{BELOW}\n"


def test_finished_runs_are_recorded_and_not_repeated(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A run is finished when all cases that are scored from it are."""
    config = RecipesConfig(folder=str(tmp_path), only=["v", "ema", "paper"], seeds=2, page=str(tmp_path / "page.md"))
    runs = [
        Run(config, "paper", 0, 9, "latents", (), {"paper": (), "ema": ()}),
        Run(config, "v", 0, 9, "latents", (), {"v": ()}),
        Run(config, "paper", 1, 9, "latents", (), {"paper": (), "ema": ()}),
    ]
    runs[1].place.with_suffix(".log").mkdir(parents=True)  # so that nothing can be started
    for run in (runs[0], runs[2]):
        for case in run.scored:
            run.output(case).mkdir(parents=True)
            (run.output(case) / "evaluation.json").write_text(json.dumps([case, run.seed]), encoding="utf-8")

    def summary(name: str, by_seed: dict[int, Any]) -> dict[str, Any]:
        return {"found": by_seed}

    assert compare(config, ["seeds=2"], [runs[:2], runs[2:]], summary, str, lambda record: ["# Page"]) == 1
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record["cases"] == {
        name: {"found": {str(seed): [name, seed] for seed in (0, 1)}} for name in ("paper", "ema")
    }
    assert record["errors"].keys() == {"v-0"} and "v-0.log" in record["errors"]["v-0"]
    assert record["command"] == "python -m bench.recipes seeds=2" and record["seeds"] == 2
    assert "- v-0 failed: " in (tmp_path / "page.md").read_text(encoding="utf-8")
