"""A trained model with its tokenizer and VAE: captions in, pictures out, and the other way round.

Batches of one call have one shape, the last one filled up: so the bits of a picture depend on its prompt, its number
and that shape, not on what the other rows hold. Smaller batches for fewer rows differ by float rounding only.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from data.manifest import LatentSpec
from data.pictures import from_unit, to_unit
from data.tokenizer import Tokenizer
from model.diffusion import DiffusionConfig
from model.sampler import Prompt, SamplerConfig, SeededDraws, SpecialTokens, generate
from model.transfusion import Transfusion
from model.vae import LatentStats, decode, load_vae, moments, vae_hash
from train import checkpoint
from train.checkpoint_storage import LISTING
from train.config import load_config
from train.distributed import Device, Ranks
from train.recipe import PretrainConfig
from train.step import latent_stats

BATCH = 50  # rows a sampling batch: small enough for a laptop, large enough to fill two cores

Weights = Literal["auto", "ema", "model"]


@dataclass(frozen=True, kw_only=True)
class GenerationConfig(SamplerConfig):
    """What every program that samples asks for."""

    checkpoint: str = "runs/pretrain"  # a checkpoint, or a run folder: its newest checkpoint that verifies
    weights: Weights = "auto"  # auto: the EMA if the run kept one
    vae: str | None = None  # AutoencoderKL; null: the one the run names
    seed: int = 0  # of noise and tokens
    device: Device = "auto"  # auto: CUDA if there is any


@dataclass
class Generation:
    """Everything needed to draw and describe. `latent_spec` and `grid` are those of the training data."""

    model: Transfusion
    tokenizer: Tokenizer
    vae: torch.nn.Module
    stats: LatentStats
    grid: tuple[int, int]
    resolution: int  # pixels
    diffusion: DiffusionConfig
    vae_hash: str  # what the training data's latents were encoded with
    batch_size: int = BATCH

    @classmethod
    def load(
        cls, path: str | Path, ranks: Ranks, weights: Weights = "auto", vae: str | None = None
    ) -> tuple["Generation", PretrainConfig, int]:
        """Load a checkpoint, or the newest that verifies of a run folder; return it with its recipe and step.

        Raises FileNotFoundError or ValueError when there is none, or its tokenizer or VAE are not at hand.
        """
        folder = find_checkpoint(Path(path), ranks)
        recipe_file = folder / "config.yaml"
        checkpoint.read_extra(folder, "config.yaml")  # verifies it
        recipe = load_config(PretrainConfig, [f"config={recipe_file}"])
        meta = json.loads(checkpoint.read_extra(folder, "meta.json"))
        tokenizer = Tokenizer(recipe.data.tokenizer)
        if tokenizer.hash != meta["fingerprint"]["tokenizer"]:
            raise ValueError(f"{recipe.data.tokenizer} is not the tokenizer that {folder} was trained with")
        model = Transfusion(recipe.model, tokenizer.vocab_size).to(ranks.device).eval()
        has_ema = recipe.optim.ema_decay is not None
        if weights == "ema" and not has_ema:
            raise ValueError(f"weights=ema, but {folder} was trained without one (optim.ema_decay); use weights=model")
        entry = "model" if weights == "model" or not has_ema else "ema"
        checkpoint.load(folder, {entry: {name: p.data for name, p in model.named_parameters()}}, ranks)
        spec = LatentSpec(**meta["latent_spec"]) if meta["latent_spec"] else None
        generation = cls.of(model, tokenizer, recipe, spec, meta["grids"], vae or recipe.vae)
        return generation, recipe, meta["progress"]["step"]

    @classmethod
    def of(
        cls,
        model: Transfusion,
        tokenizer: Tokenizer,
        recipe: PretrainConfig,
        spec: LatentSpec | None,
        grids: Sequence[Sequence[int]],
        vae: str | None,
    ) -> "Generation":
        """Put a model together with what decodes its latents; raise ValueError where that is not the data's."""
        if spec is None or not grids:
            raise ValueError("the model was trained on text alone: it draws no pictures")
        if vae is None:
            raise ValueError("no VAE: set vae=FOLDER to the one the data was encoded with")
        device = next(model.parameters()).device
        codec = load_vae(vae).to(device).eval()
        if vae_hash(codec) != spec.vae_hash:
            raise ValueError(f"vae={vae} has hash {vae_hash(codec)}, the data was encoded with {spec.vae_hash}")
        stats = latent_stats(spec, recipe.model.latent_channels, device)
        grid = tuple(grids[-1])
        return cls(model, tokenizer, codec, stats, grid, spec.resolution, recipe.diffusion, spec.vae_hash)

    @torch.no_grad()
    def draw(
        self,
        prompts: Sequence[str],
        config: SamplerConfig,
        seed: int,
        done: Callable[[int], object] = lambda n: None,
        numbers: Sequence[int] | None = None,
    ) -> list[np.ndarray]:
        """Return one picture uint8 [H, W, 3] a prompt, which depends on (prompt, seed, number). `done(n)` reports.

        `numbers` name the samples; None counts them from 0.
        """
        rows = [
            Prompt([torch.from_numpy(self.tokenizer.encode(text))], draw=True, index=number)
            for number, text in zip(numbers or range(len(prompts)), prompts, strict=True)
        ]
        pictures: list[np.ndarray] = []
        config = replace(config, max_new_tokens=0, max_images=1)
        for latents in self._generate(rows, config, seed, done):
            pixels = decode(self.vae, self.stats.unwhiten(torch.stack([parts[0] for parts in latents])))
            pictures += list(from_unit(pixels.float().cpu().numpy()))
        return pictures

    @torch.no_grad()
    def describe(
        self,
        pictures: Sequence[np.ndarray],
        config: SamplerConfig,
        seed: int,
        done: Callable[[int], object] = lambda n: None,
        numbers: Sequence[int] | None = None,
    ) -> list[str]:
        """Return a caption for each uint8 [H, W, 3] picture; see `draw` for the rest."""
        device, rows, numbers = self.stats.mean.device, [], numbers or range(len(pictures))
        for start in range(0, len(pictures), self.batch_size):
            pixels = torch.from_numpy(to_unit(np.stack(pictures[start : start + self.batch_size]))).to(device)
            means = moments(self.vae, pixels).float().chunk(2, dim=1)[0]
            chosen = numbers[start : start + self.batch_size]
            latents = self.stats.whiten(means).cpu()
            rows += [Prompt([one], index=number) for number, one in zip(chosen, latents, strict=True)]
        config = replace(config, max_images=0, guidance=1.0)
        captions: list[str] = []
        for outputs in self._generate(rows, config, seed, done):
            captions += [self.tokenizer.decode(parts[0]) if parts else "" for parts in outputs]
        return captions

    def _generate(self, rows: list[Prompt], config: SamplerConfig, seed: int, done: Callable[[int], object]):
        """Yield the outputs of each batch of rows."""
        ids = self.tokenizer.special
        special = SpecialTokens(bos=ids.bos, eos=ids.eos, boi=ids.boi, eoi=ids.eoi, never=(ids.pad,))
        for start in range(0, len(rows), self.batch_size):
            chosen = rows[start : start + self.batch_size]
            filled = chosen + [chosen[-1]] * (min(self.batch_size, len(rows)) - len(chosen))
            outputs = generate(self.model, filled, config, self.diffusion, special, self.grid, SeededDraws(seed))
            yield outputs[: len(chosen)]
            done(len(chosen))


def find_checkpoint(path: Path, ranks: Ranks) -> Path:
    """Return a checkpoint folder from its own path, a run's, or a checkpoints folder's; verified.

    Raises FileNotFoundError where there is none, ValueError where none is whole.
    """
    for root in (path / "checkpoints", path):
        if not (folders := checkpoint.saved(root)):
            continue
        if (newest := checkpoint.latest(root, ranks)) is None:
            raise ValueError(f"checkpoint={path}: all {len(folders)} checkpoints in it are damaged")
        return newest
    if not (path / LISTING).is_file():
        raise FileNotFoundError(f"checkpoint={path}: neither a checkpoint nor a run folder that holds one")
    if problems := checkpoint.verify(path, ranks):
        raise ValueError(f"checkpoint {path} is damaged: {'; '.join(problems)}")
    return path
