"""The paper's U-Net patcher: convolutional down blocks before the trunk, up blocks with skips after it.

Same border as model/patches.py. Patch size p takes log2(p) halvings of the grid, and a token is one cell of the
coarsest level. The paper gives the size (0.27B parameters on top of every trunk) and the norm (plain layer norm, not an
adaptive one); widths and depths are ours, the simplest that add up to that size. The layer norm is over channels at
each cell, so an image's result does not depend on its grid or its batch, as it would with group norm.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.patches import Skips, TimestepEmbedding

# Channels of each level, finest first, by patch size: 0.26B to 0.28B parameters on top of any of the paper's trunks.
CHANNELS = {1: (1152,), 2: (512, 1024), 4: (256, 512, 960), 8: (128, 256, 512, 960)}


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    # channels of each level, finest first: log2(patch_size) + 1 of them; null: the paper's 0.27B parameters
    channels: tuple[int, ...] | None = None
    blocks: int = 4  # residual blocks a level, on the way down and on the way up, >= 1
    timestep_width: int = 1024  # dimensions of the timestep embedding, >= 1

    def __post_init__(self) -> None:
        channels = (1,) if self.channels is None else self.channels
        if min(self.blocks, self.timestep_width, *channels) < 1 or not channels:
            raise ValueError(
                f"unet.blocks={self.blocks}, timestep_width={self.timestep_width}, channels={self.channels}: expected "
                "positive numbers"
            )

    def levels(self, patch_size: int) -> tuple[int, ...]:
        """Return the channels of each level; raise ValueError for a patch size that their halvings do not give."""
        channels = self.channels or CHANNELS.get(patch_size)
        if channels is None or 2 ** (len(channels) - 1) != patch_size:
            raise ValueError(
                f"patch_size={patch_size} with patches=unet, unet.channels={self.channels}: expected one of "
                f"{sorted(CHANNELS)}, or 2^n with n + 1 channels"
            )
        return channels


class UNetPatches(nn.Module):
    def __init__(self, width: int, latent_channels: int, patch_size: int, config: UNetConfig) -> None:
        super().__init__()
        channels, time = config.levels(patch_size), config.timestep_width
        self.timestep = TimestepEmbedding(time, time)
        self.from_latents = _conv(latent_channels, channels[0])
        self.down = nn.ModuleList(_level(config.blocks, c, c, time) for c in channels)
        self.shrink = nn.ModuleList(_conv(fine, coarse, stride=2) for fine, coarse in pairwise(channels))
        self.to_width = nn.Linear(channels[-1], width)
        self.from_width = nn.Linear(width, channels[-1])
        self.up = nn.ModuleList(_level(config.blocks, 2 * c, c, time) for c in channels)
        self.grow = nn.ModuleList(_conv(coarse, fine) for fine, coarse in pairwise(channels))
        self.out_norm = nn.LayerNorm(channels[0])
        self.to_latents = _conv(channels[0], latent_channels)

    def encode(self, latents: Tensor, timesteps: Tensor) -> tuple[Tensor, Skips]:
        """Return (tokens [N, P, D], the skips for `decode`) of noisy latents [N, C, h, w] at timesteps [N]."""
        time = F.silu(self.timestep(timesteps))
        x = self.from_latents(latents.to(self.from_latents.weight.dtype))
        skips = []
        for level, blocks in enumerate(self.down):
            if level:
                x = self.shrink[level - 1](x)
            for block in blocks:  # type: ignore[attr-defined]  # a ModuleList
                x = block(x, time)
                skips.append(x)
        return self.to_width(x.flatten(2).transpose(1, 2)), skips

    def decode(self, hidden: Tensor, skips: Skips, timesteps: Tensor, h: int, w: int) -> Tensor:
        """Return the prediction [N, C, h, w] of hidden states [N, P, D]; skips are used last first."""
        assert skips is not None  # of `encode`
        time, skips = F.silu(self.timestep(timesteps)), list(skips)
        x = self.from_width(hidden).transpose(1, 2).unflatten(2, skips[-1].shape[2:])
        for level, blocks in reversed(list(enumerate(self.up))):
            for block in blocks:  # type: ignore[attr-defined]  # a ModuleList
                x = block(torch.cat((x, skips.pop()), dim=1), time)
            if level:
                x = self.grow[level - 1](F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return self.to_latents(F.silu(_norm(self.out_norm, x))).contiguous()  # FSDP warns of a view


class ResidualBlock(nn.Module):
    """norm, silu, convolution, twice, with the timestep added in between (Ho et al. 2020, appendix B)."""

    def __init__(self, channels_in: int, channels: int, time: int) -> None:
        super().__init__()
        self.in_norm, self.conv_in = nn.LayerNorm(channels_in), _conv(channels_in, channels)
        self.time = nn.Linear(time, channels)
        self.mid_norm, self.conv_out = nn.LayerNorm(channels), _conv(channels, channels)
        self.shortcut = nn.Conv2d(channels_in, channels, 1) if channels_in != channels else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Return [N, channels, h, w] of x [N, channels_in, h, w] and the activated timestep embedding [N, time]."""
        inner = self.conv_in(F.silu(_norm(self.in_norm, x))) + self.time(time)[:, :, None, None]
        return self.shortcut(x) + self.conv_out(F.silu(_norm(self.mid_norm, inner)))


def _norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """Normalise [N, C, h, w] over C; the result is channels-last in memory, which convolutions prefer."""
    return norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _conv(channels_in: int, channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels, 3, stride=stride, padding=1)


def _level(blocks: int, channels_in: int, channels: int, time: int) -> nn.ModuleList:
    return nn.ModuleList(ResidualBlock(channels_in, channels, time) for _ in range(blocks))
