"""Exponential moving averages (EMA) of the weights, several side by side; each holds as much as the model's own shard.

A half-life is counted in updates, not in images or tokens (EDM2): the global batch is the same for a whole run, so they
differ by a constant, and an update that was skipped must not move an average (P8). It is a whole number, so that it
makes a readable name: `ema-69` is the average of half-life 69, in `weights=`, in the checkpoint and in exports.
"""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from train.distributed.local_shards import local

RAMP = 0.1  # a half-life is at most this part of the updates made, else the initial weights would linger


class Ema:
    """One average, in float32, sharded as the parameters are. Starts from the weights as they are."""

    def __init__(self, parameters: Mapping[str, torch.Tensor], half_life: int) -> None:
        self.half_life = half_life  # updates after which a weight's part has halved, >= 1
        self.weights = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    @torch.no_grad()
    def restart(self, parameters: Mapping[str, torch.Tensor]) -> None:
        """Take over the weights as they are."""
        for name, parameter in parameters.items():
            local(self.weights[name]).copy_(local(parameter))

    @torch.no_grad()
    def update(self, parameters: Mapping[str, torch.Tensor], updates: torch.Tensor, keep: torch.Tensor) -> None:
        """Move towards the weights after the `updates`-th update, f32 [] on the device; not at all where keep is 0.

        The decay is 2^(-1/h) with h = min(half_life, updates / 10): the ramp of EDM (Karras et al. 2022,
        arXiv:2206.00364, its training code, there with 1 / 20).
        """
        half_life = (RAMP * updates).clamp(max=float(self.half_life))
        weight = -torch.expm1(-math.log(2) / half_life) * keep  # 1 - decay, without the cancellation
        averages = [local(self.weights[name]) for name in parameters]
        torch._foreach_lerp_(averages, [local(p) for p in parameters.values()], [weight] * len(averages))


def label(half_life: int) -> str:
    """Return the name of the average of a half-life."""
    return f"ema-{half_life}"


def is_label(name: str) -> bool:
    """Whether `name` is one that `label` gives."""
    return re.fullmatch(r"ema-[1-9]\d*", name) is not None


def choose(weights: str, kept: Sequence[str], folder: Path) -> str:
    """Return which of `kept` in `folder` (labels in the recipe's order, perhaps "model") is meant by `weights`.

    auto: the first average, without any the model; ema: the first average; or a name. Raises ValueError for what is
    not there.
    """
    averages = [name for name in kept if is_label(name)]
    chosen = {"auto": (averages or kept)[0], "ema": (averages or ["ema"])[0]}.get(weights, weights)
    if chosen not in kept:
        raise ValueError(f"weights={weights}: {folder} holds {', '.join(kept)}; use weights={kept[0]}, or auto")
    return chosen
