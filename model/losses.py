"""Both losses, as (sum, count): the step divides by the global count.

A mean here would be a mean of means over ranks and micro-batches, wrong wherever their counts differ.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100  # target of an unused slot


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int = 4096) -> tuple[Tensor, Tensor]:
    """Return (f32 sum of -log softmax(hidden weight^T)[target], int64 number of targets that are not -100).

    `hidden` [T, D], `weight` [V, D], `targets` int64 [T]. Logits exist for `chunk` rows at a time, with the softmax in
    f32. The forward computes the gradients too, from each chunk's softmax, so no logits are kept or recomputed.
    """
    return _LinearCrossEntropy.apply(hidden, weight, targets, chunk), (targets != IGNORE).sum()


def noise_error(pred: Tensor, target: Tensor, valid: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return (f32 sum over valid images of weight * mean squared error, int64 number of valid images).

    `pred`, `target` [N, C, h, w]; `valid` bool [N]; `weight` f32 [N]. The mean is over one image's elements, so every
    image counts once, whatever its size (the paper, equation 3).
    """
    error = (pred.float() - target.float()).square().flatten(1).mean(1)
    if weight is not None:
        error = error * weight
    return torch.where(valid, error, 0.0).sum(), valid.sum()


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        # f32 even for bf16 weights: a sum over many chunks.
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        total = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, len(targets), chunk):
            part = slice(start, start + chunk)
            x, target = hidden[part], targets[part]
            log_probs = F.log_softmax((x @ weight.T).float(), dim=-1)  # [chunk, V]
            total += F.nll_loss(log_probs, target, ignore_index=IGNORE, reduction="sum")
            if grad_hidden is None and grad_weight is None:
                continue
            # d nll / d logits = softmax - onehot, 0 where the target is ignored.
            trained = (target != IGNORE)[:, None]
            grad_logits = log_probs.exp_()
            grad_logits.scatter_add_(1, target.clamp(min=0)[:, None], -trained.to(torch.float32))
            grad_logits = grad_logits.mul_(trained).to(x.dtype)
            if grad_hidden is not None:
                torch.mm(grad_logits, weight, out=grad_hidden[part])
            if grad_weight is not None:
                grad_weight += grad_logits.T @ x
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        # One dimension, not none, so that the product with bf16 is computed in f32: 1 / count in bf16 is off by up to
        # 0.4 %, differently each step.
        scale = grad_total.reshape(1)
        grad_hidden, grad_weight = (
            None if grad is None else torch.mul(grad, scale, out=torch.empty_like(grad)) for grad in ctx.saved_tensors
        )
        return grad_hidden, grad_weight, None, None
