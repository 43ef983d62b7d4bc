"""The keys and values of tokens already seen: preallocated, a length per row, several caches side by side.

Attention over a row spans its own tokens, rounded up, so a row pays for its own length, and its bits depend on nothing
but that. Rejected: one span for all rows (short rows pay for long ones), paging (rows are few) and growing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from model.attention import additive_mask, attend


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy from the host, which does not wait for the device, as it would to copy from pageable memory."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class KVCache:
    """Keys and values of every layer; tokens past a row's length are never seen.

    A forward of n tokens writes [length, length + n) of its rows. Only `advance` keeps them: without it the next
    forward overwrites them, which is how denoising steps share a prefix. Attention spans multiples of `step` tokens.
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
        step: int = 64,
    ) -> None:
        # Zeros, not empty: a masked token still enters the product with weight 0, and 0 * nan is nan.
        shape = (layers, rows, -(-capacity // step) * step, kv_heads, head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.lengths = [0] * rows  # on the host: nothing waits for the device to know them
        self.step = step

    def span(self, row: int, count: int) -> int:
        """Return over how many tokens `count` new ones attend."""
        return -(-(self.lengths[row] + count) // self.step) * self.step

    def advance(self, rows: Sequence[int], counts: Sequence[int]) -> None:
        """Keep the first `counts` of the tokens written last to `rows`."""
        for row, count in zip(rows, counts, strict=True):
            self.lengths[row] += count

    def swap(self, a: int, b: int) -> None:
        """Exchange the contents of two rows."""
        longest = max(self.lengths[a], self.lengths[b])
        for part in (self.keys, self.values):
            part[:, [a, b], :longest] = part[:, [b, a], :longest]
        self.lengths[a], self.lengths[b] = self.lengths[b], self.lengths[a]


@dataclass
class _Run:
    """Neighbouring rows with the same span, attended to in one call."""

    keys: Tensor  # [layers, rows, span, Hkv, K], a part of a cache
    values: Tensor
    at: tuple[Tensor | slice, Tensor | slice]  # (rows, tokens) of the run that the new tokens take
    mask: Tensor | None  # additive, [rows, 1, count or 1, span]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = self.keys[layer], self.values[layer]
        keys[self.at], values[self.at] = k.to(keys.dtype), v.to(values.dtype)
        return attend(q, keys.transpose(1, 2), values.transpose(1, 2), self.mask)


class NextTokens:
    """The next `count` tokens, text (causal) or one image (not), of some rows of several caches in one forward.

    After them come `padding` rows that belong to no cache; attention gives them zeros.
    """

    def __init__(
        self, parts: Sequence[tuple[KVCache, Sequence[int]]], count: int, causal: bool, padding: int = 0
    ) -> None:
        device = parts[0][0].keys.device
        lengths = [cache.lengths[row] for cache, rows in parts for row in rows] + [0] * padding
        starts = to_device(torch.tensor(lengths), device)
        self.position_ids = starts[:, None] + torch.arange(count, device=device)
        # On CPU torch's kernel aligns its scratch memory for even numbers of queries only: with an odd number the last
        # bits depend on the thread. So a query is repeated there.
        self._extra = count % 2 if device.type == "cpu" else 0
        self._runs: list[_Run] = []
        for cache, rows in parts:
            # Without a mask where none is needed, by the row alone: its bits may not depend on the run it is in.
            kinds = [(cache.span(row, count), cache.lengths[row] + count < cache.span(row, count)) for row in rows]
            for _, group in groupby(range(len(rows)), key=lambda i: (kinds[i], rows[i] - i)):
                self._add_run(cache, [rows[i] for i in group], count, causal)

    def _add_run(self, cache: KVCache, rows: list[int], count: int, causal: bool) -> None:
        first, length, span = rows[0], cache.lengths[rows[0]], cache.span(rows[0], count)
        part = slice(first, first + len(rows))
        start = sum(len(run.keys[0]) for run in self._runs)
        positions = self.position_ids[start : start + len(rows)]  # [r, count]
        at: tuple[Tensor | slice, Tensor | slice] = slice(None), slice(length, length + count)
        if any(cache.lengths[row] != length for row in rows):
            at = torch.arange(len(rows), device=positions.device)[:, None], positions
        mask = None
        if span > length + count or (causal and count > 1):
            last_visible = positions if causal else positions[:, -1:]
            if self._extra and last_visible.shape[1] > 1:
                last_visible = torch.cat((last_visible, last_visible[:, -1:]), dim=1)
            index = torch.arange(span, device=positions.device)
            mask = additive_mask((index <= last_visible[..., None])[:, None], cache.keys.dtype)
        self._runs.append(_Run(cache.keys[:, part, :span], cache.values[:, part, :span], at, mask))

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Write k, v [R, count, Hkv, K]; return attention [R, Hq, count, K] of q over all that each row holds."""
        count = q.shape[2]
        if self._extra:
            q = torch.cat((q, q[:, :, -1:]), dim=2)
        sizes = [run.keys.shape[1] for run in self._runs]
        padding = len(q) - sum(sizes)
        parts = [tensor.split([*sizes, padding]) for tensor in (q, k, v)]
        outputs = [run.attend(layer, *run_parts) for run, *run_parts in zip(self._runs, *parts, strict=False)]
        if padding:
            outputs.append(torch.zeros_like(parts[0][-1]))
        by_token = [output.transpose(1, 2) for output in outputs]  # in memory too: cheap to join, and to flatten later
        joined = torch.cat(by_token) if len(by_token) > 1 else by_token[0]
        return joined[:, :count].transpose(1, 2)
