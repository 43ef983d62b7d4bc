"""Answers to questions about pictures are those of the model, in the lines that LLaVA's scorers read."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.pictures import encode_png
from model.sampler_config import SamplerConfig, text_alone
from tests.ranks import run_ranks
from tests.runs import DrawingRun
from tests.test_pipeline import load
from train.distributed.ranks import Ranks, alone
from train.evaluation.answers import AnswersConfig, read_llava_questions, write_answers
from train.evaluation.part import Inputs, bar_of
from train.inference.pipeline import Pipeline, PipelineConfig

SAMPLER = SamplerConfig(max_new_tokens=5)
ROWS = [{"question_id": 10 + i, "image": f"{i}.png", "text": f"a red circle {i}", "category": "x"} for i in range(5)]
ROWS += [{"question_id": "text", "text": "3 small", "system": "large blue"}]


@pytest.fixture
def asked(tmp_path: Path) -> AnswersConfig:
    random = np.random.default_rng(0)
    for i in range(5):
        (tmp_path / f"{i}.png").write_bytes(encode_png(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)))
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    questions = str(tmp_path / "questions.jsonl")
    return AnswersConfig(questions=questions, pictures=str(tmp_path), template="{question} beside")


def answer(ranks: Ranks, run_dir: Path, config: AnswersConfig, output: Path) -> None:
    pipeline = Pipeline.load(PipelineConfig(checkpoint=str(run_dir), device="cpu", batch_size=2), ranks)
    output.mkdir(exist_ok=True)
    write_answers(config, read_llava_questions(config), Inputs(pipeline, SAMPLER, 3, output, ranks, bar_of(ranks), {}))


def test_answers_follow_picture_and_question_in_llavas_form(
    asked: AnswersConfig, drawn: DrawingRun, tmp_path: Path
) -> None:
    answer(alone(), drawn.run_dir, asked, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    pipeline, pictures = load(drawn.run_dir), [tmp_path / f"{i}.png" for i in range(5)]
    # The plain form: a line break after each message; texts that meet are one.
    prompts = [[np.asarray(Image.open(path)), f"a red circle {i} beside\n"] for i, path in enumerate(pictures)]
    expected = pipeline.complete([*prompts, ["large blue\n3 small beside\n"]], text_alone(SAMPLER), 3)
    assert [line["text"] for line in lines] == ["".join(parts).strip() for parts in expected]
    assert [(line["question_id"], line["prompt"]) for line in lines] == [(r["question_id"], r["text"]) for r in ROWS]
    keys = {"question_id", "prompt", "text", "answer_id", "model_id", "metadata"}
    assert all(line.keys() == keys for line in lines) and len({line["answer_id"] for line in lines}) == len(ROWS)


def test_what_cannot_be_asked_is_refused_by_line_or_name(asked: AnswersConfig, tmp_path: Path) -> None:
    (tmp_path / "3.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 are not there, as 3\.png"):
        read_llava_questions(asked)
    for content, words in (('{"text": "a"}', "1: KeyError: 'question_id'"), ("[]", ":1:"), ("", "no questions")):
        (tmp_path / "questions.jsonl").write_text(content)
        with pytest.raises(ValueError, match=words):
            read_llava_questions(asked)
    with pytest.raises(ValueError, match="template='x': expected a text with"):
        AnswersConfig(template="x")


@pytest.mark.slow
def test_any_number_of_ranks_gives_the_same_answers(asked: AnswersConfig, drawn: DrawingRun, tmp_path: Path) -> None:
    for world_size in (1, 3):
        run_ranks(answer, world_size, drawn.run_dir, asked, tmp_path / str(world_size))
    one, three = ((tmp_path / name / "answers.jsonl").read_text() for name in ("1", "3"))
    assert one == three
