"""What the model computes differently on a CPU, only because torch's kernels there are slow.

Each function equals the plain formula that CUDA and compiled blocks use, up to rounding; its docstring says what it
gains. Nothing here is needed to understand the model. FlexAttention's backward is the one kernel that CPUs lack
outright: training takes model/document_attention.py in its place.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def rotate_pairs(pairs: Tensor, turns: Tensor) -> Tensor:
    """Rotate f32 pairs [B, S, heads, K/2, 2] by unit complex `turns` [B, S, 1, K/2]; return [B, S, heads, K].

    One complex product takes a fifth of the time of four real ones. Compilers cannot fuse complex numbers.
    """
    return torch.view_as_real(torch.view_as_complex(pairs) * turns).flatten(-2)


def in_portions(run: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Return run(images), on a CPU 2...8 at a time: among so many a convolution gives an image the same bits."""
    if images.device.type != "cpu":
        return run(images)
    portions = images.split(8)
    return torch.cat([run(part if len(part) > 1 else part.repeat(2, 1, 1, 1))[: len(part)] for part in portions])


def attend_bf16(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Return attention [B, H, S, K] of bf16 q, k, v [B, H, S, K] with the additive mask `bias` [B, 1, S, Skv].

    Plain products: torch's fused kernel is five times slower in bf16, forward and backward.
    """
    rows, heads, length, head_dim = q.shape
    bias = bias.expand(-1, heads, -1, -1).flatten(0, 1)
    scores = torch.baddbmm(bias, (q * head_dim**-0.5).flatten(0, 1), k.flatten(0, 1).transpose(1, 2))
    return torch.bmm(scores.softmax(-1), v.flatten(0, 1)).view(rows, heads, length, head_dim)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) * weight over the last dimension.

    Half the time of torch's, which is a twentieth of a small model's step.
    """
    return _RMSNorm.apply(x, weight, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        exact = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=exact)
        scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_().to(x.dtype)  # [..., 1]
        unit = x * scale
        ctx.save_for_backward(unit, scale, weight)
        return unit * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        unit, scale, weight = ctx.saved_tensors
        product = grad * unit
        rows = product.flatten(0, -2)
        # d x = scale (grad w - unit mean(grad w unit))
        mean = (rows @ weight).view(scale.shape).div_(-unit.shape[-1])
        grad_weight = rows.sum(0)
        # In place from here on: new memory costs more than the arithmetic.
        return torch.mul(grad, weight, out=product).addcmul_(unit, mean).mul_(scale), grad_weight, None


def swiglu(gate_up: Tensor) -> Tensor:
    """Return silu(gate) * up [..., H] of gate_up [..., 2H].

    silu(gate) is computed again in the backward, which keeps a third less memory, and the gradients of both halves are
    written side by side instead of being concatenated.
    """
    return _SwiGLU.apply(gate_up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        both = torch.empty_like(gate_up)
        grad_gate, grad_up = both.chunk(2, dim=-1)
        scratch = F.silu(gate)
        torch.mul(grad, scratch, out=grad_up)
        torch.ops.aten.silu_backward.grad_input(torch.mul(grad, up, out=scratch), gate, grad_input=grad_gate)
        return both
