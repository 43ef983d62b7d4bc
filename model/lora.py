"""LoRA (Hu et al. 2021, arXiv:2106.09685): small trained matrices beside the trunk's frozen weights.

A layer adds alpha / rank * (x A^T) B^T to its output. B starts at zero, so a model starts as its base exactly. The
adapters are parameters of `Linear` itself: names of the base stay, and blocks, sharding and caches know nothing.
Rejected: wrapping layers in modules of another class, as peft does, which renames every weight below.
"""

from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor, nn

from model.linear import Linear

TRUNK = "transformer."


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    rank: int = 0  # of the adapters beside the trunk's weights, >= 0; 0: none. Weights that have no adapter stay frozen
    alpha: float = 16.0  # what adapters add is scaled by alpha / rank, > 0
    # Weights of the trunk's linear layers that get adapters: names, * for any part (transformer.blocks.*.qkv.weight)
    parameters: tuple[str, ...] = ("transformer.blocks.*",)

    def __post_init__(self) -> None:
        if self.rank < 0 or self.alpha <= 0 or not self.parameters:
            raise ValueError(
                f"lora.rank={self.rank}, alpha={self.alpha}, parameters={list(self.parameters)}: expected at least 0, "
                "more than 0 and at least one name"
            )

    @property
    def scale(self) -> float:
        return self.alpha / max(1, self.rank)


def add_adapters(transformer: nn.Module, config: LoraConfig) -> None:
    """Give the layers whose weights `config` names their adapters, without values yet, on the current device.

    Raises ValueError for a pattern that matches no linear layer's weight.
    """
    if not config.rank:
        return
    layers = {f"{TRUNK}{name}.weight": m for name, m in transformer.named_modules() if isinstance(m, Linear)}
    for pattern in config.parameters:
        if not any(fnmatchcase(name, pattern) for name in layers):
            first = [name for name in layers if name.startswith(f"{TRUNK}blocks.0.")]
            raise ValueError(
                f"model.lora.parameters: {pattern} matches no weight that can have an adapter; expected a name or a "
                f"pattern of the trunk's linear layers: {', '.join(first)}, and so on in each of its blocks"
            )
    for name, layer in layers.items():
        if any(fnmatchcase(name, pattern) for pattern in config.parameters):
            layer.add_adapter(config.rank, config.scale)


def is_adapter(name: str) -> bool:
    """Return whether the parameter `name` belongs to an adapter."""
    return name.endswith((".lora_a", ".lora_b"))


def merged(parameters: dict[str, Tensor], config: LoraConfig) -> dict[str, Tensor]:
    """Return unsharded `parameters` by plain name without adapters, with their sums in the weights, in float32."""
    found = {name: tensor.detach() for name, tensor in parameters.items() if not is_adapter(name)}
    for name, a in parameters.items():
        if name.endswith(".lora_a"):
            base = name.removesuffix("lora_a")
            change = parameters[f"{base}lora_b"].detach().float() @ a.detach().float()
            found[f"{base}weight"] = found[f"{base}weight"].float() + config.scale * change
    return found
