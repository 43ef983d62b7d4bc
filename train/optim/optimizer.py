"""The update: gradient clipping, learning rate, AdamW or Muon, and EMAs, all on local shards.

Nothing here waits for the device. A bad gradient norm skips the update and the EMAs on all ranks alike (P8): guard.py
judges, and the optimizers read its flag on the device. `step` names the batch either way.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from train.distributed.local_shards import is_sharded, local
from train.optim import muon
from train.optim.bfloat16_adamw import BFloat16AdamW
from train.optim.ema import Ema, label
from train.optim.groups import OTHERS, GroupConfig, group_of
from train.optim.guard import Guard, GuardConfig
from train.optim.part_norms import PartNorms


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    # adamw: for all parameters; muon: for the blocks' matrices, with AdamW for the rest, both at the same rate.
    optimizer: Literal["adamw", "muon"] = "adamw"
    # Dtype in which moments are stored; bfloat16 halves them, with unbiased rounding, but makes the update slower.
    state_dtype: Literal["float32", "bfloat16"] = "float32"
    learning_rate: float = 3e-4  # peak, > 0
    min_learning_rate: float = 1.5e-5  # at the end of the schedule, in [0, learning_rate]
    warmup_steps: int = 4000  # linear from 0
    steps: int = 250_000  # steps of the whole run; the schedule ends there
    schedule: Literal["cosine", "wsd"] = "cosine"  # after the warm-up: half a cosine, or stable and then decay
    decay_share: float = 0.1  # wsd: the last share of `steps`, in which the rate falls, in [0, 1]
    decay_shape: Literal["linear", "sqrt"] = "linear"  # wsd: the rate falls as 1 - x or 1 - sqrt(x)
    beta1: float = 0.9  # in [0, 1)
    beta2: float = 0.95  # in [0, 1)
    eps: float = 1e-8  # AdamW's epsilon, > 0
    muon_momentum: float = 0.95  # in [0, 1)
    # Muon: root mean square of an update's elements divided by the rate, > 0. AdamW's is about 0.2 in the gradient
    # noise of large models, so 0.2 suits its rate; it is up to 1 in a small model, where more may be better.
    muon_update_rms: float = 0.2
    weight_decay: float = 0.1  # on matrices; none on norms, biases and other parameters with one axis
    clip_norm: float = 1.0  # norm of all gradients together, > 0; frozen parameters have none
    # Half-lives of averages of the weights, in updates, >= 1; previews and weights=auto use the first.
    ema_half_lives: tuple[int, ...] = ()
    # Parameters that are frozen, or trained at another rate or weight decay, by a name of your choice, in order.
    groups: dict[str, GroupConfig] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 <= self.min_learning_rate <= self.learning_rate:
            raise ValueError(f"optim.min_learning_rate={self.min_learning_rate}: expected in [0, learning_rate]")
        if self.steps < 1 or self.warmup_steps < 0:
            raise ValueError(f"optim.steps={self.steps}, warmup_steps={self.warmup_steps}: expected at least 1 and 0")
        if self.clip_norm <= 0:
            raise ValueError(f"optim.clip_norm={self.clip_norm}: expected more than 0")
        if not 0 <= self.decay_share <= 1:
            raise ValueError(f"optim.decay_share={self.decay_share}: expected a share of the steps, in [0, 1]")
        betas_fit = all(0 <= beta < 1 for beta in (self.beta1, self.beta2, self.muon_momentum))
        if not (betas_fit and self.eps > 0 and self.muon_update_rms > 0 and self.weight_decay >= 0):
            raise ValueError(
                f"optim.beta1={self.beta1}, beta2={self.beta2}, muon_momentum={self.muon_momentum}, eps={self.eps}, "
                f"muon_update_rms={self.muon_update_rms}, weight_decay={self.weight_decay}: expected betas and "
                "momentum in [0, 1), eps and muon_update_rms > 0, weight_decay >= 0"
            )
        if min(self.ema_half_lives, default=1) < 1 or len(set(self.ema_half_lives)) < len(self.ema_half_lives):
            raise ValueError(f"optim.ema_half_lives={self.ema_half_lives}: expected distinct numbers of at least 1")

    @property
    def weights(self) -> list[str]:
        """Return the names of all weights that a run keeps, the preferred ones first."""
        return [*(label(half_life) for half_life in self.ema_half_lives), "model"]


def learning_rate(step: int, config: OptimConfig) -> float:
    """Return the rate of a step, from 1. A pure function, so a resume may change everything it depends on (P10).

    A linear warm-up, then half a cosine to the minimum, or WSD (warm-up, stable, decay; Hu et al. 2024, MiniCPM,
    arXiv:2404.06395, section 4): the peak, then over the last `decay_share` of the steps a decay to the minimum, linear
    or as 1 - sqrt (Hägele et al. 2024, arXiv:2405.18392, section 3). If `steps` is raised before a WSD run decays, it
    becomes the longer run exactly; if raised during the decay, the rate returns to the peak.
    """
    if step <= config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    start: float = config.warmup_steps
    if config.schedule == "wsd":
        start = max(start, config.steps * (1 - config.decay_share))
    done = min(1.0, max(0.0, step - start) / max(1, config.steps - start))
    if config.schedule == "cosine":
        left = 0.5 * (1 + math.cos(math.pi * done))
    else:
        left = 1 - (math.sqrt(done) if config.decay_shape == "sqrt" else done)
    return config.min_learning_rate + (config.learning_rate - config.min_learning_rate) * left


class Optimizer:
    """AdamW, optionally Muon, and the EMAs of one model's (sharded) parameters that are not frozen."""

    def __init__(self, model: nn.Module, config: OptimConfig, guard: GuardConfig):
        self.config = config
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
        blocks = muon.matrices(model) if config.optimizer == "muon" else {}
        (rest, scales), (of_muon, muon_scales) = (self._groups(blocks, inside=inside) for inside in (False, True))
        self._lr_scales = [of_part for of_part in (scales, muon_scales) if of_part]  # of each group of each of `parts`
        low = config.state_dtype == "bfloat16"
        adamw = BFloat16AdamW if low else partial(torch.optim.AdamW, fused=True)
        # Set before each update. A number, as for a tensor DTensor would run another variant of fused AdamW, which has
        # no fake kernel, on real tensors of the whole model's size: four copies of it per rank, at the first update.
        rate, betas = 0.0, (config.beta1, config.beta2)
        self.adamw: Any = adamw(rest, lr=rate, betas=betas, eps=config.eps) if rest else None
        self.parts: list[Any] = [self.adamw] if rest else []  # torch optimizers with `found_inf` and `batch`
        if of_muon:
            settings = {"momentum": config.muon_momentum, "update_rms": config.muon_update_rms, "lr": rate}
            self.parts.append(muon.Muon(of_muon, blocks, torch.bfloat16 if low else torch.float32, **settings))
        self.emas = {label(half_life): Ema(self.parameters, half_life) for half_life in config.ema_half_lives}
        self.guard = Guard(guard, next(iter(self.parameters.values())).device)
        self.part_sums: dict[str, torch.Tensor] = {}  # of the last update, if it was measured; see part_norms.py

    def _groups(
        self, blocks: Mapping[torch.Tensor, muon.Parts], inside: bool
    ) -> tuple[list[dict[str, Any]], list[float]]:
        """Return torch's groups of the trained parameters inside or outside `blocks`, and the lr_scale of each.

        Each group's matrices have its weight decay; norms, biases and other parameters with one axis have none.
        """
        config, found = self.config, dict[tuple[int, bool], tuple[dict[str, Any], float]]()
        in_order = [*config.groups, OTHERS.name]  # decides a parameter's number, and so the rounding of its moments
        for name, p in self.parameters.items():
            if (p in blocks) == inside:
                group = group_of(name, config.groups)
                decay = config.weight_decay if group.weight_decay is None else group.weight_decay
                start = {"params": [], "weight_decay": decay if p.ndim > 1 else 0.0}
                place = found.setdefault((in_order.index(group.name), p.ndim <= 1), (start, group.lr_scale))
                place[0]["params"].append(p)
        chosen = [found[key] for key in sorted(found)]
        return [group for group, _ in chosen], [scale for _, scale in chosen]

    @torch.no_grad()
    def update(self, step: int, measure: bool = False) -> torch.Tensor:
        """Clip, update, average, clear the gradients; `measure`: and fill `part_sums`.

        Returns the gradient norm before clipping, f32 [].
        """
        parts = PartNorms(self.parameters) if measure else None
        grads = [p.grad for p in self.parameters.values() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads, norm_type=2.0, foreach=True)
        if is_sharded(norm):
            norm = norm.full_tensor()  # sums over the mesh; every rank takes part
        torch.nn.utils.clip_grads_with_norm_(list(self.parameters.values()), self.config.clip_norm, norm, foreach=True)
        skip = self.guard.judge(norm)
        for part, scales in zip(self.parts, self._lr_scales, strict=True):
            for group, scale in zip(part.param_groups, scales, strict=True):
                group["lr"] = learning_rate(step, self.config) * scale
            part.found_inf, part.batch = skip, step
            part.step()
            part.zero_grad(set_to_none=True)
        self.part_sums = parts.sums() if parts else {}
        _, _, good_updates, _ = self.guard.counts
        for ema in self.emas.values():
            ema.update(self.parameters, good_updates, keep=1.0 - skip)
        return norm

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Let the model have the weights of the first average meanwhile, bit for bit and a tensor at a time."""
        weights = next(iter(self.emas.values())).weights
        self._exchange(weights)
        try:
            yield
        finally:
            self._exchange(weights)

    @torch.no_grad()
    def _exchange(self, weights: Mapping[str, torch.Tensor]) -> None:
        for name, parameter in self.parameters.items():
            mine, theirs = local(parameter), local(weights[name])
            kept = mine.clone()
            mine.copy_(theirs)
            theirs.copy_(kept)

    def preferred_weights(self) -> dict[str, torch.Tensor]:
        """Return the whole model that weights=auto means: of the first average, or of the model without one."""
        return {**self.frozen, **(next(iter(self.emas.values())).weights if self.emas else self.parameters)}
