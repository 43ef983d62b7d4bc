"""PackedBatch -> loss: the one adapter between data and model.

Latents are whitened (per channel), timesteps made from the batch's uniform draws `u`, and noise added. Both losses are
sums divided by *global* counts, so that splitting a batch over ranks or micro-batches changes nothing:
LM + image_weight * DDPM (the paper, equation 4). Within its document a token attends to itself and earlier tokens,
and a patch also to all patches of its image (model/attention.py).

To add a loss: return its sum from the model or model/losses.py; add it to `micro_step` and StepLoss, its weight
to LossConfig; if its denominator is new, carry the count through PackedBatch, StepBatch and the vote
(train/distributed/vote.py); log it in train/metrics.py.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from data.manifest import LatentSpec
from data.packing import NO_IMAGE, PackedBatch
from model.attention import block_mask, dense_mask
from model.diffusion import DiffusionConfig, Level, add_noise, loss_weights, training_target, x0_error_factor
from model.document_attention import document_mask
from model.latent_space import LatentStats, to_raw
from model.log_snr_bins import log_snr_of_uniform, sum_by_bin
from model.losses import noise_error
from model.schedule import NoiseSchedule
from model.transformer import Mask
from model.transfusion import Timesteps, Transfusion, TransfusionConfig
from train.distributed.parallelize import ParallelConfig, set_micro_step


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    image_weight: float = 5.0  # lambda of the paper, >= 0

    def __post_init__(self) -> None:
        if self.image_weight < 0:
            raise ValueError(f"loss.image_weight={self.image_weight}: expected 0 or more")


@dataclass(frozen=True)
class StepLoss:
    """This rank's losses of one micro-batch."""

    total: torch.Tensor  # [] what backward runs on, already divided by the global counts
    text_nll: torch.Tensor  # [] detached sum over text targets, nats
    image_error: torch.Tensor  # [] detached sum over images of the weighted mean squared error of the prediction
    x0_errors: torch.Tensor  # f64 [3, bins] by log SNR: see model/log_snr_bins.sum_by_bin, of whitened x0
    by_group: torch.Tensor  # f64 [2, groups]: text_nll and image_error of each of the batch's groups
    by_order: torch.Tensor  # f64 [2]: image_error of images with their caption first, and of those before it


def latent_stats(spec: LatentSpec | None, channels: int, device: torch.device) -> LatentStats:
    """Return the mean and std that whiten latents of `spec`; without one (text alone) mean 0 and std 1."""
    mean = spec.mean if spec is not None else (0.0,) * channels
    std = spec.std if spec is not None else (1.0,) * channels
    return LatentStats(torch.tensor(mean, device=device), torch.tensor(std, device=device))


def forward_backward(
    model: Transfusion,
    batch: PackedBatch,
    *,
    stats: LatentStats,
    diffusion: DiffusionConfig,
    image_weight: float,
    parallel: ParallelConfig,
    global_text_targets: int,
    global_images: int,
    is_last: bool,
) -> StepLoss:
    """Add a micro-batch's gradients to the sharded model's (one rank's is sharded too). Collective.

    With `is_last`, the last micro-batch of the step, gradients are also summed over ranks.
    """
    set_micro_step(model, parallel, is_last=is_last)
    loss = micro_step(
        model,
        batch,
        stats=stats,
        diffusion=diffusion,
        image_weight=image_weight,
        global_text_targets=global_text_targets,
        global_images=global_images,
    )
    loss.total.backward()
    return replace(loss, total=loss.total.detach())  # losses are kept until the next log row, the graph must not be


def micro_step(
    model: Transfusion,
    batch: PackedBatch,
    *,
    stats: LatentStats,
    diffusion: DiffusionConfig,
    image_weight: float,
    global_text_targets: int,
    global_images: int,
    uniform_log_snr: bool = False,
    mask_of: Callable[..., Mask] | None = None,
) -> StepLoss:
    """Run the model on one micro-batch. A pure function: all random numbers are in the batch.

    With `uniform_log_snr`, noise levels are spread evenly over the bins of log SNR, whatever `diffusion` says.
    `mask_of` builds the mask from (document_ids, image_ids, visible_until); None: the form that suits the device.
    """
    noisy, timesteps, levels, targets, used, counted_of, token_index = noised_images(
        batch, stats, diffusion, model.config, uniform_log_snr
    )
    mask_of = mask_of or _mask_builder(model, batch.input_ids.device)
    mask_image_ids = batch.image_ids
    if model.config.image_attention == "causal":
        mask_image_ids = torch.full_like(batch.image_ids, NO_IMAGE)  # as if all tokens were text
    output = model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        grid_positions=batch.grid_positions,
        is_image=batch.image_ids != NO_IMAGE,
        mask=mask_of(batch.document_ids, mask_image_ids, batch.visible_until),
        text_target_index=batch.text_target_index,
        text_targets=batch.text_targets,
        noisy=noisy,
        timesteps=Timesteps(timesteps),
        image_valid=used,
        image_token_index=token_index,
        num_text=batch.input_ids.numel() - batch.num_image_tokens(model.config.patch_size),
    )
    image_sum, errors = torch.zeros((), device=batch.input_ids.device), []
    for grid, pred in output.noise_pred.items():
        weight = loss_weights(levels[grid], diffusion)
        error_sum, _, each = noise_error(pred, targets[grid], counted_of[grid], weight)
        image_sum = image_sum + error_sum
        errors.append((each, each if weight is None else each * weight, *levels[grid], counted_of[grid]))
    error, weighted, signal, sigma, counted = (torch.cat(parts) for parts in zip(*errors, strict=True))  # of all grids
    level = Level(signal, sigma)
    text = output.text_nll_sum / max(global_text_targets, 1)
    image = image_sum / max(global_images, 1)
    return StepLoss(
        text + image_weight * image,
        output.text_nll_sum.detach(),
        image_sum.detach(),
        sum_by_bin(error * x0_error_factor(level, diffusion), level.log_snr, counted),
        *_sums(batch, model.config.patch_size, output.text_nll.double(), torch.where(counted, weighted.double(), 0.0)),
    )


