"""The peer from the package registry, as its README uses it: lists of text and latents, its own padding and losses.

Its defaults, and its fastest documented ways: `modality_processing="auto"` (the default) picks the quickest of its
layouts, `sample_many` draws side by side with caches. Its flex attention runs on CUDA only. It multiplies by matrices
of its time conditioning, twice the size of the blocks', which it cannot do without. Heads are 4 of 64 channels, so that
attention is as wide as the model, as in its README. It has no optimizer of its own: fused AdamW, as for the others.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from transfusion_pytorch import Transfusion

from bench.peers.works import PATCH, PATCH_DIM, Sample, Size, Work


class TransfusionPytorch:
    def __init__(self, work: Work) -> None:
        torch.manual_seed(work.seed)
        self.work = work
        head_dim = work.width // work.heads
        trunk = {"dim": work.width, "depth": work.layers, "heads": work.heads, "dim_head": head_dim}
        self.model = Transfusion(
            num_text_tokens=work.vocabulary,
            dim_latent=PATCH_DIM,
            modality_default_shape=(8, 8),
            transformer=trunk,
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-4, betas=(0.9, 0.95), fused=True)

    def describe(self) -> dict[str, Any]:
        layers = self.model.transformer.layers
        matrices = [
            p.numel()
            for _, attention, feed_forward, _ in layers
            for p in (*attention.fn.parameters(), *feed_forward.fn.parameters())
            if p.ndim == 2
        ]
        return vars(Size(sum(p.numel() for p in self.model.parameters()), sum(matrices)))

    def train(self) -> None:
        loss = self.model([_parts(sample) for sample in self.work.samples])
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def draw(self, pictures: int, evaluations: int) -> None:
        """Draw pictures of 64 patches; the midpoint rule evaluates the model twice an interval."""
        prompts = [torch.from_numpy(caption) for caption in self.work.prompts(pictures)]
        steps = evaluations // 2 + 1  # ends of the intervals
        # After a picture of 64 tokens nothing more may be drawn: max_length ends the sample there.
        samples = self.model.sample_many(
            prompts, max_length=1, force_modality_at_start=(0, (8, 8)), modality_steps=steps, cfg_scale=3.0
        )
        for sample in samples:
            drawn = [part[1] for part in sample if isinstance(part, tuple)]
            assert len(drawn) == 1 and math.prod(drawn[0].shape[:-1]) == 64 and torch.isfinite(drawn[0]).all()

    def close(self) -> None:
        pass


def _parts(sample: Sample) -> list[Tensor]:
    """Return text and latents [rows, columns, PATCH_DIM] in order, as the model takes them."""
    c, h, w = sample.latents.shape
    grid = torch.from_numpy(sample.latents).reshape(c, h // PATCH, PATCH, w // PATCH, PATCH)
    latents = grid.permute(1, 3, 2, 4, 0).reshape(h // PATCH, w // PATCH, PATCH_DIM)
    tail = [torch.from_numpy(sample.tail)] if len(sample.tail) else []
    return [torch.from_numpy(sample.caption), latents, *tail]
