"""Linear layers on oneDNN equal torch's, forward and backward, and are what a CPU runs in float32."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from model.linear import HAS_ONEDNN, Linear


class Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("shape", [(2, 50, 24), (7, 24), (1, 24), (24,)])
@pytest.mark.parametrize("outputs", [9, 24, 40])
def test_outputs_and_gradients_are_the_formulas(shape: tuple[int, ...], outputs: int) -> None:
    torch.manual_seed(0)
    layer, x = Linear(24, outputs), torch.randn(shape, requires_grad=True)
    upstream = torch.randn(*shape[:-1], outputs)
    exact_x, exact_weight = (t.detach().double().requires_grad_() for t in (x, layer.weight))
    exact = F.linear(exact_x, exact_weight)
    exact.backward(upstream.double())
    found = layer(x)
    found.backward(upstream)
    for ours, theirs in ((found, exact), (x.grad, exact_x.grad), (layer.weight.grad, exact_weight.grad)):
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=3e-5)


@pytest.mark.skipif(not HAS_ONEDNN, reason="torch was built without oneDNN")
def test_float32_runs_on_onednn_and_bfloat16_as_before() -> None:
    layer, x = Linear(16, 8), torch.randn(4, 16)
    with Operators() as seen, torch.no_grad():
        layer(x)
    assert seen.names == ["mkldnn._linear_pointwise.default"]
    with Operators() as seen:
        layer.to(torch.bfloat16)(x.bfloat16()).sum().backward()
    assert not [name for name in seen.names if "mkldnn" in name]


def test_a_frozen_weight_and_a_leaf_without_gradient_get_none() -> None:
    layer, x = Linear(16, 8), torch.randn(4, 16, requires_grad=True)
    layer.weight.requires_grad_(False)
    y = layer(x)
    assert not any(saved is x for saved in y.grad_fn.saved_tensors), "kept for a gradient that nobody needs"
    y.sum().backward()
    assert layer.weight.grad is None and x.grad is not None
    layer = Linear(16, 8)
    layer(x.detach()).sum().backward()
    assert layer.weight.grad is not None
