"""The discriminator sees patches of 70 pixels, judges each picture by itself, and learns to tell real from blurred."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from data.pictures import to_unit
from data.scenes import make_splits, training_example
from model.discriminator import SMALLEST_PICTURE, PatchDiscriminator, generator_loss, hinge_loss
from train.optim.guard import GuardConfig
from train.optim.optimizer import OptimConfig, Optimizer


def discriminator(channels: int = 8) -> PatchDiscriminator:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return PatchDiscriminator(channels)


def scenes(first: int, count: int) -> Tensor:
    splits = make_splits(0)
    drawn = [training_example(splits, index, 32, 0.15).picture for index in range(first, first + count)]
    return torch.from_numpy(to_unit(np.stack(drawn)))


def blurred(pictures: Tensor) -> Tensor:
    return functional.avg_pool2d(pictures, kernel_size=5, stride=1, padding=2, count_include_pad=False)


def test_a_score_looks_at_70_pixels_a_side() -> None:
    """By the gradient of one score, with the norms out of the way: their statistics are those of the picture."""
    network = discriminator()
    for index, layer in enumerate(network.layers):
        if isinstance(layer, nn.GroupNorm):
            network.layers[index] = nn.Identity()
    pixels = torch.randn(1, 3, 128, 128, requires_grad=True)
    network(pixels)[0, 0, 7, 7].backward()
    for axis in (2, 3):
        reached = pixels.grad.abs().sum(dim=[d for d in range(4) if d != axis]).nonzero()
        assert reached.max() - reached.min() + 1 == 70


def test_it_is_the_papers_network_but_for_the_norm() -> None:
    """Isola et al., C64-C128-C256-C512 and one score; with as many parameters: batch norms have as many."""
    network = PatchDiscriminator()
    widths = [
        (layer.in_channels, layer.out_channels, layer.stride) for layer in network.layers if hasattr(layer, "stride")
    ]
    assert widths == [(3, 64, (2, 2)), (64, 128, (2, 2)), (128, 256, (2, 2)), (256, 512, (1, 1)), (512, 1, (1, 1))]
    assert sum(parameter.numel() for parameter in network.parameters()) == 2_765_633
    assert network.layers[0].weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert network(torch.zeros(2, 3, 256, 256)).shape == (2, 1, 30, 30)


def test_the_smallest_picture_leaves_one_score() -> None:
    network = discriminator()
    assert network(torch.zeros(1, 3, SMALLEST_PICTURE, SMALLEST_PICTURE)).shape == (1, 1, 1, 1)
    with pytest.raises(RuntimeError):
        network(torch.zeros(1, 3, SMALLEST_PICTURE - 1, SMALLEST_PICTURE - 1))


def test_a_score_does_not_depend_on_what_else_is_in_the_batch() -> None:
    network, pictures = discriminator(), scenes(0, 3)
    among = network(torch.cat([pictures, 100 * torch.randn(2, 3, 32, 32)]))[:3]
    alone = torch.cat([network(picture[None]) for picture in pictures])
    torch.testing.assert_close(among, alone, rtol=1e-4, atol=1e-5)


def test_the_losses_are_hinges_with_a_margin_of_one() -> None:
    real, fake = torch.tensor([0.0, 2.0, -1.0]), torch.tensor([0.0, -3.0, 1.0])
    assert hinge_loss(real, fake).item() == pytest.approx(0.5 * ((1 + 0 + 2) / 3 + (1 + 0 + 2) / 3))
    assert hinge_loss(torch.full((4,), 1.5), torch.full((4,), -1.0)) == 0
    assert generator_loss(fake).item() == pytest.approx(2 / 3)


def test_it_tells_real_from_blurred_after_a_few_steps() -> None:
    """Each held-out picture from its own blur; and along its verdict's gradient a blurred picture gets realer to it."""
    network, pictures = discriminator(16), scenes(0, 96)
    config = OptimConfig(learning_rate=2e-3, warmup_steps=2, steps=1000, weight_decay=0.0)
    optimizer = Optimizer(network, config, GuardConfig())
    for step in range(1, 61):
        real = pictures[torch.arange(16 * step, 16 * step + 16) % len(pictures)]
        hinge_loss(network(real), network(blurred(real))).backward()
        optimizer.update(step)
    heldout = scenes(1000, 32)
    made = blurred(heldout).requires_grad_()
    real_scores, fake_scores = (network(pictures).mean(dim=(1, 2, 3)) for pictures in (heldout, made))
    assert (real_scores > fake_scores).float().mean() >= 0.95 and real_scores.mean() > 0 > fake_scores.mean()
    generator_loss(fake_scores).backward()
    assert network(made - 0.1 * made.grad.sign()).mean() > fake_scores.mean() + 0.1
