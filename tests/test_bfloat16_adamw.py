"""Moments stored in bfloat16: unbiased, the same on any world size, and as good as float32 ones (P3, P4, P8)."""

import math
import shutil

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tests.ranks import run_ranks
from tests.test_optimizer import set_gradients
from train.distributed.parallelize import gather_weights
from train.distributed.ranks import Ranks
from train.optim.bfloat16_adamw import MOMENTS, BFloat16AdamW
from train.optim.guard import GuardConfig
from train.optim.optimizer import OptimConfig, Optimizer
from train.optim.stochastic_rounding import _compiled, _start, stochastic_bfloat16

CONFIG = OptimConfig(state_dtype="bfloat16", warmup_steps=0, learning_rate=1e-2, clip_norm=1e9, steps=12)
BAD_STEP = 7


@pytest.mark.parametrize("value", [1.0 + 2**-9, -3.0 - 2**-8 - 2**-10, 1.2345e-20, -6.0221e23])
def test_rounding_has_the_exact_mean_and_goes_to_a_neighbour(value: float) -> None:
    count, step = 1 << 16, 2.0 ** (math.floor(math.log2(abs(value))) - 7)
    exact = torch.full((count,), value)
    rounded = stochastic_bfloat16(exact, 0, "7 3 exp_avg").double()
    down = math.floor(exact[0].item() / step) * step
    assert set(rounded.tolist()) == {down, down + step}
    share = (exact[0].item() - down) / step
    assert (rounded == down + step).double().mean() == pytest.approx(share, abs=5 * (0.5 / math.sqrt(count)))
    ups = (rounded == down + step).double() - share  # neighbours do not go together
    assert abs((ups[1:] * ups[:-1]).mean()) < 5 * share * (1 - share) / math.sqrt(count)


def test_values_exact_in_bfloat16_do_not_change_nor_does_sharding_matter() -> None:
    kept = torch.tensor([0.0, -0.0, 1.0, -1.5, math.inf, -math.inf, 2.0**-130, 3.0e38]).bfloat16()
    assert torch.equal(stochastic_bfloat16(kept.float(), 5, "a"), kept)
    assert stochastic_bfloat16(torch.tensor([math.nan]), 5, "a").isnan().all()
    exact = torch.randn(50, 7, generator=torch.Generator().manual_seed(0))
    whole = stochastic_bfloat16(exact, 2**33, "a")
    assert torch.equal(stochastic_bfloat16(exact[20:], 2**33 + 140, "a"), whole[20:])
    assert not torch.equal(stochastic_bfloat16(exact, 2**33, "b"), whole)


def test_a_moment_falls_that_rounding_to_nearest_would_freeze() -> None:
    """With beta2 = 0.999 a step changes it by a quarter of what bfloat16 can tell apart."""
    p = nn.Parameter(torch.ones(2000))
    optimizer = BFloat16AdamW([{"params": [p]}], lr=torch.tensor(0.0), betas=(0.9, 0.999), weight_decay=0.0)
    optimizer.state[p]["exp_avg_sq"].fill_(1.0)
    p.grad = torch.zeros_like(p)
    for batch in range(1, 501):
        optimizer.batch = batch
        optimizer.step()
    assert optimizer.state[p]["exp_avg_sq"].double().mean() == pytest.approx(0.999**500, rel=0.01)
    assert (torch.ones(1).bfloat16() * 0.999).bfloat16() == 1.0


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 7)
        self.norm = nn.RMSNorm(2)


def _train(ranks: Ranks, sharded: bool, config: OptimConfig) -> list[dict[str, torch.Tensor]]:
    """Return all weights and moments after each step."""
    torch.manual_seed(0)
    model = Small()
    if sharded:
        fully_shard(model, mesh=init_device_mesh("cpu", (ranks.world_size,)))
    optimizer, history = Optimizer(model, config, GuardConfig()), []
    for step in range(1, config.steps + 1):
        generator, scale = torch.Generator().manual_seed(step), math.nan if step == BAD_STEP else 1.0
        grads = {n: scale * torch.randn(p.shape, generator=generator) for n, p in optimizer.parameters.items()}
        set_gradients(optimizer.parameters, grads)
        optimizer.update(step)
        tensors = dict(optimizer.parameters)
        for name, p in optimizer.parameters.items():
            tensors |= {f"{name}.{moment}": optimizer.adamw.state[p][moment] for moment in (*MOMENTS, "step")}
        history.append(gather_weights(tensors))
    return history


def test_moments_are_rounded_alike_on_any_number_of_ranks_and_are_near_those_of_float32() -> None:
    """P3, P4, P8: rounding depends on elements and steps only; a skipped update changes nothing."""
    alone = run_ranks(_train, 1, False, CONFIG)[0]
    exact = run_ranks(_train, 1, False, OptimConfig(**{**vars(CONFIG), "state_dtype": "float32"}))[0]
    for history in run_ranks(_train, 3, True, CONFIG):
        for step, (tensors, expected) in enumerate(zip(history, alone, strict=True), start=1):
            assert tensors.keys() == expected.keys()
            for name, tensor in tensors.items():  # the kernel's own last bits depend on where a vector ends
                torch.testing.assert_close(tensor, expected[name], rtol=2**-7, atol=1e-5)
                assert not name.endswith(MOMENTS) or (tensor == expected[name]).float().mean() > 0.95
            if step == BAD_STEP:
                assert all(torch.equal(tensor, history[step - 2][name]) for name, tensor in tensors.items())
    for name, tensor in alone[-1].items():
        assert (tensor.dtype == torch.bfloat16) == name.endswith(MOMENTS)
        close = {"rtol": 0.1, "atol": 0.02} if name.endswith(MOMENTS) else {"rtol": 0, "atol": 2e-3}
        torch.testing.assert_close(tensor.float(), exact[-1][name].float(), **close)


def test_a_state_dict_keeps_the_moments_dtype() -> None:
    """torch's own load_state_dict would widen them."""
    p = nn.Parameter(torch.ones(3))
    optimizer, other = (BFloat16AdamW([{"params": [p]}], lr=torch.tensor(1e-3)) for _ in range(2))
    p.grad = torch.randn(3)
    optimizer.step()
    other.load_state_dict(optimizer.state_dict())
    for name in MOMENTS:
        assert other.state[p][name].dtype == torch.bfloat16
        assert torch.equal(other.state[p][name], optimizer.state[p][name]) and other.state[p][name].any()


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_compiled_rounding_has_the_same_bits_and_one_graph_for_all_shapes() -> None:
    """What a GPU runs: one kernel instead of a dozen, not compiled again for each parameter and step."""
    torch._dynamo.utils.counters.clear()
    for number, shape in enumerate([(50, 7), (3000,), (64, 64), (2, 3, 5)]):
        exact = torch.randn(shape, generator=torch.Generator().manual_seed(number)) * 1e-3
        exact.view(-1)[:3] = torch.tensor([math.inf, math.nan, -0.0])
        expected = stochastic_bfloat16(exact, number * 2**31, f"{number} 3 exp_avg")
        start = _start(number * 2**31, f"{number} 3 exp_avg")
        found = _compiled()(exact.flatten().data, torch.full((), start, dtype=torch.int32)).view(shape)
        assert torch.equal(found.view(torch.int16), expected.view(torch.int16)), shape
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
