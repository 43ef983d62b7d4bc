"""The keys and values of tokens already seen: preallocated, a length per row, several caches side by side.

Attention spans a fixed number of slots, whatever the rows' lengths, so that a row's bits depend on shapes and not on
how long its neighbours are. Rejected: paging (rows are few and of like length) and growing (the bits would move).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from model.attention import attend

Mask = Tensor | tuple[Tensor, ...]


class KVCache:
    """Keys and values of every layer; what lies past a row's length is never seen.

    A forward of n tokens writes slots [length, length + n) of each row; only `advance` keeps them, so writing again
    without it overwrites: that is how denoising steps share a prefix. Attention looks at the first `span` slots; those
    up to `capacity` take what idle rows write past their end.
    """

    def __init__(
        self,
        layers: int,
        rows: int,
        capacity: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        span: int | None = None,
    ) -> None:
        # Zeros, not empty: a masked slot still enters the product with weight 0, and 0 * nan is nan.
        shape = (layers, rows, capacity, kv_heads, head_dim)
        self.span = capacity if span is None else span
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=device)
        self._row_index = torch.arange(rows, device=device)[:, None]

    def slots(self, count: int) -> Tensor:
        """Return the next `count` slots of each row, int64 [rows, count]: also their positions in the document."""
        return self.lengths[:, None] + torch.arange(count, device=self.lengths.device)

    def mask(self, count: int, causal: bool) -> Mask:
        """Return bool [rows, 1, count, span] for the next `count` tokens: text (causal), or one image (not)."""
        last_visible = self.slots(count) if causal else (self.lengths + count - 1)[:, None].expand(-1, count)
        return (torch.arange(self.span, device=self.lengths.device) <= last_visible[..., None])[:, None]

    def layer(self, index: int) -> "LayerCache":
        """Return layer `index`'s part, which its attention writes and reads."""
        return LayerCache(self, index)

    def advance(self, counts: Tensor) -> None:
        """Keep the first `counts` int [rows] of the slots written last."""
        self.lengths += counts

    def write(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v [rows, n, Hkv, K] to the next slots; return what attention spans, [rows, Hkv, span, K]."""
        at = self._row_index, self.slots(k.shape[1])
        keys, values = self.keys[layer], self.values[layer]
        keys[at], values[at] = k.to(keys.dtype), v.to(values.dtype)
        return keys[:, : self.span].transpose(1, 2), values[:, : self.span].transpose(1, 2)


class LayerCache:
    """One layer of a KVCache: what a block gets, so that no block is compiled for its own layer number."""

    def __init__(self, cache: KVCache, index: int) -> None:
        self._cache, self._index = cache, index

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
        """Keep k, v [rows, n, Hkv, K]; return attention [rows, Hq, n, K] of q over all that the rows hold."""
        return attend(q, *self._cache.write(self._index, k, v), mask)


class SideBySide:
    """Several caches in one forward, the rows of the first, then of the next: each spans no more than it needs.

    The unconditional branch of guidance holds two tokens and a picture, a few hundred fewer than the prompt's.
    """

    def __init__(self, caches: Sequence[KVCache]) -> None:
        self.caches = tuple(caches)

    def slots(self, count: int) -> Tensor:
        return torch.cat([cache.slots(count) for cache in self.caches])

    def mask(self, count: int, causal: bool) -> Mask:
        return tuple(cache.mask(count, causal) for cache in self.caches)

    def layer(self, index: int) -> "LayersSideBySide":
        return LayersSideBySide(self.caches, index)


class LayersSideBySide:
    def __init__(self, caches: Sequence[KVCache], index: int) -> None:
        self._layers = [cache.layer(index) for cache in caches]
        self._rows = [len(cache.lengths) for cache in caches]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
        parts = zip(self._layers, *(tensor.split(self._rows) for tensor in (q, k, v)), mask, strict=True)
        return torch.cat([layer.attend(*part) for layer, *part in parts])
