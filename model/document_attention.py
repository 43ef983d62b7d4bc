"""Attention on CPU during training: document by document, so that nothing is computed between two documents.

A row holds several documents, and each sees itself alone. So the mask is a list of documents, found once per batch, and
attention gathers those of similar length into one batched product. In a long document only the keys that a chunk of
queries can see are multiplied. The rule is `allowed` in model/attention.py, the only difference to the dense mask that
padding sees nothing and gets zeros; nothing reads it. Rejected: torch's fused kernel under a dense mask, which computes
every pair of a row.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from model.attention import allowed

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
    """Documents of similar length L, the length of the longest."""

    tokens: Tensor  # int64 [n, L] into the B * S tokens; a shorter document's last token repeats
    filled: Tensor  # bool [n, L], False where it repeats
    chunks: list[Chunk]


class Places(NamedTuple):
    """Where vectors of one head's size lie in a batch [B, S, heads, K], seen as [B * S * heads, K], and by group."""

    gather: Tensor  # int64 [R], from where each vector of the groups comes
    scatter: Tensor  # int64 [B * S * heads], where each vector of the batch is among the groups'; R if nowhere
    repeats: Tensor  # int64, which of the groups' vectors are repetitions
    sizes: list[int]  # how many of the R vectors belong to each part of each group


class DocumentMask:
    """The mask of one batch. A plain class, as FSDP2's mixed precision would cast the biases of a dataclass."""

    def __init__(self, groups: list[Group], num_tokens: int) -> None:
        self.groups, self.num_tokens = groups, num_tokens
        self._places: dict[tuple[int, ...], Places] = {}

    def places(self, parts: tuple[int, ...]) -> Places:
        """Return the places of vectors with sum(parts) heads; by group, each of the `parts` is [n, heads, L, K]."""
        if parts not in self._places:
            self._places[parts] = self._find_places(parts)
        return self._places[parts]

    def _find_places(self, parts: tuple[int, ...]) -> Places:
        heads, found, filled = torch.arange(sum(parts)).split(parts), [], []
        for group in self.groups:
            for part in heads:
                places = group.tokens[:, None] * sum(parts) + part[:, None]  # [n, heads, L]
                found.append(places.flatten())
                filled.append(group.filled[:, None].expand_as(places).flatten())
        empty = torch.zeros(0, dtype=torch.int64)
        gather, real = torch.cat([empty, *found]), torch.cat([empty.bool(), *filled])
        scatter = torch.full((self.num_tokens * sum(parts),), len(gather))
        scatter[gather[real]] = real.nonzero().flatten()
        return Places(gather, scatter, (~real).nonzero().flatten(), [len(each) for each in found])


