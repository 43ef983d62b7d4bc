"""Exponential moving averages (EMA) of the weights; each takes as much memory as the rank's shard of the model.

A half-life is counted in updates, not in images as in EDM2: the global batch never changes within a run, so they differ
by a constant, and a skipped update must not move an average (P8). It is a whole number, which makes readable names:
`ema-69` is the average of half-life 69 in `weights=`, in checkpoints and in exports.
"""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from train.distributed.local_shards import local

RAMP = 0.1  # a half-life is at most this share of the updates made, so that the initial weights fade early


class Ema:
    """One average, in float32, sharded like the parameters. Starts at the current weights."""

    def __init__(self, parameters: Mapping[str, torch.Tensor], half_life: int) -> None:
        self.half_life = half_life  # updates after which the influence of old weights has halved, >= 1
        self.weights = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    def restart(self, parameters: Mapping[str, torch.Tensor]) -> None:
        """Set the average to the current weights."""
        for name, parameter in parameters.items():
            local(self.weights[name]).copy_(local(parameter))

    @torch.no_grad()
    def update(self, parameters: Mapping[str, torch.Tensor], updates: torch.Tensor, keep: torch.Tensor) -> None:
        """Move the average towards the weights; not at all if `keep`, f32 [], is 0.

        `updates`, f32 [] on the device, is the number of updates made. The decay is 2^(-1/h) with h = min(half_life,
        updates / 10): the ramp of EDM (Karras et al. 2022, arXiv:2206.00364; its training code uses 1 / 20).
        """
        half_life = (RAMP * updates).clamp(max=float(self.half_life))
        weight = -torch.expm1(-math.log(2) / half_life) * keep  # 1 - decay, without cancellation
        averages = [local(self.weights[name]) for name in parameters]
        torch._foreach_lerp_(averages, [local(p) for p in parameters.values()], [weight] * len(averages))


def label(half_life: int) -> str:
    """Return the name of the average with a half-life."""
    return f"ema-{half_life}"


def is_label(name: str) -> bool:
    """Return whether `name` is one that `label` returns."""
    return re.fullmatch(r"ema-[1-9]\d*", name) is not None


def choose(weights: str, kept: Sequence[str], folder: Path, key: str = "weights") -> str:
    """Return which of the weights `kept` in `folder` (labels in the config's order, perhaps "model") to use.

    `weights` is a name, or auto: the first average, or the model if there is none; or ema: the first average. `key`
    is the option that gave it. Raises ValueError for weights that were not kept.
    """
    averages = [name for name in kept if is_label(name)]
    chosen = {"auto": (averages or kept)[0], "ema": (averages or ["ema"])[0]}.get(weights, weights)
    if chosen not in kept:
        raise ValueError(f"{key}={weights}: {folder} holds {', '.join(kept)}; use {key}={kept[0]}, or auto")
    return chosen
