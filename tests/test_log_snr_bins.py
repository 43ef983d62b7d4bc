"""One unit of image error: the same for every prediction of the same x0, in bins that no config moves."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from data.arrangement import OrderConfig
from data.dataset import DataSet, open_data
from data.loader import Loader
from data.packing import PackedBatch
from data.tokenizer import Tokenizer
from model.diffusion import DiffusionConfig, add_noise, eps_of, to_x0_and_eps, training_target, x0_error_factor
from model.log_snr_bins import BINS, EDGES, mean_by_bin, mean_over_bins, sum_by_bin
from model.losses import noise_error
from model.schedule import NoiseSchedule
from model.transformer import TransformerConfig
from model.transfusion import Transfusion, TransfusionConfig, TransfusionOutput, init_weights
from tests.sources import data_config
from train.step import StepLoss, latent_stats, micro_step, noised_images

TRUNK = TransformerConfig(width=24, layers=1, heads=2, ffn_multiple_of=8)
MODEL = TransfusionConfig(transformer=TRUNK, latent_channels=2)
CONFIGS = [DiffusionConfig(prediction=prediction) for prediction in ("eps", "v", "x0")]
CONFIGS += [DiffusionConfig(prediction=prediction, schedule="flow") for prediction in ("v", "x0")]
CONFIGS += [DiffusionConfig(prediction="v", schedule="linear", shift=2.0, zero_terminal_snr=True)]


def test_a_bin_holds_its_lower_edge_and_what_is_beyond_all_or_not_valid_counts_nowhere() -> None:
    """Not even if it is infinite, as the factor of pure noise is."""
    log_snr = [-math.inf, -6.1, -6.0, -4.001, -4.0, 0.0, 5.999, 6.0, math.inf, 1.0, 1.5]
    errors = torch.tensor([math.inf, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, math.nan, math.nan, 0.5])
    valid = torch.tensor([True] * 9 + [False, True])
    sums = sum_by_bin(errors, torch.tensor(log_snr, dtype=torch.float64), valid)
    assert BINS == ("-6..-4", "-4..-2", "-2..0", "0..2", "2..4", "4..6")
    squares = [20.0, 64.0, 0.0, 256.25, 0.0, 1024.0]
    assert sums.tolist() == [[6.0, 8.0, 0.0, 16.5, 0.0, 32.0], [2, 1, 0, 2, 0, 1], squares]


def test_the_mean_over_bins_counts_each_alike_and_is_none_if_one_is_empty() -> None:
    sums = torch.tensor([[2.0, 8.0, 3.0, 4.0, 5.0, 6.0], [4, 1, 3, 1, 1, 1], [0] * 6])
    assert mean_by_bin(sums) == [0.5, 8.0, 1.0, 4.0, 5.0, 6.0]
    assert mean_over_bins(mean_by_bin(sums)) == pytest.approx(24.5 / 6)
    assert mean_over_bins(mean_by_bin(sums * torch.tensor([1, 0, 1, 1, 1, 1]))) is None


def test_predictions_of_the_same_x0_have_the_same_x0_error() -> None:
    """Any guess of x0, told as noise, v or x0 of any schedule, within 1e-5 at all levels of the bins."""
    log_snr = torch.linspace(EDGES[0], EDGES[-1], 97, dtype=torch.float64)
    x0, noise, guess = torch.randn(3, 97, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    expected = (guess - x0).square().flatten(1).mean(1).double()
    for config in CONFIGS:
        schedule = NoiseSchedule.of(config, 32)
        level = schedule.levels(schedule.nearest(log_snr))
        implied = eps_of(guess, add_noise(x0, noise, level), level)
        pred, target = training_target(guess, implied, level, config), training_target(x0, noise, level, config)
        *_, each = noise_error(pred, target, torch.ones(97).bool())
        assert torch.allclose(each * x0_error_factor(level, config), expected, rtol=1e-5), config


@pytest.fixture(scope="module")
def read(tokenizer: Tokenizer, sources: dict[str, Path]) -> tuple[DataSet, list[PackedBatch]]:
    config = data_config(tokenizer, sources, lanes=4, sequence_length=96, order=OrderConfig(caption_first=0.5))
    data = open_data(config, 3, MODEL.patch_size)
    loader = Loader(data, config, rank=0, world_size=1, micro_batch_size=2)
    batches = [batch for _ in range(12) for batch in loader.next(30).micro_batches]
    loader.close()
    return data, batches


def _run(read: Any, diffusion: DiffusionConfig, **settings: Any) -> tuple[StepLoss, torch.Tensor]:
    """Return all batches' losses, and the x0 errors as an oracle sums them: each image's own x0, binned by a loop."""
    data, batches = read
    model, outputs = Transfusion(MODEL, data.tokenizer.vocab_size), []
    init_weights(model, 5)
    model.register_forward_hook(lambda _, __, output: outputs.append(output))
    stats, schedule = latent_stats(data.latent_spec, 2, torch.device("cpu")), NoiseSchedule.of(diffusion, 32)
    found, slow = [], torch.zeros(2, len(BINS), dtype=torch.float64)
    for batch in batches:
        given: dict[str, Any] = {"stats": stats, "image_weight": 5.0}
        given |= {"global_text_targets": 9, "global_images": 3}
        found.append(micro_step(model, batch, diffusion=diffusion, **given, **settings))
        output: TransfusionOutput = outputs.pop()
        noisy, timesteps, *_ = noised_images(batch, stats, diffusion, MODEL, **settings)
        for grid, images in batch.images.items():
            level = schedule.levels(timesteps[grid])
            x0, _ = to_x0_and_eps(output.noise_pred[grid], noisy[grid], level, diffusion)
            moments = images.stored.float()
            latents = moments[:, :2] + torch.exp(moments[:, 2:] / 2) * images.posterior_noise
            for i in range(images.num_valid):
                log_snr = 2 * math.log(level.signal[i] / level.sigma[i])
                for number, low in enumerate(EDGES[:-1]):
                    if low <= log_snr < low + 2:
                        slow[0, number] += (x0[i] - stats.whiten(latents[[i]])[0]).square().mean().item()
                        slow[1, number] += 1
    total = StepLoss(*(sum(getattr(loss, name) for loss in found) for name in vars(found[0])))
    return total, slow


WEIGHED = [replace(CONFIGS[0], min_snr_gamma=1.0), replace(CONFIGS[2], loss="v"), replace(CONFIGS[3], loss="x0")]


@pytest.mark.parametrize("config", [CONFIGS[1], *WEIGHED], ids=["v", "eps", "x0", "flow"])
def test_training_sums_the_x0_errors_of_its_images(read: Any, config: DiffusionConfig) -> None:
    """Equal to an oracle that goes from each prediction to x0 and compares; the loss's weights do not matter."""
    loss, slow = _run(read, config)
    assert torch.equal(loss.x0_errors[1], slow[1]) and slow[1].min() > 0 and not loss.x0_errors.requires_grad
    assert torch.allclose(loss.x0_errors[0], slow[0], rtol=1e-4)


def test_at_uniform_log_snr_an_image_has_its_level_whatever_the_config_says(read: Any) -> None:
    """Its u says which, on any schedule: exactly for flow, else at the nearest timestep."""
    by_u = torch.zeros(len(BINS))
    for images in (images for batch in read[1] for images in batch.images.values()):
        by_u += torch.bincount((images.u[: images.num_valid] * len(BINS)).int(), minlength=len(BINS))
    settings = DiffusionConfig(timestep_sampling="logit_normal", logit_normal_mean=3.0, before_caption_max_timestep=0)
    for diffusion, apart in ((settings, 1), (replace(settings, schedule="flow", prediction="v", shift=3.0), 0)):
        loss, slow = _run(read, diffusion, uniform_log_snr=True)
        assert torch.allclose(loss.x0_errors[0], slow[0], rtol=1e-4)
        assert (loss.x0_errors[1] - by_u).abs().max() <= apart  # the nearest timestep may lie beyond an edge
