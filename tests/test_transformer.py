"""The trunk against Llama written out in its plainest form, and cached against uncached."""

import pytest
import torch
import torch.nn.functional as F

from model import cpu
from model.cache import KVCache, NextTokens
from model.transformer import SIZES, RMSNorm, Transformer, TransformerConfig


def small_trunk(**changes):
    torch.manual_seed(0)
    settings = {"width": 32, "layers": 2, "heads": 4, "ffn_hidden": 40} | changes
    trunk = Transformer(TransformerConfig(**settings))
    with torch.no_grad():
        for name, parameter in trunk.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
    return trunk


def rms_norm(x, weight, eps):
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def rotate(x, position, theta):
    """x [K] at one position: pairs (2i, 2i + 1) turn by position * theta^(-2i / K)."""
    turned = x.clone()
    for i in range(0, len(x), 2):
        angle = torch.tensor(position * theta ** (-i / len(x)))
        turned[i] = x[i] * angle.cos() - x[i + 1] * angle.sin()
        turned[i + 1] = x[i + 1] * angle.cos() + x[i] * angle.sin()
    return turned


def slow_llama(trunk, h, mask):
    """One row h [S, D], one query and one head at a time."""
    config = trunk.config
    size, group = config.head_width, config.heads // config.num_kv_heads
    for block in trunk.blocks:
        x = rms_norm(h, block.attention_norm.weight, config.norm_eps)
        q, k, v = (x @ block.attention.qkv.weight.T).split(
            [config.width, config.num_kv_heads * size, config.num_kv_heads * size], -1
        )
        mixed = torch.zeros_like(h)
        for head in range(config.heads):
            columns = slice(head * size, (head + 1) * size)
            kv_columns = slice(head // group * size, (head // group + 1) * size)
            qs, ks = [], []
            for t in range(len(h)):
                query, key = q[t, columns], k[t, kv_columns]
                if config.qk_norm:
                    query = rms_norm(query, block.attention.q_norm.weight, config.norm_eps)
                    key = rms_norm(key, block.attention.k_norm.weight, config.norm_eps)
                qs.append(rotate(query, t, config.rope_theta))
                ks.append(rotate(key, t, config.rope_theta))
            scores = torch.stack(qs) @ torch.stack(ks).T / size**0.5
            mixed[:, columns] = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v[:, kv_columns]
        h = h + mixed @ block.attention.out.weight.T
        x = rms_norm(h, block.ffn_norm.weight, config.norm_eps)
        gate, up = (x @ block.ffn.gate_up.weight.T).chunk(2, -1)
        h = h + (F.silu(gate) * up) @ block.ffn.down.weight.T
    return rms_norm(h, trunk.norm.weight, config.norm_eps)


@pytest.mark.parametrize("changes", [{}, {"kv_heads": 2}, {"qk_norm": True}, {"rope_theta": 50.0}])
@torch.no_grad()
def test_trunk_equals_llama_written_out(changes):
    trunk = small_trunk(**changes)
    h = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(9, 9, dtype=torch.bool).tril()
    mask[3:6, 3:6] = True
    positions = torch.arange(9).expand(2, 9)
    fast = trunk(h, positions, None, mask.expand(2, 1, 9, 9))
    slow = torch.stack([slow_llama(trunk, row, mask) for row in h])
    assert torch.allclose(fast, slow, atol=1e-5)


@pytest.mark.parametrize("changes", [{}, {"kv_heads": 2, "qk_norm": True}, {"rope_2d": True}])
@torch.no_grad()
def test_cached_steps_equal_the_full_forward(changes):
    trunk = small_trunk(**changes)
    generator = torch.Generator().manual_seed(2)
    h = torch.randn(2, 12, 32, generator=generator)
    positions = torch.arange(12).expand(2, 12)
    grid = torch.full((2, 12, 2), -1)
    grid[:, 4:8] = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])
    mask = torch.ones(12, 12, dtype=torch.bool).tril()
    mask[4:8, 4:8] = True
    full = trunk(h, positions, grid, mask.expand(2, 1, 12, 12))

    config = trunk.config
    cache = KVCache(config.layers, 2, 16, config.num_kv_heads, config.head_width)
    pieces = []
    for start, stop, causal in [(0, 3, True), (3, 4, True), (4, 8, False), (8, 9, True), (9, 12, True)]:
        span = slice(start, stop)
        for content in (torch.randn(2, stop - start, 32, generator=generator), h[:, span]):  # noise is overwritten
            tokens = NextTokens([(cache, [0, 1])], stop - start, causal)
            piece = trunk(content, tokens.position_ids, grid[:, span], None, tokens)
        pieces.append(piece)
        cache.advance([0, 1], [stop - start] * 2)
    assert torch.allclose(torch.cat(pieces, 1), full, atol=1e-5)


@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_rms_norm_equals_torchs_in_value_and_gradients(dtype, tolerance):
    generator = torch.Generator().manual_seed(0)
    norm = RMSNorm(24, eps=1e-5, dtype=dtype)
    norm.weight.data.copy_(torch.rand(24, generator=generator) + 0.5)
    x = (torch.randn(3, 5, 24, generator=generator) * 3).to(dtype).requires_grad_()
    upstream = torch.randn(3, 5, 24, generator=generator).to(dtype)
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, norm.weight)]
    expected = F.rms_norm(exact[0], (24,), exact[1], 1e-5)
    ours = norm(x)
    assert ours.dtype == dtype
    assert torch.allclose(ours.double(), expected, rtol=tolerance, atol=tolerance)
    gradients = torch.autograd.grad(ours, (x, norm.weight), upstream)
    for grad, wanted in zip(gradients, torch.autograd.grad(expected, exact, upstream.double()), strict=True):
        assert (grad - wanted).norm() <= tolerance * wanted.norm()


def test_the_feed_forward_of_7b_is_as_wide_as_llamas():
    assert SIZES["7b"].hidden == 11008


def test_compiled_blocks_equal_eager_ones_and_share_one_graph():
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    trunk = small_trunk(layers=3)
    h = torch.randn(2, 8, 32).requires_grad_()  # as in training: embeddings need a gradient
    positions = torch.arange(8).expand(2, 8)
    mask = torch.ones(2, 1, 8, 8, dtype=torch.bool).tril()
    expected = trunk(h, positions, None, mask)
    for block in trunk.blocks:
        block.compile(backend=backend, dynamic=False)
    assert torch.allclose(trunk(h, positions, None, mask), expected, atol=1e-6)
    assert len(graphs) == 1


@pytest.mark.parametrize("name,low,high", [("0.16b", 0.11e9, 0.16e9), ("0.76b", 0.65e9, 0.8e9), ("7b", 6.4e9, 7.2e9)])
def test_block_parameters_come_to_about_the_size_in_the_name(name, low, high):
    with torch.device("meta"):
        trunk = Transformer(SIZES[name])
    assert low < sum(parameter.numel() for parameter in trunk.parameters()) < high


def test_meta_device_gives_no_buffers_to_lose():
    with torch.device("meta"):
        assert not list(small_trunk().buffers())


def test_swiglu_on_cpu_has_the_gradients_of_the_plain_formula():
    generator = torch.Generator().manual_seed(0)
    gate_up = torch.randn(5, 7, 24, dtype=torch.float64, generator=generator, requires_grad=True)
    gate, up = gate_up.chunk(2, -1)
    assert torch.allclose(cpu.swiglu(gate_up), F.silu(gate) * up)
    assert torch.autograd.gradcheck(cpu.swiglu, (gate_up,))
