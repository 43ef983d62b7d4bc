"""What training and sampling compute with noise: noising, targets, conversions, weights and sampler steps.

Each formula is stated once, at a noise level (signal, sigma), where x_t = signal x0 + sigma noise; which level a
timestep has is said by the schedule (model/schedule.py). A level is two floats (samplers) or two f64 tensors [N]
(training): f64 because 1 - signal^2 near t = 0 is off by a thousandth in f32. Results have the latents' dtype. Nothing
here draws or keeps state.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

# With loss=v, an error in x0 counts as one in v: divided by sigma, which is taken as at least this (JiT's bound).
LEAST_SIGMA = 0.05


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    num_timesteps: int = 1000  # T, timesteps of the schedule, >= 2; the timestep of a flow's pure noise
    # How signal gives way to noise. cosine (the paper) and linear (DDPM's betas) have T levels with signal^2 + sigma^2
    # = 1. flow (SD3, FLUX, BAGEL) is the straight line x_t = (1 - t) x0 + t noise with t in [0, 1]: timestep t T.
    schedule: Literal["cosine", "linear", "flow"] = "cosine"
    # Rescale cosine or linear so that the last timestep is pure noise (Lin et al. 2023); prediction must be v or x0.
    zero_terminal_snr: bool = False
    # Factor on sigma / signal, 0.001...1000, in training and sampling alike; 1: none. For flow it is SD3's timestep
    # shift; for others it shifts log SNR by -2 ln(shift). Larger images need more noise.
    shift: float = 1.0
    # Multiply `shift` by sqrt(n / 4096) for each image, where n is how many numbers it has: tokens x channels.
    shift_by_size: bool = False
    # What the noise head predicts: eps (the paper), v or x0. v is signal noise - sigma x0; for flow it is noise - x0.
    prediction: Literal["eps", "v", "x0"] = "eps"
    # Whose squared error is the loss: own (that of `prediction`), or that of the v or x0 that the prediction implies.
    # prediction=x0 with loss=v is JiT's objective, for patches with more numbers than the model can copy noise of.
    loss: Literal["own", "v", "x0"] = "own"
    # Distribution of t in training, before any shift: uniform, or logit_normal (SD3).
    timestep_sampling: Literal["uniform", "logit_normal"] = "uniform"
    logit_normal_mean: float = 0.0  # mean of logit(t / T), with timestep_sampling=logit_normal
    logit_normal_std: float = 1.0  # standard deviation of logit(t / T), > 0
    # Largest t of images before their caption, 0...T-1; null: no cap. The paper's controlled runs have no cap; 500 is
    # its ablation (table 8), for better captions.
    before_caption_max_timestep: int | None = 500
    min_snr_gamma: float | None = None  # ours: min-SNR loss weight with this gamma, > 0 (5 is usual); null: off

    def __post_init__(self) -> None:
        if self.num_timesteps < 2:
            raise ValueError(f"num_timesteps={self.num_timesteps}: expected at least 2")
        cap = self.before_caption_max_timestep
        if cap is not None and not 0 <= cap < self.num_timesteps:
            raise ValueError(f"before_caption_max_timestep={cap}: expected 0...{self.num_timesteps - 1}, or null")
        if self.logit_normal_std <= 0:
            raise ValueError(f"logit_normal_std={self.logit_normal_std}: expected a positive number")
        if not 0.001 <= self.shift <= 1000:  # beyond, levels round to no noise, by which samplers divide
            raise ValueError(f"shift={self.shift}: expected 0.001...1000")
        if self.min_snr_gamma is not None and self.min_snr_gamma <= 0:
            raise ValueError(f"min_snr_gamma={self.min_snr_gamma}: expected a positive number, or null for no weight")
        self._refuse_contradictions()

    def _refuse_contradictions(self) -> None:
        is_flow, weighs = self.schedule == "flow", self.min_snr_gamma is not None
        no_signal = "sampling starts from pure noise, and knowing the noise there says nothing of x0; predict v or x0"
        refused: list[tuple[bool, dict[str, Any], str]] = [
            (is_flow and self.prediction == "eps", {"schedule": "flow", "prediction": "eps"}, no_signal),
            (
                self.zero_terminal_snr and self.prediction == "eps",
                {"zero_terminal_snr": True, "prediction": "eps"},
                no_signal,
            ),
            (
                self.zero_terminal_snr and is_flow,
                {"zero_terminal_snr": True, "schedule": "flow"},
                "flow ends in pure noise as it is; leave zero_terminal_snr out",
            ),
            (
                self.loss != "own" and self.prediction == "eps",
                {"loss": self.loss, "prediction": "eps"},
                "the error of what the noise implies grows without bound as the signal fades; predict v or x0",
            ),
            (
                weighs and is_flow,
                {"min_snr_gamma": self.min_snr_gamma, "schedule": "flow"},
                "min-SNR is defined for cosine and linear; use timestep_sampling=logit_normal or loss=x0",
            ),
            (
                weighs and self.loss != "own",
                {"min_snr_gamma": self.min_snr_gamma, "loss": self.loss},
                "both weigh timesteps against each other; leave one of them out",
            ),
        ]
        for holds, settings, reason in refused:
            if holds:
                said = " with ".join(f"{name}={value}" for name, value in settings.items())
                raise ValueError(f"diffusion: {said}: {reason}")


class Level(NamedTuple):
    """A noise level: x_t = signal x0 + sigma noise. Two floats, or two f64 tensors [N]."""

    signal: Any
    sigma: Any

    def like(self, images: Tensor) -> "Level":
        """Return the level shaped to multiply `images` [N, ...], in their dtype."""
        if isinstance(self.signal, float):
            return self
        shape = (-1, *[1] * (images.ndim - 1))
        return Level(*(part.view(shape).to(images.dtype) for part in self))

    @property
    def log_snr(self) -> Tensor:
        """Return log(signal^2 / sigma^2), f64 [N], of a level of tensors."""
        return 2 * (self.signal / self.sigma).log()


CLEAN = Level(1.0, 0.0)


def add_noise(x0: Tensor, noise: Tensor, level: Level) -> Tensor:
    """Return x_t = signal x0 + sigma noise, [N, C, h, w]."""
    signal, sigma = level.like(x0)
    return signal * x0 + sigma * noise


def training_target(x0: Tensor, noise: Tensor, level: Level, config: DiffusionConfig) -> Tensor:
    """Return what the noise head should predict: noise, x0, or v, the derivative of x_t along the schedule's path.

    For flow v = noise - x0 (by t), else v = signal noise - sigma x0 (by the angle; Salimans & Ho 2022).
    """
    if config.prediction == "eps":
        return noise
    if config.prediction == "x0":
        return x0
    if config.schedule == "flow":
        return noise - x0
    signal, sigma = level.like(x0)
    return signal * noise - sigma * x0


def to_x0_and_eps(pred: Tensor, x_t: Tensor, level: Level, config: DiffusionConfig) -> tuple[Tensor, Tensor]:
    """Return the (x0, noise) that a prediction implies at `level`."""
    signal, sigma = level.like(x_t)
    if config.prediction == "eps":
        return (x_t - sigma * pred) / signal, pred
    if config.prediction == "x0":
        return pred, eps_of(pred, x_t, level)
    if config.schedule == "flow":
        return x_t - sigma * pred, x_t + signal * pred
    return signal * x_t - sigma * pred, signal * pred + sigma * x_t


def eps_of(x0: Tensor, x_t: Tensor, level: Level) -> Tensor:
    """Return the noise that is left of x_t besides x0."""
    signal, sigma = level.like(x_t)
    return (x_t - signal * x0) / sigma


def x0_error_factor(level: Level, config: DiffusionConfig) -> Tensor:
    """Return f64 [N]: the squared error in x0 over that of the prediction which implies it."""
    if config.prediction == "x0":
        return torch.ones_like(level.sigma)
    squared = level.sigma**2  # v, whatever the schedule: its x0 is linear in v with the factor -sigma
    return squared / level.signal**2 if config.prediction == "eps" else squared


def loss_weights(level: Level, config: DiffusionConfig) -> Tensor | None:
    """Return f32 [N], the weight of each image's squared error in the prediction; None: 1.

    For `loss`, what makes it the error in v or x0; for min-SNR (Hang et al. 2023, section 3.4) that of x0 counts
    min(SNR, gamma).
    """
    if config.min_snr_gamma is not None:
        snr = level.signal**2 / level.sigma**2
        return (snr.clamp(max=config.min_snr_gamma) * x0_error_factor(level, config)).float()
    if config.loss in ("own", config.prediction):
        return None
    weights = x0_error_factor(level, config)
    if config.loss == "v":
        weights = weights / level.sigma.clamp(min=LEAST_SIGMA) ** 2
    return weights.float()


def ddim_step(x0: Tensor, eps: Tensor, level: Level, next_level: Level, eta: float, noise: Tensor | None) -> Tensor:
    """Return x at the next, cleaner level: Song et al. 2021, equation 12; for flow with eta 0 it is Euler's step.

    The level after the last step is CLEAN. `noise` is read only if eta > 0.
    """
    ratio = level.signal / next_level.signal
    std = eta * next_level.sigma / level.sigma * math.sqrt(1 - ratio**2)
    if std <= 0:
        return next_level.signal * x0 + next_level.sigma * eps
    assert noise is not None
    kept = math.sqrt(max(next_level.sigma**2 - std**2, 0.0))
    return next_level.signal * x0 + kept * eps + std * noise


def heun_step(
    x_t: Tensor, now: tuple[Tensor, Tensor], then: tuple[Tensor, Tensor], level: Level, next_level: Level
) -> Tensor:
    """Return x at a flow's next level by Heun's method, from (x0, eps) predicted now and at Euler's next x."""
    (x0, eps), (x0_then, eps_then) = now, then
    return x_t + (next_level.sigma - level.sigma) / 2 * ((eps - x0) + (eps_then - x0_then))


