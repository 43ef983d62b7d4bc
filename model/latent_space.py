"""The latent space that images live in: stored arrays -> raw latents, and their whitening.

*Stored* is what a record keeps of an image: a posterior's moments f16 [N, 2C, h, w], a deterministic space's latents
f16 [N, C, h, w], or pixels uint8 [N, 3, H, W]. *Raw* latents are what the space decodes, f32 [N, C, h, w]; the model
sees whitened ones.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import torch
from torch import Tensor

Kind = Literal["moments", "latents", "pixels"]  # what is stored of an image


@dataclass(frozen=True)
class LatentStats:
    """Per-channel mean and standard deviation of sampled latents, float [C]; whitened latents have 0 and 1."""

    mean: Tensor
    std: Tensor

    def __post_init__(self) -> None:
        if self.mean.shape != self.std.shape or self.mean.ndim != 1:
            raise ValueError(f"latent mean {list(self.mean.shape)}, std {list(self.std.shape)}: expected [C] both")
        if not (torch.isfinite(self.mean).all() and torch.isfinite(self.std).all() and (self.std > 0).all()):
            raise ValueError(f"latent mean {self.mean.tolist()}, std {self.std.tolist()}: expected finite and std > 0")

    def whiten(self, latents: Tensor) -> Tensor:
        """Map raw latents [N, C, h, w] to mean 0, deviation 1, in f32."""
        return (latents.float() - self._per_channel(self.mean, latents)) / self._per_channel(self.std, latents)

    def unwhiten(self, latents: Tensor) -> Tensor:
        return latents.float() * self._per_channel(self.std, latents) + self._per_channel(self.mean, latents)

    @staticmethod
    def _per_channel(value: Tensor, latents: Tensor) -> Tensor:
        assert latents.shape[1] == len(value), (latents.shape, value.shape)
        return value.to(latents.device, torch.float32)[:, None, None]


def to_raw(stored: Tensor, posterior_noise: Tensor | None = None) -> Tensor:
    """Return raw latents f32 [N, C, h, w]: drawn from moments with standard normal noise [N, C, h, w], else as stored.

    Pixels uint8 become numbers in [-1, 1].
    """
    if posterior_noise is not None:
        mean, logvar = stored.float().chunk(2, dim=1)
        return mean + torch.exp(0.5 * logvar) * posterior_noise
    if stored.dtype == torch.uint8:
        return stored.float() / 127.5 - 1
    return stored.float()


class LatentSpace(ABC):
    """Pictures to what a record keeps of them, and raw latents back to pictures.

    Pictures are f32 [N, 3, H, W] in [-1, 1], both sides multiples of `stride`; decoded ones may lie outside: clip them.
    """

    kind: Kind
    channels: int  # C of raw latents
    stride: int  # pixels a latent cell, along each side
    hash: str  # 16 hex digits of what decides the latents; "pixels"
    picture_side: int | None = None  # pixels a side of the only pictures that it takes, squares; None: no such limit

    @abstractmethod
    def encode(self, pixels: Tensor) -> Tensor:
        """Return what is stored of pictures: f16 [N, 2C, h, w] or [N, C, h, w], or uint8 [N, 3, H, W]."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Return the pictures of raw latents [N, C, h, w]."""

    @property
    @abstractmethod
    def states_scaling(self) -> bool:
        """Return whether it states by what statistics its latents are whitened; a scaling of 1 states nothing."""

    @abstractmethod
    def stated_stats(self) -> LatentStats:
        """Return the statistics that the space states or implies, f64; raise ValueError for impossible ones."""

    def to(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Self:
        """Compute on `device` in `dtype` from now on."""
        return self

    def save(self, folder: Path) -> bool:
        """Write it where load_latent_space reads it; return whether there is anything to write."""
        return False


class Pixels(LatentSpace):
    """Pictures themselves, kept as bytes without loss: no model encodes or decodes them."""

    kind = "pixels"
    channels, stride, hash = 3, 1, "pixels"

    def encode(self, pixels: Tensor) -> Tensor:
        return ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)

    def decode(self, latents: Tensor) -> Tensor:
        return latents.float()

    @property
    def states_scaling(self) -> bool:
        return True  # none: [-1, 1] is the range of diffusion in pixels

    def stated_stats(self) -> LatentStats:
        return LatentStats(torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64))
