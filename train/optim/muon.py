"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) for the blocks' matrices, sharded by fully_shard.

The update of a matrix is its momentum with all singular values moved to about 1, which needs the whole matrix. In each
round every rank of the mesh owns one matrix, or several small ones; rounds go from large to small, so that those of a
round are alike. One all-to-all brings each owner its matrices, another returns the updates' slices, and replicas add up
their results. So nothing is computed twice, a rank holds one large matrix at a time, and updates do not depend on the
ranks (P3).
Rejected: torch.optim.Muon, which knows no shards and takes stacked gate and up matrices for one; gathering every matrix
on every rank, which at 7B costs more than forward and backward on 256 GPUs.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from model.transformer import Attention, FeedForward
from train.distributed.local_shards import first_element, is_sharded, local, rows, shard_dim
from train.optim.stochastic_rounding import stochastic_bfloat16

Parts = tuple[int, ...]  # rows of each of the matrices stacked in one parameter

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan's quintic: steep at 0, singular values end in about [0.7, 1.2]
ITERATIONS = 5
ROUND = 1 << 22  # elements that a rank orthogonalizes at once, or one matrix if that is larger


def matrices(model: nn.Module) -> dict[torch.Tensor, Parts]:
    """Return the parameters that Muon updates: the blocks' trained matrices, not embeddings, heads, patchers and norms.

    Nor adapters (model/lora.py): what should be orthogonal is a weight's update, not the updates of its two factors.
    """
    found: dict[torch.Tensor, Parts] = {}
    for module in model.modules():
        if isinstance(module, Attention):
            heads, kv = module.heads * module.head_dim, module.kv_heads * module.head_dim
            found |= {module.qkv.weight: (heads, kv, kv), module.out.weight: (module.out.weight.shape[0],)}
        elif isinstance(module, FeedForward):
            hidden = module.down.weight.shape[1]
            found |= {module.gate_up.weight: (hidden, hidden), module.down.weight: (module.down.weight.shape[0],)}
    return found


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalized, with decoupled weight decay. Set `found_inf` and `batch` before each step.

    A skipped update changes no bit of weights or momentum (P8). The momentum is stored in `state_dtype`.
    """

    found_inf: torch.Tensor | None = None  # f32 [] on the device; 1 skips the update
    batch: int = 0  # the step; with a parameter's number it is the key of the momentum's rounding

    def __init__(
        self,
        groups: list[dict[str, Any]],
        parts: Mapping[torch.Tensor, Parts],
        state_dtype: torch.dtype,
        **settings: Any,
    ) -> None:
        """`groups` are torch's, each with its weight_decay; `settings`: lr; momentum in [0, 1); update_rms."""
        super().__init__(groups, settings)
        self._parts = parts
        found = [(p, group) for group in self.param_groups for p in group["params"]]
        self._in_order = sorted(found, key=lambda pair: -pair[0].numel())
        for p, _ in found:
            self.state[p] = {"momentum_buffer": torch.zeros_like(p, dtype=state_dtype)}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update from the gradients, all of which must be present. Collective over the mesh."""
        parameters = [p for p, _ in self._in_order]
        skip = torch.zeros((), device=parameters[0].device) if self.found_inf is None else self.found_inf
        ranks, start = parameters[0].device_mesh.size() if is_sharded(parameters[0]) else 1, 0
        while start < len(parameters):
            dealt = self._in_order[start : start + ranks * max(1, ROUND // parameters[start].numel())]
            directions = [self._direction(p, start + i, skip.bool()) for i, (p, _) in enumerate(dealt)]
            updates = self._orthogonalized([p for p, _ in dealt], directions)
            for (p, group), update in zip(dealt, updates, strict=True):
                rate = group["lr"] * (1.0 - skip)  # on the device
                decay = 1.0 - rate * group["weight_decay"]
                local(p).mul_(decay).addcmul_(update, rate * group["update_rms"], value=-1)
            start += len(dealt)

    def _direction(self, p: torch.Tensor, number: int, skip: torch.Tensor) -> torch.Tensor:
        """Advance this rank's part of the momentum; return the same part of the update, not yet orthogonalized."""
        assert p.grad is not None
        beta = self.param_groups[0]["momentum"]
        grad, buffer = local(p.grad), local(self.state[p]["momentum_buffer"])
        momentum = torch.lerp(buffer.float(), grad, 1 - beta)
        kept = torch.where(skip, buffer.float(), momentum)
        if buffer.dtype == torch.bfloat16:
            kept = stochastic_bfloat16(kept, first_element(p), f"{self.batch} {number} momentum")
        buffer.copy_(kept)
        # bfloat16 is precise enough (Jordan) and much faster on a GPU, but slower on most CPUs.
        dtype = torch.bfloat16 if grad.is_cuda else torch.float32
        return torch.where(skip, 0.0, torch.lerp(grad, momentum, beta)).to(dtype)

    def _orthogonalized(self, dealt: list[torch.Tensor], directions: list[torch.Tensor]) -> list[torch.Tensor]:
        """Return this rank's rows of the updates of one round, whose matrices are dealt to the ranks in turn."""
        first = dealt[0]
        if not is_sharded(first) or (dim := shard_dim(first)) is None or first.device_mesh.size() == 1:
            return orthogonalize(directions, [self._parts[p] for p in dealt])
        mesh = first.device_mesh
        num_shards, group = mesh.size(dim), mesh.get_group(dim)
        replica = mesh.get_local_rank(1 - dim) if mesh.ndim == 2 else 0
        # Of each rank along `dim`, the matrices that it owns in this replica.
        owned = [range(replica * num_shards + shard, len(dealt), mesh.size()) for shard in range(num_shards)]
        updates = [torch.zeros_like(direction) for direction in directions]
        if ours := [i for indices in owned for i in indices]:
            mine = [dealt[i] for i in owned[mesh.get_local_rank(dim)]]
            sizes = [sum(directions[i].numel() for i in indices) for indices in owned]
            for i, update in zip(ours, self._by_owners(mine, [directions[i] for i in ours], sizes, group), strict=True):
                updates[i] = update
        if mesh.ndim == 2:
            flat = torch.cat([update.flatten() for update in updates])
            dist.all_reduce(flat, group=mesh.get_group(1 - dim))  # one replica has the update, the others zeros
            updates = _split_like(flat, directions)
        return updates

    def _by_owners(
        self, mine: list[torch.Tensor], directions: list[torch.Tensor], sizes: list[int], group: dist.ProcessGroup
    ) -> list[torch.Tensor]:
        """Return the updates of this rank's rows of `directions`, in the order of their owners.

        `mine` are the matrices that this rank owns, `sizes` how many elements it sends to each rank of `group`.
        """
        sent = torch.cat([direction.flatten() for direction in directions])
        held = [[count * p.shape[1] for count in rows(p)] for p in mine]  # elements of each matrix by rank
        by_rank = [[of_rank[rank] for of_rank in held] for rank in range(len(sizes))]
        own_sizes = [sum(elements) for elements in by_rank]
        whole = sent.new_empty(sum(own_sizes))
        dist.all_to_all_single(whole, sent, own_sizes, sizes, group=group)
        pieces = whole.split([size for elements in by_rank for size in elements])
        matrices = [torch.cat(pieces[i :: len(mine)]).view(p.shape) for i, p in enumerate(mine)]
        updates = orthogonalize(matrices, [self._parts[p] for p in mine])
        pieces_back = [update.flatten().split(of_rank) for update, of_rank in zip(updates, held, strict=True)]
        if mine:
            whole = torch.cat([pieces[rank] for rank in range(len(sizes)) for pieces in pieces_back])
        returned = torch.empty_like(sent)
        dist.all_to_all_single(returned, whole, sizes, own_sizes, group=group)
        return _split_like(returned, directions)


