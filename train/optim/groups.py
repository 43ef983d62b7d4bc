"""Which parameters a run trains, at what rate and decay, and which are frozen (`optim.groups`).

A group is a list of patterns over plain parameter names; the first group that matches a parameter has it, and what none
matches is trained as without groups, or frozen if the trunk has adapters (LoRA). Frozen parameters have no gradient,
moments or averages and are held in the dtype of forward and backward, so that a step computes the same bits as from
float32 masters. They are not in checkpoints; train/inference/saved_model.py makes them again.
"""

import difflib
import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from omegaconf import MISSING
from torch import nn

from model.lora import is_adapter
from train.distributed.parallelize import plain_name

ADAPTED = ("transformer.*", "text_*")  # frozen beside adapters unless a group says otherwise


@dataclass(frozen=True, kw_only=True)
class GroupConfig:
    # Patterns over parameter names, such as "transformer.blocks.*.ffn.*", in which * stands for any characters. The
    # first group that matches a parameter has it; a pattern that matches none is refused.
    parameters: tuple[str, ...] = MISSING
    frozen: bool = False  # keep the parameters as they are: no gradients, moments or averages, half the memory
    lr_scale: float = 1.0  # times the learning rate, > 0
    weight_decay: float | None = None  # on the group's matrices, >= 0; null: optim.weight_decay

    def __post_init__(self) -> None:
        if not self.parameters:
            raise ValueError('optim.groups.NAME.parameters=[]: expected at least one pattern, such as "text_*"')
        if not 0 < self.lr_scale < math.inf or not 0 <= (self.weight_decay or 0) < math.inf:
            raise ValueError(
                f"optim.groups.NAME.lr_scale={self.lr_scale}, weight_decay={self.weight_decay}: expected more than 0, "
                "and null or at least 0; frozen=true trains nothing"
            )
        if self.frozen and (self.lr_scale != 1 or self.weight_decay is not None):
            raise ValueError(
                f"optim.groups.NAME.frozen=true with lr_scale={self.lr_scale}, weight_decay={self.weight_decay}: "
                "frozen parameters have neither; leave them out"
            )


Groups = Mapping[str, GroupConfig]  # by name, in the config's order


@dataclass(frozen=True)
class Group:
    """What is done with a parameter."""

    name: str  # in the config; in brackets, for what no group matches
    frozen: bool = False
    lr_scale: float = 1.0
    weight_decay: float | None = None


OTHERS, BASE = Group("(others)"), Group("(adapted)", frozen=True)


def group_of(name: str, groups: Groups, adapted: bool = False) -> Group:
    """Return the group of the parameter `name`; `adapted`: the model has adapters."""
    name = plain_name(name)
    for key, group in groups.items():
        if any(fnmatchcase(name, pattern) for pattern in group.parameters):
            return Group(key, group.frozen, group.lr_scale, group.weight_decay)
    is_base = any(fnmatchcase(name, pattern) for pattern in ADAPTED) and not is_adapter(name)
    return BASE if adapted and is_base else OTHERS


def resolve(names: Iterable[str], groups: Groups, adapted: bool = False) -> dict[str, Group]:
    """Return the group of each of a model's parameters.

    Raises ValueError for a pattern that matches none, a group that is left none or has a name of ours, and if all are
    frozen (P10).
    """
    names = [plain_name(name) for name in names]
    found = {name: group_of(name, groups, adapted) for name in names}
    for key, group in groups.items():
        if key in (OTHERS.name, BASE.name):
            raise ValueError(f"optim.groups: {key} stands for what no group matches; choose another name")
        for pattern in group.parameters:
            if not any(fnmatchcase(name, pattern) for name in names):
                near = ", ".join(difflib.get_close_matches(pattern, names, n=3, cutoff=0.0))
                raise ValueError(
                    f'optim.groups.{key}.parameters: "{pattern}" matches no parameter; names like it are {near}'
                )
        if not any(of.name == key for of in found.values()):
            taken = [name for name in names if any(fnmatchcase(name, pattern) for pattern in group.parameters)]
            owners = ", ".join(dict.fromkeys(found[name].name for name in taken))
            raise ValueError(
                f"optim.groups.{key}: earlier groups ({owners}) have all of its {len(taken)} parameters; put it before "
                "them, or leave it out"
            )
    if all(group.frozen for group in found.values()):
        raise ValueError("optim.groups: every parameter is frozen: expected some to train; narrow a frozen group")
    return found


def freeze(model: nn.Module, groups: Groups, dtype: torch.dtype, adapted: bool = False) -> None:
    """Freeze a meta-device model's parameters in place and hold them in `dtype`, that of forward and backward.

    Comes before `parallelize`. A model with fewer blocks than the config's, as a plan rehearses, may lack what a
    pattern matches; `resolve` refuses patterns.
    """
    frozen = set(frozen_among((name for name, _ in model.named_parameters()), groups, adapted))
    for prefix, module in model.named_modules():
        for name, parameter in [*module.named_parameters(recurse=False)]:
            if (f"{prefix}.{name}" if prefix else name) in frozen:
                setattr(module, name, nn.Parameter(parameter.to(dtype), requires_grad=False))


def table(model: nn.Module, groups: Groups, adapted: bool = False) -> list[dict[str, Any]]:
    """Return a row for each group of a model: what it has and what is done with it; none where nothing is grouped."""
    rows: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        group = group_of(name, groups, adapted)
        row = rows.setdefault(group.name, {"group": group.name, "tensors": 0, "parameters": 0})
        row["tensors"] += 1
        row["parameters"] += parameter.numel()
        row |= {"frozen": group.frozen, "lr_scale": group.lr_scale, "weight_decay": group.weight_decay}
    in_order = [*groups, BASE.name, OTHERS.name]
    return sorted(rows.values(), key=lambda row: in_order.index(row["group"])) if groups or adapted else []


def frozen_set(names: Iterable[str]) -> str:
    """Return what identifies a set of frozen parameters."""
    names = sorted(names)
    digest = hashlib.blake2b("\n".join(names).encode(), digest_size=6).hexdigest()
    return f"{len(names)} tensors ({digest})" if names else "none"


def frozen_among(names: Iterable[str], groups: Groups, adapted: bool = False) -> list[str]:
    """Return which of these names are of frozen parameters, in their order."""
    return [name for name in names if group_of(name, groups, adapted).frozen]


def frozen_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return what `freeze` froze, by plain name."""
    return {plain_name(name): parameter for name, parameter in model.named_parameters() if not parameter.requires_grad}
