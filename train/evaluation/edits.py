"""Scores of a trained model on edits of scenes: it carries them out, and the judge says what came of them."""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.durable import write_durably
from data.pictures import encode_png
from data.scene_edit_judge import EditVerdict, judge_edit
from data.scene_edits import Edit
from data.scenes import Shape
from train.evaluation.part import Inputs, Part, in_order
from train.evaluation.scene_rows import Row, read_items, read_picture
from train.evaluation.scores import Score, share

TRIO = ("before", "drawn", "true")  # pictures of an example


@dataclass(frozen=True)
class EditItem:
    """One edit: what is asked for, and the pictures before and after it."""

    edit: Edit
    instruction: str
    before: Path
    after: Path

    @property
    def kind(self) -> str:
        return self.edit.kind

    @property
    def pictures(self) -> tuple[Path, ...]:
        return self.before, self.after


def read_edits(folder: str, per_kind: int) -> list[EditItem]:
    """Read at most `per_kind` edits of each kind; see `read_items` for what is raised."""
    return read_items("edits", folder, per_kind, _items_of)


def _items_of(row: Row, folder: Path) -> Iterator[EditItem]:
    before, after = (tuple(Shape(**shape) for shape in row[when]) for when in ("before", "after"))
    (given,) = row["input_images"]
    yield EditItem(Edit(row["kind"], before, after), row["instruction"], folder / given, folder / row["output_image"])


def evaluate_edits(folder: str, per_kind: int, inputs: Inputs) -> Part:
    """Carry out at most `per_kind` edits of each kind and judge them; write their pictures on rank 0. Collective.

    Scores are `edits/all` and `edits/KIND`, shares with every attribute of every shape right, and `edits/unchanged`,
    the share that leaves alone what the edit does not concern (data/scene_edit_judge.py).
    """
    ranks, pipeline = inputs.ranks, inputs.pipeline
    items = read_edits(folder, per_kind)
    asked = repr([(item.edit, item.instruction) for item in items])
    ranks.require_alike({"edits (contents)": str(zlib.crc32(asked.encode()))})
    numbers = range(ranks.rank, len(items), ranks.world_size)
    mine, side = [items[number] for number in numbers], pipeline.latent_spec.resolution
    before = [read_picture(item.before, side) for item in mine]
    after = [read_picture(item.after, side) for item in mine]
    with inputs.bar("edits", len(mine)) as progress:
        instructed = [([picture], item.instruction) for picture, item in zip(before, mine, strict=True)]
        drawn = pipeline.edit(instructed, inputs.sampler, inputs.seed, progress.update, numbers)
    perfect = pipeline.reconstruct(after, inputs.seed, numbers)
    judged = [judge_edit(new, best, item.edit) for new, best, item in zip(drawn, perfect, mine, strict=True)]
    results = in_order(ranks, list(zip(judged, before, drawn, after, strict=True)))
    examples = _examples(inputs.output, items, results) if ranks.is_first else []
    data = {"path": folder, "fingerprint": f"{zlib.crc32(asked.encode()):08x}", "items": len(items)}
    return Part(shares(items, [result[0] for result in results]), examples, data)


def shares(items: list[EditItem], verdicts: list[EditVerdict]) -> dict[str, Score]:
    """Return the shares of right edits, of those that leave the rest alone, and of right ones by kind."""
    right: dict[str, list[bool]] = {"all": [], "unchanged": []}
    for item, verdict in zip(items, verdicts, strict=True):
        right["all"].append(verdict.right)
        right["unchanged"].append(verdict.unchanged)
        right.setdefault(item.kind, []).append(verdict.right)
    return {f"edits/{goal}": share(sum(found), len(found)) for goal, found in right.items()}


def _examples(output: Path, items: list[EditItem], results: list[tuple[EditVerdict, Any, Any, Any]]) -> list[Row]:
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
