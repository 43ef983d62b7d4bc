"""The update against a plain loop in float64, on one rank and on three with uneven shards (P8)."""

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from model.transformer import TransformerConfig
from model.transfusion import Transfusion, TransfusionConfig
from tests.ranks import run_ranks
from train.distributed import Ranks
from train.guard import GuardConfig
from train.optim import OptimConfig, Optimizer, learning_rate
from train.parallelize import gather_weights

BAD_STEPS = (3, 6, 7)
CONFIG = OptimConfig(
    learning_rate=1e-2,
    min_learning_rate=1e-3,
    warmup_steps=4,
    steps=12,
    weight_decay=0.3,
    clip_norm=0.7,
    ema_decay=0.8,
)


def test_the_rate_rises_in_a_line_and_falls_as_half_a_cosine() -> None:
    """P1: the paper's defaults, at the places where the closed form is known."""
    paper = OptimConfig()
    top, floor = 3e-4, 1.5e-5
    closed_form = {1: top / 4000, 2000: top / 2, 4000: top, 127_000: (top + floor) / 2, 250_000: floor, 10**6: floor}
    for step, expected in closed_form.items():
        assert learning_rate(step, paper) == pytest.approx(expected, rel=1e-12), step
    third = 4000 + 246_000 / 3
    assert learning_rate(int(third), paper) == pytest.approx(floor + (top - floor) * 0.75, rel=1e-12)
    assert learning_rate(1, OptimConfig(warmup_steps=0, steps=2)) == pytest.approx((top + floor) / 2)
    assert learning_rate(5, OptimConfig(warmup_steps=10, steps=5)) == pytest.approx(top / 2), (
        "warm-up longer than the run"
    )


class Small(nn.Module):
    """Sizes that no world size divides, a bias and a norm with fewer elements than ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 3)
        self.linear = nn.Linear(3, 2)
        self.norm = nn.RMSNorm(2)


def _gradients(step: int) -> dict[str, torch.Tensor]:
    """Full gradients of a step, some longer than the clip norm, some shorter, those of the bad steps not finite."""
    generator = torch.Generator().manual_seed(step)
    scale = 0.02 if step % 2 else 3.0
    grads = {name: scale * torch.randn(p.shape, generator=generator) for name, p in Small().named_parameters()}
    if step in BAD_STEPS:
        grads["embedding.weight"][0, 0] = math.inf if step == 3 else math.nan  # in the first rank's slice alone
    return grads


def _start() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(99)
    return {name: torch.randn(p.shape, generator=generator) for name, p in Small().named_parameters()}


def _plain_loop(config: OptimConfig) -> tuple[list[dict], list[dict], list[float]]:
    """Return weights, averages and gradient norms after each step, by AdamW as it is written in its paper."""
    weights = {name: tensor.double() for name, tensor in _start().items()}
    average = {name: tensor.clone() for name, tensor in weights.items()}
    first = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    second = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    updates, history = 0, ([], [], [])
    for step in range(1, config.steps + 1):
        grads = {name: grad.double() for name, grad in _gradients(step).items()}
        norm = math.sqrt(sum(float((grad**2).sum()) for grad in grads.values()))
        if math.isfinite(norm):
            updates += 1
            for name, weight in weights.items():
                grad = grads[name] * min(1.0, config.clip_norm / norm)
                first[name] = config.beta1 * first[name] + (1 - config.beta1) * grad
                second[name] = config.beta2 * second[name] + (1 - config.beta2) * grad**2
                m, v = first[name] / (1 - config.beta1**updates), second[name] / (1 - config.beta2**updates)
                decay = config.weight_decay if weight.ndim == 2 else 0.0
                weights[name] = weight - learning_rate(step, config) * (m / (v.sqrt() + config.eps) + decay * weight)
                average[name] = config.ema_decay * average[name] + (1 - config.ema_decay) * weights[name]
        for record, value in zip(history, (dict(weights), dict(average), norm), strict=True):
            record.append(value)
    return history


def _run_optimizer(ranks: Ranks, sharded: bool) -> list[tuple[dict, dict, float, list[float], float]]:
    model = Small()
    model.load_state_dict(_start())
    if sharded:
        mesh = init_device_mesh("cpu", (ranks.world_size,))
        fully_shard(model.linear, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = Optimizer(model, CONFIG, GuardConfig())
    history = []
    for step in range(1, CONFIG.steps + 1):
        for name, p in model.named_parameters():
            grad = _gradients(step)[name]
            if isinstance(p, DTensor):
                grad = distribute_tensor(grad, p.device_mesh, p.placements, src_data_rank=None)
            p.grad = grad
        norm = optimizer.update(step)
        assert all(p.grad is None for p in model.parameters())
        weights, average = gather_weights(optimizer.parameters), gather_weights(optimizer.ema)
        counted = optimizer.adamw.state[model.linear.weight]["step"].item()
        history.append((weights, average, norm.item(), optimizer.guard.counts[:2].tolist(), counted))
    return history


@pytest.mark.parametrize("world_size", [1, 3])
def test_clipping_adamw_and_ema_equal_the_plain_loop_on_any_number_of_ranks(world_size: int) -> None:
    """P8 too: a bad step moves neither weights nor averages by a bit on any rank, is counted, and Adam's own count
    of updates leaves it out, while the learning rate goes on with the step."""
    weights, averages, norms = _plain_loop(CONFIG)
    for history in run_ranks(_run_optimizer, world_size, world_size > 1):
        in_all = in_a_row = 0
        for i, (found, average, norm, nonfinite, counted) in enumerate(history):
            bad = i + 1 in BAD_STEPS
            in_all, in_a_row = in_all + bad, (in_a_row + 1) * bad
            assert nonfinite == [in_all, in_a_row] and counted == i + 1 - in_all
            assert norm == pytest.approx(norms[i], rel=1e-5, nan_ok=True)
            for name in found:
                torch.testing.assert_close(found[name].double(), weights[i][name], rtol=1e-5, atol=1e-6)
                torch.testing.assert_close(average[name].double(), averages[i][name], rtol=1e-5, atol=1e-6)
                if bad and i:
                    assert torch.equal(found[name], history[i - 1][0][name])
                    assert torch.equal(average[name], history[i - 1][1][name])


def test_norms_and_biases_are_not_decayed_and_matrices_are() -> None:
    """With zero gradients only the decay moves a weight; every parameter of the model is in one group."""
    config = TransfusionConfig(
        transformer=TransformerConfig(width=16, layers=1, heads=2, qk_norm=True), latent_channels=2
    )
    model = Transfusion(config, 20)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = Optimizer(model, OptimConfig(warmup_steps=1), GuardConfig())
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.update(1)
    for name, p in model.named_parameters():
        kept = name.endswith(("norm.weight", ".bias"))
        assert torch.equal(p, before[name]) == (kept or not before[name].any()), name
        torch.testing.assert_close(p, before[name] * (1 if kept else 1 - 3e-4 * 0.1))


def test_no_average_is_kept_unless_asked_for() -> None:
    assert Optimizer(Small(), OptimConfig(), GuardConfig()).ema is None


@pytest.mark.parametrize(
    "changes",
    [
        {"min_learning_rate": 1.0},
        {"steps": 0},
        {"warmup_steps": -1},
        {"clip_norm": 0.0},
        {"ema_decay": 1.0},
        {"beta1": 1.0},
        {"eps": 0.0},
    ],
)
def test_impossible_settings_are_refused_by_name(changes: dict[str, Any]) -> None:
    """P10."""
    with pytest.raises(ValueError, match=next(iter(changes))):
        OptimConfig(**changes)
