"""The trunk: a Llama stack (pre-norm RMSNorm, rotary attention, SwiGLU; no dropout).

It sees embeddings [B, S, D], positions and a mask, never tokens or images. Queries, keys and values are one linear
layer, gate and up another: fewer, larger products. Blocks are a plain ModuleList, so that checkpointing, compilation
and sharding are applied to each from outside.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import attention, cpu
from model.attention import RopeScaling, RotaryTables, additive_mask, apply_rope, attend, rotary_tables
from model.cache import NextTokens
from model.document_attention import DocumentMask, attend_documents
from model.linear import Linear
from model.modalities import Modalities, Modality, Untied, linear_pair, norm_pair

Mask = attention.Mask | DocumentMask
CachedAttention = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v -> attention over all that the cache holds


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    width: int = 768  # D, dimensions of the residual stream, >= 1
    layers: int = 16  # number of blocks, >= 1
    heads: int = 12  # query heads, >= 1
    head_dim: int | None = None  # dimensions of a head, even; null: width / heads
    kv_heads: int | None = None  # key-value heads, a divisor of heads; null: as many as heads
    ffn_hidden: int | None = None  # hidden dimensions of SwiGLU, >= 1; null: Llama's rule
    ffn_multiple_of: int = 256  # Llama's rule rounds 8/3 width up to a multiple of this, >= 1
    rope_theta: float = 10000.0  # base of the rotary frequencies, > 1
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)
    rope_2d: bool = False  # ours: inside images, half of the rotary frequencies rotate by row and column
    norm_eps: float = 1e-5  # added to the mean square in RMSNorm, > 0
    qkv_bias: bool = False  # biases of queries, keys and values (Qwen2); off in the paper
    qk_norm: bool = False  # RMSNorm of each query and key head (Chameleon, Qwen3); off in the paper

    def __post_init__(self) -> None:
        for name in ("width", "layers", "heads", "head_dim", "kv_heads", "ffn_hidden", "ffn_multiple_of"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected a positive number")
        if self.head_dim is None and self.width % (2 * self.heads):
            raise ValueError(f"width={self.width}, heads={self.heads}: expected width to be a multiple of 2 * heads")
        if self.head_width % 2:
            raise ValueError(f"head_dim={self.head_dim}: expected an even number, or null")
        if self.rope_2d and self.head_width % 8:
            raise ValueError(f"rope_2d with head dimension {self.head_width}: expected a multiple of 8; change heads")
        if self.heads % self.num_kv_heads:
            raise ValueError(f"kv_heads={self.kv_heads}: expected a divisor of heads={self.heads}, or null")
        if self.rope_theta <= 1 or self.norm_eps <= 0:
            raise ValueError(f"rope_theta={self.rope_theta}, norm_eps={self.norm_eps}: expected > 1 and > 0")

    @property
    def head_width(self) -> int:
        """Return K, the dimensions of a head."""
        return self.head_dim or self.width // self.heads

    @property
    def num_kv_heads(self) -> int:
        return self.kv_heads or self.heads

    @property
    def hidden(self) -> int:
        if self.ffn_hidden is not None:
            return self.ffn_hidden
        return -(-(8 * self.width // 3) // self.ffn_multiple_of) * self.ffn_multiple_of


# The paper's table 1.
SIZES = {
    "0.16b": TransformerConfig(width=768, layers=16, heads=12),
    "0.37b": TransformerConfig(width=1024, layers=24, heads=16),
    "0.76b": TransformerConfig(width=1536, layers=24, heads=24),
    "1.4b": TransformerConfig(width=2048, layers=24, heads=16),
    "7b": TransformerConfig(width=4096, layers=32, heads=32),
}


class RMSNorm(nn.RMSNorm):
    """torch's, but faster on CPU."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            assert self.eps is not None
            return cpu.rms_norm(x, self.weight, self.eps)
        return super().forward(x)


