"""Attention on CPU during training: document by document, so that nothing is computed between two documents.

A row holds several documents, and each sees itself alone. So the mask is a list of documents, found once per batch, and
attention gathers those of similar length into one batched product. In a long document only the keys that a chunk of
queries can see are multiplied. The rule is `allowed` in model/attention.py; the only difference to the dense mask is
that padding sees nothing and gets zeros, which nothing reads. Rejected: torch's fused kernel under a dense mask, which
computes every pair of a row.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from model.attention import RotaryTables, allowed

PADDING = 0  # its document id
SIMILAR = 0.8  # documents share a product if the shortest has at least this share of the longest one's length
WHOLE = 512  # tokens of a document up to which it is one chunk, whose attention weights are kept for the backward
CHUNK = 256  # queries at once in a longer document; their weights are computed again in the backward


class Chunk(NamedTuple):
    """Queries [first, last) of a group's documents: they see no key from `keys` on, and all of the first `free`."""

    first: int
    last: int
    free: int
    keys: int
    bias: Tensor  # f32 [n, 1, last - first, keys - free], 0 or -inf


class Group(NamedTuple):
    """n documents of similar length; L is that of the longest."""

    tokens: Tensor  # int64 [n, L] into the B * S tokens; a shorter document's last token repeats
    filled: Tensor  # bool [n, L], False where it repeats
    chunks: list[Chunk]


class Places(NamedTuple):
    """Where each head's vectors lie in a batch [B, S, heads, K], seen as [B * S * heads, K], and in the groups."""

    gather: Tensor  # int64 [R], from where each vector of the groups comes
    scatter: Tensor  # int64 [B * S * heads], where each vector of the batch is among the groups'; R if nowhere
    repeats: Tensor  # int64, which of the groups' vectors are repetitions
    shapes: list[list[tuple[int, int, int]]]  # by group, (n, heads, L) of each part

    def split(self, vectors: Tensor) -> Iterator[list[Tensor]]:
        """Yield each group's parts, [n, heads, L, K] each, of vectors [R or more, K]."""
        start = 0
        for shapes in self.shapes:
            parts = []
            for n, heads, length in shapes:
                stop = start + n * heads * length
                parts.append(vectors[start:stop].view(n, heads, length, -1))
                start = stop
            yield parts


class DocumentMask:
    """The mask of one batch. A plain class, as FSDP2's mixed precision would cast the biases of a dataclass."""

    def __init__(self, groups: list[Group], num_tokens: int, place: Tensor | None = None) -> None:
        self.groups, self.num_tokens = groups, num_tokens
        self._place = place  # int64 [B * S], where each token is, if they are in another order
        self._places: dict[tuple[int, ...], Places] = {}
        self._turns: tuple[RotaryTables, list[tuple[Tensor, Tensor]]] | None = None

    def moved(self, place: Tensor) -> "DocumentMask":
        """Return the mask for tokens that lie at `place` int64 [B * S], wherever their positions are."""
        return DocumentMask(self.groups, self.num_tokens, place)

    def places(self, parts: tuple[int, ...]) -> Places:
        """Return the places of vectors with sum(parts) heads, of which each group holds one part after the other."""
        if parts not in self._places:
            self._places[parts] = self._find_places(parts)
        return self._places[parts]

    def turns(self, rotary: RotaryTables) -> list[tuple[Tensor, Tensor]]:
        """Return each group's turns, complex [n, 1, L, K/2]: of queries, also scaled by K^-1/2, and of keys."""
        if self._turns is None or self._turns[0] is not rotary:
            assert rotary.turns is not None
            vectors, pairs = rotary.turns.flatten(0, 2), []
            for group in self.groups:
                turns = vectors.index_select(0, group.tokens.flatten()).view(*group.tokens.shape, -1)[:, None]
                pairs.append((turns * (2 * turns.shape[-1]) ** -0.5, turns))
            self._turns = rotary, pairs
        return self._turns[1]

    def _find_places(self, parts: tuple[int, ...]) -> Places:
        heads, found, filled = torch.arange(sum(parts)).split(parts), [], []
        for group in self.groups:
            tokens = group.tokens if self._place is None else self._place[group.tokens]
            for part in heads:
                places = tokens[:, None] * sum(parts) + part[:, None]  # [n, heads, L]
                found.append(places.flatten())
                filled.append(group.filled[:, None].expand_as(places).flatten())
        empty = torch.zeros(0, dtype=torch.int64)  # a batch may be padding alone
        gather, real = torch.cat([empty, *found]), torch.cat([empty.bool(), *filled])
        scatter = torch.full((self.num_tokens * sum(parts),), len(gather))
        scatter[gather[real]] = real.nonzero().flatten()
        shapes = [[(len(group.tokens), part, group.tokens.shape[1]) for part in parts] for group in self.groups]
        return Places(gather, scatter, (~real).nonzero().flatten(), shapes)


