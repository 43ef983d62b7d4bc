"""Intervals: of shares, and of held-out losses, whose documents are summed one by one, then drawn again."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.arrangement import OrderConfig
from data.dataset import open_data
from data.layout import IGNORE
from data.loader import Loader
from data.packing import PackedBatch
from data.tokenizer import Tokenizer
from model.diffusion import DiffusionConfig
from model.transformer import TransformerConfig
from model.transfusion import Transfusion, TransfusionConfig, init_weights
from tests.sources import data_config
from train.evaluation.loss_intervals import by_document, intervals, of_documents
from train.evaluation.scores import Z, share
from train.step import StepLoss, latent_stats, micro_step

MODEL = TransfusionConfig(
    transformer=TransformerConfig(width=16, layers=1, heads=2, ffn_multiple_of=8), latent_channels=2
)


def _alone(batch: PackedBatch, chosen: torch.Tensor) -> PackedBatch:
    """Keep the text targets in `chosen` bool [B, S] only."""
    kept = chosen.flatten()[batch.text_target_index]
    return replace(batch, text_targets=torch.where(kept, batch.text_targets, IGNORE))


def test_each_documents_losses_are_what_it_adds_to_the_batchs(tokenizer: Tokenizer, sources: dict[str, Path]) -> None:
    config = data_config(tokenizer, sources, lanes=4, sequence_length=96, order=OrderConfig(caption_first=0.5))
    data = open_data(config, 3, MODEL.patch_size)
    loader = Loader(data, config, rank=0, world_size=1, micro_batch_size=4)
    batch = by_document(loader.next(30).micro_batches[0])
    loader.close()
    model = Transfusion(MODEL, data.tokenizer.vocab_size)
    init_weights(model, 5)

    def run(of: PackedBatch) -> StepLoss:
        given: dict[str, Any] = {"stats": latent_stats(data.latent_spec, 2, torch.device("cpu"))}
        given |= {"diffusion": DiffusionConfig(), "image_weight": 5.0, "global_text_targets": 1, "global_images": 1}
        return micro_step(model, of, **given)

    loss = run(batch)
    found = of_documents(batch, loss, MODEL.patch_size)
    assert found[:, 1].sum() == batch.num_text_targets and found[:, 3].sum() == batch.num_images > 2
    assert found[:, 0].sum() == pytest.approx(loss.text_nll.item(), rel=1e-5)
    assert found[:, 2].sum() == pytest.approx(loss.image_error.item(), rel=1e-5)
    documents = [
        number for number in batch.group_ids.unique().tolist() if batch.document_ids[batch.group_ids == number][0]
    ]
    assert len(documents) == len(found) > 8
    for number, (nll, targets, *_) in list(zip(documents, found.tolist(), strict=True))[::4]:
        alone = _alone(batch, batch.group_ids == number)
        assert run(alone).text_nll.item() == pytest.approx(nll, rel=1e-5)
        assert (alone.text_targets != IGNORE).sum() == targets


def test_the_intervals_hold_the_mean_of_the_population_as_often_as_they_say() -> None:
    """Of documents of uneven lengths whose mean loss is 2 and images of loss 0.5."""
    random, inside = np.random.default_rng(0), np.zeros(2)
    for _ in range(60):
        lengths = random.integers(5, 50, size=80)
        text = np.stack([lengths * random.normal(2.0, 0.5, size=80), lengths, np.zeros(80), np.zeros(80)], axis=1)
        images = np.stack([np.zeros(40), np.zeros(40), random.exponential(0.5, size=40), np.ones(40)], axis=1)
        found = intervals({"caption_first": np.concatenate([text, images])}, torch.zeros(3, 6))
        assert found.keys() == {"text_loss", "image_loss", "perplexity"}
        inside += [low < mean < high for mean, (low, high) in zip((2.0, 0.5), found.values(), strict=False)]
        assert found["perplexity"] == pytest.approx(tuple(np.exp(found["text_loss"])))
    assert (inside / 60 > 0.85).all() and (inside < 60).all(), inside


def test_the_order_of_documents_does_not_change_an_interval_and_one_document_has_none() -> None:
    documents = np.random.default_rng(0).random((50, 4)) + 0.5
    x0_errors = torch.tensor([[5.0] * 6, [10.0] * 6, [5.0] * 6], dtype=torch.float64)  # of mean 0.5 and variance 0.28
    one, other = (intervals({"caption_first": of}, x0_errors) for of in (documents, documents[::-1]))
    assert one == other and one["x0_error"] == pytest.approx((0.5 - 0.1333, 0.5 + 0.1333), abs=1e-3)
    assert intervals({"caption_first": documents[:1]}, torch.zeros(3, 6)) == {}


@pytest.mark.parametrize(("right", "of"), [(0, 10), (3, 10), (97, 100), (200, 200)])
def test_both_ends_of_an_interval_are_the_shares_that_lie_z_deviations_away(right: int, of: int) -> None:
    """Wilson's definition: (p - share)^2 = z^2 p (1 - p) / n."""
    score = share(right, of)
    low, high = score.low, score.high
    for end in (low, high):
        assert (end - right / of) ** 2 == pytest.approx(Z**2 * end * (1 - end) / of, abs=1e-12)
    assert low <= right / of <= high and high - low < 2 * Z * math.sqrt(0.25 / of)
