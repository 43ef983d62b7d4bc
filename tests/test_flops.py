"""FLOPs are those of the real model, counted by torch, and of the mask that it runs under (P9)."""

from fnmatch import fnmatchcase
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bench.step import backward, sharded_model
from data.largest_batch import largest_batches
from data.packing import PackedBatch
from model import linear
from model.attention import dense_mask
from model.lora import LoraConfig
from model.losses import linear_cross_entropy
from model.modalities import Modalities
from model.transformer import TransformerConfig
from model.transfusion import Transfusion, TransfusionConfig
from model.unet import UNetConfig
from tests.ranks import run_ranks
from train.distributed.parallelize import ParallelConfig
from train.distributed.ranks import Ranks
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


LORA = LoraConfig(rank=2)
BELOW = ("text_*", "patches.*", "transformer.blocks.[01].*")
TEXT = ("text_*", "transformer.blocks.?.[af]*", "transformer.norm.*")  # all of it with untied=all
TRAINED = {  # settings of the model, and patterns of frozen parameters
    "adapters": ({"lora": LORA}, ("text_*", "transformer.*weight")),
    "adapters of untied": ({"lora": LORA, "untied": "ffn"}, ("text_*", "transformer.*weight")),
    "patches": ({"tied_embeddings": True}, ("text_*", "transformer.*")),
    "upper layers": ({}, BELOW),
    "images": ({"untied": "all"}, TEXT),
    "images' ffn": ({"untied": "ffn"}, TEXT),
    "norms": ({}, ("text_*", "patches.*", "transformer.blocks.?.attention.*", "transformer.blocks.?.ffn.*")),
}


def _two_products(x: Tensor, first: Tensor, *_: Any, out_val: Tensor) -> int:
    return 2 * x.shape[0] * first.numel()


def _weight_gradient(grad: Tensor, x: Tensor, split: Tensor, number: int, out_val: Tensor) -> int:
    return 2 * out_val.numel() * (int(split), len(x) - int(split))[number]


_two_products._get_raw = _weight_gradient._get_raw = True  # called with tensors, not with shapes
OURS = {torch.ops.transfusion.two_products: _two_products, torch.ops.transfusion.weight_gradient: _weight_gradient}


@pytest.mark.parametrize("name", TRAINED)
def test_flops_of_partly_frozen_models_are_those_that_torch_counts(name: str) -> None:
    """Forward and backward; no gradient passes below the first trained parameter, none is made of a frozen one."""
    settings, frozen = TRAINED[name]
    trunk = TransformerConfig(width=32, layers=3, heads=4, head_dim=12, kv_heads=2)
    model = Transfusion(TransfusionConfig(transformer=trunk, **settings), 50).double()
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(not any(fnmatchcase(key, pattern) for pattern in frozen))
    tokens, patches = 24, 10
    is_image = torch.arange(tokens)[None] % 24 < patches
    flops, modalities = Flops.of_model(model), Modalities(is_image) if model.config.untied != "none" else None
    needed = any(p.requires_grad for p in [*model.patches.parameters(), model.text_embedding.weight])
    h = torch.zeros(1, tokens, 32, dtype=torch.float64, requires_grad=needed)
    position_ids, no_grid = torch.arange(tokens)[None], torch.full((1, tokens, 2), -1)
    with FlopCounterMode(display=False, custom_mapping=OURS) as counter, sdpa_kernel(SDPBackend.MATH):
        hidden = model.trunk(h, position_ids, no_grid, None, None, modalities)
        hidden.sum().backward()
    assert counter.get_total_flops() == (
        flops.per_token * tokens + flops.more_per_patch * patches + flops.per_pair * tokens**2
    )
    hidden, targets = hidden.detach().requires_grad_()[0], torch.zeros(tokens, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        linear_cross_entropy(hidden, model.head_weight, targets)[0].backward()
    assert counter.get_total_flops() == flops.per_text_target * tokens


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
        images={grid: SimpleNamespace(num_valid=1, is_target=torch.ones(1)) for grid in ((4, 4), (4, 8))},
    )
    flops = Flops.of(config, 50)
    others = flops.per_token * 20 + flops.per_latent_cell * (16 + 32)
    pairs = int(dense_mask(torch.ones_like(seen), seen, torch.full_like(seen, 20)).sum())
    assert flops.of_batch(batch) == (flops.per_pair * pairs + others, 0)


def _products(ranks: Ranks, of: TransfusionConfig, batch: PackedBatch) -> dict[str, tuple[float, float]]:
    """Return the FLOPs of a real step's matrix products and convolutions by kind of activation checkpointing."""
    linear.HAS_ONEDNN, found = False, {}  # in this process alone: the counter knows torch's own products
    for level in ("none", "selective", "full"):
        config = ParallelConfig(dtype="float32", activation_checkpointing=level)
        with FlopCounterMode(display=False) as counter:
            backward(sharded_model(of, 50, ranks, config), [batch], ranks, config, targets=9, images=9)
        counts = counter.get_flop_counts()["Global"]
        found[level] = counts[torch.ops.aten.mm], counts.get(torch.ops.aten.convolution, 0)
    return found


def test_recomputed_flops_are_those_that_a_real_backward_repeats() -> None:
    """Of blocks that are not compiled; tests/test_compile.py has the others. P9."""
    unet = UNetConfig(channels=(8, 12), blocks=2, timestep_width=16)
    of = TransfusionConfig(transformer=TRUNK, latent_channels=2, patches="unet", unet=unet)
    batch = largest_batches(2, 64, [(8, 4)], 2, of.patch_size)[0]
    cells = sum(len(images.u) * grid[0] * grid[1] for grid, images in batch.images.items())
    found = run_ranks(_products, 1, of, batch)[0]
    for level, (products, convolutions) in found.items():
        flops = Flops.of(of, 50, level)
        assert products - found["none"][0] == flops.again_per_token * 2 * 64, level
        assert convolutions - found["none"][1] == flops.again_per_latent_cell * cells, level
