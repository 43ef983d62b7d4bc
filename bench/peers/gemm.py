"""The ceiling: the products of the blocks' linear layers alone, forward and backward, at the shapes of the work.

The model's tokens lie in one matrix and outputs are allocated once, so this is what torch's matrix products reach on
this machine at these shapes, with these threads.
"""

from typing import Any

import torch

from bench.peers.works import Work


class Gemm:
    def __init__(self, work: Work) -> None:
        width, hidden, tokens = work.width, work.ffn_hidden, work.useful_tokens
        shapes = [(width, 3 * width), (width, width), (width, 2 * hidden), (hidden, width)]  # in, out
        self.products = []
        for inputs, outputs in shapes:
            x, grad = torch.randn(tokens, inputs), torch.randn(tokens, outputs)
            weights = [torch.randn(outputs, inputs) for _ in range(work.layers)]
            out, grad_x, grad_weight = torch.empty_like(grad), torch.empty_like(x), torch.empty_like(weights[0])
            for weight in weights:
                self.products += [(x, weight.T, out), (grad, weight, grad_x), (grad.T, x, grad_weight)]

    def describe(self) -> dict[str, Any]:
        return {"flops": sum(2 * a.shape[0] * a.shape[1] * b.shape[1] for a, b, _ in self.products)}

    def train(self) -> None:
        for a, b, out in self.products:
            torch.mm(a, b, out=out)

    def close(self) -> None:
        pass
