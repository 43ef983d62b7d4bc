"""AdamW with moments stored in bfloat16: 12 bytes per parameter for weights, gradients and moments instead of 16.

torch's fused kernel needs moments in the parameters' dtype. So, one parameter at a time, they are widened to float32,
updated by that kernel, and rounded back stochastically (stochastic_rounding.py).
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch.optim.adamw import adamw

from train.distributed.local_shards import first_element, local
from train.optim.stochastic_rounding import stochastic_bfloat16

MOMENTS = ("exp_avg", "exp_avg_sq")


class BFloat16AdamW(torch.optim.AdamW):
    """torch.optim.AdamW(fused=True), but with bfloat16 moments. Set `found_inf` and `batch` before each step.

    A skipped update changes no bit of a moment, as it is exact in bfloat16 (P8).
    """

    found_inf: torch.Tensor | None = None  # f32 [] on the device; 1 skips the update
    batch: int = 0  # the step; with a parameter's number it is the key of its rounding

    def __init__(self, params: Iterable[dict[str, Any]], **settings: Any) -> None:
        super().__init__(params, fused=True, **settings)
        for p in self._parameters():
            zeros = {name: torch.zeros_like(p, dtype=torch.bfloat16) for name in MOMENTS}
            self.state[p] = {"step": torch.zeros((), device=p.device), **zeros}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update from the gradients, all of which must be present."""
        number = 0
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                state = self.state[p]
                moments = [local(state[name]) for name in MOMENTS]
                exact = [moment.float() for moment in moments]
                adamw(
                    [local(p)], [local(p.grad)], [exact[0]], [exact[1]], [], [state["step"]],
                    fused=True, found_inf=self.found_inf, amsgrad=False, maximize=False, lr=group["lr"],
                    beta1=beta1, beta2=beta2, weight_decay=group["weight_decay"], eps=group["eps"],
                )  # fmt: skip
                for name, moment, value in zip(MOMENTS, moments, exact, strict=True):
                    key = f"{self.batch} {number} {name}"
                    moment.copy_(stochastic_bfloat16(value, first_element(p), key))
                number += 1

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state and keep bfloat16, where torch would widen the moments to the parameters' dtype."""
        super().load_state_dict(state_dict)
        for p in self._parameters():
            for name in MOMENTS:
                self.state[p][name] = self.state[p][name].to(torch.bfloat16)

    def _parameters(self) -> list[torch.Tensor]:
        return [p for group in self.param_groups for p in group["params"]]
