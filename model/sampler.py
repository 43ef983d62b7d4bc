"""Decoding: text mode samples tokens until BOI, image mode denoises P patch slots, and the two alternate.

The paper, section 3 (inference), batched: rows are grouped by mode, and those that wait or are done run no forward.
Everything before an image stays in the cache and is never recomputed: each denoising step overwrites the image's slots,
all branches of guidance in one forward (the unconditional one has the prefix `BOS BOI`), and the clean image is written
last, at t = 0, for the text after it.
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from model.cache import to_device
from model.cached_model import CachedModel
from model.denoising import denoise
from model.diffusion import DiffusionConfig
from model.draws import SeededDraws
from model.nucleus import sample_tokens
from model.sampler_config import SamplerConfig
from model.transfusion import Grid, Transfusion

# Called after each denoising step with the `index` of each row that is being drawn, the number of the step from 1, and
# the clean latents f32 [r, C, h, w] that the model predicts so far, on its device.
Watch = Callable[[Sequence[int], int, Tensor], object]


@dataclass(frozen=True)
class SpecialTokens:
    bos: int
    eos: int
    boi: int
    eoi: int
    never: tuple[int, ...] = ()  # more ids that text mode must not emit: padding, unknown


@dataclass(frozen=True)
class Prompt:
    """What a row starts from. BOS, and BOI and EOI around images, are added as in training.

    `segments`: text int64 [len], or the clean, whitened latents of an image f32 [C, h, w]. `draw`: begin with a
    picture. `index` names the sample: its noise depends on (seed, index), not on its place in the batch.
    """

    segments: Sequence[Tensor]
    draw: bool = False
    index: int = 0


def generate(
    model: Transfusion,
    prompts: Sequence[Prompt],
    config: SamplerConfig,
    diffusion: DiffusionConfig,
    special: SpecialTokens,
    grid: Grid,
    draws: SeededDraws,
    progress: Callable[[float], object] = lambda rows: None,
    batch: int | None = None,
    guide: Transfusion | None = None,
    watch: Watch = lambda indices, step, x0: None,
    left: Callable[[int], bool] = lambda index: False,
) -> list[list[Tensor]]:
    """Return for each prompt what follows it: text int64 [len] without special tokens, and latents f32 [C, h, w].

    The model is unsharded; `grid` is the latent size (h, w) of new pictures. `progress(rows)` is called with the
    fraction of rows that each forward completed; the sum is the number of prompts. What it or `watch` raises ends the
    sampling between two forwards. `batch` is the rows of a full batch, if these are its incomplete last one: on CUDA,
    bits are the same at the same `batch`. A `guide` of the same tokens, latents and patch size is the weak model of
    guidance, in place of the model without its prompt. Raises ValueError for a prompt that does not fit in
    `max_length`, and for a guide with image_guidance. After each forward the rows of whose index `left` is true end
    with what they have.
    """
    if not prompts:
        return []
    batch = batch or len(prompts)
    decoding = _Decoding(model, prompts, config, diffusion, special, grid, draws, progress, batch, guide, watch, left)
    decoding.prefill()
    while not all(row.mode == "done" for row in decoding.rows):
        decoding.text_mode()
        if any(row.mode == "image" for row in decoding.rows):
            decoding.image_mode()
    return [row.segments() for row in decoding.rows]


@dataclass
class _Row:
    index: int
    pending: deque[Tensor]  # pieces of the prompt that are not in the cache yet: token ids or latents
    mode: Literal["text", "image", "done"]
    num_tokens: int = 0  # text tokens sampled
    num_images: int = 0
    output: list[list[int] | Tensor] = field(default_factory=list)

    def add_token(self, token: int) -> None:
        last = self.output[-1] if self.output else None
        if isinstance(last, list):
            last.append(token)
        else:
            self.output.append([token])

    def segments(self) -> list[Tensor]:
        return [part if isinstance(part, Tensor) else torch.tensor(part) for part in self.output]


def _take_text(pending: deque[Tensor], count: int) -> list[int]:
    """Take at most `count` tokens from the head of `pending`, none if it is an image."""
    if not pending or pending[0].ndim == 3:
        return []
    piece = pending.popleft()
    if len(piece) > count:
        pending.appendleft(piece[count:])
    return piece[:count].tolist()


class _Decoding:
    def __init__(
        self,
        model: Transfusion,
        prompts: Sequence[Prompt],
        config: SamplerConfig,
        diffusion: DiffusionConfig,
        special: SpecialTokens,
        grid: Grid,
        draws: SeededDraws,
        progress: Callable[[float], object],
        batch: int,
        guide: Transfusion | None,
        watch: Watch,
        left: Callable[[int], bool],
    ) -> None:
        self._progress, self._reported, self._watch, self._left = progress, 0.0, watch, left
        self.config, self.diffusion = config.suited_to(diffusion), diffusion
        self.special, self.draws = special, draws
        self.patch_size = model.config.patch_size
        self.shape = (model.config.latent_channels, *grid)  # of a picture
        self.patches = self._num_patches(self.shape)
        self.rows = [
            _Row(prompt.index, self._lay_out(prompt.segments, prompt.draw), "image" if prompt.draw else "text")
            for prompt in prompts
        ]
        self.max_length = self._max_length()
        if guide is not None and config.image_guidance is not None:
            found = f"image_guidance={config.image_guidance} with a guide, which reads the whole prompt"
            raise ValueError(f"{found}: expected null, or no guide")
        # Of each row, for the branch of guidance without texts.
        self._pictures = [
            self._lay_out([part for part in prompt.segments if part.ndim == 3], prompt.draw)
            for prompt in prompts
            if config.is_guided and config.image_guidance is not None
        ]
        guide = guide if config.is_guided else None
        unconditional = [special.bos, special.boi] if config.is_guided and guide is None else None
        sizes = (self.max_length, config.prefill_chunk, self.patches)
        self.cached_model = CachedModel(model, len(self.rows), *sizes, unconditional, batch, guide)
        never = torch.zeros(model.vocab_size, dtype=torch.bool)
        never[[special.bos, special.eoi, *special.never]] = True
        never[special.eos] = False  # a language model without BOS or PAD has EOS in its place
        self._never = never.to(self.cached_model.device)

    def prefill(self) -> None:
        """Append all prompts, and for a branch of guidance all prompts without their texts."""
        self._append(self.cached_model, [row.pending for row in self.rows])
        if self._pictures:
            lengths = map(self._num_tokens, self._pictures)
            room = [self.max_length - self.cached_model.length(i) for i in range(len(self.rows))]
            length = max(taken + left for taken, left in zip(lengths, room, strict=True))
            self._append(self.cached_model.without_texts(length), self._pictures)

    def _append(self, cached_model: CachedModel, pending: Sequence[deque[Tensor]]) -> None:
        """Append all that is pending of each row, rows side by side: text in chunks, images whole."""
        chunk = self.config.prefill_chunk
        while any(pending):
            pieces = {i: piece for i, of_row in enumerate(pending) if (piece := _take_text(of_row, chunk))}
            if pieces:
                cached_model.append_text(pieces, chunk)
            by_shape: dict[torch.Size, dict[int, Tensor]] = {}
            for i, of_row in enumerate(pending):
                if of_row and of_row[0].ndim == 3:
                    image = of_row.popleft()
                    by_shape.setdefault(image.shape, {})[i] = image
            for images in by_shape.values():
                cached_model.append_images(images)

    def text_mode(self) -> None:
        """Sample tokens until every row has begun a picture or is done. The host waits for the device once a token."""
        while True:
            for i, row in enumerate(self.rows):
                is_full = row.num_tokens == self.config.max_new_tokens or not self._fits(i, 1)
                if row.mode == "text" and (is_full or self._left(row.index)):
                    row.mode = "done"
            active = [i for i, row in enumerate(self.rows) if row.mode == "text"]
            if not active:
                return self._report()
            pieces: dict[int, list[int]] = {}
            for i, token in zip(active, self._next_tokens(active), strict=True):
                row = self.rows[i]
                if token == self.special.eos:
                    row.mode = "done"
                    continue
                row.num_tokens += 1
                if token == self.special.boi:
                    row.mode = "image"
                else:
                    row.add_token(token)
                if token == self.special.boi or row.num_tokens < self.config.max_new_tokens:
                    pieces[i] = [token]  # else nothing follows it
            if pieces:
                self.cached_model.append_text(pieces, 1)
            self._report()

    def image_mode(self) -> None:
        """Draw a picture in every row that has begun one, then append it and EOI to the cache."""
        drawing = [i for i, row in enumerate(self.rows) if row.mode == "image"]
        continuing: dict[int, Tensor] = {}
        for chosen in self.cached_model.chunks(drawing, self.patches):
            rows, latents = self._denoise(chosen)
            for i, picture, copy in zip(rows, latents, latents.cpu(), strict=True):
                row = self.rows[i]
                row.output.append(copy)
                row.num_images += 1
                has_room = row.num_tokens < self.config.max_new_tokens and self._fits(i, self.patches + 1)
                row.mode = "text" if has_room else "done"
                if has_room:
                    continuing[i] = picture
        if continuing:
            self.cached_model.append_images(continuing)
            self.cached_model.append_text({i: [self.special.eoi] for i in continuing}, 1)
        self._report()

    def _denoise(self, chosen: list[int]) -> tuple[list[int], Tensor]:
        """Return the chosen rows but those that left, and clean latents f32 [r, C, h, w], denoised after them.

        The cache keeps nothing of them.
        """
        config, rows = self.config, chosen
        denoiser = partial(
            self.cached_model.denoiser,
            grid=self.shape[1:],
            guidance=config.guidance,
            image_guidance=config.image_guidance,
            rescale=config.guidance_rescale,
        )
        predict = denoiser(rows)

        def report(step: int, x0: Tensor) -> list[int] | None:
            nonlocal rows, predict
            self._watch([self.rows[i].index for i in rows], step, x0)
            self._report(rows, step)
            staying = [i for i in rows if not self._left(self.rows[i].index)]
            if len(staying) == len(rows):
                return None
            for i in set(rows) - set(staying):
                self.rows[i].mode = "done"
            before, rows = rows, next(iter(self.cached_model.chunks(staying, self.patches)), [])
            predict = denoiser(rows) if rows else predict
            return [before.index(i) for i in rows]

        latents = denoise(
            lambda x_t, t, is_guided: predict(x_t, t, is_guided),
            lambda step: self._noise(rows, step),
            self.config,
            self.diffusion,
            math.prod(self.shape),
            report,
        )
        return rows, latents

    def _report(self, drawing: Sequence[int] = (), steps: int = 0) -> None:
        """Report progress since the last report, in rows; rows that are `drawing` are `steps` into a picture."""
        config = self.config
        whole = max(1, config.max_new_tokens + max(1, config.max_images) * config.steps)
        done = 0.0
        for i, row in enumerate(self.rows):
            part = row.num_tokens + row.num_images * config.steps + steps * (i in drawing)
            done += 1.0 if row.mode == "done" else min(1.0, part / whole)
        self._progress(done - self._reported)
        self._reported = done

    def _noise(self, chosen: Sequence[int], step: int) -> Tensor:
        rows = [self.rows[i] for i in chosen]
        noise = torch.stack([self.draws.noise(row.index, row.num_images, step, self.shape) for row in rows])
        return to_device(noise, self.cached_model.device)

    def _next_tokens(self, active: Sequence[int]) -> list[int]:
        config, logits = self.config, self.cached_model.logits(active)
        logits.masked_fill_(self._never, -torch.inf)
        rows = [self.rows[i] for i in active]
        no_picture = [
            row.num_images >= config.max_images or not self._fits(i, 1 + self.patches)
            for i, row in zip(active, rows, strict=True)
        ]
        logits[:, self.special.boi].masked_fill_(to_device(torch.tensor(no_picture), logits.device), -torch.inf)
        uniforms = torch.tensor([self.draws.uniform(row.index, row.num_tokens) for row in rows])
        return sample_tokens(logits, to_device(uniforms, logits.device), config.temperature, config.top_p).tolist()

    def _lay_out(self, segments: Sequence[Tensor], draw: bool) -> deque[Tensor]:
        tokens: list[int] = [self.special.bos]
        pending: deque[Tensor] = deque()
        for segment in segments:
            if segment.ndim == 1:
                tokens += segment.tolist()
                continue
            pending += [torch.tensor([*tokens, self.special.boi]), segment.float()]
            tokens = [self.special.eoi]
        pending.append(torch.tensor([*tokens, self.special.boi] if draw else tokens))
        return pending

    def _max_length(self) -> int:
        """Return the number of tokens a row may hold; refuse prompts that do not fit."""
        lengths = [self._num_tokens(row.pending) for row in self.rows]
        first_pictures = [self.patches * (row.mode == "image") for row in self.rows]
        needed = max(length + first for length, first in zip(lengths, first_pictures, strict=True))
        config = self.config
        if config.max_length is not None:
            if needed > config.max_length:
                raise ValueError(f"max_length={config.max_length}: a prompt needs {needed}; raise it or shorten that")
            return config.max_length
        images = max(config.max_images, int(any(first_pictures)))
        return max(lengths) + config.max_new_tokens + images * (self.patches + 2)

    def _fits(self, row: int, count: int) -> bool:
        return self.cached_model.length(row) + count <= self.max_length

    def _num_tokens(self, pending: Sequence[Tensor]) -> int:
        return sum(len(part) if part.ndim == 1 else self._num_patches(part.shape) for part in pending)

    def _num_patches(self, shape: Sequence[int]) -> int:
        return shape[1] * shape[2] // self.patch_size**2
