"""FLOPs are those of the real model, counted by torch, and of the mask that it runs under (P9)."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model.attention import dense_mask
from model.transformer import TransformerConfig
from model.transfusion import Transfusion, TransfusionConfig
from model.unet import UNetConfig
from train.flops import Flops

TRUNK = TransformerConfig(width=32, layers=3, heads=4)


def counted(run) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("kv_heads", [None, 2])
def test_flops_are_those_that_torch_counts(kv_heads: int | None) -> None:
    """The blocks' matrices, attention over the pairs of a full mask and the text head, times three for training."""
    config = TransfusionConfig(transformer=TransformerConfig(width=32, layers=3, heads=4, kv_heads=kv_heads))
    model, tokens, flops = Transfusion(config, 50).double(), 24, Flops.of(config, 50)
    h = torch.zeros(1, tokens, 32, dtype=torch.float64)
    no_grid = torch.full((1, tokens, 2), -1)
    trunk = counted(lambda: model.trunk(h, torch.arange(tokens)[None], no_grid, None))
    assert 3 * trunk == flops.per_token * tokens + flops.per_pair * tokens**2
    assert 3 * counted(lambda: model.text_logits(h)) == flops.per_text_target * tokens


@pytest.mark.parametrize(
    "settings",
    [
        {"patch_size": 2},
        {"patch_size": 8},
        {"patches": "unet", "patch_size": 1, "unet": UNetConfig(channels=(12,), blocks=2)},
        {"patches": "unet", "patch_size": 4, "unet": UNetConfig(channels=(8, 12, 20), blocks=3)},
    ],
)
def test_patchers_flops_are_those_that_torch_counts_but_for_the_timestep(settings: dict) -> None:
    config = TransfusionConfig(transformer=TRUNK, latent_channels=5, **settings)
    model, grid = Transfusion(config, 50), (16, 24)
    latents, timesteps = torch.zeros(2, 5, *grid), torch.tensor([1, 2])

    def run() -> None:
        tokens, skips = model.embed_images(latents, timesteps)
        model.predict_noise(tokens, skips, timesteps, *grid)

    of_time = [module for name, module in model.patches.named_modules() if name.split(".")[-1] in ("time", "timestep")]
    embedding = sum(2 * 2 * p.numel() for module in of_time for p in module.parameters() if p.ndim == 2)
    halves = 2 if config.patches == "unet" else 1  # both halves of the U-Net embed the timestep
    embedding += (halves - 1) * sum(2 * 2 * p.numel() for p in model.patches.timestep.parameters() if p.ndim == 2)
    exact = counted(run) - embedding
    assert 3 * exact == pytest.approx(Flops.of(config, 50).per_latent_cell * 2 * grid[0] * grid[1], rel=1e-9)


@pytest.mark.parametrize("image_attention", ["bidirectional", "causal"])
def test_pairs_are_those_of_the_mask_that_the_model_runs_under(image_attention: str) -> None:
    config = TransfusionConfig(transformer=TRUNK, latent_channels=5, image_attention=image_attention)
    image_ids = torch.full((1, 20), -1)
    image_ids[0, 3:7], image_ids[0, 9:17] = 0, 1
    seen = image_ids if image_attention == "bidirectional" else torch.full_like(image_ids, -1)
    whole = 20 * 21 // 2 + 4 * 3 // 2 + 8 * 7 // 2  # as data/packing.py counts
    batch = SimpleNamespace(
        input_ids=torch.zeros(1, 20),
        num_padding=0,
        num_text_targets=0,
        num_attention_pairs=whole,
        images={(4, 4): SimpleNamespace(num_valid=1), (4, 8): SimpleNamespace(num_valid=1)},
    )
    flops = Flops.of(config, 50)
    others = flops.per_token * 20 + flops.per_latent_cell * (16 + 32)
    pairs = int(dense_mask(torch.ones_like(seen), seen, torch.full_like(seen, 20)).sum())
    assert flops.of_batch(batch) == (flops.per_pair * pairs + others, 0)
