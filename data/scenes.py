"""The embedded data set: drawn scenes with captions, and which of them are held out.

A scene is one or two shapes on a light ground. Everything is a pure function of (seed, index), so a data set is
regenerated rather than shipped. One table of wordings both writes and parses captions: `parse_caption` accepts exactly
what `caption` can write. data/scene_judge.py reads pictures back.

Lengths are in canvas units: a picture is 32 wide whatever its resolution. A corner shape stays inside its quadrant, so
two shapes in different corners never touch.
"""

import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

SHAPES = ("circle", "square", "triangle")
COLOURS = ("red", "green", "blue", "yellow")
POSITIONS = ("centre", "top left", "top right", "bottom left", "bottom right")
SIZES = ("small", "large")

CANVAS = 32.0
CENTRES = dict(zip(POSITIONS, ((16, 16), (8, 8), (24, 8), (8, 24), (24, 24)), strict=True))
RADII = {"small": 5.2, "large": 6.9}
HUES = {"red": 0.0, "green": 130.0, "blue": 222.0, "yellow": 50.0}  # degrees
SQUARE_SIDE = 0.9  # half a square's side in radii: between equal box and equal area

# Placeholder -> (the attribute it speaks of, attribute value -> words).
PHRASES = {
    "size": ("size", {size: size for size in SIZES}),
    "big": ("size", {"small": "little", "large": "big"}),
    "colour": ("colour", {colour: colour for colour in COLOURS}),
    "shape": ("shape", {shape: shape for shape in SHAPES}),
    "at": ("position", {p: "in the centre" if p == "centre" else f"at the {p}" for p in POSITIONS}),
    "corner": ("position", {p: "in the middle" if p == "centre" else f"in the {p} corner" for p in POSITIONS}),
}
WORDINGS = (
    "a {size0} {colour0} {shape0} {at0}",
    "there is a {size0} {colour0} {shape0} {at0}",
    "{at0}, a {size0} {colour0} {shape0}",
    "a {big0} {colour0} {shape0} {corner0}",
    "the {shape0} {at0} is {size0} and {colour0}",
    "a picture of a {big0} {colour0} {shape0} {at0}",
    "{size0} {colour0} {shape0} {at0}",
    "{corner0} there is a {big0} {colour0} {shape0}",
    "a {colour0} {shape0}, {size0}, {at0}",
    "we see a {size0} {colour0} {shape0} {corner0}",
)
PAIR_WORDINGS = (
    "a {size0} {colour0} {shape0} {at0} and a {size1} {colour1} {shape1} {at1}",
    "there is a {size0} {colour0} {shape0} {at0} and a {size1} {colour1} {shape1} {at1}",
    "{at0}, a {size0} {colour0} {shape0}; {at1}, a {size1} {colour1} {shape1}",
    "a {big0} {colour0} {shape0} {corner0} with a {big1} {colour1} {shape1} {corner1}",
)


@dataclass(frozen=True, order=True)
class Shape:
    """One shape of a scene, and the *combination* of attributes that splits are made of."""

    shape: str
    colour: str
    position: str
    size: str

    @property
    def combination(self) -> str:
        """Name the combination, as in the records."""
        return f"{self.size} {self.colour} {self.shape} {self.position}"


@dataclass(frozen=True)
class Example:
    """A picture (uint8 [H, W, 3]) with the caption and the shapes it shows.

    `captions` are up to three of different wordings, `caption` first; the others are of wordings that training allows.
    """

    picture: np.ndarray
    caption: str
    shapes: tuple[Shape, ...]
    wording: int
    captions: tuple[str, ...]


def names_of(shapes: tuple[Shape, ...]) -> list[str]:
    """Return the combinations of a scene, in an order that does not depend on that of its shapes."""
    return sorted(shape.combination for shape in shapes)


def may_stand_together(a: Shape, b: Shape) -> bool:
    """Return whether two shapes are of different colours and in different corners."""
    return a.colour != b.colour and a.position != b.position and "centre" not in (a.position, b.position)


def caption(shapes: tuple[Shape, ...], wording: int) -> str:
    """Describe `shapes` in one of WORDINGS (one shape) or PAIR_WORDINGS (two)."""
    template = (WORDINGS, PAIR_WORDINGS)[len(shapes) - 1][wording]
    words = {
        f"{name}{i}": says[getattr(shape, attribute)]
        for i, shape in enumerate(shapes)
        for name, (attribute, says) in PHRASES.items()
    }
    return template.format(**words)


def parse_caption(text: str) -> tuple[Shape, ...] | None:
    """Parse what `caption` wrote; None for any other text. Case, spacing and a final full stop do not matter."""
    text = " ".join(text.lower().split()).removesuffix(".").rstrip()
    for pattern, placeholders in _GRAMMAR:
        if match := pattern.fullmatch(text):
            values: list[dict[str, str]] = [{}, {}]
            for name, words in zip(placeholders, match.groups(), strict=True):
                attribute, says = PHRASES[name[:-1]]
                values[int(name[-1])][attribute] = next(value for value, said in says.items() if said == words)
            return tuple(Shape(**attributes) for attributes in values if attributes)
    return None


