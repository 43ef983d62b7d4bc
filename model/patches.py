"""Latents <-> token embeddings: the only part of the model that sees an image's size.

A patcher has two halves: `encode(latents, timesteps) -> (tokens, skips)` before the trunk and `decode(hidden, skips,
timesteps, h, w)` after it. `skips` are the U-Net's skip connections (None for linear patches). Neither half lets an
image depend on the others in its batch.
"""

import math

import torch
from torch import Tensor, nn

TIMESTEP_FEATURES = 256  # sinusoids of t before the MLP, as in DiT
Skips = list[Tensor] | None  # finest first


def patchify(latents: Tensor, patch_size: int) -> Tensor:
    """Return [N, P, p*p*C] of latents [N, C, h, w]: patches row by row, inside each row, column, channel."""
    n, c, h, w = latents.shape
    p = patch_size
    assert h % p == 0 and w % p == 0, f"latents {h}x{w} are not a multiple of patch size {p}"
    return latents.reshape(n, c, h // p, p, w // p, p).permute(0, 2, 4, 3, 5, 1).reshape(n, -1, p * p * c)


def unpatchify(patches: Tensor, patch_size: int, h: int, w: int) -> Tensor:
    """Return latents [N, C, h, w] of patches [N, P, p*p*C]: the inverse of `patchify`."""
    p = patch_size
    n, _, d = patches.shape
    grid = patches.reshape(n, h // p, w // p, p, p, d // (p * p))
    return grid.permute(0, 5, 1, 3, 2, 4).reshape(n, -1, h, w)


def timestep_features(timesteps: Tensor, dim: int = TIMESTEP_FEATURES) -> Tensor:
    """Return f32 [N, dim]: cosines and sines of timesteps [N] (0...999) at frequencies from 1 down to 1/10000."""
    half = dim // 2
    frequencies = torch.exp(torch.arange(half, device=timesteps.device) * (-math.log(10000.0) / half))
    angles = timesteps[:, None].float() * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


class TimestepEmbedding(nn.Module):
    def __init__(self, hidden: int, dim: int) -> None:
        super().__init__()
        self.up = nn.Linear(TIMESTEP_FEATURES, hidden)
        self.down = nn.Linear(hidden, dim)

    def forward(self, timesteps: Tensor) -> Tensor:
        """Return [N, dim] of timesteps [N], int or float."""
        features = timestep_features(timesteps).to(self.up.weight.dtype)
        return self.down(nn.functional.silu(self.up(features)))


class LinearPatches(nn.Module):
    """The paper's linear patcher: add the timestep embedding to every patch vector, then one linear layer.

    With `timestep_after` (ours) it is added after that layer, at the width of the trunk: a patch vector has too few
    dimensions for both.
    """

    def __init__(self, width: int, latent_channels: int, patch_size: int, timestep_after: bool = False) -> None:
        super().__init__()
        self.patch_size, self.timestep_after = patch_size, timestep_after
        patch_dim = patch_size * patch_size * latent_channels
        self.timestep = TimestepEmbedding(width, width if timestep_after else patch_dim)
        self.to_width = nn.Linear(patch_dim, width)
        self.to_patch = nn.Linear(width, patch_dim)

    def encode(self, latents: Tensor, timesteps: Tensor) -> tuple[Tensor, Skips]:
        """Return (tokens [N, P, D], None) of noisy latents [N, C, h, w] at timesteps [N] or [1]."""
        patches = patchify(latents, self.patch_size).to(self.to_width.weight.dtype)
        embedding = self.timestep(timesteps)[:, None]
        if self.timestep_after:
            return self.to_width(patches) + embedding, None
        return self.to_width(patches + embedding), None

    def decode(self, hidden: Tensor, skips: Skips, timesteps: Tensor, h: int, w: int) -> Tensor:
        """Return the prediction [N, C, h, w] of hidden states [N, P, D]."""
        return unpatchify(self.to_patch(hidden), self.patch_size, h, w).contiguous()  # FSDP warns of a view
