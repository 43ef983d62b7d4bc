"""Nucleus sampling (Holtzman et al. 2020) of text tokens, by given uniform numbers."""

import torch
from torch import Tensor


def sample_tokens(logits: Tensor, uniforms: Tensor, temperature: float, top_p: float, head: int = 64) -> Tensor:
    """Return int64 [R] from logits [R, V]: nucleus sampling by inverting the cumulative at `uniforms` f32 [R].

    On a CPU, where sorting a vocabulary takes as long as a block, the `head` likeliest tokens are sorted first, and the
    others only for rows that these do not decide; the result is the same.
    """
    if temperature == 0:
        return logits.argmax(-1)
    probs = (logits.double() / temperature).softmax(-1)
    if probs.device.type != "cpu" or probs.shape[-1] <= head:
        return _invert(*probs.sort(dim=-1, descending=True, stable=True), uniforms, top_p)
    values, order = probs.topk(head)
    order, by_index = order.sort(dim=-1)  # `topk` leaves equal values in any order
    values, by_value = values.gather(1, by_index).sort(dim=-1, descending=True, stable=True)
    order = order.gather(1, by_value)
    cumulative = values.cumsum(-1)
    kept = (cumulative - values < top_p).sum(-1, keepdim=True)
    total = cumulative.gather(1, kept - 1) if top_p < 1 else probs.sum(-1, keepdim=True)
    choice = (cumulative <= uniforms.double()[:, None] * total).sum(-1, keepdim=True)
    choice = torch.minimum(choice, kept - 1) if top_p < 1 else choice
    # The nucleus, or the choice among all, must end before the last value: it may have others like it outside.
    certain = (kept if top_p < 1 else choice + 1) <= (values > values[:, -1:]).sum(-1, keepdim=True)
    tokens = order.gather(1, choice.clamp(max=head - 1))[:, 0]
    rest = (~certain[:, 0]).nonzero()[:, 0]
    if len(rest):
        tokens[rest] = _invert(*probs[rest].sort(dim=-1, descending=True, stable=True), uniforms[rest], top_p)
    return tokens


def _invert(probs: Tensor, order: Tensor, uniforms: Tensor, top_p: float) -> Tensor:
    cumulative = probs.cumsum(-1)
    kept = (cumulative - probs < top_p).sum(-1, keepdim=True)  # at least one
    threshold = uniforms.double()[:, None] * cumulative.gather(1, kept - 1)
    choice = (cumulative <= threshold).sum(-1, keepdim=True)
    return order.gather(1, torch.minimum(choice, kept - 1))[:, 0]