def document_mask(document_ids: Tensor, image_ids: Tensor, visible_until: Tensor) -> DocumentMask:
    """Return the mask of int ids [B, S] on the CPU; each document must lie in one piece in its row."""
    rows, length = document_ids.shape
    begins = torch.ones_like(document_ids, dtype=torch.bool)
    begins[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    starts = begins.flatten().nonzero().flatten()
    sizes = torch.diff(starts, append=torch.tensor([rows * length]))
    is_document = document_ids.flatten()[starts] != PADDING
    starts, sizes = starts[is_document], sizes[is_document]
    row = torch.arange(rows)[:, None]
    ids = document_ids.flatten(), image_ids.flatten(), (visible_until + row * length).flatten()
    groups: list[list[int]] = []
    for number in sizes.argsort(descending=True, stable=True).tolist():
        if not groups or sizes[number] < SIMILAR * sizes[groups[-1][0]]:
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
        bias = torch.zeros(seen[:, :, free:keys].shape).masked_fill_(~seen[:, :, free:keys], -torch.inf)
        chunks.append(Chunk(first, first + bias.shape[1], free, keys, bias[:, None]))
    return Group(tokens, filled, chunks)


def attend_documents(qkv: Tensor, turns: Tensor, mask: DocumentMask, heads: int, kv_heads: int) -> Tensor:
    """Return attention [B, S, Hq * K] of queries, keys and values qkv [B, S, Hq + 2 Hkv, K], not yet rotated.

    `turns`: unit complex numbers [B, S, 1, K/2] by which queries and keys are rotated.
    """
    return _DocumentAttention.apply(qkv, turns, mask, heads, kv_heads).flatten(2)


class _DocumentAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, turns: Tensor, mask: DocumentMask, heads: int, kv_heads: int) -> Tensor:
        into, out_of = mask.places((heads, kv_heads, kv_heads)), mask.places((heads,))
        gathered = qkv.flatten(0, 2).index_select(0, into.gather)
        mixed = _with_zero_row(out_of, qkv)
        ctx.mask, ctx.heads, ctx.kv_heads, ctx.shape = mask, heads, kv_heads, qkv.shape
        turned, weights = [], []
        for group, (q, k, v), (out,) in _parts(mask, (into, gathered), (out_of, mixed)):
            turned.append(turns.flatten(0, 2).index_select(0, group.tokens.flatten()).view(len(q), 1, -1, q.shape[-1] // 2))
            _rotate(q, turned[-1] * q.shape[-1] ** -0.5)
            _rotate(k, turned[-1])
            for chunk in group.chunks:
                p = _weights(chunk, q, k)
                _write(out, chunk, torch.bmm(p, v.flatten(0, 1)[:, : chunk.keys]))
            if len(group.chunks) == 1:
                weights.append(p)
        ctx.save_for_backward(gathered, *turned, *weights)
        return mixed.index_select(0, out_of.scatter).view(*qkv.shape[:2], heads, -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        mask, heads, kv_heads = ctx.mask, ctx.heads, ctx.kv_heads
        gathered, *saved = ctx.saved_tensors
        turned, weights = saved[: len(mask.groups)], iter(saved[len(mask.groups) :])
        into, out_of = mask.places((heads, kv_heads, kv_heads)), mask.places((heads,))
        upstream = grad.reshape(-1, grad.shape[-1]).index_select(0, out_of.gather).index_fill_(0, out_of.repeats, 0)
        grads = _with_zero_row(into, gathered)
        parts = _parts(mask, (into, gathered), (out_of, upstream), (into, grads))
        for turns, (group, (q, k, v), (above,), (dq, dk, dv)) in zip(turned, parts, strict=True):
            whole = len(group.chunks) == 1
            if not whole:
                dk.zero_(), dv.zero_()
            for chunk in group.chunks:
                p = next(weights) if whole else _weights(chunk, q, k)
                part, keys = _read(above, chunk, k), slice(chunk.keys)
                k3, v3, dk3, dv3 = (each.flatten(0, 1)[:, keys] for each in (k, v, dk, dv))
                ds = torch.bmm(part, v3.mT)
                torch._softmax_backward_data(ds, p, -1, p.dtype, grad_input=ds)
                _write(dq, chunk, torch.bmm(ds, k3))
                dv3.baddbmm_(p.mT, part, beta=0 if whole else 1)
                dk3.baddbmm_(ds.mT, _read(q, chunk, k), beta=0 if whole else 1)
            _rotate(dq, turns.conj() * q.shape[-1] ** -0.5)
            _rotate(dk, turns.conj())
        return grads.index_select(0, into.scatter).view(ctx.shape), None, None, None, None


def _with_zero_row(places: Places, like: Tensor) -> Tensor:
    """Return room for the groups' vectors and for one of zeros after them, what `scatter` gives to padding."""
    room = like.new_empty(len(places.gather) + 1, like.shape[-1])
    room[-1] = 0
    return room


def _parts(mask: DocumentMask, *placed: tuple[Places, Tensor]) -> Any:
    """Yield each group with its parts [n, heads, L, K] of tensors of vectors."""
    iterators = []
    for places, vectors in placed:
        iterators.append(iter(vectors[: len(places.gather)].split(places.sizes)))
    for group in mask.groups:
        found = []
        for (places, _), iterator in zip(placed, iterators, strict=True):
            count = len(places.sizes) // len(mask.groups)
            shape = (*group.tokens.shape, -1)
            found.append([next(iterator).view(shape[0], -1, shape[1], placed[0][1].shape[-1]) for _ in range(count)])
        yield group, *found


def _rotate(x: Tensor, turns: Tensor) -> None:
    """Rotate the pairs of x [n, heads, L, K] in place."""
    pairs = x.float().unflatten(-1, (-1, 2))
    torch.view_as_complex(pairs).mul_(turns)
    if x.dtype != torch.float32:
        x.copy_(pairs.flatten(-2))


def _read(x: Tensor, chunk: Chunk, k: Tensor) -> Tensor:
    """Return [n * Hkv, heads of a key * queries, K], the chunk's queries of x [n, Hq, L, K]."""
    return x[:, :, chunk.first : chunk.last].reshape(k.shape[0] * k.shape[1], -1, k.shape[-1])


def _write(x: Tensor, chunk: Chunk, values: Tensor) -> None:
    part = x[:, :, chunk.first : chunk.last]
    part.copy_(values.view(part.shape))


def _weights(chunk: Chunk, q: Tensor, k: Tensor) -> Tensor:
    """Return the chunk's softmax, [n * Hkv, heads of a key * queries, keys]."""
    scores = torch.bmm(_read(q, chunk, k), k.flatten(0, 1)[:, : chunk.keys].mT)
    by_head = scores.view(len(q), -1, chunk.last - chunk.first, chunk.keys)
    by_head[..., chunk.free :].add_(chunk.bias)
    return torch.softmax(scores, -1, out=scores)
