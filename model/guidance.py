"""How predictions of one picture become one: away from the weaker, and perhaps back to the strongest's contrast."""

import torch
from torch import Tensor


def guided(
    prediction: Tensor,
    weak: Tensor,
    guidance: float,
    rescale: float = 0.0,
    without_texts: Tensor | None = None,
    image_guidance: float | None = None,
) -> Tensor:
    """Return weak + guidance * (prediction - weak), for predictions [N, C, h, w].

    `weak` is that of the same model without a prompt (Ho & Salimans 2021, arXiv:2207.12598) or of a weaker model with
    the same prompt (autoguidance: Karras et al. 2024, arXiv:2406.02507). `without_texts`, that of the same model after
    the prompt's pictures alone, gives these a scale of their own (Brooks et al. 2022, arXiv:2211.09800, equation 3):
    weak + image_guidance * (without_texts - weak) + guidance * (prediction - without_texts).

    A `rescale` of 0...1 is the share of the way to the standard deviation that `prediction` has over all numbers of a
    picture (Lin et al. 2023, arXiv:2305.08891, section 3.4).
    """
    if without_texts is None:
        result = weak + guidance * (prediction - weak)
    else:
        assert image_guidance is not None
        result = weak + image_guidance * (without_texts - weak) + guidance * (prediction - without_texts)
    if rescale == 0:
        return result
    factors = _deviations(prediction) / _deviations(result)
    return rescale * (result * factors) + (1 - rescale) * result


def _deviations(images: Tensor) -> Tensor:
    """Return [N, 1, 1, 1], one image at a time: how CUDA divides a joint reduction, hence its bits, varies with N."""
    return torch.stack([image.std() for image in images])[:, None, None, None]
