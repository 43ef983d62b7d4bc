"""The update: clip, learning rate, AdamW, EMA on local shards. No host waits for the device here.

A non-finite gradient norm skips the update and the EMA on every rank alike (P8): the norm is global, and fused AdamW
reads the flag on the device. `step` names the batch either way.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.tensor import DTensor


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    learning_rate: float = 3e-4  # peak, > 0
    min_learning_rate: float = 1.5e-5  # at the end of the cosine, in [0, learning_rate]
    warmup_steps: int = 4000  # linear from 0
    steps: int = 250_000  # updates of the whole run; the cosine ends there
    beta1: float = 0.9  # in [0, 1)
    beta2: float = 0.95  # in [0, 1)
    eps: float = 1e-8  # AdamW's epsilon, > 0
    weight_decay: float = 0.1  # on matrices; none on norms, biases and embeddings' vectors of one axis
    clip_norm: float = 1.0  # global gradient norm, > 0
    ema_decay: float | None = None  # exponential moving average of the weights, in (0, 1); None keeps none
    max_nonfinite_in_a_row: int = 5  # skipped updates in a row after which the next log row stops the run, >= 1

    def __post_init__(self) -> None:
        if not 0 <= self.min_learning_rate <= self.learning_rate:
            raise ValueError(
                f"optim.min_learning_rate={self.min_learning_rate}: expected between 0 and "
                f"learning_rate={self.learning_rate}"
            )
        if self.steps < 1 or self.warmup_steps < 0 or self.clip_norm <= 0:
            raise ValueError(
                f"optim.steps={self.steps}, warmup_steps={self.warmup_steps}, clip_norm={self.clip_norm}: expected "
                "steps >= 1, warmup_steps >= 0, clip_norm > 0"
            )
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1 and self.eps > 0 and self.weight_decay >= 0):
            raise ValueError(
                f"optim.beta1={self.beta1}, beta2={self.beta2}, eps={self.eps}, weight_decay={self.weight_decay}: "
                "expected betas in [0, 1), eps > 0, weight_decay >= 0"
            )
        if self.max_nonfinite_in_a_row < 1:
            raise ValueError(f"optim.max_nonfinite_in_a_row={self.max_nonfinite_in_a_row}: expected at least 1")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"optim.ema_decay={self.ema_decay}: expected in (0, 1), or null for no EMA")


def learning_rate(step: int, config: OptimConfig) -> float:
    """Return the rate of the step-th update (from 1): linear warm-up, then a cosine to the minimum."""
    if step <= config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    done = min(1.0, (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps))
    span = config.learning_rate - config.min_learning_rate
    return config.min_learning_rate + span * 0.5 * (1 + math.cos(math.pi * done))


class Optimizer:
    """AdamW and the EMA of one model's (sharded) parameters."""

    def __init__(self, model: nn.Module, config: OptimConfig):
        self.config = config
        self.parameters = dict(model.named_parameters())
        matrices = [p for p in self.parameters.values() if p.ndim > 1]
        vectors = [p for p in self.parameters.values() if p.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self.adamw = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=0.0,  # set before each update; a tensor would cost the first one four copies of the whole model a rank:
            # DTensor tries fused AdamW's tensor variant, which has no fake kernel, on full-size tensors
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            fused=True,
        )
        self.ema: dict[str, torch.Tensor] | None = None
        if config.ema_decay is not None:
            self.ema = {name: p.detach().clone() for name, p in self.parameters.items()}
        device = next(iter(self.parameters.values())).device
        self.nonfinite = torch.zeros(2, device=device)  # updates skipped: in all, in a row

    @torch.no_grad()
    def update(self, step: int) -> torch.Tensor:
        """Clip, update, average; clear the gradients. Returns the gradient norm before clipping, f32 []."""
        grads = [p.grad for p in self.parameters.values() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads, norm_type=2.0, foreach=True)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()  # sums over the mesh; every rank takes part
        finite = torch.isfinite(norm)
        torch.nn.utils.clip_grads_with_norm_(list(self.parameters.values()), self.config.clip_norm, norm, foreach=True)
        for group in self.adamw.param_groups:
            group["lr"] = learning_rate(step, self.config)
        skip = (~finite).to(torch.float32)
        self.adamw.found_inf = skip  # read by the fused kernel
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        self._average(1.0 - skip)
        self.nonfinite += skip
        self.nonfinite[1] *= skip
        return norm

    def _average(self, keep: torch.Tensor) -> None:
        if self.ema is None:
            return
        weight = (1.0 - self.config.ema_decay) * keep
        averages = [_local(self.ema[name]) for name in self.parameters]
        torch._foreach_lerp_(averages, [_local(p) for p in self.parameters.values()], [weight] * len(averages))


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()
