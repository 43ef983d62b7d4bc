"""The program that evaluates: what it refuses, what it writes, and that it works on models of text alone."""

import json
import math
from pathlib import Path

import pytest

from bench.ranks import ProgramRanks
from data.tokenizer import Tokenizer
from tests.runs import expect, finish, settings
from tests.sources import make_source, texts
from train import evaluate, sample
from train.checkpoints.folder_lock import FolderLock


def test_an_evaluation_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"nothing to score: give .*heldout.NAME=FOLDER"):
        evaluate.main(["checkpoint=runs/any"])


def test_a_model_trained_on_text_alone_has_text_losses_and_answers_but_is_refused_scenes_and_pictures(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    data = make_source(tmp_path / "data", tokenizer, texts(40))
    held = make_source(tmp_path / "held", tokenizer, texts(10, seed=9))
    finish(settings(tmp_path / "run", tokenizer, {"texts": data}, optim__steps=2), None)
    argv = [f"checkpoint={tmp_path / 'run'}", f"output={tmp_path / 'out'}", f"heldout.texts={held}", "device=cpu"]
    with ProgramRanks(evaluate.main, argv, None, tmp_path / "log") as run:
        said = expect(run, 0)
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    loss, perplexity = (found["scores"][f"heldout/texts/{kind}"] for kind in ("text_loss", "perplexity"))
    shown = f"{loss['value']:.4g}  [{loss['low']:.4g}, {loss['high']:.4g}]  of 10"
    assert any(line.split(maxsplit=1) == ["heldout/texts/text_loss", shown] for line in said.splitlines()), said
    assert loss["value"] == found["heldout"]["texts"]["text_loss"] and loss["items"] == 10
    assert perplexity["value"] == pytest.approx(math.exp(loss["value"]))
    assert found["resolution"] is None and set(found["scores"]) == {
        "heldout/texts/text_loss",
        "heldout/texts/perplexity",
    }
    with ProgramRanks(evaluate.main, [*argv, f"scenes={tmp_path}"], None, tmp_path / "refused") as run:
        assert "was trained on text alone" in expect(run, 2)
    sampling = [argv[0], f"output={tmp_path / 'samples'}", "device=cpu", "max_new_tokens=4"]
    with ProgramRanks(sample.main, [*sampling, "ask=a red circle"], None, tmp_path / "asked") as run:
        expect(run, 0)
    with ProgramRanks(sample.main, [*sampling, "prompt=a red circle"], None, tmp_path / "drawn") as run:
        assert "was trained on text alone" in expect(run, 2)
    lock = FolderLock(tmp_path / "out", evaluate.LOCK)  # of another evaluation, which goes on
    with ProgramRanks(evaluate.main, argv, None, tmp_path / "second") as run:
        assert f"folder {tmp_path / 'out'} is in use by pid" in expect(run, 2)
    lock.close()


def test_files_that_cannot_be_read_are_refused_before_a_model_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "bad").write_text("{")
    bad = tmp_path / "bad"
    for arguments in (
        [f"choices.x={bad}"],
        ["benchmark=mjhq30k", f"benchmark_prompts=[{bad}]"],
        [f"answers.questions={bad}"],
        [f"captioning.pictures={tmp_path}", f"captioning.annotations={bad}"],
        [f"generation.pictures={tmp_path}", f"generation.annotations={bad}", "generation.clip=x"],
    ):
        with pytest.raises(ValueError, match=str(bad)):
            evaluate.main(["checkpoint=runs/none", *arguments])


def test_a_set_of_questions_whose_name_is_no_file_name_is_refused_before_any_work() -> None:
    with pytest.raises(ValueError, match=r"choices\.a/b: expected a short name"):
        evaluate.main(["choices={a/b: x.jsonl}"])
