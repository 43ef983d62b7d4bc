"""A trained model with its tokenizer and VAE: text and pictures in, text and pictures out.

Batches of one call have one shape, the last one filled up: so the bits of a picture depend on its prompt, its number
and that shape, not on what the other rows hold. Smaller batches for fewer rows differ by float rounding only.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch

from data.manifest import LatentSpec
from data.pictures import from_unit, to_unit
from data.storage import Location
from data.tokenizer import Tokenizer
from model.diffusion import DiffusionConfig
from model.draws import Draws, SeededDraws
from model.sampler import Prompt, SamplerConfig, SpecialTokens, first_step_error, generate
from model.transfusion import Transfusion
from model.vae import LatentStats, decode, moments, sample_latents, stride_of
from train.distributed.ranks import Device, Ranks
from train.inference.saved_model import LoadedModel, SavedModel, load_matching_vae
from train.pretrain_config import PretrainConfig
from train.step import latent_stats

log = logging.getLogger(__name__)

MOST_ERROR = 50.0  # times that a sampler's first step may multiply the error of a predicted noise without a warning
BATCH = 50  # rows a sampling batch: small enough for a laptop, large enough to fill two cores
# Progress in rows, of which a denoising step is a fraction.
BAR_FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {n:.1f}/{total:.0f} [{elapsed}<{remaining}]"

Part = str | np.ndarray  # text, or a picture uint8 [H, W, 3]
Progress = Callable[[float], object]  # is told how many rows, or what fraction of one, were added


@dataclass(frozen=True, kw_only=True)
class PipelineConfig(SamplerConfig):
    """What every program that samples asks for."""

    checkpoint: Location = "runs/pretrain"  # a checkpoint; a run folder: its newest that verifies; or an export
    weights: str = "auto"  # auto: the first EMA if the run kept one; ema: the first; ema-N: of half-life N; model
    vae: Location | None = None  # AutoencoderKL; null: the one the run names
    tokenizer: Location | None = None  # SentencePiece model; null: the copy in the run or export, else the run's
    seed: int = 0  # of noise and tokens
    device: Device = "auto"  # auto: CUDA if there is any
    dtype: Literal["float32", "bfloat16"] = "float32"  # number format of the model
    batch_size: int = BATCH  # rows sampled side by side, >= 1; a part of what decides a picture's last bits

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size}: expected at least 1")


@dataclass
class Pipeline:
    """Everything needed to draw and describe. `latent_spec` and `grid` are those of the training data."""

    model: Transfusion
    tokenizer: Tokenizer
    vae: torch.nn.Module
    stats: LatentStats
    grid: tuple[int, int]  # of new pictures
    resolution: int  # pixels a side of pictures that are given
    diffusion: DiffusionConfig
    vae_hash: str  # what the training data's latents were encoded with
    batch_size: int = BATCH
    weights: str = "model"  # which of a run's: model, or the label of an EMA
    stored: SavedModel | None = None  # where it was loaded from
    _seen: set[str] = field(default_factory=set)  # prompts

    @classmethod
    def load(cls, config: PipelineConfig, ranks: Ranks) -> tuple["Pipeline", PretrainConfig, int]:
        """Load what `config.checkpoint` names; return it with its recipe and step. Collective.

        Raises FileNotFoundError or ValueError when there is none, or its tokenizer or VAE are not at hand.
        """
        trained = LoadedModel.load(config.checkpoint, ranks, config.weights, config.tokenizer)
        last = trained.recipe.diffusion.num_timesteps - 1
        if config.steps > last + 1 or max(config.guidance_interval or (0,)) > last:
            raise ValueError(
                f"steps={config.steps}, guidance_interval={config.guidance_interval}: expected at most {last + 1} "
                f"steps and timesteps in 0...{last}, those that the model was trained with"
            )
        recipe, vae = trained.recipe, config.vae or trained.recipe.vae
        factor = first_step_error(config, recipe.diffusion)
        if ranks.is_first and recipe.diffusion.prediction == "eps" and config.clip_x0 is None and factor > MOST_ERROR:
            log.warning(
                "spacing=%s with a model that predicts noise: the first of %d steps multiplies its error %.0f "
                "times; use spacing=leading, which begins where there is signal, or clip_x0",
                *(config.spacing, config.steps, factor),
            )
        model = trained.model.to(getattr(torch, config.dtype))
        generation = cls.of(model, trained.tokenizer, recipe, trained.latent_spec, trained.grids, vae)
        of_run = {"weights": trained.weights, "stored": trained.stored}
        return replace(generation, batch_size=config.batch_size, **of_run), recipe, trained.step

    @classmethod
    def of(
        cls,
        model: Transfusion,
        tokenizer: Tokenizer,
        recipe: PretrainConfig,
        spec: LatentSpec | None,
        grids: Sequence[Sequence[int]],
        vae: str | None,
    ) -> "Pipeline":
        """Put a model together with what decodes its latents; raise ValueError where that is not the data's."""
        if spec is None or not grids:
            raise ValueError("the model was trained on text alone: it draws no pictures")
        device = next(model.parameters()).device
        codec = load_matching_vae(vae, spec).to(device).eval()
        stats = latent_stats(spec, recipe.model.latent_channels, device)
        # The square, or what is nearest to it; of these the largest.
        grid = min(map(tuple, grids), key=lambda grid: (max(grid) / min(grid), -grid[0] * grid[1]))
        return cls(model, tokenizer, codec, stats, grid, spec.resolution, recipe.diffusion, spec.vae_hash)

    def sized(self, pixels: tuple[int, int] | None) -> "Pipeline":
        """Return the same for new pictures of `pixels` [height, width]; None keeps the training data's grid.

        Raises ValueError for a size that cells and patches do not tile.
        """
        if pixels is None:
            return self
        stride = stride_of(self.vae)
        unit = stride * self.model.config.patch_size
        if any(side < unit or side % unit for side in pixels):
            raise ValueError(
                f"size={list(pixels)}: expected multiples of {unit} pixels, the VAE's stride times a patch"
            )
        return replace(self, grid=tuple(side // stride for side in pixels))

    @torch.no_grad()
    def complete(
        self,
        prompts: Sequence[Sequence[Part]],
        config: SamplerConfig,
        seed: int,
        progress: Progress = lambda rows: None,
        numbers: Sequence[int] | None = None,
        draw: bool = False,
    ) -> Iterator[list[Part]]:
        """Yield, batch by batch, what follows each prompt of text and pictures: a function of (prompt, seed, number).

        `draw`: begin with a picture; else the model begins with text and decides. Pictures of a prompt are
        [resolution, resolution, 3]. `numbers` name the samples; None counts them from 0.
        """
        self._warn_of_unknown({part for prompt in prompts for part in prompt if isinstance(part, str)})
        numbers = numbers or range(len(prompts))
        given = [[part for part in prompt if not isinstance(part, str)] for prompt in prompts]
        places = [(number, i) for number, parts in zip(numbers, given, strict=True) for i in range(len(parts))]
        latents = iter(self._encode([picture for parts in given for picture in parts], places, SeededDraws(seed)))
        rows = []
        for number, prompt in zip(numbers, prompts, strict=True):
            segments = [
                torch.from_numpy(self.tokenizer.encode(part)) if isinstance(part, str) else next(latents)
                for part in prompt
            ]
            rows.append(Prompt(segments, draw=draw, index=number))
        for outputs in self._generate(rows, config, seed, progress):
            pictures = iter(self._decode([part for parts in outputs for part in parts if part.ndim == 3]))
            for parts in outputs:
                yield [next(pictures) if part.ndim == 3 else self.tokenizer.decode(part) for part in parts]

    def draw(
        self,
        prompts: Sequence[str],
        config: SamplerConfig,
        seed: int,
        progress: Progress = lambda rows: None,
        numbers: Sequence[int] | None = None,
    ) -> list[np.ndarray]:
        """Return one picture uint8 [H, W, 3] a caption; see `complete` for the rest."""
        results = self.complete([[text] for text in prompts], one_picture(config), seed, progress, numbers, draw=True)
        return [parts[0] for parts in results]

    def describe(
        self,
        pictures: Sequence[np.ndarray],
        config: SamplerConfig,
        seed: int,
        progress: Progress = lambda rows: None,
        numbers: Sequence[int] | None = None,
    ) -> list[str]:
        """Return a caption for each picture; see `complete` for the rest."""
        results = self.complete([[picture] for picture in pictures], text_alone(config), seed, progress, numbers)
        return [parts[0] if parts else "" for parts in results]

    def _warn_of_unknown(self, texts: set[str]) -> None:
        """Log what of new prompts the tokenizer has no piece for."""
        for text in sorted(texts - self._seen):
            if unknown := self.tokenizer.unknown_in(text):
                log.warning("prompt %r: %s unknown to the tokenizer: the model cannot tell them apart", text, unknown)
        self._seen |= texts

    def _encode(
        self, pictures: Sequence[np.ndarray], places: Sequence[tuple[int, int]], draws: Draws
    ) -> Iterator[torch.Tensor]:
        """Yield the whitened latents f32 [C, h, w] of each picture, at `places` (number of its prompt, place in it).

        A draw from the posterior, as in training and by the same function: the mean would be latents of less variance
        than any that the model has seen (P12).
        """
        for start in range(0, len(pictures), self.batch_size):
            pixels = torch.from_numpy(to_unit(np.stack(pictures[start : start + self.batch_size])))
            encoded = moments(self.vae, pixels.to(self.stats.mean.device)).float()
            shape = (encoded.shape[1] // 2, *encoded.shape[2:])
            noise = torch.stack([draws.posterior(*place, shape) for place in places[start : start + self.batch_size]])
            yield from self.stats.whiten(sample_latents(encoded, noise.to(encoded.device))).cpu()

    def _decode(self, latents: Sequence[torch.Tensor]) -> Iterator[np.ndarray]:
        for start in range(0, len(latents), self.batch_size):
            raw = self.stats.unwhiten(torch.stack(latents[start : start + self.batch_size]).to(self.stats.mean.device))
            yield from from_unit(decode(self.vae, raw).float().cpu().numpy())

    def _generate(
        self, rows: list[Prompt], config: SamplerConfig, seed: int, progress: Progress
    ) -> Iterator[list[list[torch.Tensor]]]:
        """Yield the outputs of each batch of rows."""
        ids = self.tokenizer.special
        special = SpecialTokens(bos=ids.bos, eos=ids.eos, boi=ids.boi, eoi=ids.eoi, never=(ids.pad,))
        for start in range(0, len(rows), self.batch_size):
            chosen = rows[start : start + self.batch_size]
            filled = chosen + [chosen[-1]] * (min(self.batch_size, len(rows)) - len(chosen))
            share = len(chosen) / len(filled)
            outputs = generate(
                self.model,
                filled,
                config,
                self.diffusion,
                special,
                self.grid,
                SeededDraws(seed),
                lambda done, share=share: progress(done * share),
            )
            yield outputs[: len(chosen)]


def one_picture(config: SamplerConfig) -> SamplerConfig:
    """Return the settings that draw one picture and end there."""
    return replace(config, max_new_tokens=0, max_images=1)


def text_alone(config: SamplerConfig) -> SamplerConfig:
    """Return the settings that write text and no picture."""
    return replace(config, max_images=0, guidance=1.0)
