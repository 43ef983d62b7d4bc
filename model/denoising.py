"""Denoising: from noise to clean latents, by any of the samplers, for anything that predicts."""

from collections.abc import Callable

import torch
from torch import Tensor

from model.diffusion import (
    CLEAN,
    DiffusionConfig,
    Level,
    ddim_step,
    ddpm_step,
    dpmpp_step,
    eps_of,
    heun_step,
    to_x0_and_eps,
)
from model.sampler_config import SamplerConfig
from model.schedule import BASE_NUMBERS, NoiseSchedule


def denoise(
    predict: Callable[[Tensor, float, bool], Tensor],
    noise: Callable[[int], Tensor],
    config: SamplerConfig,
    diffusion: DiffusionConfig,
    numbers: int,
    report: Callable[[int, Tensor], list[int] | None],
) -> Tensor:
    """Return clean latents [N, C, h, w] of `numbers` = C h w numbers each.

    `predict(x_t, timestep, is_guided)` is the noise head's prediction. `noise(0)` is where the images start, and
    `noise(i)` what a random sampler adds in step i. `report(i, x0)` is called after step i, counted from 1, with the
    clean latents that the model predicted in it. It returns which images, by place and in which order, go on; None: all
    as they are. What it raises ends the denoising.
    """
    steps = NoiseSchedule.of(diffusion, numbers).sampling_steps(config.steps, config.spacing)
    eta = config.eta if config.sampler == "ddim" else 0.0
    lowest, highest = config.guidance_interval or (0, diffusion.num_timesteps)

    def implied(x_t: Tensor, t: float, level: Level) -> tuple[Tensor, Tensor]:
        """Return the (x0, noise) that the model predicts in x_t."""
        pred = predict(x_t, t, config.is_guided and lowest <= t <= highest)
        x0, eps = to_x0_and_eps(pred, x_t, level, diffusion)
        if config.clip_x0 is None:
            return x0, eps
        x0 = x0.clamp(-config.clip_x0, config.clip_x0)
        return x0, eps_of(x0, x_t, level)

    before: tuple[Tensor, Level] | None = None
    x_t = noise(0)
    for step, ((t, level), (t_next, cleaner)) in enumerate(zip(steps, [*steps[1:], (0, CLEAN)], strict=True), start=1):
        x0, eps = implied(x_t, t, level)
        is_random = (config.sampler == "ddpm" or eta > 0) and cleaner is not CLEAN
        added = noise(step) if is_random else None
        if config.sampler == "ddpm":
            x_t = ddpm_step(x_t, x0, level, cleaner, added)
        elif config.sampler == "dpm++":
            x_t, before = dpmpp_step(x_t, x0, level, cleaner, before), (x0, level)
        else:
            x_next = ddim_step(x0, eps, level, cleaner, eta, added)
            if config.sampler == "heun" and cleaner is not CLEAN:
                x_next = heun_step(x_t, (x0, eps), implied(x_next, t_next, cleaner), level, cleaner)
            x_t = x_next
        kept = report(step, x0)
        if kept is not None:
            x_t, before = x_t[kept], before and (before[0][kept], before[1])
            if not kept:
                break
    return x_t


def first_step_error(config: SamplerConfig, diffusion: DiffusionConfig) -> float:
    """Return the factor by which the first denoising step, by DDIM, multiplies an error of the predicted noise."""
    schedule = NoiseSchedule.of(diffusion, BASE_NUMBERS)
    (_, first), *rest = schedule.sampling_steps(config.steps, config.spacing)
    error, none = torch.ones(1), torch.zeros(1)
    x0, eps = to_x0_and_eps(error, none, first, diffusion)
    return ddim_step(x0, eps, first, rest[0][1] if rest else CLEAN, 0.0, None).abs().item()
