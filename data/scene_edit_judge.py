"""The judge of edits: whether a picture shows what was asked for, and whether the rest of it stayed as it was."""

import itertools
from dataclasses import dataclass

import numpy as np

from data.scene_edits import VALUES, Edit
from data.scene_judge import judge
from data.scenes import CANVAS, CENTRES, RADII, Shape

# Mean absolute difference from the picture before, in shares of the pixels' range, outside the places of the edit. The
# demo's VAE reconstructs 99 % of scenes to within it; a ground or a shape drawn anew is mostly further off.
MAX_DIFFERENCE = 0.02
MARGIN = 2.3  # canvas units around a shape's largest box: its jitter's offset of 0.6, and what a VAE smears


@dataclass(frozen=True)
class EditVerdict:
    """`right`: all of the scene is as it should be. `unchanged`: what the edit does not concern is as before."""

    right: bool
    unchanged: bool
    difference: float  # outside the places of the edit, 0..1


def judge_edit(before: np.ndarray, drawn: np.ndarray, edit: Edit) -> EditVerdict:
    """Judge `drawn`, made from `before`, both uint8 [H, W, 3].

    Right is a picture with the shapes of `edit.after` in every attribute, size included. Unchanged is one in which each
    shape that stays has all attributes, the one that changes all others, and the pixels outside the edit's places
    differ from `before` by MAX_DIFFERENCE at most.
    """
    found = judge(drawn)
    outside = ~np.logical_or.reduce([_place(shape, len(drawn)) for shape in (edit.gone, edit.come) if shape])
    difference = float(abs(drawn.astype(float) - before)[outside].mean() / 255)
    kept = _keeps(found, edit) and difference <= MAX_DIFFERENCE
    return EditVerdict(found == tuple(sorted(edit.after)), kept, difference)


def _keeps(found: tuple[Shape, ...], edit: Edit) -> bool:
    """Return whether shapes of those found have the attributes that the edit does not change."""
    wanted = [(shape, list(VALUES)) for shape in edit.after if shape != edit.come]
    if edit.gone is not None and edit.come is not None:
        same = [name for name in VALUES if getattr(edit.gone, name) == getattr(edit.come, name)]
        wanted.append((edit.come, same))
    return any(
        all(
            getattr(f, name) == getattr(w, name) for f, (w, names) in zip(chosen, wanted, strict=True) for name in names
        )
        for chosen in itertools.permutations(found, len(wanted))
    )


def _place(shape: Shape, side: int) -> np.ndarray:
    """Return which pixels a shape may cover, bool [side, side]."""
    ticks = (np.arange(side) + 0.5) * (CANVAS / side)
    near = [abs(ticks - centre) <= RADII[shape.size] + MARGIN for centre in CENTRES[shape.position]]
    return near[1][:, None] & near[0][None, :]
