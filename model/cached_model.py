"""The model over a cache: rows of unequal length, appended to side by side, with pictures denoised at their ends.

The sampler decides what to append. Each call is one forward of all rows and a fixed number of tokens, idle rows
included (they append nothing), so the bits of a row depend on shapes and never on what its neighbours hold. Rejected:
shrinking the batch to the active rows, which saves time only where rows diverge and makes no picture reproducible;
left padding, which moves a row when a longer one joins.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from model.cache import KVCache, NextTokens
from model.transfusion import Transfusion


class CachedModel:
    """`rows` documents in one cache and, for guidance, as many copies of an unconditional prefix in the same batch."""

    def __init__(
        self, model: Transfusion, rows: int, length: int, largest: int, picture: int, unconditional: list[int] | None
    ) -> None:
        """Allocate for at most `length` tokens per row, `largest` per forward, `picture` per new picture."""
        trunk, weight = model.config.transformer, model.text_head.weight
        self.model, self.device = model, weight.device
        self.lengths = [0] * rows

        def cache(span: int, idle: int) -> KVCache:
            shape = (trunk.layers, rows, span + idle, trunk.num_kv_heads, trunk.head_dim)
            return KVCache(*shape, weight.dtype, self.device, span)

        self._conditional = cache(length, largest)
        self._last_hidden = torch.zeros(rows, trunk.width, dtype=weight.dtype, device=self.device)
        if unconditional is not None:
            prefix = torch.tensor([unconditional] * rows, device=self.device)
            counts = torch.full((rows,), len(unconditional), device=self.device)
            self._unconditional = cache(len(unconditional) + picture, 0)
            self._run_text(self._unconditional, prefix, counts)

    @torch.no_grad()
    def append_text(self, pieces: Sequence[Sequence[int]], width: int) -> None:
        """Append each row's tokens, at most `width` and perhaps none."""
        # The padding of a short piece is written past the row's length, where attention does not look.
        padded = [[*piece, *[0] * (width - len(piece))] for piece in pieces]
        counts = torch.tensor([len(piece) for piece in pieces], device=self.device)
        hidden = self._run_text(self._conditional, torch.tensor(padded, device=self.device), counts)
        self._last_hidden = torch.where((counts > 0)[:, None], hidden, self._last_hidden)
        self.lengths = [length + len(piece) for length, piece in zip(self.lengths, pieces, strict=True)]

    @torch.no_grad()
    def append_images(self, latents: Tensor, chosen: Sequence[bool]) -> None:
        """Append clean latents f32 [R, C, h, w], at t = 0, to the chosen rows."""
        count = self._run_image([self._conditional], latents, 0)[1]
        self._conditional.advance(torch.tensor(chosen, device=self.device) * count)
        self.lengths = [length + count * take for length, take in zip(self.lengths, chosen, strict=True)]

    @torch.no_grad()
    def logits(self) -> Tensor:
        """Return f32 [R, V] for the token after each row's last."""
        return self.model.text_logits(self._last_hidden).float()

    @torch.no_grad()
    def predict(self, x_t: Tensor, t: int, guidance: float) -> Tensor:
        """Return the noise head's prediction f32 [R, C, h, w] for a picture at the end of each row; keep nothing.

        unconditional + guidance * (conditional - unconditional) (Ho & Salimans 2021), both in one forward; with
        guidance 1 the unconditional branch is not run.
        """
        if guidance == 1:
            return self._run_image([self._conditional], x_t, t)[0]
        caches = [self._conditional, self._unconditional]
        conditional, unconditional = self._run_image(caches, x_t.repeat(2, 1, 1, 1), t)[0].chunk(2)
        return unconditional + guidance * (conditional - unconditional)

    def _run_text(self, cache: KVCache, input_ids: Tensor, counts: Tensor) -> Tensor:
        """Keep `counts` [R] of input_ids [R, n]; return [R, D], the hidden state of each row's last kept token."""
        rows, width = input_ids.shape
        no_grid = torch.full((1, width, 2), -1, device=self.device).expand(rows, -1, -1)
        tokens = NextTokens([cache], width, causal=True)
        hidden = self.model.trunk(self.model.embed_text(input_ids), tokens.position_ids, no_grid, None, tokens)
        cache.advance(counts)
        return hidden[torch.arange(rows, device=self.device), (counts - 1).clamp(min=0)]

    def _run_image(self, caches: Sequence[KVCache], latents: Tensor, t: int) -> tuple[Tensor, int]:
        """Return (prediction f32 [R, C, h, w], tokens per image) for images in each row's next slots; keep nothing."""
        h, w = latents.shape[2:]
        timesteps = torch.full((len(latents),), t, device=self.device)
        embedded, skips = self.model.embed_images(latents, timesteps)
        count, columns = embedded.shape[1], w // self.model.config.patch_size
        index = torch.arange(count, device=self.device)
        grid = torch.stack((index // columns, index % columns), dim=-1).expand(len(latents), -1, -1)
        tokens = NextTokens(caches, count, causal=self.model.config.image_attention == "causal")
        hidden = self.model.trunk(embedded, tokens.position_ids, grid, None, tokens)
        return self.model.predict_noise(hidden, skips, timesteps, h, w).float(), count
