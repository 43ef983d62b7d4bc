"""The baseline as everybody writes it: one document a row, padded to the longest, a dense boolean mask, plain modules.

Same blocks, sizes and losses as ours (RMSNorm, rotary positions, SwiGLU, timestep embedding, linear patches), but the
usual way: separate projections, logits at every position, masked means, and sampling without a cache, both guidance
branches in one forward over the whole sequence.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.peers.works import PATCH, PATCH_DIM, Sample, Size, Work

BOS, EOS, BOI, EOI, PAD = range(5)
IGNORE = -100


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [B, H, S, K] by cos, sin [S, K], halves paired, as in most Llamas."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Block(nn.Module):
    def __init__(self, work: Work) -> None:
        super().__init__()
        width, hidden = work.width, work.ffn_hidden
        self.heads = work.heads
        self.attention_norm, self.ffn_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.w1, self.w3 = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)

    def forward(self, h: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        x = self.attention_norm(h)
        q, k, v = (w(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        mixed = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, attn_mask=mask)
        h = h + self.wo(mixed.transpose(1, 2).flatten(2))
        x = self.ffn_norm(h)
        return h + self.w2(F.silu(self.w1(x)) * self.w3(x))


class Model(nn.Module):
    def __init__(self, work: Work) -> None:
        super().__init__()
        self.width, self.head_dim = work.width, work.width // work.heads
        self.embedding = nn.Embedding(work.vocabulary, work.width)
        self.time = nn.Sequential(nn.Linear(256, work.width), nn.SiLU(), nn.Linear(work.width, work.width))
        self.to_width, self.to_patch = nn.Linear(PATCH_DIM, work.width), nn.Linear(work.width, PATCH_DIM)
        self.blocks = nn.ModuleList(Block(work) for _ in range(work.layers))
        self.norm = nn.RMSNorm(work.width)
        self.head = nn.Linear(work.width, work.vocabulary, bias=False)

    def forward(self, ids: Tensor, patches: Tensor, timesteps: Tensor, is_patch: Tensor, mask: Tensor) -> Tensor:
        """Return hidden states [B, S, D]; `patches` [P, PATCH_DIM] of all rows in order, `timesteps` [P]."""
        angles = timesteps[:, None] * torch.exp(torch.arange(128) * (-math.log(10000.0) / 128))
        tokens = self.to_width(patches) + self.time(torch.cat((angles.cos(), angles.sin()), dim=-1))
        h = self.embedding(ids).masked_scatter(is_patch[..., None], tokens)
        inverse = 10000.0 ** (-torch.arange(0, self.head_dim, 2) / self.head_dim)
        turns = torch.arange(ids.shape[1])[:, None] * torch.cat((inverse, inverse))
        cos, sin = turns.cos(), turns.sin()
        for block in self.blocks:
            h = block(h, cos, sin, mask)
        return self.norm(h)


def patchify(sample: Sample) -> Tensor:
    """Return [P, PATCH_DIM]."""
    return F.unfold(torch.from_numpy(sample.latents)[None], PATCH, stride=PATCH)[0].T


def lay_out(sample: Sample) -> tuple[Tensor, int]:
    """Return (ids [len] with PAD in the place of patches, place of the first patch)."""
    caption, tail = torch.from_numpy(sample.caption), torch.from_numpy(sample.tail)
    before, after = torch.tensor([BOS, *caption, BOI]), torch.tensor([EOI, *tail, EOS])
    return torch.cat((before, torch.full((sample.patches,), PAD), after)), len(before)


def attention_mask(is_patch: Tensor, lengths: Tensor) -> Tensor:
    """Return bool [B, 1, S, S]: causal, or both in the row's image; padding sees only what is real."""
    causal = torch.ones(is_patch.shape[1], is_patch.shape[1], dtype=torch.bool).tril()
    image = is_patch[:, :, None] & is_patch[:, None, :]
    real = torch.arange(is_patch.shape[1]) < lengths[:, None]
    return ((causal | image) & real[:, None, :])[:, None]


class Plain:
    def __init__(self, work: Work) -> None:
        torch.manual_seed(work.seed)
        self.work, self.model = work, Model(work)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-4, betas=(0.9, 0.95), fused=True)
        steps = torch.arange(1000) / 1000
        self.alphas = torch.cos((steps + 0.008) / 1.008 * math.pi / 2) ** 2  # cumulative products

    def describe(self) -> dict[str, Any]:
        matrices = [p.numel() for n, p in self.model.named_parameters() if "blocks" in n and p.ndim == 2]
        return vars(Size(sum(p.numel() for p in self.model.parameters()), sum(matrices)))

    def train(self) -> None:
        samples = self.work.samples
        laid_out = [lay_out(sample) for sample in samples]
        lengths = torch.tensor([len(ids) for ids, _ in laid_out])
        ids = nn.utils.rnn.pad_sequence([ids for ids, _ in laid_out], batch_first=True, padding_value=PAD)
        firsts = torch.tensor([first for _, first in laid_out])
        counts = torch.tensor([sample.patches for sample in samples])
        place = torch.arange(ids.shape[1])
        is_patch = (place >= firsts[:, None]) & (place < (firsts + counts)[:, None])

        clean = torch.cat([patchify(sample) for sample in samples])
        timesteps = torch.randint(1000, (len(samples),)).repeat_interleave(counts)
        alpha, noise = self.alphas[timesteps][:, None], torch.randn_like(clean)
        noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise

        hidden = self.model(ids, noisy, timesteps, is_patch, attention_mask(is_patch, lengths))
        targets = torch.where(is_patch | (ids == PAD) | (ids == EOI), IGNORE, ids)[:, 1:]
        text = F.cross_entropy(self.model.head(hidden)[:, :-1].flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
        image = F.mse_loss(self.model.to_patch(hidden[is_patch]), noise)
        (text + 5 * image).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def draw(self, pictures: int, evaluations: int) -> None:
        """Draw pictures of 64 patches by DDIM with guidance 3."""
        patches, prompts = 64, self.work.prompts(pictures)
        rows = [torch.tensor([BOS, *caption, BOI]) for caption in prompts] + [torch.tensor([BOS, BOI])] * pictures
        firsts = torch.tensor([len(row) for row in rows])
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
        ids = F.pad(ids, (0, patches), value=PAD)
        place = torch.arange(ids.shape[1])
        is_patch = (place >= firsts[:, None]) & (place < firsts[:, None] + patches)
        mask = attention_mask(is_patch, firsts + patches)
        x = torch.randn(pictures * patches, PATCH_DIM)
        times = torch.linspace(999, 0, evaluations).round().long()
        for step, t in enumerate(times):
            at = t.expand(2 * len(x))
            hidden = self.model(ids, x.repeat(2, 1), at, is_patch, mask)
            conditional, free = self.model.to_patch(hidden[is_patch]).chunk(2)
            noise = free + 3.0 * (conditional - free)
            alpha = self.alphas[t]
            before = self.alphas[times[step + 1]] if step + 1 < evaluations else torch.tensor(1.0)
            clean = (x - (1 - alpha).sqrt() * noise) / alpha.sqrt().clamp(min=0.01)
            x = before.sqrt() * clean + (1 - before).sqrt() * noise
        assert torch.isfinite(x).all()

    def close(self) -> None:
        pass
