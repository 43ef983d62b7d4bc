"""The U-Net patcher: its border, its size beside every trunk of the paper, and what a picture's result depends on."""

import pytest
import torch

from model.transformer import SIZES, TransformerConfig
from model.transfusion import Transfusion, TransfusionConfig, init_weights
from model.unet import CHANNELS, ResidualBlock, UNetConfig, UNetPatches

SMALL = {1: (8,), 2: (8, 12), 4: (8, 12, 16), 8: (4, 8, 12, 16)}


def patcher(patch_size: int, seed: int = 0) -> UNetPatches:
    config = UNetConfig(channels=SMALL[patch_size], blocks=2, timestep_width=16)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return UNetPatches(10, 3, patch_size, config)


def roundtrip(unet: UNetPatches, latents: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    tokens, skips = unet.encode(latents, timesteps)
    return unet.decode(tokens.flip(1), skips, timesteps, *latents.shape[2:])


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("patch_size", CHANNELS)
def test_p1_it_has_270_million_parameters_within_a_twentieth_beside_every_trunk(name: str, patch_size: int) -> None:
    with torch.device("meta"):
        unet = UNetPatches(SIZES[name].width, 8, patch_size, UNetConfig())
    assert sum(p.numel() for p in unet.parameters()) == pytest.approx(0.27e9, rel=0.05)


@pytest.mark.parametrize("patch_size", SMALL)
@pytest.mark.parametrize("grid", [(8, 8), (16, 8), (8, 40)])
@torch.no_grad()
def test_any_grid_becomes_a_token_a_patch_and_comes_back(patch_size: int, grid: tuple[int, int]) -> None:
    unet = patcher(patch_size)
    latents = torch.randn(2, 3, *grid, generator=torch.Generator().manual_seed(1))
    tokens, skips = unet.encode(latents, torch.tensor([3, 900]))
    assert tokens.shape == (2, grid[0] * grid[1] // patch_size**2, 10)
    assert len(skips) == 2 * len(SMALL[patch_size])
    result = unet.decode(tokens, skips, torch.tensor([3, 900]), *grid)
    assert result.shape == latents.shape and result.is_contiguous()


@torch.no_grad()
def test_tokens_run_row_by_row() -> None:
    """Far from a change of the picture its tokens stay: those that move lie around its row and column."""
    unet, timesteps = patcher(2), torch.tensor([10])
    latents = torch.zeros(1, 3, 64, 32)
    changed = latents.clone()
    changed[:, :, 40, 6] = 5.0
    difference = unet.encode(changed, timesteps)[0] - unet.encode(latents, timesteps)[0]
    moved = difference.abs().sum(-1).view(32, 16)
    row, column = divmod(int(moved.argmax()), 16)
    assert abs(row - 20) <= 1 and abs(column - 3) <= 1
    assert moved[:6].max() == 0 and moved[:, 14:].max() == 0


@torch.no_grad()
def test_a_picture_is_its_own_whatever_stands_beside_it() -> None:
    unet = patcher(4)
    latents, timesteps = torch.randn(3, 3, 8, 16), torch.tensor([0, 500, 999])
    one = roundtrip(unet, latents, timesteps)
    other = roundtrip(unet, torch.stack([latents[0], *torch.randn(2, 3, 8, 16)]), torch.tensor([0, 7, 8]))
    assert torch.equal(one[0], other[0])
    alone = roundtrip(unet, latents[:1], timesteps[:1])
    assert torch.allclose(one[0], alone[0], atol=1e-5)


@torch.no_grad()
def test_the_timestep_reaches_tokens_and_prediction() -> None:
    unet, latents = patcher(2), torch.randn(1, 3, 8, 8)
    early, late = (unet.encode(latents, torch.tensor([t])) for t in (10, 800))
    assert not torch.allclose(early[0], late[0], atol=1e-3)
    results = [unet.decode(early[0], early[1], torch.tensor([t]), 8, 8) for t in (10, 800)]
    assert not torch.allclose(*results, atol=1e-3)


def test_blocks_start_as_what_they_get_and_learn_all_the_same() -> None:
    """Ours: a block's last convolution starts at zero, so the whole starts shallow."""
    config = TransfusionConfig(
        transformer=TransformerConfig(width=16, layers=1, heads=2),
        patches="unet",
        unet=UNetConfig(channels=(8, 12), blocks=1, timestep_width=16),
        latent_channels=3,
    )
    model = Transfusion(config, 11)
    init_weights(model, 0)
    blocks = [module for module in model.modules() if isinstance(module, ResidualBlock)]
    x, time = torch.randn(2, 8, 4, 4), torch.randn(2, 16)
    assert torch.equal(blocks[0](x, time), x)
    block_out = blocks[0].conv_out.weight
    (model.patches.encode(torch.randn(2, 3, 4, 4), torch.tensor([1, 2]))[0].square().sum()).backward()
    assert block_out.grad.abs().max() > 0


def test_what_halvings_do_not_make_is_refused() -> None:
    trunk = TransformerConfig(width=16, layers=1, heads=2)
    for changes, words in [
        ({"patch_size": 3}, "patch_size=3"),
        ({"patch_size": 4, "unet": UNetConfig(channels=(8, 8))}, "patch_size=4"),
        ({"timestep_after_patches": True}, "timestep_after_patches=true"),
    ]:
        with pytest.raises(ValueError, match=words):
            TransfusionConfig(transformer=trunk, patches="unet", **changes)
    with pytest.raises(ValueError, match=r"unet\.blocks=0"):
        UNetConfig(blocks=0)
