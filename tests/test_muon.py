"""Muon against the singular value decomposition, whole and sharded, also with replicas (P3, P4, P8)."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from data.tokenizer import Tokenizer
from model.transformer import TransformerConfig
from model.transfusion import Transfusion, TransfusionConfig, init_weights
from tests.ranks import run_ranks
from tests.runs import assert_same_end, finish, saved_state, settings
from tests.test_optimizer import set_gradients
from train.distributed.parallelize import gather_weights
from train.distributed.ranks import Ranks
from train.optim.guard import GuardConfig
from train.optim.muon import COEFFICIENTS, matrices, newton_schulz
from train.optim.optimizer import OptimConfig, Optimizer, learning_rate

CONFIG = OptimConfig(
    optimizer="muon", learning_rate=1e-2, min_learning_rate=1e-3, warmup_steps=1, steps=5, weight_decay=0.3
)
BAD_STEP = 3
# Widths that neither 2 nor 3 ranks divide; fewer key rows than ranks' shares; 8 matrices, which 3 ranks deal unevenly.
MODEL = TransfusionConfig(
    transformer=TransformerConfig(width=10, layers=2, heads=5, kv_heads=1, ffn_hidden=7), latent_channels=2
)


def by_singular_values(matrix: torch.Tensor) -> torch.Tensor:
    """Jordan's polynomial on the singular values, in float64: what the iteration does without ever finding them."""
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    values = values / values.square().sum().sqrt()
    a, b, c = COEFFICIENTS
    for _ in range(5):
        values = a * values + b * values**3 + c * values**5
    return left @ values.diag() @ right


