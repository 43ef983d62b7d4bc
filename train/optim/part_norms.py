"""How large gradients and updates are in each part of the model, measured at the steps whose row is logged.

Sums of squares over this rank's shards and over how many numbers they go; train/metrics.py adds those of all ranks. A
part's mean square does not depend on how often ranks replicate it, so nothing else is communicated. The update is read
off at most SAMPLE evenly spaced weights of each shard, before and after, each of which stands for as many as there are
for one sampled: whatever the optimizer, at no extra memory.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from train.distributed.local_shards import local
from train.distributed.parallelize import plain_name

PARTS = ("embeddings", "trunk", "trunk_image", "patches", "heads")  # trunk_image: of an untied trunk
SAMPLE = 1 << 14


def part_of(name: str) -> str:
    """Return the part that a parameter belongs to; of the patches all but their last layer, the noise head."""
    name = plain_name(name)
    if name.startswith("transformer."):
        return "trunk_image" if ".image." in name or ".image_norm." in name else "trunk"
    if name.startswith(("text_head.", "patches.to_patch.", "patches.to_latents.")):
        return "heads"
    return "embeddings" if name.startswith("text_embedding.") else "patches"


class PartNorms:
    """Measures one update: made before it, when the gradients are whole; `sums` is called after it."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self._shards = {name: local(p.detach()) for name, p in parameters.items()}
        grads = [local(p.grad) for p in parameters.values() if p.grad is not None]
        with_grad = [name for name, p in parameters.items() if p.grad is not None]
        self._squares = dict(zip(with_grad, torch._foreach_norm(grads), strict=True))
        self._before = {name: _sample(shard).clone() for name, shard in self._shards.items()}

    def sums(self) -> dict[str, Tensor]:
        """Return f64 [4] by part: sums of gradients' squares and of numbers, of squares of updates and of weights."""
        found: dict[str, list[Tensor]] = {}
        for name, shard in self._shards.items():
            before, grad = self._before[name].double(), self._squares.get(name)
            change = _sample(shard).double() - before
            squares = change.new_zeros(()) if grad is None else grad.double().square()
            numbers = torch.full_like(squares, shard.numel())
            # Else the weights of norms, which are few and all sampled, would outweigh the matrices.
            each = shard.numel() / max(len(before), 1)
            four = torch.stack([squares, numbers, each * change.square().sum(), each * before.square().sum()])
            found.setdefault(part_of(name), []).append(four)
        return {part: torch.stack(found[part]).sum(0) for part in PARTS if part in found}


def part_sizes(parameters: Mapping[str, Tensor]) -> dict[str, int]:
    """Return how many weights each part has, over all ranks."""
    found = dict.fromkeys((part for part in PARTS if part in set(map(part_of, parameters))), 0)
    for name, parameter in parameters.items():
        found[part_of(name)] += parameter.numel()
    return found


def sizes(sums: Sequence[float], numbers: int) -> tuple[float, float | None]:
    """Return the gradient norm of a part of `numbers` weights, and its update's norm over its weights' norm.

    `sums` are those of `PartNorms.sums` over all ranks. The ratio is None where all weights are zero.
    """
    squares, counted, change, weights = sums
    return (squares / max(counted, 1) * numbers) ** 0.5, (change / weights) ** 0.5 if weights else None


def _sample(shard: Tensor) -> Tensor:
    """Return at most SAMPLE evenly spaced elements, a view."""
    return shard.flatten()[:: max(1, -(-shard.numel() // SAMPLE))]
