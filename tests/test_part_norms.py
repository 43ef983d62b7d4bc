"""Norms of gradients and updates by part of the model, against whole tensors."""

import pytest
import torch
from torch.nn import Parameter

from train.optim.part_norms import SAMPLE, PartNorms, part_of, part_sizes, sizes

NAMES = {
    "transformer.blocks.0.ffn.down.weight": "trunk",
    "transformer.blocks.0._checkpoint_wrapped_module.ffn_norm.weight": "trunk",
    "transformer.blocks.0.image.ffn.down.weight": "trunk_image",
    "transformer.image_norm.weight": "trunk_image",
    "text_embedding.weight": "embeddings",
    "text_head.weight": "heads",
    "patches.to_latents.weight": "heads",
    "patches.from_latents.weight": "patches",
}


def test_each_parameter_belongs_to_one_part() -> None:
    assert {name: part_of(name) for name in NAMES} == NAMES


def test_norms_by_part_are_those_of_whole_tensors_though_few_weights_of_a_large_one_are_read() -> None:
    """Each of two ranks holds half of a large matrix of small weights, and half of a norm's few large ones."""
    random = torch.Generator().manual_seed(0)
    matrix = 0.02 * torch.randn(40 * SAMPLE, generator=random)
    whole = {"transformer.a.weight": matrix, "transformer.norm.weight": torch.ones(512)}
    grads = {name: torch.randn(len(of), generator=random) for name, of in whole.items()}
    updates = {name: 1e-3 * torch.randn(len(of), generator=random) for name, of in whole.items()}
    expected = [torch.cat([*of.values()]).norm().item() for of in (grads, updates, whole)]
    sums = torch.zeros(4, dtype=torch.float64)
    for rank in range(2):
        parameters = {name: Parameter(of.chunk(2)[rank].clone()) for name, of in whole.items()}
        for name, parameter in parameters.items():
            parameter.grad = grads[name].chunk(2)[rank].clone()
        norms = PartNorms(parameters)
        for name, parameter in parameters.items():
            parameter.data += updates[name].chunk(2)[rank]
            parameter.grad = None
        sums += norms.sums()["trunk"]
    numbers = part_sizes({name: torch.empty(len(of)) for name, of in whole.items()})
    assert numbers == {"trunk": len(matrix) + 512}
    grad_norm, ratio = sizes(sums.tolist(), numbers["trunk"])
    assert grad_norm == pytest.approx(expected[0], rel=1e-3)
    assert ratio == pytest.approx(expected[1] / expected[2], rel=0.02)
    assert sizes([0.0, 10.0, 0.0, 0.0], 10) == (0.0, None)
