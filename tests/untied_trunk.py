"""The trunk with untied weights, the slow way: layers run with both modalities' weights, a token keeps one result."""

import torch
from torch import Tensor

from model.attention import apply_rope, attend, rotary_tables
from model.transfusion import Transfusion


def untied_trunk(
    model: Transfusion, h: Tensor, positions: Tensor, grid: Tensor, mask: Tensor, is_image: Tensor
) -> Tensor:
    """Return the hidden states [B, S, D] that `model.trunk` should; `is_image` bool [B, S], `mask` a dense one."""
    trunk, config = model.transformer, model.config.transformer
    tables = rotary_tables(
        positions, config.head_width, config.rope_theta, grid if config.rope_2d else None, config.rope_scaling
    )

    def each(owner, name: str, x: Tensor) -> Tensor:
        text = owner.get_submodule(name)
        try:
            image = owner.get_submodule(f"image.{name}")
        except AttributeError:
            return text(x)
        chosen = is_image.view(*is_image.shape, *[1] * (x.ndim - 2))
        return torch.where(chosen, image(x), text(x))

    for block in trunk.blocks:
        qkv = each(block, "attention.qkv", each(block, "attention_norm", h)).unflatten(-1, (-1, config.head_width))
        q, k, v = qkv.split((config.heads, config.num_kv_heads, config.num_kv_heads), dim=2)
        if config.qk_norm:
            q, k = each(block, "attention.q_norm", q), each(block, "attention.k_norm", k)
        q, k = (apply_rope(x, tables).transpose(1, 2) for x in (q, k))
        mixed = attend(q, k, v.transpose(1, 2), mask).transpose(1, 2).flatten(2)
        h = h + each(block, "attention.out", mixed)
        gate, up = each(block, "ffn.gate_up", each(block, "ffn_norm", h)).chunk(2, -1)
        h = h + each(block, "ffn.down", torch.nn.functional.silu(gate) * up)
    of_text = trunk.norm(h)
    return of_text if trunk.image_norm is None else torch.where(is_image[..., None], trunk.image_norm(h), of_text)
