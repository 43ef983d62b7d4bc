"""The judge of edits: whether a picture shows what was asked for, and whether the rest of it stayed as it was."""

import itertools
from dataclasses import dataclass

import numpy as np

from data.scene_edits import VALUES, Edit
from data.scene_judge import judge
from data.scenes import CANVAS, CENTRES, RADII, Shape

# Mean absolute difference, in shares of the pixels' range, from what a perfect edit leaves of the picture, outside the
# places of the edit. Two draws of the demo's VAE from one picture's posterior meet it in every case; with another
# ground or other jitter the same shapes do so in one case of four.
MAX_DIFFERENCE = 0.02
MARGIN = 2.3  # canvas units around a shape's largest box: its jitter's offset of 0.6, and what a VAE smears


@dataclass(frozen=True)
class EditVerdict:
    """`right`: all of the scene is as it should be. `unchanged`: what the edit does not concern is as before."""

    right: bool
    unchanged: bool
    difference: float  # outside the places of the edit, 0..1


def judge_edit(drawn: np.ndarray, perfect: np.ndarray, edit: Edit) -> EditVerdict:
    """Judge `drawn` beside `perfect`, the true result as the model's latent space shows it, both uint8 [H, W, 3].

    Right is a picture with the shapes of `edit.after` in every attribute, size included. Unchanged is one in which each
    shape that stays has all its attributes and the one that changes all others, and whose pixels outside the edit's
    places differ from `perfect` by MAX_DIFFERENCE at most: there the true result is the picture before, and through the
    latent space the difference is the model's and not that of the autoencoder.
    """
    found = judge(drawn)
    outside = ~np.logical_or.reduce([_place(shape, len(drawn)) for shape in (edit.gone, edit.come) if shape])
    difference = float(abs(drawn.astype(float) - perfect)[outside].mean() / 255)
    unchanged = _keeps(found, edit) and difference <= MAX_DIFFERENCE
    return EditVerdict(found == tuple(sorted(edit.after)), unchanged, difference)


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
