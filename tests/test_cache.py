"""The cache's rows, and caches side by side, against plain attention over the kept tokens of each row."""

import pytest
import torch

from model.attention import attend
from model.cache import KVCache, NextTokens


def make(rows: int, capacity: int, step: int, lengths: list[int], seed: int = 0) -> tuple[KVCache, list[torch.Tensor]]:
    """Return a cache whose rows hold `lengths` tokens, and those tokens, [length, Hkv, K] each; values are -keys."""
    cache = KVCache(layers=2, rows=rows, capacity=capacity, kv_heads=2, head_dim=4, step=step)
    held = []
    for row, length in enumerate(lengths):
        tokens = torch.randn(length, 2, 4, generator=torch.Generator().manual_seed(100 * seed + row))
        cache.keys[1, row, :length], cache.values[1, row, :length] = tokens, -tokens
        cache.advance([row], [length])
        held.append(tokens)
    return cache, held


def expected(q: torch.Tensor, k: torch.Tensor, held: torch.Tensor, causal: bool) -> torch.Tensor:
    """Return attention [Hq, n, K] of one row's n new tokens q [Hq, n, K], k [n, Hkv, K]; values are -keys."""
    keys = torch.cat((held, k)).transpose(0, 1)
    count, total = len(k), len(held) + len(k)
    mask = torch.ones(count, total, dtype=torch.bool)
    return attend(q[None], keys[None], -keys[None], mask.tril(total - count) if causal else mask)[0]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("count", [1, 4, 5])
def test_chosen_rows_of_two_caches_attend_as_each_row_alone(count: int, causal: bool) -> None:
    """Rows of equal and of other lengths, with and without room to the end of their span, in any order; padding."""
    lengths = [[3, 3, 7, 9, 0], [2, 2]]
    (first, held), (second, held_too) = make(5, 30, 8, lengths[0]), make(2, 2 + count, 1, lengths[1], seed=1)
    parts = [(first, [0, 1, 3, 2]), (second, [0, 1])]
    all_held = [held[0], held[1], held[3], held[2], *held_too]
    generator = torch.Generator().manual_seed(5)
    q, k = (torch.randn(8, count, 2, 4, generator=generator) for _ in range(2))
    for attempt in range(2):  # what is not kept is overwritten
        tokens = NextTokens(parts, count, causal, padding=2)
        k = k + attempt
        ours = tokens.attend(1, q.transpose(1, 2), k, -k)
    assert ours.shape == (8, 2, count, 4) and not ours[6:].any()
    for i, tokens_held in enumerate(all_held):
        assert torch.allclose(ours[i], expected(q[i].transpose(0, 1), k[i], tokens_held, causal), atol=1e-6), i
    starts = torch.tensor([len(tokens_held) for tokens_held in all_held] + [0, 0])
    assert torch.equal(tokens.position_ids, starts[:, None] + torch.arange(count))
    assert torch.equal(first.keys[1, 4], torch.zeros(32, 2, 4)), "a row that was not chosen is not written"


def test_rows_change_places_with_all_that_they_hold() -> None:
    cache, (first, second) = make(2, 16, 8, [3, 7])
    cache.swap(0, 1)
    assert cache.lengths == [7, 3]
    assert torch.equal(cache.keys[1, 0, :7], second) and torch.equal(cache.values[1, 1, :3], -first)
