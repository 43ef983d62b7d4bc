"""The noise process: schedule, noising, targets, conversions and sampler steps, as pure functions of explicit noise.

Time is a table `alphas_cumprod` f64 [T]: training gathers from it by timestep, samplers read single floats. f64 because
1 - alpha near t = 0 is off by a thousandth in f32; results have the latents' dtype. Nothing here draws or keeps state.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Prediction = Literal["eps", "v", "x0"]
Spacing = Literal["leading", "trailing", "linspace"]


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    num_timesteps: int = 1000  # T, timesteps of the schedule, >= 2
    prediction: Prediction = "eps"  # what the noise head predicts: eps (the paper), v or x0
    timestep_sampling: Literal["uniform", "logit_normal"] = "uniform"  # distribution of t in training
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
        if self.min_snr_gamma is not None and self.min_snr_gamma <= 0:
            raise ValueError(f"min_snr_gamma={self.min_snr_gamma}: expected a positive number, or null for no weight")


def alphas_cumprod(num_timesteps: int = 1000) -> Tensor:
    """Return f64 [T]: the cosine schedule of Nichol & Dhariwal 2021, equation 17 (s = 0.008, betas <= 0.999)."""

    def alpha_bar(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    steps = range(num_timesteps)
    betas = [min(1 - alpha_bar((i + 1) / num_timesteps) / alpha_bar(i / num_timesteps), 0.999) for i in steps]
    return (1 - torch.tensor(betas, dtype=torch.float64)).cumprod(0)


def timesteps_from_uniform(u: Tensor, before_caption: Tensor, config: DiffusionConfig) -> Tensor:
    """Return int64 timesteps [N] from draws u [N] in [0, 1) and `before_caption` bool [N].

    Capped images are spread over 0...cap, not clipped to it: all timesteps stay equally likely.
    """
    cap = config.before_caption_max_timestep
    choices = torch.full_like(u, config.num_timesteps, dtype=torch.float64)
    if cap is not None:
        choices = torch.where(before_caption, float(cap + 1), choices)
    u = u.double()
    if config.timestep_sampling == "logit_normal":
        u = torch.sigmoid(config.logit_normal_mean + config.logit_normal_std * torch.special.ndtri(u))
    return torch.minimum((u * choices).floor(), choices - 1).long()


def add_noise(x0: Tensor, noise: Tensor, timesteps: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """Return x_t = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) noise, [N, C, h, w] at int64 timesteps [N]."""
    signal, sigma = _signal_and_sigma(alphas_cumprod[timesteps], x0)
    return signal * x0 + sigma * noise


def training_target(
    x0: Tensor, noise: Tensor, timesteps: Tensor, alphas_cumprod: Tensor, prediction: Prediction
) -> Tensor:
    """Return what the noise head should predict: noise, x0, or v = sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) x0."""
    if prediction == "eps":
        return noise
    if prediction == "x0":
        return x0
    signal, sigma = _signal_and_sigma(alphas_cumprod[timesteps], x0)
    return signal * noise - sigma * x0


def loss_weights(timesteps: Tensor, alphas_cumprod: Tensor, config: DiffusionConfig) -> Tensor | None:
    """Return f32 [N], the min-SNR weights (Hang et al. 2023, section 3.4) of the squared error; None when off."""
    if config.min_snr_gamma is None:
        return None
    alpha = alphas_cumprod[timesteps]
    snr = alpha / (1 - alpha)
    clipped = snr.clamp(max=config.min_snr_gamma)  # the weight of the error in x0
    per_unit = {"x0": torch.ones_like(snr), "eps": snr, "v": snr + 1}[config.prediction]
    return (clipped / per_unit).float()


def to_x0_and_eps(pred: Tensor, x_t: Tensor, alpha: float | Tensor, prediction: Prediction) -> tuple[Tensor, Tensor]:
    """Return (x0, eps) that a prediction implies at `alpha` = alpha_bar_t, a float or f64 [N]."""
    signal, sigma = _signal_and_sigma(alpha, x_t)
    if prediction == "eps":
        return (x_t - sigma * pred) / signal, pred
    if prediction == "x0":
        return pred, (x_t - signal * pred) / sigma
    return signal * x_t - sigma * pred, signal * pred + sigma * x_t


def ddim_step(x0: Tensor, eps: Tensor, alpha: float, alpha_prev: float, eta: float, noise: Tensor | None) -> Tensor:
    """Return x at the previous, cleaner timestep: Song et al. 2021, equation 12.

    `alpha`, `alpha_prev` are alpha_bar before and after the step (1.0 after the last one); `noise` is read only if
    eta > 0.
    """
    std = eta * math.sqrt((1 - alpha_prev) / (1 - alpha) * (1 - alpha / alpha_prev))
    x_prev = math.sqrt(alpha_prev) * x0 + math.sqrt(max(1 - alpha_prev - std**2, 0.0)) * eps
    if std <= 0:
        return x_prev
    assert noise is not None
    return x_prev + std * noise


def ddpm_step(x_t: Tensor, x0: Tensor, alpha: float, alpha_prev: float, noise: Tensor | None) -> Tensor:
    """Return a draw of q(x_prev | x_t, x0): Ho et al. 2020, equations 6 and 7, across any gap of timesteps.

    `noise` is not read at the last step, where alpha_prev is 1.0.
    """
    ratio = alpha / alpha_prev
    mean = (
        math.sqrt(alpha_prev) * (1 - ratio) / (1 - alpha) * x0 + math.sqrt(ratio) * (1 - alpha_prev) / (1 - alpha) * x_t
    )
    variance = (1 - alpha_prev) / (1 - alpha) * (1 - ratio)
    if variance <= 0:
        return mean
    assert noise is not None
    return mean + math.sqrt(variance) * noise


def dpmpp_step(x_t: Tensor, x0: Tensor, alpha: float, alpha_prev: float, before: tuple[Tensor, float] | None) -> Tensor:
    """Return x at the previous timestep by DPM-Solver++(2M): Lu et al. 2022, algorithm 2; deterministic.

    `before` is (x0, alpha) of the previous step, None at the first, which is of first order. So is the last one, where
    alpha_prev is 1.0 and the result is x0: log-SNR is infinite there.
    """
    if alpha_prev == 1.0:
        return x0
    half_log_snr, half_log_snr_prev = _half_log_snr(alpha), _half_log_snr(alpha_prev)
    h = half_log_snr_prev - half_log_snr
    data = x0
    if before is not None:
        x0_before, alpha_before = before
        data = x0 + (h / (half_log_snr - _half_log_snr(alpha_before)) / 2) * (x0 - x0_before)
    return math.sqrt((1 - alpha_prev) / (1 - alpha)) * x_t - math.sqrt(alpha_prev) * math.expm1(-h) * data


def sampling_timesteps(num_steps: int, spacing: Spacing, num_timesteps: int = 1000) -> list[int]:
    """Return `num_steps` timesteps, noisiest first, by one of the spacings of diffusers (Lin et al. 2023, table 2)."""
    if not 1 <= num_steps <= num_timesteps:
        raise ValueError(f"{num_steps} sampling steps: expected 1...{num_timesteps}, the timesteps of the schedule")
    if spacing == "leading":
        stride = num_timesteps // num_steps
        return [i * stride for i in reversed(range(num_steps))]
    if spacing == "trailing":
        return [round(num_timesteps - i * num_timesteps / num_steps) - 1 for i in range(num_steps)]
    return torch.linspace(0, num_timesteps - 1, num_steps, dtype=torch.float64).round().long().flip(0).tolist()


def _half_log_snr(alpha: float) -> float:
    return 0.5 * math.log(alpha / (1 - alpha))


def _signal_and_sigma(alpha: float | Tensor, like: Tensor) -> tuple[float | Tensor, float | Tensor]:
    """Return (sqrt(alpha_bar), sqrt(1 - alpha_bar)), shaped to multiply `like` [N, ...] where alpha is [N]."""
    if isinstance(alpha, float):
        return math.sqrt(alpha), math.sqrt(1 - alpha)
    alpha = alpha.view(-1, *[1] * (like.ndim - 1))
    return alpha.sqrt().to(like.dtype), (1 - alpha).sqrt().to(like.dtype)
