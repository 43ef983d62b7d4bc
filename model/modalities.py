"""Text tokens and image tokens under weights of their own (`model.untied`): sorted once, multiplied side by side.

Attention needs tokens in their order, everything else only their kind. So the residual stream is sorted, text first,
once per forward; each layer's product is two products, one per modality, into the halves of one output. Its shapes are
static whatever the split, so compiled blocks never recompile, and the split is a number on the host, so nothing waits
for a device (Liang et al. 2024, Mixture-of-Transformers, arXiv:2411.04996).
Rejected: torch._grouped_mm, which wants both weights stacked (they are separate parameters, so that either may be
frozen, and a copy costs as much memory traffic as the product), aligned sizes, bfloat16 and one generation of GPUs;
two products of dynamic sizes in the graph, which recompile for an empty modality; a mixture's masks, which compute
both products for every token.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.linear import Linear, product

Untied = Literal["none", "ffn", "all"]
Modality = Literal["text", "image"]


def text_name(name: str) -> str:
    """Return the name of text's own part in the place of images' part `name`; of any other parameter, its name."""
    return name.replace(".image.", ".").replace(".image_norm.", ".norm.")


class Modalities:
    """Which tokens of a batch are images', and the order in which text comes first.

    A plain class on purpose, like RotaryTables: FSDP2 would move `num_text` to the device.
    """

    __slots__ = ("is_image", "num_text", "order", "place", "shape", "sizes")

    def __init__(self, is_image: Tensor, num_text: int | None = None) -> None:
        """Sort the tokens of `is_image` bool [B, S]; without `num_text`, their number is read from the device."""
        flat = is_image.flatten()
        if num_text is None:
            num_text = len(flat) - int(flat.sum())
        self.shape = is_image.shape
        self.sizes = (num_text, len(flat) - num_text)
        self.num_text = torch.tensor(num_text)  # on the host: the sizes for compiled blocks, which must not know them
        self.order = flat.to(torch.uint8).argsort(stable=True)  # int64 [B * S], which token is where
        self.place = torch.empty_like(self.order)  # its inverse: where each token is
        self.place.scatter_(0, self.order, torch.arange(len(flat), device=flat.device))
        self.is_image = flat.index_select(0, self.order)  # bool [B * S], of the sorted tokens

    def sort(self, x: Tensor) -> Tensor:
        """Return [1, B * S, ...] of x [B, S, ...]."""
        return _Permute.apply(x.flatten(0, 1), self.order, self.place)[None]

    def unsort(self, x: Tensor) -> Tensor:
        """Return [B, S, ...] of x [1, B * S, ...]."""
        return _Permute.apply(x[0], self.place, self.order).unflatten(0, self.shape)


class _Permute(torch.autograd.Function):
    """x[order]; its gradient is a gather too, where that of index_select would add up atomically."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None


def norm_pair(text: nn.RMSNorm, image: nn.RMSNorm, x: Tensor, modalities: Modalities) -> Tensor:
    """Return [1, N, ..., D] of sorted x [1, N, ..., D], normalised with the weight of each token's modality."""
    if torch.compiler.is_compiling():
        is_image = modalities.is_image.view(1, -1, *[1] * (x.ndim - 2))
        return F.rms_norm(x, (x.shape[-1],), None, text.eps) * torch.where(is_image, image.weight, text.weight)
    of_text, of_image = x.split(modalities.sizes, dim=1)
    return torch.cat((text(of_text), image(of_image)), dim=1)


def linear_pair(text: Linear, image: Linear, x: Tensor, modalities: Modalities) -> Tensor:
    """Return [1, N, outputs] of sorted x [1, N, inputs], multiplied by the weight of each token's modality."""
    split = modalities.num_text
    y = _TwoProducts.apply(x[0], text.weight, image.weight, split)[None]
    if text.bias is not None and image.bias is not None:
        y = y + torch.where(modalities.is_image[:, None], image.bias, text.bias)
    if text.lora_a is not None and image.lora_a is not None:
        assert text.lora_b is not None and image.lora_b is not None
        low = _TwoProducts.apply(x[0], text.lora_a, image.lora_a, split) * text.lora_scale
        return y + _TwoProducts.apply(low, text.lora_b, image.lora_b, split)
    for layer, rows in ((text, ~modalities.is_image), (image, modalities.is_image)):
        if layer.lora_a is not None:  # of one modality alone: its product with all tokens has static shapes
            y = y + layer.adapted(x, rows)
    return y


@torch.library.custom_op("transfusion::two_products", mutates_args=())
def two_products(x: Tensor, first: Tensor, second: Tensor, split: Tensor) -> Tensor:
    """Return x[:split] @ first.T above x[split:] @ second.T [N, outputs]; x [N, inputs], `split` an int on the host."""
    out = x.new_empty(len(x), len(first))
    for rows, weight, to in zip(_split(x, split), (first, second), _split(out, split), strict=True):
        if len(rows):
            product(rows, weight, out=to)
    return out


@two_products.register_fake
def _(x: Tensor, first: Tensor, second: Tensor, split: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], first.shape[0])


@torch.library.custom_op("transfusion::weight_gradient", mutates_args=())
def weight_gradient(grad: Tensor, x: Tensor, split: Tensor, number: int) -> Tensor:
    """Return the gradient [outputs, inputs] of the first or the second (`number` 0 or 1) weight of `two_products`."""
    rows, above = _split(x, split)[number], _split(grad, split)[number]
    widens = grad.shape[1] >= x.shape[1]  # as in model/linear.py
    return above.T @ rows if widens else (rows.T @ above).T.contiguous()


@weight_gradient.register_fake
def _(grad: Tensor, x: Tensor, split: Tensor, number: int) -> Tensor:
    return x.new_empty(grad.shape[1], x.shape[1])


class _TwoProducts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, first: Tensor, second: Tensor, split: Tensor) -> Tensor:
        ctx.save_for_backward(x if any(ctx.needs_input_grad[1:3]) else None, first, second, split)
        return two_products(x, first, second, split)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, first, second, split = ctx.saved_tensors
        grad = grad.contiguous()
        of_x = two_products(grad, first.T, second.T, split) if ctx.needs_input_grad[0] else None
        of_weights = [weight_gradient(grad, x, split, i) if ctx.needs_input_grad[1 + i] else None for i in (0, 1)]
        return of_x, *of_weights, None


def _split(x: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    number = int(at)
    return x[:number], x[number:]
