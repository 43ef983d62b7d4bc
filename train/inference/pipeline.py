"""A trained model with its tokenizer and latent space: text and pictures in, text and pictures out.

The bits of a picture depend on its prompt and its number, not on what else is asked for, nor on how many rows run
beside it (P12); on CUDA also on the batch size. An incomplete last batch runs the rows that it has.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch

from data.chat import Chat, Message
from data.manifest import LatentSpec
from data.pictures import from_unit, to_unit
from data.storage import Location
from data.tokenizer import Tokenizer
from model.cpu import in_portions
from model.denoising import first_step_error
from model.draws import SeededDraws
from model.latent_space import LatentSpace, LatentStats, to_raw
from model.sampler import Prompt, SpecialTokens, Watch, generate
from model.sampler_config import SamplerConfig, one_picture, text_alone
from model.transfusion import Transfusion
from train.distributed.ranks import Device, Ranks
from train.inference.guide import load_with_guide
from train.inference.prompts import (
    Part,
    Question,
    Room,
    is_picture,
    pictures_of,
    require_captions,
    require_instruction,
    require_question,
    text_of,
)
from train.inference.saved_model import LoadedModel, SavedModel, load_matching_space
from train.pretrain_config import PretrainConfig
from train.step import latent_stats

log = logging.getLogger(__name__)

MOST_ERROR = 50.0  # factor by which a sampler's first step may multiply the error of the predicted noise, unwarned
BATCH = 50  # rows of a sampling batch: small enough for a laptop, large enough to fill two cores
# Progress in rows; a denoising step is a fraction of one.
BAR_FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {n:.1f}/{total:.0f} [{elapsed}<{remaining}]"
Progress = Callable[[float], object]  # called with the rows, or the fraction of one, completed since the last call


@dataclass(frozen=True, kw_only=True)
class PipelineConfig(SamplerConfig):
    """Options of every program that samples."""

    checkpoint: Location = "runs/pretrain"  # a checkpoint, a run folder (its newest that verifies) or an export
    weights: str = "auto"  # model, ema-N (half-life N), ema (the first); auto: the first EMA, or model if there is none
    # Autoguidance (Karras et al. 2024): a weaker model takes the place of the model without its prompt. An earlier
    # checkpoint, a run folder or an export, alike in tokenizer, latents, patch size and diffusion, of any width and
    # depth. It costs a second model and a second cache of keys and values. null: none, unless guide_weights is set.
    guide: Location | None = None
    # Which of the guide's weights, as `weights`; null: auto. With guide=null, these weights of `checkpoint` itself are
    # the guide, such as an EMA of another half-life.
    guide_weights: str | None = None
    vae: Location | None = None  # autoencoder, a folder or hub id; null: the one the run names, none for pixels
    tokenizer: Location | None = None  # file or folder; null: the copy in the run or export, else the run's
    # Where the frozen parameters come from that checkpoints do not hold; null: what the run was started from.
    base: Location | None = None
    seed: int = 0  # of noise and tokens
    device: Device = "auto"  # auto: CUDA if available
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the model
    batch_size: int = BATCH  # rows sampled at once, >= 1; on CUDA it affects a picture's last bits

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size}: expected at least 1")
        if self.image_guidance is not None and (self.guide is not None or self.guide_weights is not None):
            found = f"image_guidance={self.image_guidance}, guide={self.guide}, guide_weights={self.guide_weights}"
            raise ValueError(f"{found}: a guide reads the whole prompt; expected image_guidance=null, or no guide")


@dataclass
class Pipeline:
    """Everything needed to draw and describe."""

    model: Transfusion
    tokenizer: Tokenizer
    latents: tuple[LatentSpace, LatentSpec] | None  # of the training data; None: it was text alone
    stats: LatentStats
    grid: tuple[int, int]  # latent size of new pictures
    config: PretrainConfig  # that the model was trained with
    batch_size: int = BATCH
    weights: str = "model"  # which of the run's: model, or the label of an EMA
    saved: SavedModel | None = None  # where it was loaded from; None: a model in memory
    guide: LoadedModel | None = None  # the weak model of autoguidance; None: classifier-free guidance
    _seen: set[str] = field(default_factory=set)  # prompts

    @classmethod
    def load(cls, config: PipelineConfig, ranks: Ranks) -> "Pipeline":
        """Load the model that `config.checkpoint` names, and its guide. Collective.

        Raises FileNotFoundError or ValueError if there is none, its tokenizer or vae cannot be found, or the guide
        cannot guide it.
        """
        names = (config.checkpoint, config.weights, config.tokenizer, config.guide, config.guide_weights, config.base)
        loaded, guide = load_with_guide(*names, ranks)
        diffusion, vae = loaded.config.diffusion, config.vae or loaded.config.vae
        sampler = config.suited_to(diffusion)
        factor = first_step_error(sampler, diffusion) if diffusion.prediction == "eps" else 0.0
        if ranks.is_first and diffusion.zero_terminal_snr and config.spacing == "leading":
            log.warning(
                "spacing=leading with a model trained with zero_terminal_snr: it starts below the pure noise that the "
                "model has learnt to start from; use spacing=trailing"
            )
        if ranks.is_first and config.clip_x0 is None and factor > MOST_ERROR:
            log.warning(
                "spacing=%s with a model that predicts noise: the first of %d steps multiplies its error %.0f "
                "times; use spacing=leading, which starts where there is some signal, or clip_x0",
                *(config.spacing, config.steps, factor),
            )
        saved, model = loaded.saved, loaded.model.to(getattr(torch, config.dtype))
        if guide is not None:
            guide.model.to(getattr(torch, config.dtype))
        pipeline = cls.of(model, loaded.tokenizer, loaded.config, saved.latent_spec, saved.grids, vae)
        return replace(pipeline, batch_size=config.batch_size, weights=loaded.weights, saved=saved, guide=guide)

    @classmethod
    def of(
        cls,
        model: Transfusion,
        tokenizer: Tokenizer,
        config: PretrainConfig,
        spec: LatentSpec | None,
        grids: Sequence[tuple[int, int]],
        vae_path: str | None,
        device: torch.device | None = None,  # None: the model's; of one whose weights come later, it must be given
    ) -> "Pipeline":
        """Combine a model with the latent space of its data; raise ValueError for any other.

        Without a spec, of a model that was trained on text alone, it only writes.
        """
        device = device or next(model.parameters()).device
        stats = latent_stats(spec, config.model.latent_channels, device)
        if spec is None or not grids:
            return cls(model, tokenizer, None, stats, (config.model.patch_size,) * 2, config)
        space = load_matching_space(vae_path, spec).to(device)
        # The grid nearest to a square; among equals the largest.
        grid = min(grids, key=lambda grid: (max(grid) / min(grid), -grid[0] * grid[1]))
        return cls(model, tokenizer, (space, spec), stats, grid, config)

    @property
    def space(self) -> LatentSpace:
        """Return the latent space of pictures; raise ValueError for a model that was trained on text alone."""
        return self.require_pictures()[0]

    @property
    def latent_spec(self) -> LatentSpec:
        """Return that of the training data, the resolution of pictures in prompts; raise ValueError for text alone."""
        return self.require_pictures()[1]

    def require_pictures(self) -> tuple[LatentSpace, LatentSpec]:
        """Raise ValueError for a model that was trained on text alone."""
        if self.latents is None:
            raise ValueError("the model was trained on text alone: it neither draws nor sees pictures")
        return self.latents

    def describe_guide(self) -> dict[str, Any] | None:
        """Return which weights of which step guide, for a record of results; None without autoguidance."""
        if self.guide is None:
            return None
        saved = self.guide.saved
        return {"checkpoint": str(saved.folder.resolve()), "step": saved.step, "weights": self.guide.weights}

    def sized(self, pixels: tuple[int, int] | None) -> "Pipeline":
        """Return the same for new pictures of `pixels` [height, width]; None keeps the training data's grid.

        Raises ValueError for a size that is not a whole number of patches.
        """
        if pixels is None:
            return self
        stride, only = self.space.stride, self.space.picture_side
        unit = stride * self.model.config.patch_size
        if only is not None and pixels != (only, only):
            raise ValueError(f"size={list(pixels)}: the autoencoder decodes to {[only, only]} alone; leave size out")
        if any(side < unit or side % unit for side in pixels):
            raise ValueError(f"size={list(pixels)}: expected multiples of {unit}, pixels a token")
        return replace(self, grid=(pixels[0] // stride, pixels[1] // stride))

    @torch.no_grad()
    def complete(
        self,
        prompts: Sequence[Sequence[Part]],
        config: SamplerConfig,
        seed: int | SeededDraws,
        progress: Progress = lambda rows: None,
        numbers: Sequence[int] | None = None,
        draw: bool = False,
        watch: Watch = lambda numbers, step, x0: None,
        left: Callable[[int], bool] = lambda number: False,
    ) -> Iterator[list[Part]]:
        """Yield, batch by batch, what follows each prompt of text and pictures: a function of (prompt, seed, number).

        What is given is context, as data with roles calls it, and what is sampled a target. `draw`: begin with a
        picture; otherwise with text, and the model decides. Pictures in prompts are [resolution, resolution, 3].
        `numbers` identify the samples; None counts from 0. Instead of a seed, draws may be given. `watch` sees pictures
        while they are denoised, whitened; `decode` makes pixels of them. A sample of whose number `left` is true is
        given up, and ends with what it has. Raises ValueError for a prompt of blanks.
        """
        if draw or config.max_images:
            self.require_pictures()
        require_captions("prompt", prompts)
        if config.max_length is not None:
            self.room(config).require("prompts", ((f"number {i}", prompt) for i, prompt in enumerate(prompts)), draw)
        self._warn_of_unknown({part for prompt in prompts for part in prompt if isinstance(part, str)})
        numbers = numbers or range(len(prompts))
        given = [[part for part in prompt if is_picture(part)] for prompt in prompts]
        places = [(number, i) for number, parts in zip(numbers, given, strict=True) for i in range(len(parts))]
        draws = SeededDraws(seed) if isinstance(seed, int) else seed
        latents = iter(self._encode([picture for parts in given for picture in parts], places, draws))
        rows = []
        for number, prompt in zip(numbers, prompts, strict=True):
            ids = [self.tokenizer.encode(part) if isinstance(part, str) else part for part in prompt]
            segments = [next(latents) if is_picture(part) else torch.from_numpy(part) for part in ids]
            rows.append(Prompt(segments, draw=draw, index=number))
        for outputs in self._generate(rows, config, draws, progress, watch, left):
            pictures = iter(self.decode([part for parts in outputs for part in parts if part.ndim == 3]))
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
        """Return one picture uint8 [H, W, 3] per caption; see `complete` for the other arguments."""
        given = [[text] for text in prompts]
        return pictures_of(self.complete(given, one_picture(config), seed, progress, numbers, draw=True))

    def edit(
        self,
        edits: Sequence[tuple[Sequence[np.ndarray], str]],
        config: SamplerConfig,
        seed: int,
        progress: Progress = lambda rows: None,
        numbers: Sequence[int] | None = None,
    ) -> list[np.ndarray]:
        """Return what each instruction makes of the pictures before it, uint8 [H, W, 3]; see `complete`."""
        for pictures, text in edits:
            require_instruction("instruction", text, len(pictures))
        given: list[list[Part]] = [[*pictures, text] for pictures, text in edits]
        return pictures_of(self.complete(given, one_picture(config), seed, progress, numbers, draw=True))

    def describe(
        self,
        pictures: Sequence[np.ndarray],
        config: SamplerConfig,
        seed: int,
        progress: Progress = lambda rows: None,
        numbers: Sequence[int] | None = None,
    ) -> list[str]:
        """Return one caption per picture; see `complete` for the other arguments."""
        results = self.complete([[picture] for picture in pictures], text_alone(config), seed, progress, numbers)
        return [text_of(parts) for parts in results]

    def answer(
        self,
        questions: Sequence[Question],
        config: SamplerConfig,
        seed: int,
        progress: Progress = lambda rows: None,
        numbers: Sequence[int] | None = None,
    ) -> list[str]:
        """Return the answer to each question, stripped; see `complete`."""
        results = self.complete([self.ask(*one) for one in questions], text_alone(config), seed, progress, numbers)
        return [text_of(parts).strip() for parts in results]

    def ask(self, pictures: Sequence[np.ndarray], question: str, system: str | None = None) -> list[Part]:
        """Return the prompt of a question after its pictures, up to where the assistant is to speak (data/chat.py)."""
        require_question("question", question, system)
        self._warn_of_unknown({question})
        messages: list[Message[np.ndarray]] = [] if system is None else [Message("system", (system,))]
        parts: list[np.ndarray] = Chat(self.tokenizer).prompt([*messages, Message("user", (*pictures, question))])
        return [*parts]

    def room(self, config: SamplerConfig) -> Room:
        """Return what a prompt takes of the model's sequence, and how long that may be."""
        side = 0 if self.latents is None else self.latent_spec.resolution // self.space.stride
        given, new = (h * w // self.model.config.patch_size**2 for h, w in ((side, side), self.grid))
        return Room(self.tokenizer, given, new, config, self.config.data.sequence_length)

    @torch.no_grad()
    def reconstruct(self, pictures: Sequence[np.ndarray], seed: int, numbers: Sequence[int]) -> list[np.ndarray]:
        """Return what the latents of each picture decode to, drawn as for the first picture of a prompt."""
        latents = self._encode(pictures, [(number, 0) for number in numbers], SeededDraws(seed))
        return list(self.decode(list(latents)))

    def _warn_of_unknown(self, texts: set[str]) -> None:
        """Warn once of each prompt with characters that the tokenizer does not know."""
        for text in sorted(texts - self._seen):
            if unknown := self.tokenizer.unknown_in(text):
                log.warning("prompt %r: %s unknown to the tokenizer: the model cannot tell them apart", text, unknown)
        self._seen |= texts

    def _encode(
        self, pictures: Sequence[np.ndarray], places: Sequence[tuple[int, int]], draws: SeededDraws
    ) -> Iterator[torch.Tensor]:
        """Yield the whitened latents f32 [C, h, w] of each picture; `places` are (sample number, place in its prompt).

        Drawn from the posterior, by the same function as in training: the mean would have less variance than any
        latents that the model has seen (P12).
        """
        for start in range(0, len(pictures), self.batch_size):
            pixels = torch.from_numpy(to_unit(np.stack(pictures[start : start + self.batch_size])))
            stored, noise = in_portions(self.space.encode, pixels.to(self.stats.mean.device)), None
            if self.space.kind == "moments":
                shape = (self.space.channels, *stored.shape[2:])
                of_batch = [draws.posterior(*place, shape) for place in places[start : start + self.batch_size]]
                noise = torch.stack(of_batch).to(stored.device)
            yield from self.stats.whiten(to_raw(stored, noise)).cpu()

    @torch.no_grad()
    def decode(self, latents: Sequence[torch.Tensor]) -> Iterator[np.ndarray]:
        """Yield the picture uint8 [H, W, 3] of each of the whitened latents f32 [C, h, w]."""
        for start in range(0, len(latents), self.batch_size):
            batch = torch.stack(tuple(latents[start : start + self.batch_size]))
            raw = self.stats.unwhiten(batch.to(self.stats.mean.device))
            yield from from_unit(in_portions(self.space.decode, raw).cpu().numpy())

    def _generate(
        self,
        rows: list[Prompt],
        config: SamplerConfig,
        draws: SeededDraws,
        progress: Progress,
        watch: Watch,
        left: Callable[[int], bool],
    ) -> Iterator[list[list[torch.Tensor]]]:
        """Yield the outputs of each batch of rows."""
        ids = self.tokenizer.special
        special = SpecialTokens(bos=ids.bos, eos=ids.eos, boi=ids.boi, eoi=ids.eoi, never=(ids.pad,))
        for start in range(0, len(rows), self.batch_size):
            chosen, full = rows[start : start + self.batch_size], min(self.batch_size, len(rows))
            diffusion, guide = self.config.diffusion, None if self.guide is None else self.guide.model
            settings = (config, diffusion, special, self.grid, draws)
            yield generate(self.model, chosen, *settings, progress, full, guide, watch, left)