class Attention(nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.heads, config.num_kv_heads, config.head_width
        self.qkv = Linear(config.width, (self.heads + 2 * self.kv_heads) * self.head_dim, config.qkv_bias)
        self.out = Linear(self.heads * self.head_dim, config.width)
        self.q_norm = RMSNorm(self.head_dim, eps=config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, eps=config.norm_eps) if config.qk_norm else None

    def forward(
        self,
        x: Tensor,
        rotary: RotaryTables,
        mask: Mask,
        cached: CachedAttention | None = None,
        image: "Attention | None" = None,
        modalities: Modalities | None = None,
    ) -> Tensor:
        """Return [B, S, D] of x [B, S, D]; with a cache, x are the next S tokens of each row and `mask` is not read.

        With `modalities`, x and the result are sorted, [1, B * S, D], and images' tokens have the weights of `image`.
        """
        qkv = run(*pair(self, image, "qkv"), x, modalities).unflatten(-1, (-1, self.head_dim))
        if self.q_norm is not None and self.k_norm is not None:
            q, k, v = qkv.split((self.heads, self.kv_heads, self.kv_heads), dim=2)
            q = run(*pair(self, image, "q_norm"), q, modalities)
            k = run(*pair(self, image, "k_norm"), k, modalities)
            qkv = torch.cat((q, k, v), dim=2)
        mixed = self._attend(qkv, rotary, mask, cached, modalities)
        return run(*pair(self, image, "out"), mixed, modalities)

    def _attend(
        self,
        qkv: Tensor,
        rotary: RotaryTables,
        mask: Mask,
        cached: CachedAttention | None,
        modalities: Modalities | None,
    ) -> Tensor:
        """Return attention [B, S, Hq * K] of qkv [B, S, Hq + 2 Hkv, K], not yet rotated; sorted if they are."""
        if isinstance(mask, DocumentMask) and cached is None:
            return attend_documents(qkv, rotary, mask, self.heads, self.kv_heads)  # knows where sorted tokens are
        if modalities is not None:
            qkv = modalities.unsort(qkv)
        qk, v = qkv.split((self.heads + self.kv_heads, self.kv_heads), dim=2)
        q, k = apply_rope(qk, rotary).split((self.heads, self.kv_heads), dim=2)
        if cached is None:
            assert not isinstance(mask, DocumentMask)
            mixed = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask)  # [B, Hq, S, K]
        else:
            mixed = cached(q.transpose(1, 2), k, v)
        mixed = mixed.transpose(1, 2).flatten(2)
        return mixed if modalities is None else modalities.sort(mixed)


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate x) * up x)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.gate_up = Linear(config.width, 2 * config.hidden)
        self.down = Linear(config.hidden, config.width)

    def forward(self, x: Tensor, image: "FeedForward | None" = None, modalities: Modalities | None = None) -> Tensor:
        gate_up = run(*pair(self, image, "gate_up"), x, modalities)
        if torch.compiler.is_compiling():
            gate, up = gate_up.chunk(2, dim=-1)
            hidden = F.silu(gate) * up
        else:  # on a GPU too, for the memory; a compiler does the same by itself
            hidden = cpu.swiglu(gate_up)
        return run(*pair(self, image, "down"), hidden, modalities)


def pair(text: nn.Module, image: nn.Module | None, name: str) -> tuple[Any, Any]:
    """Return the module `name` of text's parts and of images', None if images have none of their own."""
    return getattr(text, name), getattr(image, name, None)


def run(text: Linear | RMSNorm, image: Linear | RMSNorm | None, x: Tensor, modalities: Modalities | None) -> Tensor:
    """Return text(x); with an `image` module of its own for images, of sorted tokens, each by its modality's."""
    if image is None:
        return text(x)
    assert modalities is not None, "untied weights need to know which tokens are images"
    if isinstance(text, Linear) and isinstance(image, Linear):
        return linear_pair(text, image, x, modalities)
    assert isinstance(text, RMSNorm) and isinstance(image, RMSNorm)
    return norm_pair(text, image, x, modalities)


