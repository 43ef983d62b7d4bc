"""Scores of a trained model on edits of scenes: it carries them out, and the judge says what came of them."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.durable import write_durably
from data.pictures import decode_picture, encode_png
from data.raw_document import RawDocument
from data.scene_edit_judge import EditVerdict, judge_edit
from data.scene_edits import Edit
from data.scenes import Shape
from train.evaluation.part import Inputs, Part, dealt, fingerprint_of, in_order
from train.evaluation.scene_rows import read_items, shares
from train.evaluation.scores import share
from train.inference.prompts import SOME_PICTURE, Room

TRIO = ("before", "drawn", "true")  # pictures of an example


@dataclass(frozen=True)
class EditItem:
    """One edit: what is asked for, and the pictures before and after it."""

    edit: Edit
    instruction: str
    before: bytes  # of the picture's file
    after: bytes
    where: str = field(repr=False)  # its row

    @property
    def kind(self) -> str:
        return self.edit.kind


def read_edits(folder: str, per_kind: int) -> list[EditItem]:
    """Read at most `per_kind` edits of each kind; see `read_items` for what is raised."""
    return read_items("edits", folder, per_kind, _items_of)


def _items_of(row: RawDocument) -> Iterator[EditItem]:
    scenes = (tuple(Shape(**shape) for shape in row.info[when]) for when in ("before", "after"))
    (instruction,), (before, after) = row.texts, row.pictures
    yield EditItem(Edit(row.info["kind"], *scenes), instruction, before, after, row.where)


def require_room(items: list[EditItem], room: Room) -> None:
    """Raise ValueError for edits that do not fit into a sequence."""
    room.require("edits", ((item.where, [SOME_PICTURE, item.instruction]) for item in items), draw=True)


def evaluate_edits(folder: str, items: list[EditItem], inputs: Inputs) -> Part:
    """Carry out edits and judge them; write their pictures on rank 0. Collective.

    Scores are `edits/all` and `edits/KIND`, shares with every attribute of every shape right, and `edits/unchanged`,
    the share that leaves alone what the edit does not concern (data/scene_edit_judge.py).
    """
    ranks, pipeline = inputs.ranks, inputs.pipeline
    data = {"path": folder, "fingerprint": fingerprint_of("edits", items, ranks), "items": len(items)}
    (numbers, mine), side = dealt(ranks, items), pipeline.latent_spec.resolution
    before, after = (
        [decode_picture(getattr(item, when), [(side, side)], item.where) for item in mine]
        for when in ("before", "after")
    )
    with inputs.bar("edits", len(mine)) as progress:
        instructed = [([picture], item.instruction) for picture, item in zip(before, mine, strict=True)]
        drawn = pipeline.edit(instructed, inputs.sampler, inputs.seed, progress.update, numbers)
    perfect = pipeline.reconstruct(after, inputs.seed, numbers)
    judged = [judge_edit(new, best, item.edit) for new, best, item in zip(drawn, perfect, mine, strict=True)]
    results = in_order(ranks, list(zip(judged, before, drawn, after, strict=True)))
    examples = _examples(inputs.output, items, results) if ranks.is_first else []
    verdicts = [result[0] for result in results]
    scores = shares("edits", items, [verdict.right for verdict in verdicts])
    scores["edits/unchanged"] = share(sum(verdict.unchanged for verdict in verdicts), len(verdicts))
    return Part(scores, examples, data)


def _examples(
    output: Path, items: list[EditItem], results: list[tuple[EditVerdict, Any, Any, Any]]
) -> list[dict[str, Any]]:
    """Write each edit's pictures; return lines of examples.jsonl."""
    folder = output / "pictures"
    folder.mkdir(exist_ok=True)
    lines = []
    for i, (item, (verdict, *pictures)) in enumerate(zip(items, results, strict=True)):
        names = {name: f"pictures/edit-{i:04d}-{name}.png" for name in TRIO}
        for name, picture in zip(names.values(), pictures, strict=True):
            write_durably(output / name, encode_png(picture))
        judged = {"right": verdict.right, "unchanged": verdict.unchanged}
        line = {"split": f"edits: {item.kind}", "prompt": item.instruction, **names}
        lines.append({**line, "drawn_verdict": judged, "difference": verdict.difference})
    return lines
