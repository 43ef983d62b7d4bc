"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) for the blocks' matrices, sharded by fully_shard.

The update of a matrix is its momentum with all singular values moved to about 1, which needs the whole matrix. In each
round every rank of the mesh owns one matrix; rounds go from large to small, so that those of a round are alike. One
all-to-all brings each owner its matrix, another returns the updates' slices, and replicas add up their results. So
nothing is computed twice, a rank holds one whole matrix at a time, and updates do not depend on the ranks (P3).
Rejected: torch.optim.Muon, which knows no shards and takes stacked gate and up matrices for one; gathering every matrix
on every rank, which at 7B costs more than forward and backward on 256 GPUs.
"""

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


def matrices(model: nn.Module) -> dict[torch.Tensor, Parts]:
    """Return the parameters that Muon updates: the blocks' matrices, not embeddings, heads, patchers and norms."""
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

    def __init__(self, params: dict[torch.Tensor, Parts], state_dtype: torch.dtype, **settings: Any) -> None:
        """`settings`: lr; momentum in [0, 1); update_rms; weight_decay."""
        super().__init__(sorted(params, key=lambda p: -p.numel()), settings)
        self._parts = params
        for p in params:
            self.state[p] = {"momentum_buffer": torch.zeros_like(p, dtype=state_dtype)}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update from the gradients, all of which must be present. Collective over the mesh."""
        (group,) = self.param_groups
        parameters = group["params"]
        skip = torch.zeros((), device=parameters[0].device) if self.found_inf is None else self.found_inf
        rate = group["lr"] * (1.0 - skip)  # on the device
        decay = 1.0 - rate * group["weight_decay"]
        per_round = parameters[0].device_mesh.size() if is_sharded(parameters[0]) else 1
        for start in range(0, len(parameters), per_round):
            dealt = parameters[start : start + per_round]
            directions = [self._direction(p, start + i, skip.bool()) for i, p in enumerate(dealt)]
            for p, update in zip(dealt, self._orthogonalized(dealt, directions), strict=True):
                local(p).mul_(decay).sub_(update * (rate * group["update_rms"]))

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
        """Return this rank's rows of the updates of one round, in which every rank owns one matrix or none."""
        first = dealt[0]
        if not is_sharded(first) or (dim := shard_dim(first)) is None:
            return [orthogonalize(direction, self._parts[p]) for p, direction in zip(dealt, directions, strict=True)]
        mesh = first.device_mesh
        num_shards, group = mesh.size(dim), mesh.get_group(dim)
        replica = mesh.get_local_rank(1 - dim) if mesh.ndim == 2 else 0
        ours = slice(replica * num_shards, (replica + 1) * num_shards)  # those of `dealt` that this replica owns
        updates = [torch.zeros_like(direction) for direction in directions]
        if owned := dealt[ours]:
            rank = mesh.get_local_rank(dim)
            mine = owned[rank] if rank < len(owned) else None
            updates[ours] = self._by_owners(mine, directions[ours], num_shards, group)
        if mesh.ndim == 2:
            flat = torch.cat([update.flatten() for update in updates])
            dist.all_reduce(flat, group=mesh.get_group(1 - dim))  # one replica has the update, the others zeros
            parts = flat.split([direction.numel() for direction in directions])
            updates = [part.view_as(direction) for part, direction in zip(parts, directions, strict=True)]
        return updates

    def _by_owners(
        self, mine: torch.Tensor | None, directions: list[torch.Tensor], num_shards: int, group: dist.ProcessGroup
    ) -> list[torch.Tensor]:
        """Return the updates of this rank's rows of `directions`, which the first ranks of `group` own in order."""
        sent = torch.cat([direction.flatten() for direction in directions])
        sizes = [direction.numel() for direction in directions] + [0] * (num_shards - len(directions))
        own_sizes = [0] * num_shards if mine is None else [count * mine.shape[1] for count in rows(mine)]
        whole = sent.new_empty(sum(own_sizes))
        dist.all_to_all_single(whole, sent, own_sizes, sizes, group=group)
        if mine is not None:
            whole = orthogonalize(whole.view(mine.shape), self._parts[mine]).flatten()
        returned = torch.empty_like(sent)
        dist.all_to_all_single(returned, whole, sizes, own_sizes, group=group)
        parts = returned.split(sizes[: len(directions)])
        return [part.view_as(direction) for part, direction in zip(parts, directions, strict=True)]


def orthogonalize(direction: torch.Tensor, parts: Parts) -> torch.Tensor:
    """Return the update of a matrix [m, n], computed separately for each of the `parts` of its rows.

    Scaled by sqrt(max(m, n)), so that the mean square of its elements is about 1 (Liu et al. 2025, Muon is scalable
    for LLM training, arXiv:2502.16982, section 2.2; times 0.2 it suits AdamW's learning rate).
    """
    return torch.cat([newton_schulz(part) * max(part.shape) ** 0.5 for part in direction.split(parts)])


def newton_schulz(matrix: torch.Tensor) -> torch.Tensor:
    """Return [m, n] with the singular vectors of `matrix` and singular values near 1; a zero matrix stays zero."""
    a, b, c = COEFFICIENTS
    x = matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / torch.linalg.vector_norm(x, dtype=torch.float32).clamp(min=1e-20).to(x.dtype)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if matrix.shape[0] > matrix.shape[1] else x
