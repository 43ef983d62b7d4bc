"""The VAE: diffusers' AutoencoderKL, its loss, and the whitening of its latents.

Border: pixels f32 [N, 3, H, W] in [-1, 1] on one side, *moments* [N, 2C, h, w] (mean, then log-variance) on the other.
Shards hold moments, training draws latents from them with its own noise and whitens them per channel. diffusers is
imported inside the functions that build a VAE: it takes three seconds that most programs do not owe.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


@dataclass(frozen=True, kw_only=True)
class VaeConfig:
    latent_channels: int = 4  # channels C of a latent cell; 1 or more
    # channels of each resolution, finest first; the stride is 2^(blocks - 1); each a multiple of norm_groups
    block_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2  # residual blocks a resolution (the decoder has one more); 1 or more
    norm_groups: int = 32  # groups of every group norm; 1 or more
    mid_attention: bool = True  # one attention layer at the coarsest resolution

    def __post_init__(self) -> None:
        """Reject what diffusers would refuse later and less clearly."""
        for name in ("latent_channels", "layers_per_block", "norm_groups"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected 1 or more")
        if not self.block_channels or any(width < 1 or width % self.norm_groups for width in self.block_channels):
            raise ValueError(
                f"block_channels={self.block_channels}: expected at least one width, each a multiple of "
                f"norm_groups={self.norm_groups}"
            )

    @property
    def stride(self) -> int:
        """Pixels a latent cell, along each side."""
        return 2 ** (len(self.block_channels) - 1)


@dataclass(frozen=True, kw_only=True)
class VaeLossConfig:
    # squared error (pixels in [-1, 1]) that one nat of KL per pixel value may buy: twice the variance of the noise
    # that the codec need not reproduce; more than 0
    kl_weight: float = 1e-3
    kl_warmup_steps: int = 0  # steps over which kl_weight rises linearly from 0, so that no channel dies early; >= 0
    edge_weight: float = 0.0  # weight of the squared error of the differences between neighbouring pixels; 0 or more

    def __post_init__(self) -> None:
        """Reject weights that are not a loss."""
        if self.kl_weight <= 0:
            raise ValueError(f"kl_weight={self.kl_weight}: expected more than 0 (without it latents are not bounded)")
        if self.kl_warmup_steps < 0 or self.edge_weight < 0:
            raise ValueError(
                f"kl_warmup_steps={self.kl_warmup_steps}, edge_weight={self.edge_weight}: expected 0 or more"
            )

    def kl_weight_at(self, step: int) -> float:
        """Return the weight of the KL for update `step` (from 1)."""
        return self.kl_weight * min(1.0, step / max(1, self.kl_warmup_steps))


@dataclass(frozen=True)
class LatentStats:
    """Per-channel mean and standard deviation of sampled latents, f32 [C]; whitened latents have 0 and 1."""

    mean: Tensor
    std: Tensor

    def __post_init__(self) -> None:
        """Reject statistics that cannot whiten."""
        if self.mean.shape != self.std.shape or self.mean.ndim != 1:
            raise ValueError(f"latent mean {list(self.mean.shape)}, std {list(self.std.shape)}: expected [C] both")
        if not (torch.isfinite(self.mean).all() and torch.isfinite(self.std).all() and (self.std > 0).all()):
            raise ValueError(f"latent mean {self.mean.tolist()}, std {self.std.tolist()}: expected finite and std > 0")

    def whiten(self, latents: Tensor) -> Tensor:
        """Map raw latents [N, C, h, w] to mean 0, deviation 1, in f32."""
        return (latents.float() - self._per_channel(self.mean, latents)) / self._per_channel(self.std, latents)

    def unwhiten(self, latents: Tensor) -> Tensor:
        """Undo `whiten`."""
        return latents.float() * self._per_channel(self.std, latents) + self._per_channel(self.mean, latents)

    @staticmethod
    def _per_channel(value: Tensor, latents: Tensor) -> Tensor:
        assert latents.shape[1] == len(value), (latents.shape, value.shape)
        return value.to(latents.device, torch.float32)[:, None, None]


def build_vae(config: VaeConfig) -> "AutoencoderKL":
    """Return a freshly initialised VAE; its scaling factor is 1, since LatentStats whitens."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    blocks = len(config.block_channels)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=config.block_channels,
        layers_per_block=config.layers_per_block,
        latent_channels=config.latent_channels,
        norm_num_groups=config.norm_groups,
        mid_block_add_attention=config.mid_attention,
        scaling_factor=1.0,
    )


def load_vae(folder_or_hub_id: str | Path) -> "AutoencoderKL":
    """Load a VAE in diffusers' layout from a folder or the hub, safetensors only (P11).

    Raises FileNotFoundError for a missing folder, ValueError for one that holds no VAE.
    """
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    folder = Path(folder_or_hub_id)
    looks_local = folder.is_absolute() or str(folder_or_hub_id).count("/") != 1
    if looks_local and not folder.is_dir():
        raise FileNotFoundError(f"vae={folder_or_hub_id}: no such folder; make one with `python -m train.vae`")
    try:
        return AutoencoderKL.from_pretrained(str(folder_or_hub_id), use_safetensors=True, low_cpu_mem_usage=False)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"vae={folder_or_hub_id}: not an AutoencoderKL in safetensors: {reason}") from None


def vae_hash(vae: "AutoencoderKL") -> str:
    """Return 16 hex digits that identify the codec: its structure and the bits of its weights, wherever they lie."""
    digest = hashlib.sha256()
    kept = {key: value for key, value in vae.config.items() if not key.startswith("_")}
    digest.update(json.dumps(kept, sort_keys=True).encode())
    for name, tensor in sorted(vae.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def moments(vae: "AutoencoderKL", pixels: Tensor) -> Tensor:
    """Encode f32 [N, 3, H, W] in [-1, 1] to mean and log-variance [N, 2C, h, w]; the latter lies in [-30, 20]."""
    posterior = vae.encode(pixels).latent_dist
    return torch.cat([posterior.mean, posterior.logvar], dim=1)


def sample_latents(moments: Tensor, noise: Tensor) -> Tensor:
    """Draw raw latents f32 [N, C, h, w] from moments [N, 2C, h, w] with standard normal noise [N, C, h, w]."""
    mean, logvar = moments.float().chunk(2, dim=1)
    return mean + torch.exp(0.5 * logvar) * noise


def decode(vae: "AutoencoderKL", latents: Tensor) -> Tensor:
    """Decode raw (unwhitened) latents [N, C, h, w] to pixels [N, 3, H, W], about in [-1, 1]: clip before use."""
    return vae.decode(latents).sample


def vae_loss(
    config: VaeLossConfig, pixels: Tensor, reconstruction: Tensor, moments: Tensor, step: int
) -> dict[str, Tensor]:
    """Return the parts of update `step`'s loss, each a mean over pixel values, and their weighted sum `loss`.

    With edge_weight = 0, `loss / kl_weight` is the negative evidence bound of a Gaussian decoder of variance
    kl_weight / 2. Ours: squared rather than absolute error, whose gradient does not see a small bright shape until
    the decoder draws it roughly right; on drawn scenes it needs a fifth of the steps.
    """
    mean, logvar = moments.float().chunk(2, dim=1)
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum() / pixels.numel()
    error = reconstruction.float() - pixels
    pixel_error = error.square().mean()
    edge_error = error.diff(dim=-1).square().mean() + error.diff(dim=-2).square().mean()
    loss = pixel_error + config.edge_weight * edge_error + config.kl_weight_at(step) * kl
    return {"loss": loss, "pixel_error": pixel_error, "edge_error": edge_error, "kl": kl}