def document_mask(document_ids: Tensor, image_ids: Tensor, visible_until: Tensor) -> DocumentMask:
    """Return the mask of int ids [B, S] on the CPU; each document must lie in one piece in its row."""
    rows, length = document_ids.shape
    begins = torch.ones_like(document_ids, dtype=torch.bool)
    begins[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    starts = begins.flatten().nonzero().flatten()
    sizes = torch.diff(starts, append=torch.tensor([rows * length]))
    is_document = document_ids.flatten()[starts] != PADDING
    starts, sizes = starts[is_document], sizes[is_document]
    first_of_row = torch.arange(0, rows * length, length)[:, None]
    ids = document_ids.flatten(), image_ids.flatten(), (visible_until + first_of_row).flatten()
    groups: list[list[int]] = []
    lengths = sizes.tolist()
    for number in sizes.argsort(descending=True, stable=True).tolist():
        if not groups or lengths[number] < SIMILAR * lengths[groups[-1][0]]:
            groups.append([])
        groups[-1].append(number)
    return DocumentMask([_group(starts[each], sizes[each], ids) for each in groups], rows * length)


def _group(starts: Tensor, sizes: Tensor, ids: tuple[Tensor, Tensor, Tensor]) -> Group:
    longest = int(sizes.max())
    slots = torch.arange(longest)
    filled = slots < sizes[:, None]
    tokens = starts[:, None] + torch.minimum(slots, sizes[:, None] - 1)
    document, image, until = (each[tokens] for each in ids)
    chunks, step = [], longest if longest <= WHOLE else CHUNK
    for first in range(0, longest, step):
        part = slice(first, first + step)
        q_ids, k_ids = (document[:, part, None], image[:, part, None]), (document[:, None], image[:, None])
        seen = allowed(tokens[:, part, None], tokens[:, None], q_ids, k_ids, until[:, None]) & filled[:, None]
        keys = int(seen.any(1).any(0).nonzero().max()) + 1
        free = int(seen.all(1).all(0)[:keys].int().cumprod(0).sum())
        partly = seen[:, None, :, free:keys]
        bias = torch.zeros(partly.shape).masked_fill_(~partly, -torch.inf)
        chunks.append(Chunk(first, first + seen.shape[1], free, keys, bias))
    return Group(tokens, filled, chunks)


def attend_documents(qkv: Tensor, rotary: RotaryTables, mask: DocumentMask, heads: int, kv_heads: int) -> Tensor:
    """Return attention [B, S, Hq * K] of queries, keys and values qkv [B, S, Hq + 2 Hkv, K], not yet rotated."""
    return _DocumentAttention.apply(qkv, rotary, mask, heads, kv_heads).flatten(2)


class _DocumentAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, rotary: RotaryTables, mask: DocumentMask, heads: int, kv_heads: int) -> Tensor:
        into, out_of = mask.places((heads, kv_heads, kv_heads)), mask.places((heads,))
        gathered = qkv.flatten(0, 2).index_select(0, into.gather)
        mixed, kept = _with_zeros_last(out_of, qkv), []
        groups = zip(mask.groups, mask.turns(rotary), into.split(gathered), out_of.split(mixed), strict=True)
        for group, (q_turns, k_turns), (q, k, v), (out,) in groups:
            _rotate(q, q_turns)
            _rotate(k, k_turns)
            for chunk in group.chunks:
                weights = _weights(chunk, q, k)
                _chunk(out, chunk).copy_(_by_head(torch.bmm(weights, v.flatten(0, 1)[:, : chunk.keys]), out))
                if len(group.chunks) == 1:
                    kept.append(weights)
        ctx.save_for_backward(gathered, *kept)
        ctx.mask, ctx.turns, ctx.into, ctx.out_of, ctx.shape = mask, mask.turns(rotary), into, out_of, qkv.shape
        return mixed.index_select(0, out_of.scatter).view(*qkv.shape[:2], heads, -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        into, out_of = ctx.into, ctx.out_of
        gathered, *kept = ctx.saved_tensors
        above = grad.reshape(-1, grad.shape[-1]).index_select(0, out_of.gather).index_fill_(0, out_of.repeats, 0)
        grads, weights_of = _with_zeros_last(into, gathered), iter(kept)
        parts = into.split(gathered), out_of.split(above), into.split(grads)
        for group, turns, (q, k, v), (g,), (dq, dk, dv) in zip(ctx.mask.groups, ctx.turns, *parts, strict=True):
            whole = len(group.chunks) == 1
            if not whole:
                dk.zero_(), dv.zero_()
            for chunk in group.chunks:
                p = next(weights_of) if whole else _weights(chunk, q, k)
                k3, v3, dk3, dv3 = (each.flatten(0, 1)[:, : chunk.keys] for each in (k, v, dk, dv))
                g3, q3 = _by_key_head(g, chunk, k), _by_key_head(q, chunk, k)
                ds = torch.bmm(g3, v3.mT)
                torch._softmax_backward_data(ds, p, -1, p.dtype, grad_input=ds)
                _chunk(dq, chunk).copy_(_by_head(torch.bmm(ds, k3), dq))
                dv3.baddbmm_(p.mT, g3, beta=0 if whole else 1)
                dk3.baddbmm_(ds.mT, q3, beta=0 if whole else 1)
            _rotate(dq, turns[0].conj())
            _rotate(dk, turns[1].conj())
        return grads.index_select(0, into.scatter).view(ctx.shape), None, None, None, None


def _with_zeros_last(places: Places, like: Tensor) -> Tensor:
    """Return room for the groups' vectors and, after them, for one of zeros, which `scatter` gives to padding."""
    room = like.new_empty(len(places.gather) + 1, like.shape[-1])
    room[-1] = 0
    return room


def _rotate(x: Tensor, turns: Tensor) -> None:
    """Rotate the pairs of x [n, heads, L, K] in place, in f32."""
    pairs = x.float().unflatten(-1, (-1, 2))
    torch.view_as_complex(pairs).mul_(turns)
    if x.dtype != torch.float32:
        x.copy_(pairs.flatten(-2))


def _weights(chunk: Chunk, q: Tensor, k: Tensor) -> Tensor:
    """Return the softmax of a chunk of rotated, scaled queries, [n * Hkv, Hq / Hkv * queries, keys]."""
    queries, keys = _by_key_head(q, chunk, k), k.flatten(0, 1)[:, : chunk.keys]
    # Not bmm, whose results selective checkpointing keeps, and which may then not be changed in place.
    scores = q.new_empty(*queries.shape[:2], chunk.keys).baddbmm_(queries, keys.mT, beta=0)
    by_head = scores.view(*q.shape[:2], -1, chunk.keys)
    by_head[..., chunk.free :].add_(chunk.bias)
    return torch.softmax(scores, -1, out=scores)


def _chunk(x: Tensor, chunk: Chunk) -> Tensor:
    return x[:, :, chunk.first : chunk.last]


def _by_key_head(x: Tensor, chunk: Chunk, k: Tensor) -> Tensor:
    """Return [n * Hkv, Hq / Hkv * queries, K], the chunk's queries of x [n, Hq, L, K]: heads of a key side by side."""
    return _chunk(x, chunk).reshape(k.shape[0] * k.shape[1], -1, k.shape[-1])


def _by_head(values: Tensor, like: Tensor) -> Tensor:
    return values.view(*like.shape[:2], -1, like.shape[-1])
