"""The update against a plain loop in float64, on one rank and on three with uneven shards (P8)."""

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from bench.step import sharded_model
from model.transformer import TransformerConfig
from model.transfusion import Transfusion, TransfusionConfig
from tests.ranks import run_ranks
from tests.test_memory import Cost
from train.distributed.parallelize import gather_weights
from train.distributed.ranks import Ranks
from train.optim.ema import choose
from train.optim.guard import GuardConfig
from train.optim.optimizer import OptimConfig, Optimizer, learning_rate

BAD_STEPS = (3, 6, 7)
CONFIG = OptimConfig(learning_rate=1e-2, min_learning_rate=1e-3, warmup_steps=4, steps=16, weight_decay=0.3)
CONFIG = replace(CONFIG, clip_norm=0.7, ema_half_lives=(3, 1))


def test_the_rate_rises_linearly_and_falls_as_half_a_cosine() -> None:
    """P1: the paper's defaults, at steps whose closed form is known."""
    paper = OptimConfig()
    top, floor = 3e-4, 1.5e-5
    closed_form = {1: top / 4000, 2000: top / 2, 4000: top, 127_000: (top + floor) / 2, 250_000: floor, 10**6: floor}
    for step, expected in closed_form.items():
        assert learning_rate(step, paper) == pytest.approx(expected, rel=1e-12), step
    third = 4000 + 246_000 / 3
    assert learning_rate(int(third), paper) == pytest.approx(floor + (top - floor) * 0.75, rel=1e-12)
    assert learning_rate(1, OptimConfig(warmup_steps=0, steps=2)) == pytest.approx((top + floor) / 2)
    long_warmup = OptimConfig(warmup_steps=10, steps=5)
    assert learning_rate(5, long_warmup) == pytest.approx(top / 2)


def test_wsd_stays_at_the_peak_and_falls_in_its_last_part() -> None:
    """Closed forms of both shapes; the linear decay has one slope and no jump."""
    line = OptimConfig(learning_rate=1.0, min_learning_rate=0.2, warmup_steps=10, steps=100, schedule="wsd")
    line = replace(line, decay_share=0.4)
    root = replace(line, decay_shape="sqrt")
    for step, expected in {5: 0.5, 10: 1.0, 11: 1.0, 60: 1.0, 70: 0.8, 80: 0.6, 100: 0.2, 150: 0.2}.items():
        assert learning_rate(step, line) == pytest.approx(expected, rel=1e-12), step
    for step, expected in {10: 1.0, 60: 1.0, 70: 0.6, 90: 1 - 0.8 * math.sqrt(0.75), 100: 0.2}.items():
        assert learning_rate(step, root) == pytest.approx(expected, rel=1e-12), step
    rates = [learning_rate(step, line) for step in range(10, 101)]
    assert max(a - b for a, b in pairwise(rates)) == pytest.approx(0.8 / 40) and sorted(rates, reverse=True) == rates


def test_a_wsd_run_extended_before_its_decay_is_the_longer_run() -> None:
    """P10: `steps` may change on resume; so may the whole schedule, as the rate depends on step and config alone."""
    short = OptimConfig(steps=1000, warmup_steps=100, schedule="wsd", decay_share=0.2)
    long = replace(short, steps=2000)
    assert all(learning_rate(step, short) == learning_rate(step, long) for step in range(1, 801))
    assert learning_rate(1600, long) == long.learning_rate and learning_rate(2000, long) == long.min_learning_rate
    warm = replace(short, warmup_steps=900)  # the decay does not begin before the warm-up ends
    assert learning_rate(900, warm) == warm.learning_rate and learning_rate(950, warm) == pytest.approx(1.575e-4)
    constant = replace(short, decay_share=0.0)
    assert {learning_rate(step, constant) for step in range(100, 1001)} == {constant.learning_rate}


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
    averages = {half_life: {name: tensor.clone() for name, tensor in weights.items()} for half_life in (3, 1)}
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
            for half_life, average in averages.items():
                decay = 0.5 ** (1 / min(half_life, updates / 10))
                for name, weight in weights.items():
                    average[name] = decay * average[name] + (1 - decay) * weight
        now = {f"ema-{half_life}.{name}": mean for half_life, part in averages.items() for name, mean in part.items()}
        for record, value in zip(history, (dict(weights), now, norm), strict=True):
            record.append(value)
    return history


def set_gradients(parameters: dict[str, torch.Tensor], grads: dict[str, torch.Tensor]) -> None:
    """Give each parameter, sharded or not, its part of a whole gradient."""
    for name, p in parameters.items():
        own = isinstance(p, DTensor)
        p.grad = distribute_tensor(grads[name], p.device_mesh, p.placements, src_data_rank=None) if own else grads[name]


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
        set_gradients(optimizer.parameters, _gradients(step))
        norm = optimizer.update(step)
        assert all(p.grad is None for p in model.parameters())
        weights, average = gather_weights(optimizer.parameters), {}
        for label, ema in optimizer.emas.items():
            average |= {f"{label}.{name}": mean for name, mean in gather_weights(ema.weights).items()}
        counted = optimizer.adamw.state[model.linear.weight]["step"].item()
        history.append((weights, average, norm.item(), optimizer.guard.counts[:2].tolist(), counted))
    return history


