"""Answers to questions about pictures, for the scorers of visual question answering that read LLaVA's answer files.

Questions are JSON lines {"question_id", "image", "text"}, and "system" if the conversation begins with one. They are
asked in the chat form of the tokenizer's model (data/chat.py); answers are written as LLaVA's model_vqa.py does.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.durable import write_durably
from data.pictures import decode_picture
from data.storage import Location
from data.strict_json import dumps
from model.sampler_config import SamplerConfig
from train.evaluation.generation import batches_of
from train.evaluation.part import Inputs, Part, fingerprint_of
from train.evaluation.texts import OTHER_FORM, read_lines, text_of
from train.inference.pipeline import Pipeline
from train.inference.prompts import SOME_PICTURE, Question, require_question

QUESTION = "{question}"


@dataclass(frozen=True, kw_only=True)
class AnswersConfig:
    # Questions about pictures, JSON lines {"question_id", "image", "text"}, to answer in answers.jsonl; null: none.
    questions: Location | None = None
    pictures: Location = "."  # folder in which the names of `image` lie
    template: str = QUESTION  # what the user says after the picture; {question} stands for the question's text

    def __post_init__(self) -> None:
        if QUESTION not in self.template:
            raise ValueError(f"answers.template={self.template!r}: expected a text with {QUESTION} in it")


def read_llava_questions(config: AnswersConfig) -> list[dict[str, Any]]:
    """Read the lines; raise ValueError for one of another form, FileNotFoundError for a picture that is missing."""
    assert config.questions is not None
    path, rows = Path(config.questions), []
    for number, line in read_lines(path):
        try:
            row = json.loads(line)
            image = text_of(row.get("image") or "")
            system = {"system": text_of(row["system"])} if row.get("system") else {}
            require_question("text", row["text"], system.get("system"))
            rows.append({"question_id": row["question_id"], "text": text_of(row["text"]), "image": image, **system})
        except OTHER_FORM as error:
            raise ValueError(
                f"answers.questions={path}:{number}: {type(error).__name__}: {error}; expected question_id, image, text"
            ) from None
    missing = [row["image"] for row in rows if row["image"] and not (Path(config.pictures) / row["image"]).is_file()]
    if missing:
        raise FileNotFoundError(f"answers.pictures={config.pictures}: {len(missing)} are not there, as {missing[0]}")
    if not rows:
        raise ValueError(f"answers.questions={path}: no questions; expected a JSON object a line")
    return rows


def require_room(rows: list[dict[str, Any]], config: AnswersConfig, pipeline: Pipeline, sampler: SamplerConfig) -> None:
    """Raise ValueError for questions that do not fit into a sequence."""
    asked = (
        (f"question {row['question_id']}", pipeline.ask([SOME_PICTURE] * bool(row["image"]), *_words(config, row)))
        for row in rows
    )
    pipeline.room(sampler).require("answers.questions", asked, draw=False)


def write_answers(config: AnswersConfig, rows: list[dict[str, Any]], inputs: Inputs) -> Part:
    """Answer each question after its picture, if it has one, and write answers.jsonl; give no scores. Collective."""
    pipeline, ranks = inputs.pipeline, inputs.ranks
    fingerprint = fingerprint_of("answers.questions", rows, ranks)
    batches = batches_of(len(rows), pipeline.batch_size)[ranks.rank :: ranks.world_size]
    mine: list[tuple[int, str]] = []
    with inputs.bar("answers", sum(map(len, batches))) as progress:
        for batch in batches:
            questions = [_question(pipeline, config, rows[number]) for number in batch]
            answers = pipeline.answer(questions, inputs.sampler, inputs.seed, progress.update, batch)
            mine += zip(batch, answers, strict=True)
    found, saved = dict(pair for part in ranks.gather(mine) for pair in part), pipeline.saved
    model_id = pipeline.weights if saved is None else f"{saved.folder.name}-{pipeline.weights}"
    lines = []
    for number, row in enumerate(rows):
        answer = {"question_id": row["question_id"], "prompt": row["text"], "text": found[number]}
        lines.append({**answer, "answer_id": f"{fingerprint}-{number}", "model_id": model_id, "metadata": {}})
    if ranks.is_first:
        write_durably(inputs.output / "answers.jsonl", "".join(dumps(line) + "\n" for line in lines).encode())
    return Part({}, [], {"questions": config.questions, "fingerprint": fingerprint, "items": len(rows)})


def _question(pipeline: Pipeline, config: AnswersConfig, row: dict[str, Any]) -> Question:
    pictures = []
    if row["image"]:
        path, side = Path(config.pictures) / row["image"], pipeline.latent_spec.resolution
        pictures = [decode_picture(path.read_bytes(), [(side, side)], str(path))]
    return (pictures, *_words(config, row))


def _words(config: AnswersConfig, row: dict[str, Any]) -> tuple[str, str | None]:
    """Return the question and what the system says first."""
    return config.template.replace(QUESTION, row["text"]), row.get("system")
