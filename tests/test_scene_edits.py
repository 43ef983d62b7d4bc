"""Edits of scenes are deterministic, say what they mean, change nothing else, and the judge of them is strict."""

from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pytest

from data.scene_edit_judge import MAX_DIFFERENCE, judge_edit
from data.scene_edits import KINDS, VALUES, Edit, EditExample, edit_example, instructions
from data.scenes import Jitter, Shape, draw, draw_ground, make_splits, may_stand_together, paint

SPLITS = make_splits(0)
RED_CIRCLE = Shape(shape="circle", colour="red", position="top left", size="large")
BLUE_SQUARE = Shape(shape="square", colour="blue", position="bottom right", size="small")


@pytest.fixture(scope="module")
def trained() -> list[EditExample]:
    return [edit_example(SPLITS, index, 32, 0.5) for index in range(1200)]


@pytest.fixture(scope="module")
def held_out() -> list[EditExample]:
    return [edit_example(SPLITS, index, 32, 0.5, held_out=True) for index in range(300)]


def scenes(example: EditExample) -> tuple[frozenset[Shape], frozenset[Shape]]:
    return frozenset(example.edit.before), frozenset(example.edit.after)


def test_an_edit_is_a_function_of_seed_and_index(trained: list[EditExample]) -> None:
    again, other = (edit_example(make_splits(seed), 7, 32, 0.5) for seed in (0, 1))
    assert (again.edit, again.instruction) == (trained[7].edit, trained[7].instruction)
    assert np.array_equal(again.after, trained[7].after) and not np.array_equal(other.after, trained[7].after)


def test_no_held_out_edit_is_trained_and_neither_shows_a_held_out_scene(
    trained: list[EditExample], held_out: list[EditExample]
) -> None:
    assert not set(map(scenes, trained)) & set(map(scenes, held_out))
    for example in trained + held_out:
        for scene in scenes(example):
            assert scene <= set(SPLITS.trained) and not SPLITS.holds_out_pair(tuple(scene))
    for examples in (trained, held_out):
        kinds = Counter(example.edit.kind for example in examples)
        assert min(kinds[kind] for kind in KINDS) > len(examples) / len(KINDS) * 0.6


def every_edit(before: tuple[Shape, ...]) -> list[Edit]:
    """Return all edits of a scene, by trying every change."""
    found = [Edit("remove", before, before[:i] + before[i + 1 :]) for i in range(len(before)) if len(before) == 2]
    for i, shape in enumerate(before):
        for kind, values in VALUES.items():
            changed = [replace(shape, **{kind: value}) for value in values if value != getattr(shape, kind)]
            found += [Edit(kind, before, (*before[:i], new, *before[i + 1 :])) for new in changed]
    if len(before) == 1:
        found += [Edit("add", before, (*before, new)) for new in SPLITS.trained]
    return [edit for edit in found if len(edit.after) == 1 or may_stand_together(*edit.after)]


def test_an_instruction_leads_to_one_picture_alone(trained: list[EditExample]) -> None:
    """Whatever the picture: among all edits of it, none other is asked for in these words."""
    for example in trained[::12]:
        means: dict[str, set[tuple[Shape, ...]]] = defaultdict(set)
        for edit in every_edit(example.edit.before):
            for instruction in instructions(edit):
                means[instruction].add(edit.after)
        assert {len(afters) for afters in means.values()} == {1}
        assert means[example.instruction] == {example.edit.after}
    said = " ".join(example.instruction for example in trained)
    for words in ("make it blue", "move it to the left", "make the circle", "add a small", "remove the red", "up"):
        assert words in said


def test_both_pictures_have_one_ground_and_one_jitter(trained: list[EditExample]) -> None:
    """Outside the place of the shape that changes they are equal to the pixel, and the judge finds nothing changed."""
    for example in trained[:300]:
        verdict = judge_edit(example.after, example.before, example.edit)
        assert (verdict.right, verdict.unchanged, verdict.difference) == (True, True, 0.0)
    both = [(e.before, e.after) for e in trained if e.edit.kind == "colour"]
    for before, after in both:  # the same shape in another colour
        covered = [(picture != picture[0, 0]).any(-1) for picture in (before, after)]
        assert (covered[0] != covered[1]).sum() <= 8, "pixels at an edge, of which a shape covers next to nothing"


def test_nothing_done_is_not_right_and_another_ground_or_place_is_not_unchanged(trained: list[EditExample]) -> None:
    rng = np.random.default_rng(0)
    idle = [judge_edit(example.before, example.after, example.edit) for example in trained[:300]]
    assert not any(verdict.right for verdict in idle) and all(verdict.unchanged for verdict in idle)
    anew = [judge_edit(draw(e.edit.after, rng, 32), e.after, e.edit) for e in trained[:300]]
    assert all(verdict.right for verdict in anew)
    assert sum(verdict.unchanged for verdict in anew) < 0.4 * len(anew)


def test_what_else_changes_is_seen() -> None:
    """In the edited shape itself, in the other one, and where nothing was."""
    edit = Edit("colour", (RED_CIRCLE, BLUE_SQUARE), (replace(RED_CIRCLE, colour="green"), BLUE_SQUARE))
    rng = np.random.default_rng(0)
    ground, jitters = draw_ground(rng), [Jitter.drawn(rng) for _ in range(3)]

    def verdict(*shapes: Shape) -> tuple[bool, bool]:
        pictures = (paint(some, ground, jitters[: len(some)], 32) for some in (shapes, edit.after))
        found = judge_edit(*pictures, edit)
        return found.right, found.unchanged

    circle, square = edit.after
    assert verdict(circle, square) == (True, True)
    assert verdict(replace(circle, colour="yellow"), square) == (False, True), "not what was asked, yet the rest stays"
    for name, value in (("shape", "square"), ("size", "small"), ("position", "top right")):
        assert verdict(replace(circle, **{name: value}), square) == (False, False)
    for name, value in (("shape", "circle"), ("colour", "yellow"), ("size", "large"), ("position", "top right")):
        assert verdict(circle, replace(square, **{name: value})) == (False, False)
    assert verdict(circle) == verdict(square) == (False, False)
    assert verdict(circle, square, replace(square, colour="yellow", position="top right")) == (False, False)


def test_the_difference_is_measured_outside_the_places_of_the_edit(trained: list[EditExample]) -> None:
    example = next(e for e in trained if e.edit.kind == "shape" and len(e.edit.before) == 1)
    for level in (MAX_DIFFERENCE * 0.8, MAX_DIFFERENCE * 1.2):
        shifted = np.clip(example.after.astype(float) - level * 255, 0, 255).round().astype(np.uint8)
        verdict = judge_edit(shifted, example.after, example.edit)
        assert verdict.right and verdict.unchanged == (level < MAX_DIFFERENCE)