def _sums(
    batch: PackedBatch, patch_size: int, text_nll: torch.Tensor, image_errors: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the losses by group f64 [2, groups] and the images' by order f64 [2].

    They are sums of `text_nll` f64 [T] and `image_errors` f64 [N of all grids], 0 in unused slots.
    """
    groups, by_group = batch.group_ids.flatten(), text_nll.new_zeros(2, batch.num_groups)
    by_group[0].index_add_(0, groups[batch.text_target_index], text_nll)
    if not batch.images:
        return by_group, text_nll.new_zeros(2)
    by_group[1].index_add_(0, groups[batch.first_image_tokens(patch_size)], image_errors)
    later = torch.cat([images.before_caption for images in batch.images.values()])
    return by_group, torch.stack(
        [torch.where(later, 0.0, image_errors).sum(), torch.where(later, image_errors, 0.0).sum()]
    )


def _mask_builder(model: Transfusion, device: torch.device) -> Callable[..., Mask]:
    """Return the form of the mask that suits the device: by documents on CPU, but dense in blocks compiled for it."""
    if device.type == "cuda":
        return block_mask
    is_compiled = any(block._compiled_call_impl is not None for block in model.transformer.blocks)
    return dense_mask if is_compiled else document_mask


def noised_images(
    batch: PackedBatch,
    stats: LatentStats,
    diffusion: DiffusionConfig,
    config: TransfusionConfig,
    uniform_log_snr: bool = False,
) -> tuple:
    """Return (noisy, timesteps, levels, targets, used, counted) by latent grid, and the image token index.

    Images that are no targets are used but not counted: they are clean, and at timestep 0, as in the sampler's cache.
    A batch without images gets two invalid ones of 2 x 2 patches, so that every rank runs the patchers and every
    parameter has a gradient. (Two, because compiled residual blocks have graphs of their own for sizes of 1.)
    """
    device = batch.input_ids.device
    if not batch.images:
        size = 2 * config.patch_size
        zeros = torch.zeros((2, config.latent_channels, size, size), device=device)
        key, index = (size, size), torch.zeros(2 * 4, dtype=torch.int64, device=device)
        timestep = torch.zeros(2, dtype=torch.float32 if diffusion.schedule == "flow" else torch.int64, device=device)
        level = Level(*torch.full((2, 2), 0.5, dtype=torch.float64, device=device))
        none = {key: timestep.bool()}
        return {key: zeros}, {key: timestep}, {key: level}, {key: zeros}, none, none, index
    noisy, timesteps, levels, targets, used, counted = {}, {}, {}, {}, {}, {}
    for grid, images in batch.images.items():
        latents = stats.whiten(to_raw(images.stored, images.posterior_noise))
        schedule = noise_schedule(diffusion, latents[0].numel() if diffusion.shift_by_size else 1, device)
        if uniform_log_snr:
            drawn = schedule.nearest(log_snr_of_uniform(images.u))
        else:
            drawn = schedule.timesteps(images.u, images.before_caption)
        timesteps[grid] = torch.where(images.is_target, drawn, 0)
        levels[grid] = schedule.levels(drawn)  # of clean images too: an infinite weight would make their zeros NaN
        noised = add_noise(latents, images.noise, levels[grid])
        noisy[grid] = torch.where(images.is_target[:, None, None, None], noised, latents)
        targets[grid] = training_target(latents, images.noise, levels[grid], diffusion)
        used[grid] = torch.arange(len(images.u), device=device) < images.num_valid
        counted[grid] = images.is_target
    return noisy, timesteps, levels, targets, used, counted, batch.image_token_index


@lru_cache(1024)  # a table is 8 KB, and a step that made one would wait for the device
def noise_schedule(diffusion: DiffusionConfig, numbers: int, device: torch.device) -> NoiseSchedule:
    """Return the schedule of images of `numbers` = C h w numbers (any, without `shift_by_size`), once for all steps."""
    return NoiseSchedule.of(diffusion, numbers, device)
