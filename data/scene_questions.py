"""Questions about scenes with short answers: colour, shape, position, size, number, and yes or no.

Like scenes, they are a pure function of (seed, index). Of the questions about each scene one in ten is held out, in all
its wordings. An answer is right if it is the same after `normalised`.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from data.scenes import COLOURS, PHRASES, SHAPES, SIZES, Shape, Splits, draw, names_of, random_scene

KINDS = ("colour", "shape", "position", "size", "number", "yes_no")
NUMBERS = ("none", "one", "two")
ATTRIBUTES = {  # {it} is one shape, in one of NAMES
    "colour": ("what colour is {it}?", "which colour does {it} have?"),
    "shape": ("what shape is {it}?", "is {it} a circle, a square or a triangle?"),
    "position": ("where is {it}?", "in which place is {it}?"),
    "size": ("how big is {it}?", "is {it} small or large?"),
}
# Name -> the attributes that it gives away. The first is used where no other shape has the same.
NAMES = {
    "the {shape}": ("shape",),
    "the {colour} shape": ("colour",),
    "the {colour} {shape}": ("colour", "shape"),
    "the shape {at}": ("position",),
}
COUNTS = ("how many {them} are there?", "how many {them} do you see?")
WHETHER = ("is there {one}?", "do you see {one}?")
MOST_QUESTIONS = 3  # about one picture
_STREAM = 5  # of the generator


@dataclass(frozen=True)
class Question:
    """A question in one or more wordings, of which the first names it."""

    kind: str
    wordings: tuple[str, ...]
    answer: str


@dataclass(frozen=True)
class QuestionsExample:
    """A picture, uint8 [H, W, 3], its shapes, and (question, wording) of those that are asked about it."""

    picture: np.ndarray
    shapes: tuple[Shape, ...]
    asked: tuple[tuple[Question, str], ...]


def questions_about(scene: tuple[Shape, ...]) -> list[Question]:
    """Return every question about a scene."""
    return [*_of_shapes(scene), *_of_numbers(scene), *_yes_or_no(scene)]


def normalised(answer: str) -> str:
    """Return an answer as it is compared: in lower case, without spaces around it and a full stop after it."""
    return " ".join(answer.lower().split()).removesuffix(".").rstrip()


def questions_example(
    splits: Splits, index: int, resolution: int, two_shapes_share: float, held_out: bool = False
) -> QuestionsExample:
    """Return picture `index` with one to three questions that are trained, or with one that is held out."""
    rng = np.random.default_rng((splits.seed, _STREAM, int(held_out), index))
    two = rng.random() < two_shapes_share
    number = 1 if held_out else int(rng.integers(1, MOST_QUESTIONS + 1))
    kinds = (KINDS[rng.integers(len(KINDS))],) if held_out else KINDS
    while True:
        scene = random_scene(splits, rng, 2 if two else 1)
        names, every = names_of(scene), [question for question in questions_about(scene) if question.kind in kinds]
        left = [question for question in every if splits.holds_out(*names, question.wordings[0]) == held_out]
        if splits.shows(scene) and left:
            break
    picture, asked = draw(scene, rng, resolution), []
    for _ in range(min(number, len(left))):
        question = _drawn(left, rng)
        left.remove(question)
        asked.append((question, question.wordings[rng.integers(len(question.wordings))]))
    return QuestionsExample(picture, scene, tuple(asked))


def _drawn(questions: list[Question], rng: np.random.Generator) -> Question:
    """Draw one: its kind, its answer, then the question, so that the most frequent answer is no good guess."""
    kinds = [kind for kind in KINDS if any(question.kind == kind for question in questions)]
    kind = kinds[rng.integers(len(kinds))]
    answers = sorted({question.answer for question in questions if question.kind == kind})
    answer = answers[rng.integers(len(answers))]
    chosen = [question for question in questions if (question.kind, question.answer) == (kind, answer)]
    return chosen[rng.integers(len(chosen))]


def _of_shapes(scene: tuple[Shape, ...]) -> Iterator[Question]:
    """Yield questions about one attribute of a shape, named by others that tell it from the rest of the scene."""
    for shape in scene:
        words = {name: says[getattr(shape, attribute)] for name, (attribute, says) in PHRASES.items()}
        is_only = [other.shape for other in scene].count(shape.shape) == 1
        for kind, wordings in ATTRIBUTES.items():
            names = [name.format(**words) for name, given in NAMES.items() if kind not in given]
            if names[0] == f"the {shape.shape}" and not is_only:
                del names[0]
            for name in [*names, *(["it"] if len(scene) == 1 else [])]:
                yield Question(kind, tuple(wording.format(it=name) for wording in wordings), getattr(shape, kind))


def _of_numbers(scene: tuple[Shape, ...]) -> Iterator[Question]:
    """Yield how many shapes there are, how many of each shape and of each size."""
    counts = {"shapes": len(scene)}
    counts |= {f"{kind}s": [shape.shape for shape in scene].count(kind) for kind in SHAPES}
    counts |= {f"{size} shapes": [shape.size for shape in scene].count(size) for size in SIZES}
    for them, number in counts.items():
        yield Question("number", tuple(wording.format(them=them) for wording in COUNTS), NUMBERS[number])


def _yes_or_no(scene: tuple[Shape, ...]) -> Iterator[Question]:
    """Yield whether there is a shape of a colour, a shape, both, or at a place."""
    there = {f"a {kind}": any(shape.shape == kind for shape in scene) for kind in SHAPES}
    there |= {f"a {colour} shape": any(shape.colour == colour for shape in scene) for colour in COLOURS}
    for colour, kind in itertools.product(COLOURS, SHAPES):
        there[f"a {colour} {kind}"] = any((shape.colour, shape.shape) == (colour, kind) for shape in scene)
    for position, at in PHRASES["at"][1].items():
        there[f"a shape {at}"] = any(shape.position == position for shape in scene)
    for one, is_there in there.items():
        yield Question("yes_no", tuple(wording.format(one=one) for wording in WHETHER), "yes" if is_there else "no")
