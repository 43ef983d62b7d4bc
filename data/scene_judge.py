"""The judge: reads the shapes of a scene back from any picture, and compares them with the requested ones.

It segments by hue, measures each blob's area and centre, and compares the blob with the three shapes of that area. It
is independent of the request. Rejected: a learnt classifier, whose leniency nobody could specify.
"""

import itertools
from dataclasses import dataclass

import numpy as np

from data.scenes import CANVAS, CENTRES, COLOURS, HUES, RADII, SIZES, SQUARE_SIDE, Shape, coverage

UNCLEAR = "unclear"  # a shape or position that is none of the known ones
MIN_CHROMA = 0.25  # of a shape's pixel; drawn shapes have 0.64..0.9, the ground below 0.03
MIN_AREA = 20.0  # square canvas units; the smallest drawn shape has 50
MIN_OVERLAP = 0.75  # intersection over union with the best template; drawn shapes have 0.93 and more
MAX_OFFSET = 4.5  # canvas units from a position's centre; neighbours are 11.3 apart
_SCORED = ("colour", "shape", "position")
# Shape -> (area for radius 1, how far its centre of mass lies below its centre, in radii).
_MASS = {"circle": (np.pi, 0.0), "square": (4 * SQUARE_SIDE**2, 0.0), "triangle": (2.0, 1 / 3)}


@dataclass(frozen=True)
class Verdict:
    """Which attributes of *every* shape are right; all False when the number of shapes differs."""

    colour: bool
    shape: bool
    position: bool

    @property
    def all_right(self) -> bool:
        """Whether colour, shape and position are right together."""
        return self.colour and self.shape and self.position


def judge(picture: np.ndarray) -> tuple[Shape, ...]:
    """Read the shapes back from any square picture, uint8 [H, W, 3]; () where there is none."""
    assert picture.ndim == 3 and picture.shape[0] == picture.shape[1] and picture.shape[2] == 3, picture.shape
    pixels = picture / 255.0
    unit = (CANVAS / len(picture)) ** 2  # area of a pixel
    colour_of = _colour_of(pixels)
    labels = _components(colour_of)
    areas = np.bincount(labels.ravel()) * unit
    ground = np.median(pixels.reshape(-1, 3), axis=0)  # shapes cover less than half of a picture
    found = []
    for label in np.flatnonzero(areas >= MIN_AREA):
        if label > 0:
            blob = labels == label
            free = _grown(blob) & ((colour_of < 0) | blob)
            towards = np.median(pixels[blob], axis=0) - ground
            alpha = np.where(free, np.clip((pixels - ground) @ towards / (towards @ towards + 1e-9), 0, 1), 0)
            found.append(_identify(alpha, COLOURS[colour_of[blob][0]]))
    return tuple(sorted(found))


def score(picture: np.ndarray, scene: tuple[Shape, ...]) -> Verdict:
    """Compare the shapes that the judge sees in `picture` with those of `scene`."""
    return compare(judge(picture), scene)


def compare(found: tuple[Shape, ...] | None, wanted: tuple[Shape, ...]) -> Verdict:
    """Compare two scenes as sets, with their shapes paired so that most agrees; sizes are not compared."""
    if found is None or len(found) != len(wanted):
        return Verdict(False, False, False)
    verdicts = [
        Verdict(*(all(getattr(f, a) == getattr(w, a) for f, w in zip(order, wanted, strict=True)) for a in _SCORED))
        for order in itertools.permutations(found)
    ]
    return max(verdicts, key=lambda verdict: verdict.colour + verdict.shape + verdict.position)


def _colour_of(pixels: np.ndarray) -> np.ndarray:
    """Return the index in COLOURS of the nearest hue, int [H, W]; -1 where a pixel is nearly grey."""
    high, chroma = pixels.max(-1), np.ptp(pixels, axis=-1)
    r, g, b = np.moveaxis(pixels, -1, 0)
    c = np.maximum(chroma, 1e-9)
    hue = 60 * np.where(high == r, ((g - b) / c) % 6, np.where(high == g, (b - r) / c + 2, (r - g) / c + 4))
    away = abs((hue[..., None] - np.array([HUES[colour] for colour in COLOURS]) + 180) % 360 - 180)
    return np.where(chroma > MIN_CHROMA, away.argmin(-1), -1)


def _components(kind: np.ndarray) -> np.ndarray:
    """Label the 4-connected regions of equal `kind`, int [H, W]; 0 where kind < 0."""
    labels = np.where(kind >= 0, np.arange(1, kind.size + 1).reshape(kind.shape), 0)
    down, right = (kind[1:] == kind[:-1]) & (kind[1:] >= 0), (kind[:, 1:] == kind[:, :-1]) & (kind[:, 1:] >= 0)
    while True:
        before = labels.copy()
        for joined, a, b in ((down, labels[1:], labels[:-1]), (right, labels[:, 1:], labels[:, :-1])):
            larger = np.where(joined, np.maximum(a, b), 0)
            np.maximum(a, larger, out=a)
            np.maximum(b, larger, out=b)
        if np.array_equal(before, labels):
            return labels


def _grown(mask: np.ndarray) -> np.ndarray:
    """Grow a mask by one pixel on each side."""
    padded = np.pad(mask, 1)
    rows = padded[:-2] | padded[1:-1] | padded[2:]
    return rows[:, :-2] | rows[:, 1:-1] | rows[:, 2:]


def _identify(alpha: np.ndarray, colour: str) -> Shape:
    """Name the shape whose template of the same area and centre of mass overlaps `alpha` [H, W] best."""
    # Each template is tried sharp and blurred, so that blurred corners are not taken for a circle's edge.
    unit = CANVAS / len(alpha)
    ticks = (np.arange(len(alpha)) + 0.5) * unit
    total = alpha.sum()
    x, y, area = alpha.sum(0) @ ticks / total, alpha.sum(1) @ ticks / total, total * unit**2
    best = 0.0, "", 0.0, 0.0
    for shape, (unit_area, drop) in _MASS.items():
        radius = np.sqrt(area / unit_area)
        template = coverage(shape, x, y - drop * radius, radius, len(alpha))
        for _ in range(3):
            overlap = np.minimum(alpha, template).sum() / np.maximum(alpha, template).sum()
            best = max(best, (overlap, shape, y - drop * radius, radius))
            template = _blurred(template)
    overlap, shape, y, radius = best
    offset, position = min((np.hypot(x - cx, y - cy), position) for position, (cx, cy) in CENTRES.items())
    return Shape(
        shape=shape if overlap >= MIN_OVERLAP else UNCLEAR,
        colour=colour,
        position=position if offset <= MAX_OFFSET else UNCLEAR,
        size=min(SIZES, key=lambda size: abs(radius - RADII[size])),
    )


def _blurred(template: np.ndarray) -> np.ndarray:
    """Blur by the binomial 1-2-1 on both axes (sigma 0.7 pixels)."""
    padded = np.pad(template, 1, mode="edge")
    rows = (padded[:-2] + 2 * padded[1:-1] + padded[2:]) / 4
    return (rows[:, :-2] + 2 * rows[:, 1:-1] + rows[:, 2:]) / 4
