"""The works that every contestant does, and the size of its model: the same samples for all, from one seed."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

CHANNELS, PATCH = 4, 2  # of the latents and of a patch, as in the demo
PATCH_DIM = CHANNELS * PATCH * PATCH


@dataclass(frozen=True)
class Sample:
    caption: np.ndarray  # int64 [len]
    latents: np.ndarray  # f32 [C, h, w]
    tail: np.ndarray  # int64 [len], text after the image

    @property
    def patches(self) -> int:
        return self.latents.shape[1] * self.latents.shape[2] // PATCH**2

    @property
    def useful_tokens(self) -> int:
        """Tokens of the document, with BOS, BOI, EOI and EOS; what a layout adds beyond them is not useful."""
        return len(self.caption) + self.patches + len(self.tail) + 4


@dataclass(frozen=True, kw_only=True)
class Work:
    """Samples of one training step, and the model; `number` samples, whatever the kind."""

    kind: Literal["fixed", "varied"]
    number: int = 16
    width: int = 256
    layers: int = 8
    heads: int = 4
    ffn_hidden: int = 704  # of ours and plain; transfusion-pytorch's rule gives 682 at width 256
    vocabulary: int = 512  # with the five special tokens
    seed: int = 0

    @cached_property
    def samples(self) -> list[Sample]:
        rng = np.random.default_rng(self.seed)
        return [self._draw(rng) for _ in range(self.number)]

    def _draw(self, rng: np.random.Generator) -> Sample:
        if self.kind == "fixed":  # 94 tokens each
            length, side, tail = 24, 8, 2
        else:
            length, side, tail = int(rng.integers(4, 121)), int(rng.choice([4, 8, 16])), 0
        latents = rng.standard_normal((CHANNELS, side * PATCH, side * PATCH), dtype=np.float32)
        return Sample(self.text(rng, length), latents, self.text(rng, tail))

    def text(self, rng: np.random.Generator, length: int) -> np.ndarray:
        """Return token ids int64 [length] that are not special."""
        return rng.integers(5, self.vocabulary, length)

    def prompts(self, number: int) -> list[np.ndarray]:
        """Return captions of 24 tokens to draw pictures of 64 patches from."""
        rng = np.random.default_rng(self.seed + 1)
        return [self.text(rng, 24) for _ in range(number)]

    @property
    def useful_tokens(self) -> int:
        return sum(sample.useful_tokens for sample in self.samples)

    def arguments(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Size:
    """Parameters of a contestant's model."""

    all: int
    trunk: int  # in the matrices of attention and feed-forward


def rows_of(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Return which documents share a row of `capacity` tokens: the longest first, each into the first row with room."""
    rows: list[list[int]] = []
    free: list[int] = []
    for document in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        assert lengths[document] <= capacity, (lengths[document], capacity)
        row = next((r for r, room in enumerate(free) if room >= lengths[document]), len(rows))
        if row == len(rows):
            rows.append([])
            free.append(capacity)
        rows[row].append(document)
        free[row] -= lengths[document]
    return rows
