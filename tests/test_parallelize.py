"""Parallelism is invisible: the same weights, losses and gradients however the model is wrapped (P3)."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from data.dataset import open_data
from data.loader import Loader
from data.tokenizer import Tokenizer
from model.diffusion import DiffusionConfig
from model.transformer import TransformerConfig
from model.transfusion import Transfusion, TransfusionConfig, init_weights
from model.unet import UNetConfig
from tests.ranks import run_ranks
from tests.sources import data_config
from train.distributed import Ranks
from train.parallelize import ParallelConfig, compute_dtype, gather_weights, initialize, parallelize
from train.step import latent_stats, micro_step

MODEL = TransfusionConfig(
    transformer=TransformerConfig(width=24, layers=3, heads=2, ffn_multiple_of=8, qk_norm=True), latent_channels=2
)
VOCAB = 301  # divisible by no number of ranks


def _initialized(
    ranks: Ranks, config: ParallelConfig, vocab_size: int, of: TransfusionConfig = MODEL
) -> torch.nn.Module:
    with torch.device("meta"):
        model = Transfusion(of, vocab_size)
    parallelize(model, config, ranks)
    initialize(model, 7, ranks.device)
    return model


def _initial_weights(ranks: Ranks) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], float]:
    model = _initialized(ranks, ParallelConfig(activation_checkpointing="full"), VOCAB)
    parameters = dict(model.named_parameters())
    largest = sum(p.to_local().numel() for p in parameters.values()) / sum(p.numel() for p in parameters.values())
    return gather_weights(parameters), gather_weights(parameters, keep=False), largest


def test_initial_weights_are_those_of_the_plain_model_on_any_number_of_ranks() -> None:
    """P3: bit for bit; and each rank holds its share of them, not all."""
    plain = Transfusion(MODEL, VOCAB)
    init_weights(plain, 7)
    expected = dict(plain.named_parameters())
    for world_size in (1, 2, 3):
        for weights, nothing, share in run_ranks(_initial_weights, world_size):
            assert nothing == {} and weights.keys() == expected.keys()
            assert all(torch.equal(weights[name], p) for name, p in expected.items()), world_size
            assert share < 1 / world_size + 0.05


OPTIONS = {
    "plain": {},
    "checkpointing": {"activation_checkpointing": "full"},
    "one unit": {"shard_blocks": False},
    "one unit, checkpointing": {"shard_blocks": False, "activation_checkpointing": "full"},
    "kept": {"reshard_after_forward": False},
    "bfloat16": {"dtype": "bfloat16"},
}


def _step_with(
    ranks: Ranks, options: dict[str, dict], data_settings: Any, of: TransfusionConfig = MODEL
) -> dict[str, tuple[float, dict, set]]:
    """Return, by option, the loss over all ranks, the gradients and the dtypes of weights and gradients."""
    data = open_data(data_settings, 3, MODEL.patch_size)
    found = {}
    for name, changes in options.items():
        model = _initialized(ranks, ParallelConfig(**{"dtype": "float32", **changes}), data.tokenizer.vocab_size, of)
        loader = Loader(data, data_settings, rank=ranks.rank, world_size=ranks.world_size, micro_batch_size=1)
        total = torch.zeros(())
        for micro_batch in loader.next(30).micro_batches:
            loss = micro_step(
                model,
                micro_batch,
                stats=latent_stats(data.latent_spec, 2, ranks.device),
                diffusion=DiffusionConfig(),
                image_weight=5.0,
                global_text_targets=100,
                global_images=10,
            )
            loss.total.backward()
            total += loss.total.detach()
        loader.close()
        torch.distributed.all_reduce(total)
        parameters = dict(model.named_parameters())
        dtypes = {p.dtype for p in parameters.values()} | {p.grad.dtype for p in parameters.values()}
        found[name] = total.item(), gather_weights({n: p.grad for n, p in parameters.items()}), dtypes
    return found


def test_options_change_memory_and_speed_but_not_the_result(
    tokenizer: Tokenizer, pairs_folder: Path, texts_folder: Path
) -> None:
    """Within 1e-6 in float32; bfloat16 is close, and its weights and gradient sums are float32."""
    settings = data_config(tokenizer, {"pairs": pairs_folder, "texts": texts_folder}, lanes=4, sequence_length=64)
    found = run_ranks(_step_with, 2, OPTIONS, settings)[0]
    loss, grads, _ = found["plain"]
    assert all(grad.any() for grad in grads.values())
    for name, (other, other_grads, dtypes) in found.items():
        tolerance = 0.1 if name == "bfloat16" else 1e-6
        assert dtypes == {torch.float32}
        assert other == pytest.approx(loss, rel=min(tolerance, 0.01)), name
        for parameter, grad in grads.items():
            error = (other_grads[parameter] - grad).norm() / grad.norm()
            assert error <= tolerance, f"{name}: {parameter}: {error:.1e}"
    assert found["bfloat16"][0] != loss


def test_a_unet_gives_the_same_loss_and_gradients_however_it_is_sharded_and_recomputed(
    tokenizer: Tokenizer, pairs_folder: Path, texts_folder: Path
) -> None:
    """P3: 1, 2 and 3 ranks, of which some have no image, or images of fewer grids than others."""
    settings = data_config(tokenizer, {"pairs": pairs_folder, "texts": texts_folder}, lanes=5, sequence_length=64)
    unet = UNetConfig(channels=(8, 12), blocks=2, timestep_width=16)
    model = replace(MODEL, patches="unet", unet=unet)
    options = {name: OPTIONS[name] for name in ("plain", "checkpointing", "bfloat16")}
    loss, grads, _ = run_ranks(_step_with, 1, {"plain": {}}, settings, model)[0]["plain"]
    learned = [name for name in grads if name.startswith("patches.") and grads[name].any()]
    assert len(learned) > 30
    for world_size in (2, 3):
        for name, (other, other_grads, _) in run_ranks(_step_with, world_size, options, settings, model)[0].items():
            tolerance = 0.1 if name == "bfloat16" else 1e-5
            assert other == pytest.approx(loss, rel=min(tolerance, 0.01)), name
            for parameter, grad in grads.items():
                error = (other_grads[parameter] - grad).norm()
                assert error <= tolerance * grad.norm() + 1e-7, f"{name}: {parameter}: {error:.1e}"


@pytest.mark.slow
def test_compiled_blocks_give_the_same_result(tokenizer: Tokenizer, pairs_folder: Path) -> None:
    """Needs a C++ compiler."""
    settings = data_config(tokenizer, {"pairs": pairs_folder}, lanes=2, sequence_length=64)
    options = {"plain": {}, "compiled": {"compile": True, "activation_checkpointing": "full"}}
    found = run_ranks(_step_with, 2, options, settings, timeout_s=240)[0]
    (loss, grads, _), (compiled, compiled_grads, _) = found["plain"], found["compiled"]
    assert compiled == pytest.approx(loss, rel=1e-5)
    for name, grad in grads.items():
        assert (compiled_grads[name] - grad).norm() <= 1e-4 * grad.norm(), name


def test_the_compute_dtype_is_native_or_as_asked() -> None:
    assert compute_dtype(ParallelConfig(), torch.device("cuda")) == torch.bfloat16
    for name in ("float32", "bfloat16"):
        assert compute_dtype(ParallelConfig(dtype=name), torch.device("cpu")) == getattr(torch, name)
