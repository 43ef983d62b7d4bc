"""Which parameters are trained, how fast, and which stay as they are: `optim.groups`.

Patterns are matched against plain names, as in fnmatch: `transformer.blocks.*.image.*`. The first group of the config
that has a matching pattern takes a parameter. What no group takes is trained as `optim` says; with LoRA, only adapters
and patchers are.
"""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import nn

from train.distributed.parallelize import plain_name

REST, BASE = "(rest)", "(base of LoRA)"  # what no group takes


@dataclass(frozen=True, kw_only=True)
class GroupConfig:
    # Patterns of parameter names, with * for any text. The first group that matches a name takes it; train.view of a
    # checkpoint lists names, such as transformer.blocks.0.attention.qkv.weight.
    parameters: list[str] = field(default_factory=list)
    frozen: bool = False  # stays as it is: without gradients, moments and averages, and not in checkpoints
    lr_scale: float = 1.0  # times optim.learning_rate, > 0
    weight_decay: float | None = None  # on matrices, as optim.weight_decay, >= 0; null: that

    def __post_init__(self) -> None:
        if not self.lr_scale > 0 or (self.weight_decay is not None and self.weight_decay < 0):
            raise ValueError(
                f"optim.groups: lr_scale={self.lr_scale}, weight_decay={self.weight_decay}: expected more than 0, and "
                "at least 0 or null; frozen=true trains nothing"
            )
        if self.frozen and (self.lr_scale != 1 or self.weight_decay is not None):
            raise ValueError("optim.groups: frozen=true with lr_scale or weight_decay: expected only one of them")


def resolve(
    names: Iterable[str], groups: Mapping[str, GroupConfig], lora: bool = False
) -> dict[str, tuple[str, GroupConfig]]:
    """Return the group of each parameter, as (name, settings).

    `names` are all plain names of the model. Raises ValueError for a pattern that matches none, and for a group that
    earlier ones leave nothing to.
    """
    names, found = list(names), {}
    for group, config in groups.items():
        for pattern in config.parameters:
            if not any(fnmatchcase(name, pattern) for name in names):
                near = difflib.get_close_matches(pattern, names, n=2, cutoff=0.3) or names[:2]
                raise ValueError(
                    f"optim.groups.{group}.parameters: {pattern!r} matches no parameter; expected a pattern of names "
                    f"such as {', '.join(near)}"
                )
    for name in names:
        is_base = lora and name.startswith(("transformer.", "text_")) and not name.endswith((".lora_a", ".lora_b"))
        otherwise = (BASE, GroupConfig(frozen=True)) if is_base else (REST, GroupConfig())
        matching = (
            (group, config) for group, config in groups.items()
            if any(fnmatchcase(name, pattern) for pattern in config.parameters)
        )  # fmt: skip
        found[name] = next(matching, otherwise)
    if idle := groups.keys() - {group for group, _ in found.values()}:
        raise ValueError(
            f"optim.groups: {', '.join(sorted(idle))} takes no parameter, as earlier groups take what it matches or it "
            "has no patterns; put it before them, or remove it"
        )
    return found


def freeze(model: nn.Module, groups: Mapping[str, GroupConfig], lora: bool, dtype: torch.dtype) -> None:
    """Let a meta-device model's frozen parameters need no gradient, and hold them in the compute dtype.

    A forward then computes the same bits as from float32 masters, which FSDP would round for it each time. Raises
    ValueError if nothing is left to train.
    """
    resolved = resolve([plain_name(name) for name, _ in model.named_parameters()], groups, lora)
    if all(config.frozen for _, config in resolved.values()):
        raise ValueError("optim.groups: all parameters are frozen; leave some to train")
    for name, parameter in model.named_parameters():
        if resolved[plain_name(name)][1].frozen:
            parameter.requires_grad_(False)
            parameter.data = parameter.data.to(dtype)


def frozen_names(model: nn.Module) -> set[str]:
    """Return the plain names of the parameters that `freeze` froze."""
    return {plain_name(name) for name, parameter in model.named_parameters() if not parameter.requires_grad}


def table(model: nn.Module, groups: Mapping[str, GroupConfig], lora: bool) -> list[str]:
    """Return a line for each group that something is said of: its parameters and what happens to them."""
    sizes = {plain_name(name): parameter.numel() for name, parameter in model.named_parameters()}
    resolved, lines = resolve(sizes, groups, lora), []
    for group in dict.fromkeys(group for group, _ in resolved.values()):
        members = [name for name, (of, _) in resolved.items() if of == group]
        config = resolved[members[0]][1]
        what = "frozen" if config.frozen else f"trained, lr_scale {config.lr_scale:g}"
        if config.weight_decay is not None:
            what += f", weight_decay {config.weight_decay:g}"
        lines.append(f"{group}: {sum(sizes[name] for name in members):,} parameters in {len(members)} tensors, {what}")
    return lines if len(lines) > 1 or groups else []