@pytest.mark.parametrize("world_size", [1, 3])
def test_clipping_adamw_and_emas_equal_the_plain_loop_on_any_number_of_ranks(world_size: int) -> None:
    """P8: a bad step is counted and changes no bit of weights or averages on any rank; Adam's own count of updates
    leaves it out, while the learning rate still follows the step."""
    weights, averages, norms = _plain_loop(CONFIG)
    for history in run_ranks(_run_optimizer, world_size, world_size > 1):
        in_all = in_a_row = 0
        for i, (found, average, norm, nonfinite, counted) in enumerate(history):
            bad = i + 1 in BAD_STEPS
            in_all, in_a_row = in_all + bad, (in_a_row + 1) * bad
            assert nonfinite == [in_all, in_a_row] and counted == i + 1 - in_all
            assert norm == pytest.approx(norms[i], rel=1e-5, nan_ok=True)
            assert found.keys() == weights[i].keys() and average.keys() == averages[i].keys()
            for name, tensor in (found | average).items():
                expected = (weights[i] | averages[i])[name]
                torch.testing.assert_close(tensor.double(), expected, rtol=1e-5, atol=1e-6)
                if bad:
                    assert torch.equal(tensor, (history[i - 1][0] | history[i - 1][1])[name])


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


@pytest.mark.parametrize("changes", [{}, {"optimizer": "muon"}, {"optimizer": "muon", "state_dtype": "bfloat16"}])
def test_an_update_reads_no_value_back(changes: dict[str, Any]) -> None:
    """Reading one would wait for the device. Fake tensors have no values: reading one raises."""
    model = TransfusionConfig(transformer=TransformerConfig(width=16, layers=1, heads=2))
    with FakeTensorMode():
        network = Transfusion(model, 20)
        optimizer = Optimizer(network, OptimConfig(ema_half_lives=(5,), **changes), GuardConfig(spike_factor=3.0))
        for step in (1, 2):
            for p in network.parameters():
                p.grad = torch.empty_like(p)
            norm = optimizer.update(step)
        with pytest.raises(DataDependentOutputException):
            norm.item()


def test_the_first_average_is_preferred_else_the_models_weights() -> None:
    configs = (OptimConfig(), OptimConfig(ema_half_lives=(9, 2)))
    plain, averaged = (Optimizer(Small(), config, GuardConfig()) for config in configs)
    assert plain.emas == {} and plain.preferred_weights() == plain.parameters
    assert averaged.preferred_weights() == averaged.emas["ema-9"].weights
    run = Path("run")
    for weights, chosen in {"auto": "ema-9", "ema": "ema-9", "ema-2": "ema-2", "model": "model"}.items():
        assert choose(weights, ["ema-9", "ema-2", "model"], run) == chosen
    assert choose("auto", ["model"], run) == "model" and choose("ema", ["ema-2"], run) == "ema-2"
    for weights in ("ema-3", "best", "ema-", "Model"):
        with pytest.raises(ValueError, match=f"weights={weights}: run holds ema-9, model; use weights=ema-9"):
            choose(weights, ["ema-9", "model"], run)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("min_learning_rate", 1.0), ("steps", 0), ("warmup_steps", -1), ("decay_share", 1.1), ("clip_norm", 0.0)),
        *(("ema_half_lives", (0,)), ("ema_half_lives", (3, 3)), ("beta1", 1.0), ("eps", 0.0)),
        *(("muon_momentum", 1.0), ("muon_update_rms", 0.0)),
    ],
)
def test_impossible_settings_are_refused_by_name(name: str, value: Any) -> None:
    """P10."""
    with pytest.raises(ValueError, match=name):
        OptimConfig(**{name: value})


def _first_update(ranks: Ranks) -> tuple[int, int]:
    """Return the bytes of the whole model, and of host memory that the first update takes on this rank."""
    config = TransfusionConfig(transformer=TransformerConfig(width=512, layers=4, heads=4))
    model = sharded_model(config, 8000, ranks)
    optimizer = Optimizer(model, CONFIG, GuardConfig())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with Cost() as updating:
        optimizer.update(1)
    return sum(parameter.numel() * 4 for parameter in model.parameters()), updating.peak


def test_the_first_update_allocates_this_ranks_moments_and_no_copy_of_the_model() -> None:
    """DTensor finds the shapes of an unknown operator's results by running it at the size of the whole model."""
    for whole, grown in run_ranks(_first_update, 4):
        assert grown < whole, f"{grown / whole:.2f} times the model, expected 2 / 4 for the moments"
