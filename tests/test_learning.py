"""Every patcher, patch size, objective and order learns: both losses fall on a few scenes and their captions."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from data.documents import Document, ImageSegment, TextSegment
from data.layout import lay_out
from data.loader import draw_images
from data.packing import collate, pack
from data.scenes import make_splits, training_example
from data.tokenizer import Tokenizer, train_tokenizer
from model.diffusion import DiffusionConfig
from model.latent_space import LatentStats
from model.transformer import TransformerConfig
from model.transfusion import Transfusion, TransfusionConfig, init_weights
from model.unet import UNetConfig
from train.optim.guard import GuardConfig
from train.optim.optimizer import OptimConfig, Optimizer
from train.step import micro_step

STEPS, SCENES, SIDE = 40, 6, 16
UNET_CHANNELS = {1: (32,), 2: (24, 32), 4: (16, 24, 32), 8: (16, 16, 24, 32)}
EXAMPLES = [training_example(make_splits(0), index, SIDE, 0.15) for index in range(SCENES)]


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("words") / "tokenizer.model"
    train_tokenizer((training_example(make_splits(0), i, SIDE, 0.15).caption for i in range(200)), path, 300)
    return Tokenizer(path)


def documents(tokenizer: Tokenizer, order: str) -> list[Document]:
    """Use scenes as latents: their pixels are the mean of a posterior with almost no variance."""
    found = []
    for example in EXAMPLES:
        pixels = example.picture.transpose(2, 0, 1).astype(np.float32) / 127.5 - 1
        moments = np.concatenate([pixels, np.full_like(pixels, -10)]).astype(np.float16)
        image = ImageSegment(moments, before_caption=order == "image first")
        caption = TextSegment(tokenizer.encode(example.caption))
        found.append(Document((caption, image) if order == "caption first" else (image, caption)))
    return found


def losses(
    tokenizer: Tokenizer,
    model: TransfusionConfig,
    diffusion: DiffusionConfig,
    order: str,
    steps: int = STEPS,
    **optim: Any,
) -> np.ndarray:
    """Return (text, image) losses [steps, 2] of training on the same scenes with new noise in every step."""
    pieces = [lay_out(document, tokenizer.special, model.patch_size) for document in documents(tokenizer, order)]
    length = max(map(len, pieces)) * 2
    rows = [pack(pieces[i : i + 2], length, tokenizer.special.pad) for i in range(0, SCENES, 2)]
    network = Transfusion(model, tokenizer.vocab_size)
    init_weights(network, 0)
    recipe = {"learning_rate": 4e-3, "min_learning_rate": 1e-3, "warmup_steps": 5, "weight_decay": 0.0, **optim}
    optimizer = Optimizer(network, OptimConfig(steps=steps, **recipe), GuardConfig())
    stats, found = LatentStats(torch.full((3,), -0.5), torch.full((3,), 0.5)), []
    for step in range(1, steps + 1):
        batch = collate(rows, [draw_images(0, step, lane, row) for lane, row in enumerate(rows)], model.patch_size)
        counts = {"global_text_targets": batch.num_text_targets, "global_images": batch.num_images}
        loss = micro_step(network, batch, stats=stats, diffusion=diffusion, image_weight=5.0, **counts)
        loss.total.backward()
        optimizer.update(step)
        found.append([loss.text_nll.item() / batch.num_text_targets, loss.image_error.item() / batch.num_images])
    return np.array(found)


def config(patches: str = "linear", patch_size: int = 2, **changes) -> TransfusionConfig:
    return TransfusionConfig(
        transformer=TransformerConfig(width=64, layers=2, heads=4),
        patches=patches,
        unet=UNetConfig(channels=UNET_CHANNELS[patch_size], blocks=1, timestep_width=32),
        patch_size=patch_size,
        latent_channels=3,
        **changes,
    )


def assert_both_fall(curve: np.ndarray, image_to: float = 0.85) -> None:
    first, last = curve[:4].mean(0), curve[-8:].mean(0)
    assert last[0] < 0.4 * first[0], f"text: {first[0]:.3f} -> {last[0]:.3f}"
    assert last[1] < image_to * first[1], f"image: {first[1]:.3f} -> {last[1]:.3f}"


@pytest.mark.parametrize("patches", ["linear", "unet"])
@pytest.mark.parametrize("patch_size", [2, 4, *(pytest.param(size, marks=pytest.mark.slow) for size in (1, 8))])
def test_each_patcher_learns_at_each_patch_size(words: Tokenizer, patches: str, patch_size: int) -> None:
    # A linear patch of 8x8x3 numbers does not fit into a width of 64: its noise is learned slowly and only in part.
    slow = patches == "linear" and patch_size == 8
    curve = losses(words, config(patches, patch_size), DiffusionConfig(), "caption first", STEPS * (6 if slow else 1))
    assert_both_fall(curve)


@pytest.mark.parametrize(
    "changes",
    [
        {"prediction": "v"},
        {"prediction": "x0"},
        {"timestep_sampling": "logit_normal"},
        {"prediction": "v", "min_snr_gamma": 5.0},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_each_objective_learns(words: Tokenizer, changes: dict) -> None:
    assert_both_fall(losses(words, config(), replace(DiffusionConfig(), **changes), "caption first"))


@pytest.mark.parametrize("order", ["caption first", "image first"])
@pytest.mark.parametrize("switch", [{}, {"image_attention": "causal"}, {"timestep_after_patches": True}], ids=str)
def test_each_order_learns_with_each_switch(words: Tokenizer, order: str, switch: dict) -> None:
    """Images before their caption only get timesteps up to the cap, where eps is harder to predict."""
    assert_both_fall(losses(words, config(**switch), DiffusionConfig(), order), image_to=0.95)


def test_each_optimizer_learns(words: Tokenizer) -> None:
    """Muon ends lower than AdamW on both losses, at the same rate but at steps of the size that AdamW's have here (with
    0.2 it ends higher); moments in bfloat16 cost neither a hundredth."""

    def ends(**optim: Any) -> np.ndarray:
        curve = losses(words, config(), DiffusionConfig(prediction="v"), "caption first", **optim)
        assert_both_fall(curve)
        return curve[-8:].mean(0)

    muon = {"optimizer": "muon", "muon_update_rms": 0.6}
    with_adamw, with_muon = ends(), ends(**muon)
    assert (with_muon < with_adamw).all()
    assert ends(state_dtype="bfloat16") == pytest.approx(with_adamw, rel=0.01)
    assert ends(state_dtype="bfloat16", **muon) == pytest.approx(with_muon, rel=0.01)
