"""The random numbers of sampling: made on the CPU from (seed, sample) and the place inside it, on nothing else."""

import hashlib
from typing import Protocol

import torch
from torch import Tensor


class Draws(Protocol):
    """Where randomness comes from."""

    def noise(self, index: int, image: int, step: int, shape: tuple[int, ...]) -> Tensor:
        """Return f32 [C, h, w]: the start of a picture at step 0, a sampler's own noise at step 1, 2, ..."""
        ...

    def posterior(self, index: int, image: int, shape: tuple[int, ...]) -> Tensor:
        """Return f32 [C, h, w]: what picture number `image` of a prompt is drawn from its posterior with."""
        ...

    def uniform(self, index: int, token: int) -> float:
        """Return a number in [0, 1) that decides the row's sampled token number `token`."""
        ...


class SeededDraws:
    """Depends on (seed, index), not on a device, a batch or what was drawn before."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def noise(self, index: int, image: int, step: int, shape: tuple[int, ...]) -> Tensor:
        return self._normal(shape, "noise", index, image, step)

    def posterior(self, index: int, image: int, shape: tuple[int, ...]) -> Tensor:
        return self._normal(shape, "posterior", index, image)

    def uniform(self, index: int, token: int) -> float:
        return (self._hash("uniform", index, token) >> 11) / 2**53

    def _normal(self, shape: tuple[int, ...], *parts: int | str) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(self._hash(*parts) >> 1))

    def _hash(self, *parts: int | str) -> int:
        text = "/".join(str(part) for part in (self.seed, *parts))
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
