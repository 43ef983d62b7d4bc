"""Text-only documents in the words of the captions: short paragraphs about shapes, colours and places.

They describe only scenes that training may show, and no sentence repeats a caption's wording, so that nothing that
`data.scenes` holds out leaks through text. Like the pictures, each is a pure function of (seed, index).
"""

import numpy as np

from data.scenes import COLOURS, PHRASES, POSITIONS, SHAPES, SIZES, Shape, Splits

CORNERS = POSITIONS[1:]
OPPOSITE = dict(zip(CORNERS, reversed(CORNERS), strict=True))
FACTS = (
    "A circle is round and has no corners.",
    "Every point on the edge of a circle is equally far from its centre.",
    "A square has four corners and four equal sides.",
    "All the sides of a square are the same length.",
    "A triangle has three sides and three corners.",
    "The triangle comes to a point at the top.",
    "A square is as wide as it is tall.",
    "Red and yellow are warm colours.",
    "Blue is a cool colour, and so is green.",
    "Grass is green and the sky is blue.",
    "A lemon is yellow and a cherry is red.",
    "The centre is the same distance from all four corners.",
    "The picture has four corners and one centre.",
    "A large shape covers more of the picture than a small one.",
    "A small shape leaves more room around it.",
    "No two shapes in a picture ever touch.",
)
OPENINGS = (
    "The picture shows one shape, and it is {a}.",
    "Here is a picture with a single {shape}.",
    "Only one thing can be seen: {a}.",
    "Look {at}.",
    "Someone drew {a} on a pale ground.",
    "This one is simple.",
    "Imagine {a} on a sheet of paper.",
)
DETAILS = (
    "The {shape} is {colour}.",
    "Its colour is {colour}.",
    "It is a {size} one.",
    "It was placed {at}.",
    "You will find it {corner}.",
    "Nothing else is {at}.",
    "The {opposite} is empty.",
    "It is not {other_colour} but {colour}.",
    "It could have been a {other_shape}, but it is a {shape}.",
    "The {colour} {shape} stays {at}.",
    "Is it {other_size}? No, it is {size}.",
    "If it were {other_colour}, it would be a {other_colour} {shape}.",
    "Moving it to the {other_position} would change the picture.",
    "How many shapes are there? Just one.",
    "What colour is the {shape}? It is {colour}.",
    "Where is the {shape}? It is {at}.",
)


def text_document(splits: Splits, stream: int, index: int) -> str:
    """Return document `index` of a stream (0 training, 1 held out): two to five sentences."""
    rng = np.random.default_rng((splits.seed, 2, stream, index))
    subject = splits.trained[rng.integers(len(splits.trained))]
    number = int(rng.integers(2, 6))
    if rng.random() < 0.2:
        return " ".join(_some(rng, FACTS, number))
    sentences = [*_some(rng, OPENINGS, 1), *_some(rng, DETAILS, number - 1)]
    if number > 2 and rng.random() < 0.4:
        sentences[-1:] = _some(rng, FACTS, 1)
    return " ".join(sentence.format(**_words(subject, rng)) for sentence in sentences)


def text_documents(splits: Splits, num_training: int, num_held_out: int) -> tuple[list[str], list[str]]:
    """Return (training, held-out) documents; no held-out one occurs in training."""
    training = [text_document(splits, 0, index) for index in range(num_training)]
    seen = dict.fromkeys(training)
    num_seen = len(seen)
    index = 0
    while len(seen) < num_seen + num_held_out:
        seen[text_document(splits, 1, index)] = None
        index += 1
    return training, list(seen)[num_seen:]


def _some(rng: np.random.Generator, sentences: tuple[str, ...], number: int) -> list[str]:
    return [sentences[i] for i in rng.choice(len(sentences), size=min(number, len(sentences)), replace=False)]


def _words(subject: Shape, rng: np.random.Generator) -> dict[str, str]:
    """Return words for the subject's attributes, and for others that it does not have."""

    def other(values: tuple[str, ...], own: str) -> str:
        return str(rng.choice([value for value in values if value != own]))

    words = {name: says[getattr(subject, attribute)] for name, (attribute, says) in PHRASES.items()}
    return words | {
        "a": f"a {words['size']} {words['colour']} {words['shape']}",
        "opposite": "rest of the picture" if subject.position == "centre" else OPPOSITE[subject.position],
        "other_shape": other(SHAPES, subject.shape),
        "other_colour": other(COLOURS, subject.colour),
        "other_size": other(SIZES, subject.size),
        "other_position": other(POSITIONS, subject.position),
    }
