"""Scores of a trained model's answers to questions about scenes: right is what is said in the same words."""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data.durable import write_durably
from data.scene_questions import normalised
from train.evaluation.part import Inputs, Part, in_order
from train.evaluation.scene_rows import Row, read_items, read_picture
from train.evaluation.scores import Score, share

IMAGE = "<image>"  # stands for the picture in a conversation


@dataclass(frozen=True)
class QuestionItem:
    """A question about a picture, and its answer."""

    kind: str
    picture: Path
    question: str
    answer: str

    @property
    def pictures(self) -> tuple[Path, ...]:
        return (self.picture,)


def read_questions(folder: str, per_kind: int) -> list[QuestionItem]:
    """Read at most `per_kind` questions of each kind; see `read_items` for what is raised."""
    return read_items("questions", folder, per_kind, _items_of)


def _items_of(row: Row, folder: Path) -> Iterator[QuestionItem]:
    """Yield the questions of a row; each is asked alone."""
    turns = [turn["value"].replace(IMAGE, "").strip() for turn in row["conversations"]]
    for kind, question, answer in zip(row["kinds"], turns[::2], turns[1::2], strict=True):
        yield QuestionItem(kind, folder / row["image"], question, answer)


def evaluate_questions(folder: str, per_kind: int, inputs: Inputs) -> Part:
    """Answer at most `per_kind` questions of each kind. Scores are the shares of right answers, `questions/all` and
    `questions/KIND`. Collective.
    """
    ranks, pipeline = inputs.ranks, inputs.pipeline
    items = read_questions(folder, per_kind)
    asked = repr([(item.kind, item.question, item.answer) for item in items])
    ranks.require_alike({"questions (contents)": str(zlib.crc32(asked.encode()))})
    numbers = range(ranks.rank, len(items), ranks.world_size)
    mine, side = [items[number] for number in numbers], pipeline.latent_spec.resolution
    with inputs.bar("questions", len(mine)) as progress:
        prompts = [([read_picture(item.picture, side)], item.question) for item in mine]
        answers = in_order(ranks, pipeline.answer(prompts, inputs.sampler, inputs.seed, progress.update, numbers))
    right: dict[str, list[bool]] = {"all": []}
    for item, answer in zip(items, answers, strict=True):
        for goal in ("all", item.kind):
            right.setdefault(goal, []).append(normalised(answer) == normalised(item.answer))
    scores: dict[str, Score] = {f"questions/{goal}": share(sum(f), len(f)) for goal, f in right.items()}
    data = {"path": folder, "fingerprint": f"{zlib.crc32(asked.encode()):08x}", "items": len(items)}
    return Part(scores, _examples(inputs.output, items, answers) if ranks.is_first else [], data)


def _examples(output: Path, items: list[QuestionItem], answers: list[str]) -> list[Row]:
    """Copy the pictures; return lines of examples.jsonl."""
    folder = output / "pictures"
    folder.mkdir(exist_ok=True)
    lines = []
    for i, (item, answer) in enumerate(zip(items, answers, strict=True)):
        name = f"pictures/question-{i:04d}-true.png"
        write_durably(output / name, item.picture.read_bytes())
        verdict = {"right": normalised(answer) == normalised(item.answer)}
        line = {"split": f"questions: {item.kind}", "prompt": f"{item.question} {item.answer}", "true": name}
        lines.append({**line, "caption": answer, "caption_verdict": verdict})
    return lines
