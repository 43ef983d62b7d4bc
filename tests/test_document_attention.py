"""Attention document by document against the dense mask, in value and gradients; what it does not compute."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model import document_attention
from model.attention import RotaryTables, apply_rope, dense_mask, rotary_tables
from model.document_attention import attend_documents, document_mask
from model.transformer import Transformer, TransformerConfig
from tests.test_attention import random_layouts


def dense(qkv: Tensor, tables: RotaryTables, mask: Tensor, heads: int, kv_heads: int) -> Tensor:
    q, k, v = qkv.split((heads, kv_heads, kv_heads), dim=2)
    q, k, v = (x.transpose(1, 2) for x in (apply_rope(q, tables), apply_rope(k, tables), v))
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=heads != kv_heads)
    return mixed.transpose(1, 2).flatten(2)


def drawn(layout: tuple[Tensor, ...], heads: int, kv_heads: int, head_dim: int) -> tuple[Tensor, RotaryTables, Tensor]:
    """Return (qkv, rotary tables, upstream gradient that is zero on padding, as nothing reads it)."""
    generator, shape = torch.Generator().manual_seed(3), layout[0].shape
    qkv = torch.randn(*shape, heads + 2 * kv_heads, head_dim, generator=generator)
    tables = rotary_tables(torch.randint(0, 100, shape, generator=generator), head_dim, 1e4)
    upstream = torch.randn(*shape, heads * head_dim, generator=generator) * (layout[0] != 0)[..., None]
    return qkv.requires_grad_(), tables, upstream


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("whole, chunk", [(512, 256), (48, 32)])
def test_it_equals_the_dense_mask_in_value_and_gradients(
    whole: int, chunk: int, kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Documents of any length, cut into chunks or not; images that hide from later tokens; padding is zero."""
    monkeypatch.setattr(document_attention, "WHOLE", whole)
    monkeypatch.setattr(document_attention, "CHUNK", chunk)
    for seed in range(3):
        layout = random_layouts(3, 200, seed)
        qkv, tables, upstream = drawn(layout, 4, kv_heads, 16)
        expected = dense(qkv, tables, dense_mask(*layout), 4, kv_heads)
        mask = document_mask(*layout)
        found = attend_documents(qkv, tables, mask, 4, kv_heads)
        real = (layout[0] != 0)[..., None]
        assert any(len(group.chunks) > 1 for group in mask.groups) == (whole == 48)
        assert torch.allclose(found, torch.where(real, expected, 0.0), atol=1e-5)
        gradients = [torch.autograd.grad(out, qkv, upstream)[0] for out in (found, expected)]
        assert torch.allclose(*gradients, atol=1e-5)


def test_bf16_is_near_f32_in_value_and_gradients() -> None:
    layout = random_layouts(2, 120, seed=6)
    qkv, tables, upstream = drawn(layout, 4, 2, 16)
    results = []
    for x in (qkv, qkv.detach().bfloat16().requires_grad_()):
        out = attend_documents(x, tables, document_mask(*layout), 4, 2)
        results.append((out, *torch.autograd.grad(out, x, upstream.to(x.dtype))))
    for exact, half in zip(*results, strict=True):
        assert half.dtype == torch.bfloat16 and (half - exact).norm() < 2e-2 * exact.norm()


def test_nothing_is_computed_between_documents_nor_far_above_the_diagonal() -> None:
    """64 documents of 32 tokens cost 64 squares of 32, not one of 2,048; a long text about half of its square."""
    short = torch.arange(1, 65).repeat_interleave(32)[None]
    text, until = torch.full_like(short, -1), torch.full_like(short, 2048)
    (group,) = document_mask(short, text, until).groups
    assert group.tokens.shape == (64, 32)
    (group,) = document_mask(torch.ones_like(short), text, until).groups
    scores = sum((chunk.last - chunk.first) * chunk.keys for chunk in group.chunks)
    assert scores < 0.6 * 2048**2
    assert sum(chunk.bias.numel() for chunk in group.chunks) <= 2048 * document_attention.CHUNK


def test_a_batch_of_padding_gives_zeros_and_a_zero_gradient() -> None:
    layout = torch.zeros(2, 8, dtype=torch.int32), torch.full((2, 8), -1), torch.full((2, 8), 8)
    qkv, tables, _ = drawn(layout, 2, 2, 8)
    out = attend_documents(qkv, tables, document_mask(*layout), 2, 2)
    (gradient,) = torch.autograd.grad(out.sum(), qkv)
    assert not out.any() and not gradient.any()


@pytest.mark.parametrize("changes", [{}, {"qk_norm": True, "kv_heads": 2, "rope_2d": True}], ids=str)
def test_the_trunk_gives_real_tokens_the_same_hidden_states_under_both_masks(changes: dict[str, Any]) -> None:
    torch.manual_seed(0)
    trunk = Transformer(TransformerConfig(width=32, layers=2, heads=4, ffn_hidden=48, **changes))
    layout = random_layouts(2, 90, seed=8)
    h, positions = torch.randn(2, 90, 32), torch.arange(90).expand(2, -1)
    grid = torch.full((2, 90, 2), -1)
    real = layout[0] != 0
    upstream = torch.randn(int(real.sum()), 32)
    results = []
    for mask in (document_mask(*layout), dense_mask(*layout)):
        hidden = trunk(h, positions, grid, mask)[real]
        results.append([hidden, *torch.autograd.grad(hidden, list(trunk.parameters()), upstream)])
    for found, expected in zip(*results, strict=True):
        assert (found - expected).norm() < 1e-5 * max(expected.norm(), 1)
