"""The model over a cache: rows of unequal length, appended to side by side, with pictures denoised at their ends.

The sampler decides what to append; only those rows run. The bits of a row depend on its own contents, never on which
rows or how many run beside it (P12). Two things make that so: attention spans a row's own length (model/cache.py), and
the matrix products have shapes that give a row the same bits (`_padding`). Rejected: running idle rows along, where the
last row of a batch costs as much as all of it; left padding, which moves a row when a longer one joins.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from model.cache import KVCache, NextTokens, to_device
from model.guidance import guided
from model.linear import HAS_ONEDNN
from model.transfusion import Grid, Transfusion

# Tokens of a forward, more or less (two or three times as many with guidance): enough to fill a GPU, few enough that on
# CUDA, where every forward has as many rows, a last row alone does not cost what a large batch does.
TOKENS = 2048


class CachedModel:
    """`rows` documents in one cache; for guidance others, of an unconditional prefix, of a guide, or without texts."""

    def __init__(
        self,
        model: Transfusion,
        rows: int,
        length: int,
        chunk: int,
        picture: int,
        unconditional: list[int] | None,
        batch: int,
        guide: Transfusion | None = None,
    ) -> None:
        """Allocate for at most `length` tokens per row, `chunk` of text per forward, `picture` per new picture.

        `batch` is the rows of a full batch, of which there may be fewer here. A `guide`, of the same patch size, sees
        all that is appended.
        """
        trunk, weight = model.config.transformer, model.head_weight
        self.model, self.device, self.batch, self._chunk = model, weight.device, batch, chunk
        self._multiple = 2 if HAS_ONEDNN and weight.dtype == torch.float32 else 8  # of a text's products
        self._convolves = model.config.patches == "unet"
        self._slots = list(range(rows))  # of each row in the cache

        def cache(rows: int, capacity: int, step: int) -> KVCache:
            shape = (trunk.layers, rows, capacity, trunk.num_kv_heads, trunk.head_width)
            return KVCache(*shape, weight.dtype, self.device, step)

        self._conditional = cache(rows, length + chunk, 64)
        self._last_hidden = torch.zeros(rows, trunk.width, dtype=weight.dtype, device=self.device)
        self._without_texts: CachedModel | None = None
        self._guide: CachedModel | None = None
        if guide is not None:
            self._guide = CachedModel(guide, rows, length, chunk, picture, None, batch)
        self._unconditional: KVCache | None = None
        if unconditional is not None:
            copies = min(rows, self._most_rows(picture))
            self._unconditional = cache(copies, len(unconditional) + picture, 1)
            self._run_text(self._unconditional, [0], [unconditional], len(unconditional))
            for part in (self._unconditional.keys, self._unconditional.values):
                part[:, 1:] = part[:, :1]
            self._unconditional.lengths = [len(unconditional)] * copies

    def without_texts(self, length: int) -> "CachedModel":
        """Return a new cache of at most `length` tokens per row, which now gets the prompts without their texts.

        For guidance with a scale of its own for pictures. What is appended here from now on is also appended there.
        """
        rows, chunk = len(self._slots), self._chunk
        self._without_texts = CachedModel(self.model, rows, length, chunk, 0, None, self.batch)
        return self._without_texts

    def length(self, row: int) -> int:
        return self._conditional.lengths[self._slots[row]]

    def chunks(self, rows: Sequence[int], count: int) -> list[list[int]]:
        """Return `rows` in the order and the portions in which they run `count` tokens each."""
        order, most = self._arrange(rows, count), self._most_rows(count)
        if self._guide is not None:
            assert self._guide._arrange(rows, count) == order, "the guide's rows lie elsewhere"
        return [order[start : start + most] for start in range(0, len(order), most)]

    @torch.no_grad()
    def append_text(self, pieces: Mapping[int, Sequence[int]], width: int) -> None:
        """Append to the rows their tokens, 1...width each."""
        for rows in self.chunks(list(pieces), width):
            slots = [self._slots[row] for row in rows]
            hidden = self._run_text(self._conditional, slots, [pieces[row] for row in rows], width)
            self._last_hidden[to_device(torch.tensor(rows), self.device)] = hidden
        for other in filter(None, (self._guide, self._without_texts)):
            other.append_text(pieces, width)

    @torch.no_grad()
    def append_images(self, images: Mapping[int, Tensor]) -> None:
        """Append to the rows their clean latents f32 [C, h, w], all of one shape, at t = 0."""
        grid: Grid = next(iter(images.values())).shape[1:]  # type: ignore[assignment]  # torch.Size
        count = self._num_patches(grid)
        for rows in self.chunks(list(images), count):
            cache, slots = self._part(rows)
            latents = torch.stack([images[row] for row in rows]).to(self.device)
            self._run_trunk(self._image_tokens([(cache, slots)], grid), latents, 0)  # nobody reads a prediction
            cache.advance(slots, [count] * len(slots))
        for other in filter(None, (self._guide, self._without_texts)):
            other.append_images(images)

    @torch.no_grad()
    def logits(self, rows: Sequence[int]) -> Tensor:
        """Return f32 [r, V] for the token after the last of each of `rows`."""
        chosen = [*rows, *[rows[0]] * self._padding(len(rows), 1, multiple=self._multiple)]
        hidden = self._last_hidden[to_device(torch.tensor(chosen), self.device)]
        return self.model.text_logits(hidden)[: len(rows)].float()

    def denoiser(
        self,
        rows: Sequence[int],
        grid: Grid,
        guidance: float = 1.0,
        image_guidance: float | None = None,
        rescale: float = 0.0,
    ) -> Callable[[Tensor, float, bool], Tensor]:
        """Return (x_t f32 [r, C, h, w], t, is_guided) -> the noise head's prediction f32 [r, C, h, w].

        For pictures at the end of `rows`, one of `chunks`, while nothing is appended to them; nothing is kept. The
        prediction is `guided` by the guide's or, without a guide, by the unconditional one and, with `image_guidance`,
        the one without texts, which share the forward; one that is not guided runs none of these.
        """
        part = self._part(rows)
        alone = self._image_tokens([part], grid)
        guide = None if self._guide is None else self._guide.denoiser(rows, grid)
        together, branches = alone, 1
        if self._unconditional is not None:
            parts = [part, (self._unconditional, range(len(rows)))]
            if image_guidance is not None:
                assert self._without_texts is not None, "image_guidance without the prompts without their texts"
                parts.append(self._without_texts._part(rows))
            together, branches = self._image_tokens(parts, grid), len(parts)

        @torch.no_grad()
        def predict(x_t: Tensor, t: float, is_guided: bool) -> Tensor:
            if not is_guided:
                return self._run_image(alone, x_t, t)
            if guide is not None:
                return guided(self._run_image(alone, x_t, t), guide(x_t, t, False), guidance, rescale)
            assert branches > 1, "guidance without a guide or an unconditional prefix"
            predictions = self._run_image(together, x_t.repeat(branches, 1, 1, 1), t).chunk(branches)
            conditional, unconditional = predictions[:2]
            without_texts = predictions[2] if branches == 3 else None
            return guided(conditional, unconditional, guidance, rescale, without_texts, image_guidance)

        return predict

    def _part(self, rows: Sequence[int]) -> tuple[KVCache, Sequence[int]]:
        return self._conditional, [self._slots[row] for row in rows]

    @torch.no_grad()
    def _run_text(self, cache: KVCache, slots: Sequence[int], pieces: Sequence[Sequence[int]], width: int) -> Tensor:
        """Append `pieces`; return [r, D], the hidden state of each one's last token."""
        padding = self._padding(len(slots), width, multiple=self._multiple)
        # What pads a short piece is written past the row's length, where attention does not look.
        padded = [[*piece, *[0] * (width - len(piece))] for piece in [*pieces, *[[]] * padding]]
        tokens = NextTokens([(cache, slots)], width, causal=True, padding=padding)
        no_grid = torch.full((1, width, 2), -1, device=self.device).expand(len(padded), -1, -1)
        embedded = self.model.embed_text(to_device(torch.tensor(padded), self.device))
        hidden = self.model.trunk(embedded, tokens.position_ids, no_grid, None, tokens, "text")
        counts = [len(piece) for piece in pieces]
        cache.advance(slots, counts)
        last = to_device(torch.tensor(counts), self.device) - 1
        return hidden[torch.arange(len(counts), device=self.device), last]

    def _image_tokens(self, parts: Sequence[tuple[KVCache, Sequence[int]]], grid: Grid) -> NextTokens:
        count, rows = self._num_patches(grid), len(parts[0][1])
        causal = self.model.config.image_attention == "causal"
        return NextTokens(parts, count, causal, self._padding(rows, count, len(parts)))

    def _run_image(self, tokens: NextTokens, latents: Tensor, t: float) -> Tensor:
        """Return the prediction f32 [R, C, h, w] for images [R, C, h, w] in the next places of their rows."""
        (rows, _, h, w), timesteps = latents.shape, self._timesteps(t)
        states = self._run_trunk(tokens, latents, t)
        return torch.cat([self.model.predict_noise(*state, timesteps, h, w) for state in states])[:rows].float()

    def _run_trunk(self, tokens: NextTokens, latents: Tensor, t: float) -> list[tuple[Tensor, list[Tensor]]]:
        """Write images [R, C, h, w] to the next places of their rows; return what a prediction is made of, in portions
        of the padded images.
        """
        (rows, _, _, w), (forward_rows, count) = latents.shape, tokens.position_ids.shape
        timesteps = self._timesteps(t)
        padded = torch.cat((latents, latents.new_zeros(forward_rows - rows, *latents.shape[1:])))
        # On a CPU a convolution gives an image the same bits among 2...15 others; its rows are even (`_padding`).
        together = 8 if self.device.type == "cpu" and self._convolves else forward_rows
        portions = padded.split(together)
        embedded, skips = zip(*[self.model.embed_images(portion, timesteps) for portion in portions], strict=True)
        index, columns = torch.arange(count, device=self.device), w // self.model.config.patch_size
        grid = torch.stack((index // columns, index % columns), dim=-1).expand(forward_rows, -1, -1)
        hidden = self.model.trunk(torch.cat(embedded), tokens.position_ids, grid, None, tokens, "image")
        return list(zip(hidden.split(together), skips, strict=True))

    def _timesteps(self, t: float) -> Tensor:
        """Return that of all images: one row in any forward, so always the same bits."""
        return torch.full((1,), t, device=self.device)

    def _padding(self, rows: int, count: int, branches: int = 1, multiple: int = 8) -> int:
        """Return how many rows to add to `branches * rows` of `count` tokens, so that their number changes no bits.

        On a CPU a product's row has the same bits in any product of a `multiple` of 8 rows and, by oneDNN (see
        model/linear.py), in any of two or more; MKL gives it others among 1, 2 to 3, and 5 to 7 rows (f32 and bf16, 1
        to 32 threads; tests/test_cached_model.py). On CUDA kernels differ from shape to shape: there every forward of
        a kind has one.
        """
        if self.device.type == "cpu":
            unit = multiple // math.gcd(multiple, count)
            return -branches * rows % max(unit, 2 if self._convolves else 1)
        return branches * (min(self.batch, self._most_rows(count)) - rows)

    def _most_rows(self, count: int) -> int:
        return max(1, TOKENS // count)

    def _num_patches(self, grid: Grid) -> int:
        return grid[0] * grid[1] // self.model.config.patch_size**2

    def _arrange(self, rows: Sequence[int], count: int) -> list[int]:
        """Move `rows` to the first slots, those of equal span side by side, with few copies; return them in order."""
        cache, slots = self._conditional, self._slots
        spans = {row: cache.span(slots[row], count) for row in rows}
        order: list[int] = []
        for span in sorted(set(spans.values()), reverse=True):
            members = [row for row in rows if spans[row] == span]
            region = range(len(order), len(order) + len(members))
            placed = {slots[row]: row for row in members if slots[row] in region}
            moving = iter([row for row in members if slots[row] not in region])
            order += [placed[slot] if slot in placed else next(moving) for slot in region]
        for slot, row in enumerate(order):
            if slots[row] != slot:
                other = slots.index(slot)
                cache.swap(slots[row], slot)
                slots[row], slots[other] = slot, slots[row]
        return order
