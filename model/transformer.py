"""The trunk: a Llama stack (pre-norm RMSNorm, rotary attention, SwiGLU; no dropout).

It sees embeddings [B, S, D], positions and a mask, never tokens or images. Queries, keys and values are one linear
layer, gate and up another: fewer, larger products. Blocks are a plain ModuleList, so that checkpointing, compilation
and sharding are applied to each from outside.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import attention, cpu
from model.attention import RopeScaling, RotaryTables, additive_mask, apply_rope, attend, rotary_tables
from model.cache import NextTokens
from model.document_attention import DocumentMask, attend_documents
from model.linear import Linear

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

    def forward(self, x: Tensor, rotary: RotaryTables, mask: Mask, cached: CachedAttention | None = None) -> Tensor:
        """Return [B, S, D] of x [B, S, D]; with a cache, x are the next S tokens of each row and `mask` is not read."""
        qkv = self.qkv(x).unflatten(-1, (-1, self.head_dim))  # [B, S, Hq + 2 Hkv, K]
        if isinstance(mask, DocumentMask) and cached is None:
            if self.q_norm is not None and self.k_norm is not None:
                q, k, v = qkv.split((self.heads, self.kv_heads, self.kv_heads), dim=2)
                qkv = torch.cat((self.q_norm(q), self.k_norm(k), v), dim=2)
            return self.out(attend_documents(qkv, rotary, mask, self.heads, self.kv_heads))
        if self.q_norm is None or self.k_norm is None:
            qk, v = qkv.split((self.heads + self.kv_heads, self.kv_heads), dim=2)
            q, k = apply_rope(qk, rotary).split((self.heads, self.kv_heads), dim=2)
        else:
            q, k, v = qkv.split((self.heads, self.kv_heads, self.kv_heads), dim=2)
            q, k = apply_rope(self.q_norm(q), rotary), apply_rope(self.k_norm(k), rotary)
        if cached is None:
            assert not isinstance(mask, DocumentMask)
            mixed = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask)  # [B, Hq, S, K]
        else:
            mixed = cached(q.transpose(1, 2), k, v)
        return self.out(mixed.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate x) * up x)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.gate_up = Linear(config.width, 2 * config.hidden)
        self.down = Linear(config.hidden, config.width)

    def forward(self, x: Tensor) -> Tensor:
        gate_up = self.gate_up(x)
        if not torch.compiler.is_compiling():  # on a GPU too, for the memory; a compiler does the same by itself
            return self.down(cpu.swiglu(gate_up))
        gate, up = gate_up.chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.width, eps=config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = RMSNorm(config.width, eps=config.norm_eps)
        self.ffn = FeedForward(config)

    def forward(self, h: Tensor, rotary: RotaryTables, mask: Mask, cached: CachedAttention | None = None) -> Tensor:
        h = h + self.attention(self.attention_norm(h), rotary, mask, cached)
        return h + self.ffn(self.ffn_norm(h))


class Transformer(nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width, eps=config.norm_eps)

    def forward(
        self,
        h: Tensor,
        position_ids: Tensor,
        grid_positions: Tensor,
        mask: Mask,
        next_tokens: NextTokens | None = None,
    ) -> Tensor:
        """Return the normalised hidden states [B, S, D] of embeddings h [B, S, D].

        `position_ids` int [B, S]; `grid_positions` int [B, S, 2], (-1, -1) for text, read only with rope_2d; `mask`
        from `attention.block_mask`, `attention.dense_mask` or `document_mask`, or None to see everything. With
        `next_tokens`, h is appended to caches, which have their own masks, and `mask` is not read.
        """
        grid = grid_positions if self.config.rope_2d else None
        theta, scaling = self.config.rope_theta, self.config.rope_scaling
        rotary = rotary_tables(position_ids, self.config.head_width, theta, grid, scaling)
        if isinstance(mask, Tensor):
            mask = additive_mask(mask, h.dtype)
        for layer, block in enumerate(self.blocks):
            h = block(h, rotary, mask, None if next_tokens is None else partial(next_tokens.attend, layer))
        return self.norm(h)
