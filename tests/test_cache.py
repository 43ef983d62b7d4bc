"""The cache's slots, and caches side by side against each by itself."""

import torch

from model.attention import attend
from model.cache import KVCache, NextTokens


def test_cache_appends_at_each_rows_own_length_and_overwrites_until_advanced():
    cache = KVCache(layers=1, rows=2, capacity=8, kv_heads=1, head_dim=2, span=7)
    k = torch.arange(12, dtype=torch.float32).view(2, 3, 1, 2)
    cache.write(0, k, -k)
    cache.advance(torch.tensor([3, 1]))
    keys, values = cache.write(0, k + 100, -k)
    assert keys.shape == (2, 1, 7, 2)
    assert torch.equal(keys[0, 0, 3:6], k[0, :, 0] + 100)
    assert torch.equal(keys[1, 0, 1:4], k[1, :, 0] + 100)
    assert torch.equal(values[1, 0, 1:4], -k[1, :, 0])
    keys, _ = cache.write(0, k + 200, -k)
    assert torch.equal(keys[0, 0, :6], torch.cat((k[0, :, 0], k[0, :, 0] + 200)))
    assert cache.mask(2, causal=True)[:, 0].sum(-1).tolist() == [[4, 5], [2, 3]]
    assert cache.mask(2, causal=False)[:, 0].sum(-1).tolist() == [[5, 5], [3, 3]]


def test_an_idle_rows_writes_past_its_end_are_not_seen():
    cache = KVCache(layers=1, rows=1, capacity=6, kv_heads=1, head_dim=2, span=4)
    cache.write(0, torch.ones(1, 3, 1, 2), torch.ones(1, 3, 1, 2))
    cache.advance(torch.tensor([3]))
    keys, _ = cache.write(0, torch.full((1, 3, 1, 2), 9.0), torch.zeros(1, 3, 1, 2))  # slots 3, 4, 5
    assert keys.shape[2] == 4 and cache.mask(3, causal=False).shape == (1, 1, 3, 4)


def test_caches_side_by_side_attend_as_each_alone():
    generator = torch.Generator().manual_seed(0)

    def make(span: int) -> KVCache:
        cache = KVCache(layers=2, rows=2, capacity=span, kv_heads=2, head_dim=4)
        filled = torch.randn(2, 3, 2, 4, generator=torch.Generator().manual_seed(span))
        for layer in range(2):
            cache.write(layer, filled, -filled)
        cache.advance(torch.tensor([3, 2]))
        return cache

    q, k, v = (torch.randn(4, 5, 2, 4, generator=generator) for _ in range(3))
    q = q.transpose(1, 2)
    both, alone = NextTokens([make(12), make(8)], 5, causal=True), [make(12), make(8)]
    ours = both.attend(1, q, k, v)
    for cache, part in zip(alone, [slice(0, 2), slice(2, 4)], strict=True):
        mask = cache.mask(5, causal=True)
        assert torch.allclose(ours[part], attend(q[part], *cache.write(1, k[part], v[part]), mask), atol=1e-6)
    assert torch.equal(both.position_ids, torch.cat([cache.slots(5) for cache in alone]))
