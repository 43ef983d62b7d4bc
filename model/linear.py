"""Linear layers without bias; on a CPU, without gradients, their float32 products run on oneDNN.

torch takes MKL for float32. On an AMD core with AVX-512 oneDNN needs half its time for 8 rows (a decoding step), three
quarters for 256, as much for 1,024. The operator is torch.compile's own; where it is missing, torch's layer runs.
"""

import torch
from torch import Tensor, nn

HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class Linear(nn.Linear):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return x @ weight.T [..., outputs] of x [..., inputs]."""
        plain = type(self.weight) is nn.Parameter and x.dtype == self.weight.dtype == torch.float32
        eager = not (torch.is_grad_enabled() or torch.compiler.is_compiling())
        if plain and eager and x.device.type == "cpu" and HAS_ONEDNN:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, None, "none", [], "")
        return super().forward(x)
