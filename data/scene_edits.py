"""Edits of scenes: a picture, an instruction such as "make the circle blue", and the picture that it asks for.

An edit changes one shape's colour, position, shape or size, adds a shape or removes one. Everything else stays as it
was, to the ground and each shape's jitter. Like scenes, edits are a pure function of (seed, index). Both pictures show
only what training may show; of these edits one in ten is held out, told by its two scenes and so in every wording.
"""

from dataclasses import dataclass, replace

import numpy as np

from data.scenes import (
    COLOURS,
    PHRASES,
    POSITIONS,
    SHAPES,
    SIZES,
    Jitter,
    Shape,
    Splits,
    draw_ground,
    may_stand_together,
    names_of,
    paint,
    random_scene,
)

VALUES = {"colour": COLOURS, "position": POSITIONS, "shape": SHAPES, "size": SIZES}
KINDS = (*VALUES, "add", "remove")
# {it} is the shape that changes or goes, in one of `_names`; the others are PHRASES of the shape that comes.
WORDINGS: dict[str, tuple[str, ...]] = {
    "colour": ("make {it} {colour}", "paint {it} {colour}", "change the colour of {it} to {colour}"),
    "position": ("move {it} to the {position}", "put {it} {corner}", "{it} should be {at}"),
    "shape": ("turn {it} into a {shape}", "make {it} a {shape}", "replace {it} with a {shape}"),
    "size": ("make {it} {size}", "{it} should be {big}", "make {it} {sized}"),
    "add": (
        "add a {size} {colour} {shape} {at}",
        "add a {big} {colour} {shape} {corner}",
        "draw another shape: a {size} {colour} {shape} {at}",
    ),
    "remove": ("remove {it}", "take {it} away", "erase {it}"),
}
MOVE = "move {it} {towards}"  # of a shape that goes from one corner to the next; nothing else has a side to go to
TOWARDS = {"left": "to the left", "right": "to the right", "top": "up", "bottom": "down"}
SIZED = {"small": "smaller", "large": "larger"}
_STREAM = 4  # of the generator


@dataclass(frozen=True)
class Edit:
    """Two scenes that differ in one shape; those that stay are in the same order, and one that is added comes last."""

    kind: str
    before: tuple[Shape, ...]
    after: tuple[Shape, ...]

    @property
    def gone(self) -> Shape | None:
        """The shape as it was, None if one was added."""
        return next((shape for shape in self.before if shape not in self.after), None)

    @property
    def come(self) -> Shape | None:
        """The shape as it is to be, None if one was removed."""
        return next((shape for shape in self.after if shape not in self.before), None)


@dataclass(frozen=True)
class EditExample:
    """An edit, how it is asked for, and its two pictures, uint8 [H, W, 3]."""

    edit: Edit
    instruction: str
    before: np.ndarray
    after: np.ndarray


def instructions(edit: Edit) -> list[str]:
    """Return every way to ask for an edit; each leads from its first scene to its second alone."""
    gone, come = edit.gone, edit.come
    names, wordings, words = [""], WORDINGS[edit.kind], {}
    if gone is not None:
        names = _names(gone, edit.before)
    if come is not None:
        words = {name: says[getattr(come, attribute)] for name, (attribute, says) in PHRASES.items()}
        words |= {"position": come.position, "sized": SIZED[come.size]}
    if gone is not None and come is not None and (side := _side(gone.position, come.position)):
        wordings, words["towards"] = (*wordings, MOVE), TOWARDS[side]
    return [wording.format(it=name, **words) for wording in wordings for name in names]


def edit_example(
    splits: Splits, index: int, resolution: int, two_shapes_share: float, held_out: bool = False
) -> EditExample:
    """Return edit `index` of those that are trained, or of those held out: a pure function of its arguments.

    Each kind is as likely; `two_shapes_share` is of the kinds that go with one shape and with two.
    """
    rng = np.random.default_rng((splits.seed, _STREAM, int(held_out), index))
    edit = _random_edit(splits, rng, two_shapes_share, held_out)
    asked = instructions(edit)
    instruction, ground = asked[rng.integers(len(asked))], draw_ground(rng)
    jitter_of = {shape: Jitter.drawn(rng) for shape in edit.before}
    if edit.come is not None:
        jitter_of[edit.come] = Jitter.drawn(rng) if edit.gone is None else jitter_of[edit.gone]
    pictures = (paint(s, ground, [jitter_of[shape] for shape in s], resolution) for s in (edit.before, edit.after))
    return EditExample(edit, instruction, *pictures)


def _random_edit(splits: Splits, rng: np.random.Generator, two_shapes_share: float, held_out: bool) -> Edit:
    kind = KINDS[rng.integers(len(KINDS))]
    two = {"add": False, "remove": True}.get(kind, bool(rng.random() < two_shapes_share))
    while True:
        before = random_scene(splits, rng, 2 if two else 1)
        after = _changed(splits, rng, kind, before)
        if set(before) == set(after) or not all(map(splits.shows, (before, after))):
            continue
        if len(after) == 2 and not may_stand_together(*after):
            continue
        if splits.holds_out(*names_of(before), "to", *names_of(after)) == held_out:
            return Edit(kind, before, after)


def _changed(splits: Splits, rng: np.random.Generator, kind: str, before: tuple[Shape, ...]) -> tuple[Shape, ...]:
    """Return the scene after an edit of this kind, which may be no other or none that there is."""
    place = int(rng.integers(len(before)))
    if kind == "add":
        return (*before, *random_scene(splits, rng, 1))
    come: tuple[Shape, ...] = ()
    if kind != "remove":
        come = (replace(before[place], **{kind: VALUES[kind][rng.integers(len(VALUES[kind]))]}),)
    return (*before[:place], *come, *before[place + 1 :])


def _names(shape: Shape, scene: tuple[Shape, ...]) -> list[str]:
    """Return the names that mean one shape of a scene alone; colours are never alike."""
    names = [f"the {shape.colour} {shape.shape}"]
    if [other.shape for other in scene].count(shape.shape) == 1:
        names.append(f"the {shape.shape}")
    return names + (["it"] if len(scene) == 1 else [f"the {shape.colour} one"])


def _side(old: str, new: str) -> str | None:
    """Return the side on which a shape comes to lie that moves from one corner to the next, else None."""
    changed = [b for a, b in zip(old.split(), new.split(), strict=False) if a != b]
    return changed[0] if "centre" not in (old, new) and len(changed) == 1 else None
