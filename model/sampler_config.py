"""The options of sampling: how pictures are denoised and guided, and how text is drawn."""

from dataclasses import dataclass, replace
from typing import Literal

from model.diffusion import DiffusionConfig
from model.schedule import Spacing

Sampler = Literal["auto", "ddpm", "ddim", "dpm++", "euler", "heun"]


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    # ddpm (ancestral), ddim (with eta) or dpm++ (DPM-Solver++(2M)); of models trained with schedule=flow, euler or heun
    # (which runs the model twice a step); auto: ddpm, or euler.
    sampler: Sampler = "auto"
    steps: int = 250  # denoising steps per picture, 1...num_timesteps
    spacing: Spacing = "leading"  # which timesteps: leading, trailing or linspace, as in diffusers; not for flow
    eta: float = 0.0  # DDIM's noise, 0 (deterministic)...1 (as DDPM)
    guidance: float = 3.0  # scale of classifier-free guidance, 0 or more; 1 is none (the paper: 5 and 3)
    # Scale, 0 or more, of how much a picture follows the prompt's pictures; `guidance` is then that of its texts
    # (InstructPix2Pix: 1.5 and 7.5). It runs a third branch. null: `guidance` is the scale of the whole prompt.
    image_guidance: float | None = None
    # Lowest and highest timestep, 0...num_timesteps, at which guidance acts (Kynkäänniemi et al. 2024); elsewhere
    # the unconditional branch, or the guide, is not run. null: all timesteps.
    guidance_interval: tuple[int, int] | None = None
    guidance_rescale: float = 0.0  # share, 0...1, of the contrast added by guidance to take back (Lin et al. 2023: 0.7)
    clip_x0: float | None = None  # bound on the predicted clean latents' magnitude, > 0; null: none
    temperature: float = 1.0  # of text, 0 (greedy) or more
    top_p: float = 1.0  # text tokens are drawn from the smallest set that holds this probability, (0, 1]
    max_new_tokens: int = 256  # text tokens sampled per row, 0 or more
    max_images: int = 1  # pictures drawn per row, 0 or more
    # Tokens a row may hold, prompt included; null: what the longest row of the batch can need.
    max_length: int | None = None
    prefill_chunk: int = 64  # prompt tokens per forward, >= 1

    def __post_init__(self) -> None:
        lowest, highest = self.guidance_interval or (0, 0)
        expectations = {
            "steps": (self.steps >= 1, "at least 1"),
            "eta": (0 <= self.eta <= 1, "0...1"),
            "guidance": (self.guidance >= 0, "0 or more; 1 is no guidance"),
            "image_guidance": ((self.image_guidance or 0) >= 0, "0 or more, or null for one scale"),
            "guidance_interval": (0 <= lowest <= highest, "[lowest, highest] timestep, or null for all"),
            "guidance_rescale": (0 <= self.guidance_rescale <= 1, "0 (off)...1"),
            "clip_x0": (self.clip_x0 is None or self.clip_x0 > 0, "a positive number, or null for none"),
            "temperature": (self.temperature >= 0, "0 (greedy) or more"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "max_new_tokens": (self.max_new_tokens >= 0, "0 or more"),
            "max_images": (self.max_images >= 0, "0 or more"),
            "max_length": (self.max_length is None or self.max_length >= 1, "at least 1, or null"),
            "prefill_chunk": (self.prefill_chunk >= 1, "at least 1"),
        }
        for name, (holds, expected) in expectations.items():
            if not holds:
                raise ValueError(f"{name}={getattr(self, name)}: expected {expected}")

    @property
    def is_guided(self) -> bool:
        """Return whether any branch but the conditional one changes a prediction."""
        return self.guidance != 1 or self.image_guidance not in (None, 1)

    def suited_to(self, diffusion: DiffusionConfig) -> "SamplerConfig":
        """Return the same with a sampler of the schedule that the model was trained with, for auto.

        Raises ValueError for a sampler of other schedules, and for steps or timesteps that it does not have.
        """
        is_flow, count = diffusion.schedule == "flow", diffusion.num_timesteps
        last = count if is_flow else count - 1
        known: tuple[Sampler, ...] = ("euler", "heun") if is_flow else ("ddpm", "ddim", "dpm++")
        if self.sampler not in ("auto", *known):
            raise ValueError(
                f"sampler={self.sampler}: the model was trained with schedule={diffusion.schedule}; expected auto or "
                f"one of {', '.join(known)}"
            )
        if (self.steps > count and not is_flow) or max(self.guidance_interval or (0,)) > last:
            raise ValueError(
                f"steps={self.steps}, guidance_interval={self.guidance_interval}: expected at most {count} steps "
                f"and timesteps in 0...{last}, those that the model was trained with"
            )
        return replace(self, sampler=known[0]) if self.sampler == "auto" else self


def one_picture(config: SamplerConfig) -> SamplerConfig:
    """Return `config` for drawing one picture and nothing else."""
    return replace(config, max_new_tokens=0, max_images=1)


def text_alone(config: SamplerConfig) -> SamplerConfig:
    """Return `config` for writing text and no pictures."""
    return replace(config, max_images=0, guidance=1.0, image_guidance=None)
