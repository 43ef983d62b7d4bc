"""LoRA: low-rank adapters beside the trunk's frozen linear layers (Hu et al. 2021, arXiv:2106.09685).

A layer's output becomes x W^T + alpha / rank * (x A^T) B^T, with A [rank, inputs] drawn and B [outputs, rank] zero, so
that training starts from the model as it is. Stacked layers (queries, keys and values; gate and up) share one A.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from model.linear import Linear


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    # Of the adapters, >= 0; 0: none. With adapters, the rest of the trunk and the text's embedding and head are frozen,
    # but for what optim.groups takes.
    rank: int = 0
    alpha: float = 16.0  # adapters are multiplied by alpha / rank, > 0
    # Patterns of the weights that get adapters, with * for any text: *.attention.qkv.weight, *.ffn.*
    parameters: list[str] = field(default_factory=lambda: ["transformer.blocks.*"])

    def __post_init__(self) -> None:
        if self.rank < 0 or self.alpha <= 0:
            raise ValueError(f"lora.rank={self.rank}, lora.alpha={self.alpha}: expected at least 0 and more than 0")


def add_adapters(model: nn.Module, config: LoraConfig) -> None:
    """Add adapters to the linear layers of the blocks; raise ValueError for a pattern that matches none."""
    if not config.rank:
        return
    layers = {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if isinstance(module, Linear) and name.startswith("transformer.blocks.")
    }
    for pattern in config.parameters:
        if not any(fnmatchcase(name, pattern) for name in layers):
            kinds = sorted({f"*.{name.split('.', 3)[3]}" for name in layers})
            raise ValueError(
                f"model.lora.parameters: {pattern!r} matches no linear layer of the blocks; expected patterns such as "
                f"{', '.join(kinds)}"
            )
    for name, layer in layers.items():
        if any(fnmatchcase(name, pattern) for pattern in config.parameters):
            layer.adapt(config.rank, config.alpha / config.rank)


def merged(parameters: Mapping[str, Tensor], config: LoraConfig) -> dict[str, Tensor]:
    """Return parameters by plain name with the adapters added to the weights they stand beside."""
    found = {name: p for name, p in parameters.items() if not name.endswith((".lora_a", ".lora_b"))}
    for name, down in parameters.items():
        if name.endswith(".lora_a"):
            layer = name.removesuffix(".lora_a")
            low_rank = parameters[f"{layer}.lora_b"].float() @ down.float()
            weight = found[f"{layer}.weight"]
            found[f"{layer}.weight"] = torch.add(weight, low_rank, alpha=config.alpha / config.rank).to(weight.dtype)
    return found