def _split_like(flat: torch.Tensor, like: list[torch.Tensor]) -> list[torch.Tensor]:
    parts = flat.split([tensor.numel() for tensor in like])
    return [part.view_as(tensor) for part, tensor in zip(parts, like, strict=True)]


def orthogonalize(directions: list[torch.Tensor], parts: list[Parts]) -> list[torch.Tensor]:
    """Return the updates of matrices [m, n], computed separately for each of the `parts` of their rows.

    Scaled by sqrt(max(m, n)), so that the mean square of its elements is about 1 (Liu et al. 2025, Muon is scalable
    for LLM training, arXiv:2502.16982, section 2.2; times 0.2 it suits AdamW's learning rate). Small parts of one shape
    share their products.
    """
    split = [direction.split(rows) for direction, rows in zip(directions, parts, strict=True)]
    updates = [torch.empty_like(direction) for direction in directions]
    alike: dict[torch.Size, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for pieces, update, rows_of_parts in zip(split, updates, parts, strict=True):
        for piece, place in zip(pieces, update.split(rows_of_parts), strict=True):
            alike.setdefault(piece.shape, []).append((piece, place))
    for shape, pairs in alike.items():
        at_once = max(1, ROUND // shape.numel())
        for start in range(0, len(pairs), at_once):
            batch, places = zip(*pairs[start : start + at_once], strict=True)
            found = newton_schulz(torch.stack(batch)) * max(shape) ** 0.5
            torch._foreach_copy_(list(places), list(found))
    return updates


def newton_schulz(matrix: torch.Tensor) -> torch.Tensor:
    """Return [..., m, n] with the singular vectors of `matrix` and singular values near 1; zeros stay zeros."""
    a, b, c = COEFFICIENTS
    stacked = matrix.view(-1, *matrix.shape[-2:])
    x = stacked.mT if matrix.shape[-2] > matrix.shape[-1] else stacked
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=torch.float32).clamp(min=1e-20).to(x.dtype)
    for _ in range(ITERATIONS):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if matrix.shape[-2] > matrix.shape[-1] else x).reshape(matrix.shape)
