"""Both losses, as (sum, count, each term): the step divides by the global count.

A mean here would be a mean of means over ranks and micro-batches, wrong wherever their counts differ.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100  # target of an unused slot


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int = 4096, vocab_size: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (f32 sum of -log softmax(hidden weight^T)[target], int64 number of targets that are not -100, each term).

    `hidden` [T, D], `weight` [V, D], `targets` int64 [T]. Rows of `weight` from `vocab_size` on are padding: products
    run on them, but their probabilities and gradients are exactly 0. Logits exist for `chunk` rows at a time, with the
    softmax in f32. The forward computes the gradients too, from each chunk's softmax, so no logits are kept or
    recomputed. Third come the terms of the sum f32 [T], without gradient, 0 where the target is -100.
    """
    total, nll = _LinearCrossEntropy.apply(hidden, weight, targets, chunk, vocab_size or len(weight))
    return total, (targets != IGNORE).sum(), nll


def noise_error(
    pred: Tensor, target: Tensor, valid: Tensor, weight: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (f32 sum over valid images of weight * mean squared error, int64 number of valid images, each's).

    `pred`, `target` [N, C, h, w]; `valid` bool [N]; `weight` f32 [N]. The mean is over one image's elements, so every
    image counts once, whatever its size (the paper, equation 3). Third come these means f32 [N], without weight or
    gradient, of unused slots too.
    """
    means = (pred.float() - target.float()).square().flatten(1).mean(1)
    error = means if weight is None else means * weight
    return torch.where(valid, error, 0.0).sum(), valid.sum(), means.detach()


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int, vocab_size: int
    ) -> tuple[Tensor, Tensor]:
        loss_of = compiled_chunk_loss() if hidden.is_cuda else chunk_loss_on_cpu
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        # f32 even for bf16 weights: a sum over many chunks.
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        nll = hidden.new_empty(len(targets), dtype=torch.float32)
        for start in range(0, len(targets), chunk):
            part = slice(start, start + chunk)
            x, target = hidden[part], targets[part]
            logits = x @ weight.T  # [chunk, V]
            nll[part], grad_logits = loss_of(logits, target, vocab_size, needs_hidden or needs_weight)
            if grad_logits is None:
                continue
            if grad_hidden is not None:
                torch.mm(grad_logits, weight, out=grad_hidden[part])
            if grad_weight is not None:
                grad_weight += grad_logits.T @ x
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype))
        ctx.mark_non_differentiable(nll)
        return nll.sum(), nll

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, _: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        # One dimension, not none, so that the product with bf16 is computed in f32: 1 / count in bf16 is off by up to
        # 0.4 %, differently each step.
        scale = grad_total.reshape(1)
        grad_hidden, grad_weight = (
            None if grad is None else torch.mul(grad, scale, out=torch.empty_like(grad)) for grad in ctx.saved_tensors
        )
        return grad_hidden, grad_weight, None, None, None


def chunk_loss(logits: Tensor, targets: Tensor, vocab_size: int, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """Return (-log softmax f32 [T], the gradient of its sum by the logits, in their dtype, or None) of logits [T, V].

    Written to be compiled: the two passes over the logits are all that touches memory, where eager ones make ten.
    """
    columns, trained = torch.arange(logits.shape[1], device=logits.device), targets != IGNORE
    log_probs = F.log_softmax(torch.where(columns < vocab_size, logits.float(), -torch.inf), dim=-1)
    nll = -log_probs.gather(1, targets.clamp(min=0)[:, None])[:, 0]
    nll = torch.where(trained, nll, 0.0)
    if not with_gradient:
        return nll, None
    # d nll / d logits = softmax - onehot, 0 where the target is ignored.
    onehot = (columns == targets[:, None]).float()
    return nll, ((log_probs.exp() - onehot) * trained[:, None]).to(logits.dtype)


def chunk_loss_on_cpu(
    logits: Tensor, targets: Tensor, vocab_size: int, with_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Return what `chunk_loss` does, with a one-hot matrix neither made nor subtracted, in place."""
    if vocab_size < logits.shape[1]:
        logits[:, vocab_size:] = -torch.inf
    log_probs = F.log_softmax(logits.float(), dim=-1)
    nll = F.nll_loss(log_probs, targets, ignore_index=IGNORE, reduction="none")
    if not with_gradient:
        return nll, None
    trained = (targets != IGNORE)[:, None]
    gradient = log_probs.exp_()
    gradient.scatter_add_(1, targets.clamp(min=0)[:, None], -trained.to(torch.float32))
    return nll, gradient.mul_(trained).to(logits.dtype)


@functools.cache
def compiled_chunk_loss() -> Callable[[Tensor, Tensor, int, bool], tuple[Tensor, Tensor | None]]:
    """Return `chunk_loss` compiled for any number of rows: the last chunk, and other batches, are not traced again."""
    compiled = torch.compile(chunk_loss, fullgraph=True)

    def loss_of(logits: Tensor, targets: Tensor, vocab_size: int, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
        for rows in (logits, targets):
            torch._dynamo.maybe_mark_dynamic(rows, 0)
        return compiled(logits, targets, vocab_size, with_gradient)

    return loss_of
