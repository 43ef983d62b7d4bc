"""Our contestant: the trainer's own step on one rank (real packing, draws, FSDP2, both losses, clipping, fused AdamW).

The documents of a work are packed into rows twice as long as the longest. Packing, draws and collation are timed with
the step, although a real run does them in another thread; only reading shards is left out.
"""

from typing import Any

import numpy as np
import torch

from bench.peers.works import CHANNELS, PATCH, Sample, Size, Work, rows_of
from bench.step import FLOAT32, sharded_model
from data.documents import Document, ImageSegment, TextSegment
from data.layout import lay_out
from data.loader import draw_images
from data.packing import PackedBatch, collate, pack
from data.tokenizer import SpecialIds
from model.diffusion import DiffusionConfig
from model.draws import SeededDraws
from model.sampler import Prompt, SpecialTokens, generate
from model.sampler_config import SamplerConfig
from model.transformer import TransformerConfig
from model.transfusion import Transfusion, TransfusionConfig, init_weights
from train.distributed.ranks import init_ranks
from train.flops import Flops
from train.optim.guard import GuardConfig
from train.optim.optimizer import OptimConfig, Optimizer
from train.step import forward_backward, latent_stats

SPECIAL = SpecialIds(bos=0, eos=1, boi=2, eoi=3, pad=4)
GRID = (16, 16)  # latents of a drawn picture


class Ours:
    def __init__(self, work: Work) -> None:
        self.work = work
        trunk = TransformerConfig(
            width=work.width, layers=work.layers, heads=work.heads, ffn_hidden=work.ffn_hidden, rope_2d=True
        )
        self.config = TransfusionConfig(
            transformer=trunk, patch_size=PATCH, latent_channels=CHANNELS, timestep_after_patches=True
        )
        self.pieces = [lay_out(_document(sample), SPECIAL, PATCH) for sample in work.samples]
        self.length = 2 * max(len(piece) for piece in self.pieces)
        self.ranks = init_ranks(timeout_s=60, device="cpu")
        self.model = sharded_model(self.config, work.vocabulary, self.ranks, FLOAT32)
        self.optimizer = Optimizer(self.model, OptimConfig(warmup_steps=1), GuardConfig())
        self.stats = latent_stats(None, CHANNELS, self.ranks.device)
        self.drawer: Transfusion | None = None
        self.steps = 0

    def describe(self) -> dict[str, Any]:
        """Return sizes, and the FLOPs of a step of this work, which count for all contestants."""
        matrices = [p.numel() for n, p in self.model.named_parameters() if "blocks" in n and p.ndim == 2]
        size = Size(sum(p.numel() for p in self.model.parameters()), sum(matrices))
        batch = self._batch()
        flops, _ = Flops.of(self.config, self.work.vocabulary).of_batch(batch)
        tokens = batch.input_ids.numel() - batch.num_padding
        assert tokens == self.work.useful_tokens, (tokens, self.work.useful_tokens)
        rows = {"rows": list(batch.input_ids.shape), "padding_share": batch.num_padding / batch.input_ids.numel()}
        return vars(size) | rows | {"flops": flops}

    def train(self) -> None:
        self.steps += 1
        batch = self._batch()
        forward_backward(
            self.model,
            batch,
            stats=self.stats,
            diffusion=DiffusionConfig(),
            image_weight=5.0,
            parallel=FLOAT32,
            global_text_targets=batch.num_text_targets,
            global_images=batch.num_images,
            is_last=True,
        )
        self.optimizer.update(self.steps)

    def _batch(self) -> PackedBatch:
        chosen = rows_of([len(piece) for piece in self.pieces], self.length)
        rows = [pack([self.pieces[i] for i in row], self.length, SPECIAL.pad) for row in chosen]
        draws = [draw_images(self.work.seed, self.steps, lane, row) for lane, row in enumerate(rows)]
        return collate(rows, draws, PATCH)

    def draw(self, pictures: int, evaluations: int) -> None:
        """Draw pictures of 64 patches side by side, each with `evaluations` forwards of both guidance branches."""
        if self.drawer is None:
            self.drawer = Transfusion(self.config, self.work.vocabulary).eval()
            init_weights(self.drawer, 0)
        prompts = [Prompt([torch.from_numpy(ids)], True, i) for i, ids in enumerate(self.work.prompts(pictures))]
        config = SamplerConfig(sampler="ddim", steps=evaluations, max_new_tokens=0, spacing="trailing")
        special = SpecialTokens(bos=SPECIAL.bos, eos=SPECIAL.eos, boi=SPECIAL.boi, eoi=SPECIAL.eoi)
        drawn = generate(self.drawer, prompts, config, DiffusionConfig(), special, GRID, SeededDraws(0))
        assert all(torch.isfinite(parts[0]).all() for parts in drawn)

    def close(self) -> None:
        self.ranks.close()


def _document(sample: Sample) -> Document:
    # The variance of a latent is e^-30: every contestant sees the same latents.
    moments = np.concatenate([sample.latents, np.full_like(sample.latents, -30.0)]).astype(np.float16)
    tail = (TextSegment(sample.tail),) if len(sample.tail) else ()
    return Document((TextSegment(sample.caption), ImageSegment(moments), *tail))
