"""Rotary positions, the attention mask and attention itself.

The mask is one rule (the paper, section 3): allowed(q, k) <=> same document and (same image, or k <= q and
q < visible_until[k]). It comes in two forms built from the same ids: a dense boolean for SDPA and a `BlockMask` for
FlexAttention, which skips empty blocks and runs `mask_mod` only in partial ones. Rejected: `create_block_mask`, which
evaluates all S x S pairs and at 4k tokens costs more than the attention it saves.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from model import cpu

Mask = BlockMask | Tensor | None  # see `attend`

BLOCK = 128  # tokens per side of a mask block: flex attention's own tile


class RotaryTables:
    """Cosines and sines of one batch, f32 [B, S, 1, K/2], computed once per forward and shared by all blocks.

    A plain class on purpose: FSDP2's mixed precision casts every float tensor that it finds in a module's arguments,
    in tuples and dataclasses too, and angles rounded to bf16 blur positions.
    """

    __slots__ = ("cos", "sin", "turns")

    def __init__(self, angles: Tensor) -> None:
        self.cos, self.sin = angles.cos(), angles.sin()
        self.turns = None if angles.is_cuda else torch.complex(self.cos, self.sin)  # for model/cpu.py


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Llama 3's stretching of slow rotary frequencies, with which it was trained on after its context was extended.

    (Grattafiori et al. 2024, arXiv:2407.21783; the formula is that of Meta's llama-models, `apply_scaling`.)
    """

    factor: float = 1.0  # by which frequencies slower than `low_freq_factor` are divided, >= 1; 1: none
    low_freq_factor: float = 1.0  # turns in `original_length` tokens up to which a frequency counts as slow, > 0
    high_freq_factor: float = 4.0  # and from which on it stays as it is, more than low_freq_factor
    original_length: int = 8192  # tokens of the context before it was extended, >= 1

    def __post_init__(self) -> None:
        if self.factor < 1 or not 0 < self.low_freq_factor < self.high_freq_factor or self.original_length < 1:
            raise ValueError(
                f"rope_scaling.factor={self.factor}, low_freq_factor={self.low_freq_factor}, high_freq_factor="
                f"{self.high_freq_factor}, original_length={self.original_length}: expected factor >= 1, 0 < "
                "low_freq_factor < high_freq_factor, original_length >= 1"
            )

    def apply(self, inverse: Tensor) -> Tensor:
        """Return the scaled rotary frequencies f32 [K/2] of frequencies in radians a token."""
        turns = self.original_length * inverse / (2 * math.pi)
        kept = ((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)
        return inverse * (kept + (1 - kept) / self.factor)


def rotary_tables(
    position_ids: Tensor,
    head_dim: int,
    theta: float,
    grid_positions: Tensor | None = None,
    scaling: RopeScaling | None = None,
) -> RotaryTables:
    """Return the tables of `position_ids` int [B, S].

    With `grid_positions` int [B, S, 2] (ours: 2-D RoPE), every second frequency of an image token rotates by its row
    or column; (-1, -1) marks text, which keeps plain RoPE.
    """
    frequency = torch.arange(0, head_dim, 2, device=position_ids.device, dtype=torch.float32)
    inverse = theta ** (-frequency / head_dim)  # [K/2]
    if scaling is not None and scaling.factor > 1:
        inverse = scaling.apply(inverse)
    positions = position_ids[..., None].float()  # [B, S, 1]
    if grid_positions is not None:
        # Axis of each frequency: 1-D, row, 1-D, column, ... so both axes get coarse and fine frequencies.
        axis = torch.arange(head_dim // 2, device=position_ids.device) % 4
        row, column = grid_positions[..., None].float().unbind(-2)  # [B, S, 1] each
        is_image = row >= 0
        positions = torch.where(is_image & (axis == 1), row, positions)
        positions = torch.where(is_image & (axis == 3), column, positions)  # [B, S, K/2]
    return RotaryTables((positions * inverse).unsqueeze(2))


def apply_rope(x: Tensor, tables: RotaryTables) -> Tensor:
    """Rotate x [B, S, heads, K] by its positions; pairs are (2i, 2i + 1), as in Meta's Llama."""
    pairs = x.float().unflatten(-1, (-1, 2))
    if tables.turns is not None and not torch.compiler.is_compiling():
        return cpu.rotate_pairs(pairs, tables.turns).to(x.dtype)
    even, odd = pairs.unbind(-1)
    rotated = (even * tables.cos - odd * tables.sin, odd * tables.cos + even * tables.sin)
    return torch.stack(rotated, dim=-1).flatten(-2).to(x.dtype)


def allowed(
    q: Tensor, k: Tensor, q_ids: tuple[Tensor, Tensor], k_ids: tuple[Tensor, Tensor], visible_until_k: Tensor
) -> Tensor:
    """Return, broadcast, whether query index `q` may see key index `k`: the only definition of the mask.

    `q_ids` and `k_ids` are (document_ids, image_ids) at those indices, `visible_until_k` the first index that no longer
    sees the key. Image ids are unique within the row, -1 for text; padding is document 0.
    """
    (q_document, q_image), (k_document, k_image) = q_ids, k_ids
    same_image = (q_image == k_image) & (q_image >= 0)
    return (q_document == k_document) & (same_image | ((k <= q) & (q < visible_until_k)))


def dense_mask(document_ids: Tensor, image_ids: Tensor, visible_until: Tensor) -> Tensor:
    """Return bool [B, 1, S, S], True where attention is allowed, from int ids [B, S]."""
    index = torch.arange(document_ids.shape[1], device=document_ids.device)
    q_ids = document_ids[:, :, None], image_ids[:, :, None]
    k_ids = document_ids[:, None, :], image_ids[:, None, :]
    return allowed(index[:, None], index[None, :], q_ids, k_ids, visible_until[:, None, :])[:, None]


def additive_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return 0 where bool `mask` allows and -inf elsewhere, as SDPA would in every layer; additive masks stay."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)


def block_mask(document_ids: Tensor, image_ids: Tensor, visible_until: Tensor, block: int = BLOCK) -> BlockMask:
    """Return the BlockMask of int ids [B, S], on their device, without synchronizing with it.

    A block is called empty or full only where its ids' minima and maxima prove it; any other is partial, and `mask_mod`
    decides there. So the classification may be coarse but is never wrong.
    """

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        q_ids, k_ids = (document_ids[b, q], image_ids[b, q]), (document_ids[b, k], image_ids[b, k])
        return allowed(q, k, q_ids, k_ids, visible_until[b, k])

    empty, full = _classify(document_ids, image_ids, visible_until, block)
    partial, lengths = ~empty & ~full, (document_ids.shape[1], document_ids.shape[1])
    return BlockMask.from_kv_blocks(
        *_ordered(partial), *_ordered(full), BLOCK_SIZE=block, mask_mod=mask_mod, seq_lengths=lengths
    )


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """Return attention [B, Hq, S, K] of q [B, Hq, S, K] over k, v [B, Hkv, Skv, K]; `mask` None sees everything."""
    grouped = q.shape[1] != k.shape[1]
    if isinstance(mask, BlockMask):
        attention: Callable[..., Tensor] = flex_attention
        if q.is_cuda and not torch.compiler.is_compiling():  # else compiled with the block around it
            attention = _compiled_flex()
        return attention(q, k, v, block_mask=mask, enable_gqa=grouped)
    if q.dtype == torch.bfloat16 and q.device.type == "cpu" and mask is not None and not grouped:
        return cpu.attend_bf16(q, k, v, additive_mask(mask, q.dtype))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    return torch.compile(flex_attention, dynamic=False)


def _classify(document_ids: Tensor, image_ids: Tensor, visible_until: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Return bool (empty, full) [B, Q, Kv] of the block pairs; a short last block is never called full."""
    length = document_ids.shape[1]
    blocks = -(-length // block)
    index = torch.arange(blocks * block, device=document_ids.device).clamp(max=length - 1)  # repeats the last token
    first = torch.arange(blocks, device=document_ids.device) * block
    last = first + block - 1

    def extremes(ids: Tensor) -> tuple[Tensor, Tensor]:  # [B, S] -> [B, blocks] twice
        blocked = ids[:, index].unflatten(1, (blocks, block))
        return blocked.amin(2), blocked.amax(2)

    document_min, document_max = extremes(document_ids)
    image_min, image_max = extremes(image_ids)
    # Over images only: text (-1) must not stretch the interval.
    first_image, _ = extremes(torch.where(image_ids >= 0, image_ids, torch.iinfo(torch.int32).max))
    until_min, until_max = extremes(visible_until)
    (q_first, q_last), (k_first, k_last) = (first[:, None], last[:, None]), (first, last)

    some_causal = (k_first <= q_last) & (q_first < until_max[:, None, :])
    documents_meet, images_meet = _intervals_meet(document_min, document_max), _intervals_meet(first_image, image_max)
    empty = ~(documents_meet & (images_meet | some_causal))

    one_document = _same_constant(document_min, document_max)
    one_image = _same_constant(image_min, image_max) & (image_min >= 0)[:, None, :]
    all_causal = (k_last <= q_first) & (q_last < until_min[:, None, :])
    whole = (k_last < length) & (q_last < length)
    return empty, one_document & (one_image | all_causal) & whole


def _intervals_meet(low: Tensor, high: Tensor) -> Tensor:  # [B, blocks] twice -> [B, Q, Kv], as is the next
    return (low[:, :, None] <= high[:, None, :]) & (low[:, None, :] <= high[:, :, None])


def _same_constant(low: Tensor, high: Tensor) -> Tensor:
    constant = low == high
    return constant[:, :, None] & constant[:, None, :] & (low[:, :, None] == low[:, None, :])


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return int32 (count [B, 1, Q], indices [B, 1, Q, Kv], the True ones first) of bool [B, Q, Kv]."""
    indices = blocks.to(torch.int32).argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32)[:, None], indices.to(torch.int32)[:, None]