def _pattern(template: str) -> tuple[re.Pattern, list[str]]:
    placeholders = re.findall(r"\{(\w+)\}", template)
    choices = {name: "(" + "|".join(PHRASES[name[:-1]][1].values()) + ")" for name in placeholders}
    return re.compile(template.format(**choices)), placeholders


_GRAMMAR = [_pattern(template) for template in WORDINGS + PAIR_WORDINGS]


@dataclass(frozen=True)
class Splits:
    """What is trained and what is held out, for one seed."""

    seed: int
    trained: tuple[Shape, ...]
    held_out: tuple[Shape, ...]
    # Two wordings of each trained combination, whose captions no training caption contains.
    held_out_wordings: dict[Shape, tuple[int, ...]] = field(repr=False)

    def trains(self, shapes: tuple[Shape, ...], wording: int) -> bool:
        """Return whether this scene with this wording may occur in training."""
        if not self.shows(shapes):
            return False
        said = caption(shapes, wording)
        return not any(caption((s,), w) in said for s in shapes for w in self.held_out_wordings[s])

    def shows(self, shapes: tuple[Shape, ...]) -> bool:
        """Return whether training may show this scene."""
        return all(shape in self.held_out_wordings for shape in shapes) and not self.holds_out_pair(shapes)

    def holds_out_pair(self, shapes: tuple[Shape, ...]) -> bool:
        """Return whether these are two shapes that training never shows together: one pair in ten."""
        return len(shapes) == 2 and self.holds_out(*names_of(shapes))

    def holds_out(self, *parts: str) -> bool:
        """Return whether what these names stand for is never trained: one thing in ten, by its hash."""
        return _hash(self.seed, *parts) % 10 == 0


