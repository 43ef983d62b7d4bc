"""The program with choices, captions, a benchmark and the paper's row: one evaluation.json, alike on any ranks."""

import json
from pathlib import Path

import pytest

from bench.ranks import ProgramRanks
from tests.runs import DrawingRun, expect
from tests.test_benchmarks import LAYOUTS, files_of, write_prompts
from tests.test_captioning import coco  # noqa: F401
from tests.test_multiple_choice import write_questions
from train import evaluate, report


@pytest.mark.slow
def test_one_evaluation_does_all_tasks_alike_on_one_and_two_ranks(
    drawn: DrawingRun,
    coco: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    questions, prompts = write_questions(tmp_path / "made.jsonl"), write_prompts(tmp_path / "prompts", "geneval")
    found, captions = [], []
    for world_size in (1, 2):
        output = tmp_path / f"output{world_size}"
        argv = [f"checkpoint={drawn.run_dir}", f"output={output}", "device=cpu", "steps=1", "max_new_tokens=4"]
        argv += [f"choices.made={questions}", "benchmark=geneval", f"benchmark_prompts={prompts[0]}", "table=true"]
        argv += [f"captioning.pictures={coco}", f"captioning.annotations={coco / 'dataset_coco.json'}"]
        with ProgramRanks(evaluate.main, argv, world_size, tmp_path / f"log{world_size}") as run:
            said = expect(run, 0)
        assert "paper, 0.16B, linear" in said and "differs: steps=1, the paper 250" in said
        assert files_of(output / "geneval") == LAYOUTS["geneval"]
        found.append(json.loads((output / "evaluation.json").read_text()))
        captions.append((output / "captions.json").read_text())
        lines = [json.loads(line) for line in (output / "examples.jsonl").read_text().splitlines()]
        assert all((output / line.get("drawn", line.get("true"))).is_file() for line in lines)
        assert sum("score" in line for line in lines) == found[-1]["data"]["captioning"]["items"] == 6
    page = tmp_path / "report.html"
    report.main([f"run={drawn.run_dir}", f"evaluation=[{tmp_path / 'output1'}]", f"vae={drawn.vae}", f"output={page}"])
    assert "cider, of 6 examples" in page.read_text() and "a large red circle beside 0 squares." in page.read_text()
    one, two = found
    assert captions[0] == captions[1] and one["scores"] == two["scores"]
    names = {f"choices/made/{kind}" for kind in ("accuracy", "accuracy_per_character", "accuracy_per_token")}
    assert set(one["scores"]) == {*names, "captioning/cider"}
    assert one["data"]["benchmark"]["files"] == 12 and one["data"]["choices"]["made"]["items"] == 10


def test_a_benchmark_needs_its_prompts_and_prompts_a_benchmark() -> None:
    for argv in (["benchmark=dpg"], ["benchmark_prompts=[x]"]):
        with pytest.raises(ValueError, match="expected both, or neither"):
            evaluate.main(argv)
