"""Linear layers; on a CPU their float32 products run on oneDNN, in training and in sampling.

torch takes MKL for float32. On an AMD core with AVX-512 oneDNN needs 0.83 of its time for the outputs and for the
inputs' gradients of 1,500 rows, and half for 8 rows; the weights' gradients gain nothing and stay torch's. The operator
is torch.compile's own; where it is missing, torch's linear layer runs.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
PRODUCT = torch.ops.mkldnn._linear_pointwise.default if HAS_ONEDNN else None  # of (x, weight, ...)


class Linear(nn.Linear):
    lora_a: Tensor | None  # [rank, inputs]
    lora_b: Tensor | None  # [outputs, rank]

    def __init__(self, inputs: int, outputs: int, bias: bool = False) -> None:
        super().__init__(inputs, outputs, bias)
        self.lora_a, self.lora_b, self.lora_scale = None, None, 1.0

    def add_adapter(self, rank: int, scale: float) -> None:
        """Add scale * (x @ lora_a.T) @ lora_b.T to what the layer returns; the values are still to be set."""
        self.lora_a = nn.Parameter(torch.empty(rank, self.in_features))
        self.lora_b = nn.Parameter(torch.empty(self.out_features, rank))
        self.lora_scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """Return x @ weight.T + bias [..., outputs] of x [..., inputs], and what an adapter adds."""
        y = linear(x, self.weight, self.bias)
        return y if self.lora_a is None else y + self.adapted(x)

    def adapted(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        """Return what the adapter adds [..., outputs] for x [..., inputs]; only to `rows` bool [...], if given."""
        assert self.lora_a is not None and self.lora_b is not None
        low = linear(x, self.lora_a) * self.lora_scale
        return linear(low if rows is None else low * rows[..., None], self.lora_b)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x @ weight.T + bias [..., outputs] of x [..., inputs]."""
    plain = type(weight) is nn.Parameter and x.dtype == weight.dtype == torch.float32
    if plain and x.device.type == "cpu" and HAS_ONEDNN and not torch.compiler.is_compiling():
        return _Linear.apply(x, weight, bias)
    return F.linear(x, weight, bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)  # a frozen weight's input may be freed
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad_x, grad_weight, grad_bias = None, None, None
        if ctx.needs_input_grad[0]:
            grad_x = _product(grad, weight.T)
        if ctx.needs_input_grad[1]:
            rows, grad_rows = x.reshape(-1, weight.shape[1]), grad.reshape(-1, weight.shape[0])
            # MKL is faster with the longer side first.
            widens = weight.shape[0] >= weight.shape[1]
            grad_weight = grad_rows.T @ rows if widens else (rows.T @ grad_rows).T
        if ctx.needs_input_grad[2]:
            grad_bias = grad.reshape(-1, weight.shape[0]).sum(0)
        return grad_x, grad_weight, grad_bias


def product(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """Write x @ weight.T [rows, outputs] to `out`, without a graph."""
    if x.device.type == "cpu" and x.dtype == torch.float32 and HAS_ONEDNN:
        out.copy_(_product(x, weight))
    else:
        torch.mm(x, weight.T, out=out)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
