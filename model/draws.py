"""The random numbers of sampling."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


class SeededDraws:
    """Numbers that depend on the seed, the sample's `index` and the place in it; not on device, batch or history.

    Drawn on the CPU: CUDA's generators differ between devices.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def noise(self, index: int, image: int, step: int, shape: tuple[int, ...]) -> Tensor:
        """Return f32 [C, h, w]: where a picture starts (step 0), and the sampler's noise of steps 1, 2, ..."""
        return self._normal(shape, "noise", index, image, step)

    def posterior(self, index: int, image: int, shape: tuple[int, ...]) -> Tensor:
        """Return f32 [C, h, w]: the noise with which a prompt's picture `image` is drawn from the VAE's posterior."""
        return self._normal(shape, "posterior", index, image)

    def uniform(self, index: int, token: int) -> float:
        """Return a number in [0, 1) that decides the sample's text token number `token`."""
        return (self._hash("uniform", index, token) >> 11) / 2**53

    def _normal(self, shape: tuple[int, ...], *parts: int | str) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(self._hash(*parts) >> 1))

    def _hash(self, *parts: int | str) -> int:
        text = "/".join(str(part) for part in (self.seed, *parts))
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


class DrawsOfSamples(SeededDraws):
    """Draws of samples that each have a seed of their own: `index` is a place in `samples`, of (seed, index).

    Samples with different seeds share a batch so, and each draws what it would alone.
    """

    def __init__(self, samples: Sequence[tuple[int, int]]) -> None:
        self.samples = samples

    def _hash(self, *parts: int | str) -> int:
        kind, place, *rest = parts
        seed, index = self.samples[int(place)]
        return SeededDraws(seed)._hash(kind, index, *rest)
