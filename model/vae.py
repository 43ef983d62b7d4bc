"""The VAE that train.vae trains: diffusers' AutoencoderKL, and its loss.

Border: pixels f32 [N, 3, H, W] in [-1, 1] on one side, *moments* [N, 2C, h, w] (mean, then log-variance) on the other.
diffusers is imported only in the function that builds a VAE: the import takes three seconds.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from torch import Tensor

from model import discriminator, perceptual

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL


@dataclass(frozen=True, kw_only=True)
class VaeConfig:
    latent_channels: int = 4  # channels C of a latent cell; 1 or more
    # channels at each resolution, finest first, each a multiple of norm_groups; the stride is 2^(resolutions - 1)
    block_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2  # residual blocks a resolution (the decoder has one more); 1 or more
    norm_groups: int = 32  # groups of every group norm; 1 or more
    mid_attention: bool = True  # one attention layer at the coarsest resolution

    def __post_init__(self) -> None:
        """Reject what diffusers would reject later and less clearly."""
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
    # Squared or absolute error of pixels in [-1, 1]. Absolute error's gradient ignores a small bright shape until the
    # decoder draws it roughly right: on drawn scenes it needs five times the steps.
    pixel_loss: Literal["squared", "absolute"] = "squared"
    # Pixel error traded for one nat of KL per pixel value; for squared error, twice the variance of the noise that the
    # VAE need not reproduce; more than 0.
    kl_weight: float = 1e-3
    kl_warmup_steps: int = 0  # steps over which kl_weight rises linearly from 0, so that no channel dies early; >= 0
    edge_weight: float = 0.0  # weight of the squared error of the differences between neighbouring pixels; 0 or more
    lpips_weight: float = 0.0  # weight of LPIPS, a distance between VGG16 features; 0 or more; 0 needs no VGG16
    # Safetensors file with VGG16; model.perceptual.load_lpips says how to make it.
    lpips_weights: Annotated[str, "path"] | None = None
    # Weight of the patch discriminator's loss; 0 or more. Fixed, as in the paper's formula; VQGAN's adaptive weight
    # scales it by a ratio of gradient norms that changes every step.
    gan_weight: float = 0.0
    gan_start_step: int = 0  # first step that uses and trains the discriminator; >= 0
    gan_channels: int = 64  # width of the discriminator's first layer, a multiple of 8
    gan_learning_rate: float | None = None  # the discriminator's peak, same schedule; null: optim's; more than 0
    id_weight: float = 0.0  # weight of a distance between MoCo v2 features; not implemented, must be 0

    def __post_init__(self) -> None:
        if self.kl_weight <= 0:
            raise ValueError(f"kl_weight={self.kl_weight}: expected more than 0 (without it latents are unbounded)")
        for name in ("kl_warmup_steps", "edge_weight", "lpips_weight", "gan_weight", "gan_start_step"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: expected 0 or more")
        if self.lpips_weight > 0 and self.lpips_weights is None:
            raise ValueError(
                f"lpips_weight={self.lpips_weight}, but lpips_weights is not given: name a safetensors file with VGG16 "
                "(model.perceptual.load_lpips says how to make it), or set lpips_weight=0"
            )
        if self.gan_channels < 8 or self.gan_channels % 8:
            raise ValueError(f"gan_channels={self.gan_channels}: expected a multiple of 8")
        if self.gan_learning_rate is not None and self.gan_learning_rate <= 0:
            raise ValueError(f"gan_learning_rate={self.gan_learning_rate}: expected more than 0, or null for optim's")
        if self.id_weight != 0:
            raise ValueError(
                f"loss.id_weight={self.id_weight}: the MoCo v2 identity term is not implemented, because its features "
                "are not available as safetensors without torchvision; set loss.id_weight=0"
            )

    @property
    def smallest_picture(self) -> int:
        """Pixels a side that every part of the loss can process."""
        lpips = perceptual.SMALLEST_PICTURE if self.lpips_weight > 0 else 1
        return max(lpips, discriminator.SMALLEST_PICTURE if self.gan_weight > 0 else 1)

    def kl_weight_at(self, step: int) -> float:
        """Return the weight of the KL for update `step` (from 1)."""
        return self.kl_weight * min(1.0, step / max(1, self.kl_warmup_steps))

    def gan_weight_at(self, step: int) -> float:
        """Return the weight of the discriminator's loss for update `step` (from 1); 0: not used."""
        return self.gan_weight if step >= self.gan_start_step else 0.0


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


def moments(vae: "AutoencoderKL", pixels: Tensor) -> Tensor:
    """Encode f32 [N, 3, H, W] in [-1, 1] to mean and log-variance [N, 2C, h, w]; the latter is in [-30, 20]."""
    posterior = vae.encode(pixels).latent_dist
    return torch.cat([posterior.mean, posterior.logvar], dim=1)


def decode(vae: "AutoencoderKL", latents: Tensor) -> Tensor:
    """Decode raw (unwhitened) latents [N, C, h, w] to pixels [N, 3, H, W], about in [-1, 1]: clip before use."""
    return vae.decode(latents).sample


def kl_nats(moments: Tensor) -> Tensor:
    """Return the KL of the posteriors [N, 2C, h, w] from N(0, 1) in nats, summed over all latents: f32 []."""
    mean, logvar = moments.float().chunk(2, dim=1)
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum()


def vae_loss(
    config: VaeLossConfig,
    pixels: Tensor,
    reconstruction: Tensor,
    moments: Tensor,
    step: int,
    *,
    lpips: Tensor | None = None,
    fake_scores: Tensor | None = None,
) -> dict[str, Tensor]:
    """Return the parts of update `step`'s loss and their weighted sum `loss`, all f32 [] and means over the batch.

    Pixel errors and KL are both means over pixel values, so their ratio is that of the sums over a picture, for which
    the literature states its weights. `lpips` [N] and the discriminator's `fake_scores` of the reconstruction add the
    parts `lpips` and `gan`. With squared error and the KL alone, `loss / kl_weight` is the negative evidence lower
    bound of a Gaussian decoder of variance kl_weight / 2.
    """
    kl = kl_nats(moments) / pixels.numel()
    error = reconstruction.float() - pixels
    pixel_error = error.square().mean() if config.pixel_loss == "squared" else error.abs().mean()
    edge_error = error.diff(dim=-1).square().mean() + error.diff(dim=-2).square().mean()
    loss = pixel_error + config.edge_weight * edge_error + config.kl_weight_at(step) * kl
    parts = {"pixel_error": pixel_error, "edge_error": edge_error, "kl": kl}
    if lpips is not None:
        parts["lpips"] = lpips.mean()
        loss = loss + config.lpips_weight * parts["lpips"]
    if fake_scores is not None:
        parts["gan"] = discriminator.generator_loss(fake_scores)
        loss = loss + config.gan_weight_at(step) * parts["gan"]
    return {"loss": loss, **parts}
