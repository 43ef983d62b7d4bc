"""A rank's part of a parameter: fully_shard cuts the first axis into equal pieces, the last ones shorter or empty."""

import sys
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from typing_extensions import TypeIs


def is_sharded(tensor: torch.Tensor) -> "TypeIs[DTensor]":
    """Return whether a tensor is a DTensor, whose module takes half a second to import; until then there is none."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of a tensor, detached, sharing memory."""
    if is_sharded(tensor):
        with torch.no_grad():  # detach() of a DTensor takes ten times as long
            tensor = tensor.to_local()
    return tensor.detach()


def shard_dim(tensor: "DTensor") -> int | None:
    """Return the mesh dimension along which the first axis is sharded; None for a replicated tensor."""
    from torch.distributed.tensor import Shard

    dims = [dim for dim, placement in enumerate(tensor.placements) if placement == Shard(0)]
    others = [p for p in tensor.placements if not (p == Shard(0) or p.is_replicate())]
    assert len(dims) <= 1 and not others, f"not sharded by fully_shard: {tensor.placements}"
    return dims[0] if dims else None


def rows(tensor: torch.Tensor) -> list[int]:
    """Return how many rows of the first axis each rank along `shard_dim` holds, by the rule of torch.chunk."""
    count = tensor.shape[0]
    if not is_sharded(tensor) or (dim := shard_dim(tensor)) is None:
        return [count]
    ranks = tensor.device_mesh.size(dim)
    piece = -(-count // ranks)
    return [max(0, min(piece, count - rank * piece)) for rank in range(ranks)]


def first_element(tensor: torch.Tensor) -> int:
    """Return the flat index, in the whole tensor, of this rank's first element."""
    if not is_sharded(tensor) or (dim := shard_dim(tensor)) is None:
        return 0
    before = sum(rows(tensor)[: tensor.device_mesh.get_local_rank(dim)])
    return before * (tensor.numel() // max(1, tensor.shape[0]))