def ddpm_step(x_t: Tensor, x0: Tensor, level: Level, next_level: Level, noise: Tensor | None) -> Tensor:
    """Return a draw of q(x_next | x_t, x0): Ho et al. 2020, equations 6 and 7, across any gap of timesteps.

    `noise` is not read at the last step, whose next level is CLEAN.
    """
    ratio, left = level.signal / next_level.signal, next_level.sigma**2 / level.sigma**2
    beta = 1 - ratio**2
    mean = next_level.signal * beta / level.sigma**2 * x0 + ratio * left * x_t
    variance = left * beta
    if variance <= 0:
        return mean
    assert noise is not None
    return mean + math.sqrt(variance) * noise


def dpmpp_step(x_t: Tensor, x0: Tensor, level: Level, next_level: Level, before: tuple[Tensor, Level] | None) -> Tensor:
    """Return x at the next level by DPM-Solver++(2M): Lu et al. 2022, algorithm 2; deterministic.

    `before` is (x0, level) of the previous step, None at the first, which is of first order. So is the last one, where
    the next level is CLEAN and the result is x0: log SNR is infinite there.
    """
    if next_level.sigma == 0:
        return x0
    now, then = _half_log_snr(level), _half_log_snr(next_level)
    data = x0
    if before is not None:
        x0_before, level_before = before
        data = x0 + ((then - now) / (now - _half_log_snr(level_before)) / 2) * (x0 - x0_before)
    return next_level.sigma / level.sigma * x_t - next_level.signal * math.expm1(now - then) * data


def _half_log_snr(level: Level) -> float:
    return math.log(level.signal / level.sigma) if level.signal > 0 else -math.inf