@pytest.mark.parametrize("shape", [(24, 24), (40, 12), (12, 40), (1, 9)])
def test_the_iteration_moves_all_singular_values_to_about_one(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(shape, generator=generator)
    found = newton_schulz(matrix)
    torch.testing.assert_close(found.double(), by_singular_values(matrix), rtol=1e-4, atol=1e-4)
    values = torch.linalg.svdvals(found)
    assert values.max() < 1.3 and (min(shape) == 24 or values.min() > 0.6)  # a square one has singular values near 0
    torch.testing.assert_close(newton_schulz(matrix * 1e-10), found, rtol=1e-4, atol=1e-5)
    assert not newton_schulz(torch.zeros(shape)).any()


def test_muon_is_for_the_blocks_matrices_and_separates_stacked_ones() -> None:
    model = Transfusion(MODEL, 20)
    names = {p: name for name, p in model.named_parameters()}
    parts = {names[p]: parts for p, parts in matrices(model).items()}
    block = {"attention.qkv": (10, 2, 2), "attention.out": (10,), "ffn.gate_up": (7, 7), "ffn.down": (10,)}
    assert parts == {f"transformer.blocks.{i}.{name}.weight": rows for i in (0, 1) for name, rows in block.items()}
    assert all(sum(rows) == model.get_parameter(name).shape[0] for name, rows in parts.items())


def test_one_learning_rate_serves_both_as_an_update_has_adamws_size() -> None:
    """Liu et al.: a root mean square of about 0.2, whatever the shape."""
    model = Transfusion(TransfusionConfig(transformer=TransformerConfig(width=64, layers=1, heads=2)), 20)
    init_weights(model, 0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    config = OptimConfig(optimizer="muon", learning_rate=1e-3, weight_decay=0.0, warmup_steps=0)
    optimizer = Optimizer(model, config, GuardConfig())
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    optimizer.update(1)
    for name, p in model.transformer.named_parameters():
        if "norm" not in name:
            change = (p.detach() - before[f"transformer.{name}"]).square().mean().sqrt()
            assert 0.12 < change / 1e-3 < 0.25, name


def _gradients(step: int, model: nn.Module) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    grads = {name: torch.randn(p.shape, generator=generator) for name, p in model.named_parameters()}
    if step == BAD_STEP:
        grads["transformer.blocks.0.ffn.down.weight"][0, 0] = torch.nan  # on one rank alone
    return grads


def _plain_loop() -> dict[str, torch.Tensor]:
    """The blocks' matrices after all steps, in float64."""
    model = Transfusion(MODEL, 20)
    init_weights(model, 0)
    names = {p: name for name, p in model.named_parameters()}
    parts = {names[p]: rows for p, rows in matrices(model).items()}
    weights = {name: model.get_parameter(name).detach().double() for name in parts}
    momentum = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for step in range(1, CONFIG.steps + 1):
        grads = _gradients(step, model)
        norm = torch.cat([grad.double().flatten() for grad in grads.values()]).norm()
        if step == BAD_STEP:
            continue
        rate = learning_rate(step, CONFIG)
        for name, weight in weights.items():
            grad = grads[name].double() * min(1.0, CONFIG.clip_norm / norm)
            momentum[name] = CONFIG.muon_momentum * momentum[name] + (1 - CONFIG.muon_momentum) * grad
            ahead = CONFIG.muon_momentum * momentum[name] + (1 - CONFIG.muon_momentum) * grad  # Nesterov
            updates = [0.2 * max(part.shape) ** 0.5 * by_singular_values(part) for part in ahead.split(parts[name])]
            weights[name] = weight - rate * (CONFIG.weight_decay * weight + torch.cat(updates))
    return weights


def _train(ranks: Ranks, mesh_shape: tuple[int, ...] | None, config: OptimConfig) -> list[dict[str, torch.Tensor]]:
    """Return all weights after each step."""
    model = Transfusion(MODEL, 20)
    init_weights(model, 0)
    if mesh_shape is not None:
        names = ("dp_replicate", "dp_shard")[-len(mesh_shape) :]
        mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=names)
        for block in model.transformer.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer, history, shapes = Optimizer(model, config, GuardConfig()), [], Transfusion(MODEL, 20)
    for step in range(1, config.steps + 1):
        set_gradients(optimizer.parameters, _gradients(step, shapes))
        optimizer.update(step)
        history.append(gather_weights(optimizer.parameters))
    return history


@pytest.fixture(scope="module")
def with_adamw() -> dict[str, torch.Tensor]:
    return run_ranks(_train, 1, None, replace(CONFIG, optimizer="adamw"))[0][-1]


@pytest.mark.parametrize(
    "mesh_shape",
    [None, (3,), (2, 2), *(pytest.param(shape, marks=pytest.mark.slow) for shape in ((1,), (2,)))],
    ids=str,
)
def test_sharded_matrices_get_the_update_of_whole_ones(
    mesh_shape: tuple[int, ...] | None, with_adamw: dict[str, torch.Tensor]
) -> None:
    """P3, P8: as in plain float64, on any mesh; a bad step changes no bit; other parameters are AdamW's."""
    world_size = torch.Size(mesh_shape or (1,)).numel()
    expected = _plain_loop()
    with_muon = run_ranks(_train, world_size, mesh_shape, CONFIG)
    for history in with_muon:
        for name, tensor in history[-1].items():
            if name in expected:
                torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-3, atol=1e-5)
            else:
                torch.testing.assert_close(tensor, with_adamw[name])
            assert torch.equal(history[BAD_STEP - 1][name], history[BAD_STEP - 2][name])
            assert torch.equal(tensor, with_muon[0][-1][name])


def test_a_run_with_muon_low_moments_and_two_emas_resumes_to_the_bit(
    tmp_path: Path, tokenizer: Tokenizer, sources: dict[str, Path]
) -> None:
    """P4: all states are in the checkpoint, under parameters' names, in their dtypes."""
    changes = {"optim__optimizer": "muon", "optim__state_dtype": "bfloat16", "optim__ema_half_lives": [7, 3]}
    argv = settings(tmp_path / "a", tokenizer, sources, optim__steps=6, checkpoint__interval_steps=3, **changes)
    finish(argv, 2)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.rmtree(tmp_path / "b/checkpoints/step-00000006")
    finish([argument.replace(str(tmp_path / "a"), str(tmp_path / "b")) for argument in argv], 2)
    assert_same_end(tmp_path / "b", tmp_path / "a", emas={"ema-7", "ema-3"})
    tensors = saved_state(tmp_path / "a")[0]
    assert tensors["optimizer.transformer.blocks.1.ffn.down.weight.momentum_buffer"].dtype == torch.bfloat16
    assert tensors["optimizer.text_head.weight.exp_avg_sq"].dtype == torch.bfloat16
    assert "optimizer.transformer.blocks.1.ffn.down.weight.exp_avg" not in tensors
