"""PackedBatch -> loss: the one adapter between data and model.

Latents are whitened here, timesteps come from u, noise is added before patchification. Both losses are sums divided
by *global* counts, so neither ranks nor micro-batches change them: LM + image_weight * DDPM (the paper, equation 4).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask

from data.manifest import LatentSpec
from data.packing import NO_IMAGE, PackedBatch
from model.attention import block_mask, dense_mask
from model.diffusion import (
    DiffusionConfig,
    add_noise,
    alphas_cumprod,
    loss_weights,
    timesteps_from_uniform,
    training_target,
)
from model.losses import noise_error
from model.transfusion import TransfusionConfig
from model.vae import LatentStats, sample_latents


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    image_weight: float = 5.0  # lambda of the paper, >= 0

    def __post_init__(self) -> None:
        if self.image_weight < 0:
            raise ValueError(f"loss.image_weight={self.image_weight}: expected 0 or more")


@dataclass(frozen=True)
class StepLoss:
    """This rank's sums over one micro-batch; divide by global counts for the reported losses."""

    total: torch.Tensor  # [] what backward runs on, already divided by the global counts
    text_nll: torch.Tensor  # [] detached sum over text targets, nats
    image_error: torch.Tensor  # [] detached sum over images of the mean squared error of the prediction


def latent_stats(spec: LatentSpec | None, channels: int, device: torch.device) -> LatentStats:
    """Return what whitens the latents of `spec`; the identity where there are none."""
    mean = spec.mean if spec is not None else (0.0,) * channels
    std = spec.std if spec is not None else (1.0,) * channels
    return LatentStats(torch.tensor(mean, device=device), torch.tensor(std, device=device))


def micro_step(
    model: nn.Module,
    batch: PackedBatch,
    *,
    stats: LatentStats,
    diffusion: DiffusionConfig,
    image_weight: float,
    global_text_targets: int,
    global_images: int,
    mask_of: Callable[..., BlockMask | torch.Tensor | None] | None = None,
) -> StepLoss:
    """Run the model on one micro-batch. Noise and timesteps are in the batch, so this is a pure function.

    `mask_of` makes the mask of (document_ids, image_ids, visible_until); None: in the form that the device wants.
    """
    noisy, timesteps, targets, valid, token_index = noised_images(batch, stats, diffusion, model.config)
    table = schedule(diffusion.num_timesteps, batch.input_ids.device)
    mask_of = mask_of or (block_mask if batch.input_ids.is_cuda else dense_mask)
    seen_as_images = batch.image_ids
    if model.config.image_attention == "causal":
        seen_as_images = torch.full_like(batch.image_ids, NO_IMAGE)  # as if all were text
    output = model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        grid_positions=batch.grid_positions,
        is_image=batch.image_ids != NO_IMAGE,
        mask=mask_of(batch.document_ids, seen_as_images, batch.visible_until),
        text_target_index=batch.text_target_index,
        text_targets=batch.text_targets,
        noisy=noisy,
        timesteps=timesteps,
        image_valid=valid,
        image_token_index=token_index,
    )
    image_sum = torch.zeros((), device=batch.input_ids.device)
    for grid, pred in output.noise_pred.items():
        weight = loss_weights(timesteps[grid], table, diffusion)
        image_sum = image_sum + noise_error(pred, targets[grid], valid[grid], weight)[0]
    text = output.text_nll_sum / max(global_text_targets, 1)
    image = image_sum / max(global_images, 1)
    return StepLoss(text + image_weight * image, output.text_nll_sum.detach(), image_sum.detach())


def noised_images(
    batch: PackedBatch, stats: LatentStats, diffusion: DiffusionConfig, config: TransfusionConfig
) -> tuple:
    """Return (noisy, timesteps, targets, valid) by latent grid, and the image token index.

    A batch without images gets one invalid picture of a single patch, so that every rank runs the patchers and
    every parameter has a gradient.
    """
    device = batch.input_ids.device
    if not batch.images:
        size = config.patch_size
        zeros = torch.zeros((1, config.latent_channels, size, size), device=device)
        key, index = (size, size), torch.zeros(1, dtype=torch.int64, device=device)
        timestep = torch.zeros(1, dtype=torch.int64, device=device)
        return {key: zeros}, {key: timestep}, {key: zeros}, {key: timestep.bool()}, index
    table = schedule(diffusion.num_timesteps, device)
    noisy, timesteps, targets, valid = {}, {}, {}, {}
    for grid, images in batch.images.items():
        latents = stats.whiten(sample_latents(images.moments.float(), images.posterior_noise))
        t = timesteps_from_uniform(images.u, images.before_caption, diffusion)
        noisy[grid] = add_noise(latents, images.noise, t, table)
        targets[grid] = training_target(latents, images.noise, t, table, diffusion.prediction)
        timesteps[grid] = t
        valid[grid] = torch.arange(len(images.u), device=device) < images.num_valid
    return noisy, timesteps, targets, valid, batch.image_token_index


@lru_cache(4)
def schedule(num_timesteps: int, device: torch.device) -> torch.Tensor:
    """Return `alphas_cumprod` f64 [T] on `device`, one tensor for all steps."""
    return alphas_cumprod(num_timesteps).to(device)