def make_splits(seed: int) -> Splits:
    """Hold out one in ten of shape x colour x position, in both sizes, and two wordings of each other combination.

    Both sizes, because the judge does not compare them: held out in one size only, a combination would still be seen.
    Held-out combinations are spread evenly: no attribute value has more than its share, so each occurs in training.
    """
    every = list(itertools.product(SHAPES, COLOURS, POSITIONS))
    number = len(every) // 10
    held_out: list[tuple[str, str, str]] = []
    taken: Counter[str] = Counter()
    for values in sorted(every, key=lambda values: _hash(seed, *values)):
        shares = zip(values, (len(SHAPES), len(COLOURS), len(POSITIONS)), strict=True)
        if len(held_out) < number and all(taken[value] < -(-number // share) for value, share in shares):
            held_out.append(values)
            taken.update(values)
    trained = tuple(Shape(*values, size) for values in every if values not in held_out for size in SIZES)
    wordings = {}
    for shape in trained:
        order = sorted(range(len(WORDINGS)), key=lambda wording: _hash(seed, shape.combination, str(wording)))
        wordings[shape] = tuple(order[:2])
    return Splits(seed, trained, tuple(sorted(Shape(*values, size) for values in held_out for size in SIZES)), wordings)


def training_example(splits: Splits, index: int, resolution: int, two_shapes_share: float) -> Example:
    """Return training example `index`: a pure function of its arguments."""
    rng = np.random.default_rng((splits.seed, 0, index))
    number = 2 if (two := rng.random() < two_shapes_share) else 1
    while True:
        shapes = random_scene(splits, rng, number)
        wording = int(rng.integers(len(PAIR_WORDINGS if two else WORDINGS)))
        if splits.trains(shapes, wording):
            captions = _captions(splits, shapes, wording, 0, index)
            return Example(draw(shapes, rng, resolution), captions[0], shapes, wording, captions)


def held_out_examples(splits: Splits, resolution: int, num_two_shapes: int) -> Iterator[tuple[str, Example]]:
    """Yield (split, example): each held-out pair ("seen"), each held-out combination in each wording ("unseen"),
    and `num_two_shapes` scenes of two trained combinations that training never shows together ("two_shapes").
    """
    rng = np.random.default_rng((splits.seed, 1))
    wanted: list[tuple[str, tuple[Shape, ...], int]] = []
    wanted += [("seen", (s,), w) for s, wordings in splits.held_out_wordings.items() for w in wordings]
    wanted += [("unseen", (s,), w) for s in splits.held_out for w in range(len(WORDINGS))]
    pairs: dict[tuple[Shape, ...], tuple[Shape, Shape]] = {}
    while len(pairs) < num_two_shapes:
        pair = _random_pair(splits, rng)
        if splits.holds_out_pair(pair):
            pairs.setdefault(tuple(sorted(pair)), pair)
    wanted += [("two_shapes", pair, int(rng.integers(len(PAIR_WORDINGS)))) for pair in pairs.values()]
    for index, (split, shapes, wording) in enumerate(wanted):
        captions = _captions(splits, shapes, wording, 1, index)
        yield split, Example(draw(shapes, rng, resolution), captions[0], shapes, wording, captions)


def _captions(splits: Splits, shapes: tuple[Shape, ...], wording: int, stream: int, index: int) -> tuple[str, ...]:
    """Describe a scene in this wording, and in up to two others that training allows.

    They are drawn from a generator of their own, so that they change nothing else.
    """
    rng = np.random.default_rng((splits.seed, 3, stream, index))
    order = rng.permutation(len((WORDINGS, PAIR_WORDINGS)[len(shapes) - 1])).tolist()
    others = (other for other in order if other != wording and splits.trains(shapes, other))
    return tuple(caption(shapes, w) for w in (wording, *itertools.islice(others, 2)))


def random_scene(splits: Splits, rng: np.random.Generator, number: int) -> tuple[Shape, ...]:
    """Draw a scene of one or two trained combinations; `splits.shows` says whether training may show both together."""
    return _random_pair(splits, rng) if number == 2 else (splits.trained[rng.integers(len(splits.trained))],)


def _random_pair(splits: Splits, rng: np.random.Generator) -> tuple[Shape, Shape]:
    while True:
        a, b = (splits.trained[i] for i in rng.integers(len(splits.trained), size=2))
        if may_stand_together(a, b):
            return a, b


def _hash(seed: int, *parts: str) -> int:
    return int.from_bytes(hashlib.blake2b("|".join((str(seed), *parts)).encode(), digest_size=8).digest(), "big")


@dataclass(frozen=True)
class Jitter:
    """How a drawn shape departs from its attributes."""

    offset: np.ndarray  # f64 [2], canvas units
    scale: float  # of the radius
    hue: float  # degrees
    saturation: float
    value: float

    @classmethod
    def drawn(cls, rng: np.random.Generator) -> "Jitter":
        """Draw one at random."""
        offset, scale, hue = rng.uniform(-0.6, 0.6, 2), rng.uniform(0.97, 1.03), rng.uniform(-7, 7)
        return cls(offset, scale, hue, rng.uniform(0.8, 0.95), rng.uniform(0.8, 0.95))


def draw(shapes: tuple[Shape, ...], rng: np.random.Generator, resolution: int) -> np.ndarray:
    """Draw an anti-aliased picture, uint8 [H, W, 3]; `rng` jitters position, size, colour and ground."""
    ground = draw_ground(rng)
    return paint(shapes, ground, [Jitter.drawn(rng) for _ in shapes], resolution)


def draw_ground(rng: np.random.Generator) -> np.ndarray:
    """Draw the colour of a light ground, f64 [3] in 0..1."""
    return rng.uniform(0.82, 0.96) + rng.uniform(-0.015, 0.015, 3)


def paint(shapes: tuple[Shape, ...], ground: np.ndarray, jitters: Sequence[Jitter], resolution: int) -> np.ndarray:
    """Paint the shapes with a jitter each, uint8 [H, W, 3]."""
    picture = np.broadcast_to(ground, (resolution, resolution, 3))
    for shape, jitter in zip(shapes, jitters, strict=True):
        x, y = np.array(CENTRES[shape.position]) + jitter.offset
        rgb = _rgb(HUES[shape.colour] + jitter.hue, jitter.saturation, jitter.value)
        alpha = coverage(shape.shape, x, y, RADII[shape.size] * jitter.scale, resolution)[..., None]
        picture = picture + alpha * (rgb - picture)
    return np.round(np.clip(picture, 0, 1) * 255).astype(np.uint8)


def coverage(shape: str, x: float, y: float, radius: float, resolution: int) -> np.ndarray:
    """Return the share of each pixel that the shape covers, f64 [H, W], from the signed distance to its outline."""
    ticks = (np.arange(resolution) + 0.5) * (CANVAS / resolution)
    dx, dy = ticks[None, :] - x, ticks[:, None] - y
    if shape == "circle":
        inside = radius - np.hypot(dx, dy)
    elif shape == "square":
        inside = SQUARE_SIDE * radius - np.maximum(abs(dx), abs(dy))
    else:  # as high as it is wide, apex at the top
        inside = np.minimum(radius - dy, ((dy + radius) / 2 - abs(dx)) / np.sqrt(1.25))
    return np.clip(inside * (resolution / CANVAS) + 0.5, 0, 1)


def _rgb(hue: float, saturation: float, value: float) -> np.ndarray:
    """Convert HSV (degrees, 0..1, 0..1) to RGB in 0..1."""
    k = (np.array([5.0, 3.0, 1.0]) + hue / 60) % 6
    return value - value * saturation * np.clip(np.minimum(k, 4 - k), 0, 1)
