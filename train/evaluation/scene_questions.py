"""Scores of a trained model's answers to questions about scenes: right is what is said in the same words."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.durable import write_durably
from data.pictures import decode_picture
from data.raw_document import RawDocument
from data.scene_questions import normalised
from model.sampler_config import SamplerConfig
from train.evaluation.part import Inputs, Part, dealt, fingerprint_of, in_order
from train.evaluation.scene_rows import read_items, shares
from train.inference.pipeline import Pipeline
from train.inference.prompts import SOME_PICTURE


@dataclass(frozen=True)
class QuestionItem:
    """A question about a picture, and its answer."""

    kind: str
    picture: bytes  # of its file
    question: str
    answer: str
    where: str = field(repr=False)  # its row


def read_scene_questions(folder: str, per_kind: int) -> list[QuestionItem]:
    """Read at most `per_kind` questions of each kind; see `read_items` for what is raised."""
    return read_items("questions", folder, per_kind, _items_of)


def _items_of(row: RawDocument) -> Iterator[QuestionItem]:
    """Yield the questions of a row; each is asked alone."""
    (picture,), turns = row.pictures, row.texts
    for kind, question, answer in zip(row.info["kinds"], turns[::2], turns[1::2], strict=True):
        yield QuestionItem(kind, picture, question, answer, row.where)


def require_room(items: list[QuestionItem], pipeline: Pipeline, config: SamplerConfig) -> None:
    """Raise ValueError for questions that do not fit into a sequence."""
    asked = ((item.where, pipeline.ask([SOME_PICTURE], item.question)) for item in items)
    pipeline.room(config).require("questions", asked, draw=False)


def evaluate_questions(folder: str, items: list[QuestionItem], inputs: Inputs) -> Part:
    """Answer questions. Scores are the shares of right answers, `questions/all` and
    `questions/KIND`. Collective.
    """
    ranks, pipeline = inputs.ranks, inputs.pipeline
    data = {"path": folder, "fingerprint": fingerprint_of("questions", items, ranks), "items": len(items)}
    (numbers, mine), side = dealt(ranks, items), pipeline.latent_spec.resolution
    with inputs.bar("questions", len(mine)) as progress:
        prompts = [([decode_picture(item.picture, [(side, side)], item.where)], item.question) for item in mine]
        answers = in_order(ranks, pipeline.answer(prompts, inputs.sampler, inputs.seed, progress.update, numbers))
    right = [normalised(answer) == normalised(item.answer) for item, answer in zip(items, answers, strict=True)]
    examples = _examples(inputs.output, items, answers, right) if ranks.is_first else []
    return Part(shares("questions", items, right), examples, data)


def _examples(output: Path, items: list[QuestionItem], answers: list[str], right: list[bool]) -> list[dict[str, Any]]:
    """Write the pictures; return lines of examples.jsonl."""
    folder = output / "pictures"
    folder.mkdir(exist_ok=True)
    lines = []
    for i, (item, answer, is_right) in enumerate(zip(items, answers, right, strict=True)):
        name = f"pictures/question-{i:04d}-true.png"
        write_durably(output / name, item.picture)
        line = {"split": f"questions: {item.kind}", "prompt": f"{item.question} {item.answer}", "true": name}
        lines.append({**line, "caption": answer, "caption_verdict": {"right": is_right}})
    return lines
