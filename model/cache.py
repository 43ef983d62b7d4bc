"""The keys and values of tokens already seen: preallocated, a length per row, several caches side by side.

Attention spans a fixed number of slots, whatever the rows' lengths, so a row's bits depend on shapes and not on how
long its neighbours are. Rejected: paging (rows are few and of similar length) and growing (the bits would change).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from model.attention import additive_mask, attend


class KVCache:
    """Keys and values of every layer; slots past a row's length are never seen.

    A forward of n tokens writes slots [length, length + n) of each row. Only `advance` keeps them: without it the next
    forward overwrites them, which is how denoising steps share a prefix. Attention looks at the first `span` slots;
    those from there to `capacity` absorb what idle rows write past their end.
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

    def mask(self, count: int, causal: bool) -> Tensor:
        """Return bool [rows, 1, count, span] for the next `count` tokens: text (causal), or one image (not)."""
        last_visible = self.slots(count) if causal else (self.lengths + count - 1)[:, None].expand(-1, count)
        return (torch.arange(self.span, device=self.lengths.device) <= last_visible[..., None])[:, None]

    def advance(self, counts: Tensor) -> None:
        """Keep the first `counts` int [rows] of the slots written last."""
        self.lengths += counts

    def write(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v [rows, n, Hkv, K] to the next slots; return what attention spans, [rows, Hkv, span, K]."""
        at = self._row_index, self.slots(k.shape[1])
        keys, values = self.keys[layer], self.values[layer]
        keys[at], values[at] = k.to(keys.dtype), v.to(values.dtype)
        return keys[:, : self.span].transpose(1, 2), values[:, : self.span].transpose(1, 2)


class NextTokens:
    """The next `count` tokens of all rows of `caches` in one forward: the rows of the first cache, then of the second.

    Each cache spans no more than it needs: guidance's unconditional branch holds two tokens and a picture, the
    conditional one the prompt too.
    """

    def __init__(self, caches: Sequence[KVCache], count: int, causal: bool) -> None:
        self.position_ids = torch.cat([cache.slots(count) for cache in caches])  # [R, count]
        self._caches = caches
        self._masks = [additive_mask(cache.mask(count, causal), cache.keys.dtype) for cache in caches]
        self._rows = [len(cache.lengths) for cache in caches]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Write k, v [R, count, Hkv, K]; return attention [R, Hq, count, K] of q over all that each row holds."""
        outputs = []
        rows = zip(q.split(self._rows), k.split(self._rows), v.split(self._rows), strict=True)
        for cache, mask, (q_part, k_part, v_part) in zip(self._caches, self._masks, rows, strict=True):
            keys, values = cache.write(layer, k_part, v_part)
            outputs.append(attend(q_part, keys, values, mask))
        return torch.cat(outputs)
