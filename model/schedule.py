"""The noise schedule: which timesteps there are, how training draws them, and the noise level of each.

cosine and linear have a table of T levels and whole timesteps 0...T-1; flow has any timestep in [0, T]. The model sees
the timestep, and x_t the level. Nothing here draws or keeps state.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from model.diffusion import DiffusionConfig, Level

Spacing = Literal["leading", "trailing", "linspace"]
BASE_NUMBERS = 4096  # of an image that `shift_by_size` leaves as it is (RAE, section 4: 4,096)


@dataclass(frozen=True)
class NoiseSchedule:
    config: DiffusionConfig
    shift: float  # factor on sigma / signal
    alphas: Tensor | None  # f64 [T], signal^2 by timestep, shifted; None: flow

    @classmethod
    def of(cls, config: DiffusionConfig, numbers: int, device: torch.device | str = "cpu") -> "NoiseSchedule":
        """Return the schedule of images of `numbers` = C h w numbers, with its table on `device`."""
        shift = config.shift * (math.sqrt(numbers / BASE_NUMBERS) if config.shift_by_size else 1.0)
        if config.schedule == "flow":
            return cls(config, shift, None)
        alphas = alphas_cumprod(config)
        if shift != 1.0:
            alphas = alphas / (alphas + shift**2 * (1 - alphas))
        return cls(config, shift, alphas.to(device))

    def timesteps(self, u: Tensor, before_caption: Tensor) -> Tensor:
        """Return timesteps [N], int64 or for flow f32, from draws u [N] in [0, 1) and `before_caption` bool [N].

        Capped images are spread over 0...cap, not clipped to it: all timesteps stay equally likely.
        """
        config, u = self.config, u.double()
        cap = config.before_caption_max_timestep
        if config.timestep_sampling == "logit_normal":
            u = torch.sigmoid(config.logit_normal_mean + config.logit_normal_std * torch.special.ndtri(u))
        most = torch.full_like(u, config.num_timesteps)
        if self.alphas is None:
            if cap is not None:
                most = torch.where(before_caption, float(cap), most)
            return (self._shifted(u) * most).float()
        if cap is not None:
            most = torch.where(before_caption, float(cap + 1), most)
        return torch.minimum((u * most).floor(), most - 1).long()

    def levels(self, timesteps: Tensor) -> Level:
        """Return the noise levels, f64 [N], of timesteps [N]."""
        if self.alphas is None:
            t = timesteps.double() / self.config.num_timesteps
            return Level(1 - t, t)
        alphas = self.alphas[timesteps]
        return Level(alphas.sqrt(), (1 - alphas).sqrt())

    def nearest(self, log_snr: Tensor) -> Tensor:
        """Return the timesteps [N], int64 or for flow f32, whose log SNR is nearest to f64 [N]."""
        if self.alphas is None:
            return (torch.sigmoid(-log_snr / 2) * self.config.num_timesteps).float()
        known = torch.logit(self.alphas).flip(0)  # ascending
        above = torch.searchsorted(known, log_snr).clamp(1, len(known) - 1)
        is_above = known[above] - log_snr < log_snr - known[above - 1]
        return len(known) - 1 - torch.where(is_above, above, above - 1)

    def sampling_steps(self, steps: int, spacing: Spacing) -> list[tuple[float, Level]]:
        """Return (timestep, level) of each of `steps` sampling steps, noisiest first.

        Flow steps from pure noise in equal parts of t, before the shift; `spacing` is for the others.
        """
        if self.alphas is None:
            times = [float(self._shifted(torch.tensor(1 - i / steps, dtype=torch.float64))) for i in range(steps)]
            return [(t * self.config.num_timesteps, Level(1 - t, t)) for t in times]
        alphas = self.alphas.tolist()
        timesteps = sampling_timesteps(steps, spacing, len(alphas))
        return [(t, Level(math.sqrt(alphas[t]), math.sqrt(1 - alphas[t]))) for t in timesteps]

    def _shifted(self, t: Tensor) -> Tensor:
        """Return a flow's t with sigma / signal multiplied by the shift (Esser et al. 2024, equation 23)."""
        return self.shift * t / (self.shift * t + (1 - t))  # 1 at t = 1, to the last bit


def alphas_cumprod(config: DiffusionConfig) -> Tensor:
    """Return signal^2, f64 [T], of a cosine or linear schedule without shift.

    cosine: Nichol & Dhariwal 2021, equation 17 (s = 0.008, betas <= 0.999). linear: Ho et al. 2020, betas from 1e-4 to
    0.02 at T = 1000, in proportion at others. zero_terminal_snr: Lin et al. 2023, algorithm 1.
    """
    count = config.num_timesteps
    if config.schedule == "cosine":

        def alpha_bar(t: float) -> float:
            return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

        steps = [1 - alpha_bar((i + 1) / count) / alpha_bar(i / count) for i in range(count)]
        betas = torch.tensor([min(beta, 0.999) for beta in steps], dtype=torch.float64)
    else:
        betas = (torch.linspace(1e-4, 0.02, count, dtype=torch.float64) * (1000 / count)).clamp(max=0.999)
    alphas = (1 - betas).cumprod(0)
    if config.zero_terminal_snr:
        signal = alphas.sqrt()
        alphas = ((signal - signal[-1]) * (signal[0] / (signal[0] - signal[-1]))).square()
    return alphas


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