class ImageParts(nn.Module):
    """The modules of a block that images have to themselves, under the names that text's have in it."""

    def __init__(self, config: TransformerConfig, untied: Untied) -> None:
        super().__init__()
        whole = untied == "all"
        self.attention_norm = RMSNorm(config.width, eps=config.norm_eps) if whole else None
        self.attention = Attention(config) if whole else None
        self.ffn_norm = RMSNorm(config.width, eps=config.norm_eps)
        self.ffn = FeedForward(config)


class Block(nn.Module):
    def __init__(self, config: TransformerConfig, untied: Untied = "none") -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.width, eps=config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = RMSNorm(config.width, eps=config.norm_eps)
        self.ffn = FeedForward(config)
        self.image = None if untied == "none" else ImageParts(config, untied)

    def forward(
        self,
        h: Tensor,
        rotary: RotaryTables,
        mask: Mask,
        cached: CachedAttention | None = None,
        modalities: Modalities | Modality | None = None,
    ) -> Tensor:
        """Return h [B, S, D] after the block; sorted, [1, B * S, D], if `modalities` are not one for all tokens."""
        of, mixed = partial(self._parts, modalities), modalities if isinstance(modalities, Modalities) else None
        attention, image_attention = of("attention")
        h = h + attention(run(*of("attention_norm"), h, mixed), rotary, mask, cached, image_attention, mixed)
        ffn, image_ffn = of("ffn")
        return h + ffn(run(*of("ffn_norm"), h, mixed), image_ffn, mixed)

    def _parts(self, modalities: Modalities | Modality | None, name: str) -> tuple[Any, Any]:
        """Return the module `name` and, if tokens of both modalities come and images have their own, that."""
        text, image = pair(self, self.image, name)
        if image is None or modalities == "text":
            return text, None
        return (image, None) if modalities == "image" else (text, image)


class Transformer(nn.Module):
    def __init__(self, config: TransformerConfig, untied: Untied = "none") -> None:
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(Block(config, untied) for _ in range(config.layers))
        self.norm = RMSNorm(config.width, eps=config.norm_eps)
        self.image_norm = RMSNorm(config.width, eps=config.norm_eps) if untied == "all" else None

    def forward(
        self,
        h: Tensor,
        position_ids: Tensor,
        grid_positions: Tensor,
        mask: Mask,
        next_tokens: NextTokens | None = None,
        modalities: Modalities | Modality | None = None,
    ) -> Tensor:
        """Return the normalised hidden states [B, S, D] of embeddings h [B, S, D].

        `position_ids` int [B, S]; `grid_positions` int [B, S, 2], (-1, -1) for text, read only with rope_2d; `mask`
        from `attention.block_mask`, `attention.dense_mask` or `document_mask`, or None to see everything. With
        `next_tokens`, h is appended to caches, which have their own masks, and `mask` is not read. `modalities` says
        which tokens are images, or what all are; read only with untied weights.
        """
        grid = grid_positions if self.config.rope_2d else None
        theta, scaling = self.config.rope_theta, self.config.rope_scaling
        rotary = rotary_tables(position_ids, self.config.head_width, theta, grid, scaling)
        if isinstance(mask, Tensor):
            mask = additive_mask(mask, h.dtype)
        if isinstance(modalities, Modalities):
            h = modalities.sort(h)
            mask = mask.moved(modalities.place) if isinstance(mask, DocumentMask) else mask
        for layer, block in enumerate(self.blocks):
            cached = None if next_tokens is None else partial(next_tokens.attend, layer)
            h = block(h, rotary, mask, cached, modalities)
        if isinstance(modalities, Modalities):
            return modalities.unsort(run(self.norm, self.image_norm, h, modalities))
        return self.norm(h) if modalities != "image" or self.image_norm is None else self.image_norm(h)
