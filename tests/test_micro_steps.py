"""What a step's micro-steps share: one rank's sums and casts, the communicators, and the graphs of compiled blocks."""

from collections import Counter
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.utils import counters
from torch.distributed.fsdp._fully_shard import _fsdp_collectives, _fsdp_param, _fsdp_param_group

from bench.step import backward, sharded_model
from data.dataset import open_data
from data.loader import Loader
from data.tokenizer import Tokenizer
from model.transformer import TransformerConfig
from model.transfusion import TransfusionConfig
from tests.ranks import run_ranks
from tests.runs import settings
from tests.sources import data_config, make_source, pairs
from train.config import load_config
from train.distributed.parallelize import ParallelConfig, gather_weights, separate_reductions
from train.distributed.ranks import Ranks
from train.distributed.signals import StopSignal
from train.heldout import Heldout
from train.pretrain_config import PretrainConfig
from train.step import latent_stats

TRUNK = TransformerConfig(width=24, layers=3, heads=2, ffn_multiple_of=8)
MODEL = TransfusionConfig(transformer=TRUNK, latent_channels=2)
UNITS = 4  # the root and three blocks
LANES = 4
Grads = dict[str, torch.Tensor]


def _work_and_grads(ranks: Ranks, data_settings: Any, parallel: ParallelConfig, separate: bool = False) -> tuple:
    """Return how often units are reduced and their parameters cast in a step of single rows, and its gradients."""
    done: Counter[str] = Counter()

    def counted(name: str, function: Any) -> Any:
        def count(*args: Any, **kwargs: Any) -> Any:
            done[name] += 1
            return function(*args, **kwargs)

        return count

    _fsdp_param_group.foreach_reduce = counted("reductions", _fsdp_collectives.foreach_reduce)
    unsharded = _fsdp_param.FSDPParam.init_unsharded_param
    _fsdp_param.FSDPParam.init_unsharded_param = counted("casts", unsharded)
    data = open_data(data_settings, 3, MODEL.patch_size)
    loader = Loader(data, data_settings, rank=ranks.rank, world_size=ranks.world_size, micro_batch_size=1)
    batches = loader.next(30).micro_batches
    loader.close()
    model = sharded_model(MODEL, data.tokenizer.vocab_size, ranks, parallel, seed=7)
    if separate:
        separate_reductions(model)
        done["groups"] = len(dist.distributed_c10d._world.pg_map)
    backward(model, batches, ranks, parallel, spec=data.latent_spec, targets=100, images=10)
    parameters = dict(model.named_parameters())
    done["parameters"] = len(parameters)
    return done, gather_weights({name: p.grad for name, p in parameters.items()})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_rank_casts_and_reduces_once_a_step(dtype: Any, tokenizer: Tokenizer, sources: dict[str, Path]) -> None:
    """Not in each of the four micro-steps, forward and backward; the gradients have the same bits."""
    config = data_config(tokenizer, sources, lanes=LANES, sequence_length=64)
    ((done, grads),) = run_ranks(_work_and_grads, 1, config, ParallelConfig(dtype=dtype))
    assert done["reductions"] == UNITS and done["casts"] == done["parameters"]
    freed = ParallelConfig(dtype=dtype, reshard_after_forward=True)
    ((again, same),) = run_ranks(_work_and_grads, 1, config, freed)
    assert again["reductions"] == UNITS and again["casts"] > LANES * done["casts"]
    assert [name for name in grads if not torch.equal(grads[name], same[name])] == []


def test_gradients_are_the_same_over_a_communicator_of_their_own(
    tokenizer: Tokenizer, sources: dict[str, Path]
) -> None:
    config = data_config(tokenizer, sources, lanes=LANES, sequence_length=64)
    parallel = ParallelConfig(dtype="float32")
    shared, own = (run_ranks(_work_and_grads, 2, config, parallel, separate) for separate in (False, True))
    assert own[0][0]["groups"] == 5, "the default group, three of gloo, and the reductions'"
    for (_, expected), (_, grads) in zip(shared, own, strict=True):
        assert [name for name in grads if not torch.equal(grads[name], expected[name])] == []
    separate_reductions(torch.nn.Module())  # as of torch 2.11: without the method, nothing


def _graphs(ranks: Ranks, config: PretrainConfig) -> list[int]:
    """Return the number of compiled graphs after a step's micro-steps and after an evaluation."""
    torch.nn.Module.compile = partialmethod(torch.nn.Module.compile, backend="aot_eager")  # quick, the same graphs
    data = open_data(config.data, config.seed, config.model.patch_size)
    model = sharded_model(config.model, data.tokenizer.vocab_size, ranks, config.parallel)
    rows = config.micro_batch_size
    loader = Loader(data, config.data, rank=ranks.rank, world_size=ranks.world_size, micro_batch_size=rows)
    batches = loader.next(30).micro_batches
    loader.close()
    found = []
    for _ in range(2):
        backward(model, batches, ranks, config.parallel, spec=data.latent_spec, targets=100, images=10)
        found.append(counters["stats"]["unique_graphs"])
    heldout = Heldout.of_run(config, data, ranks)
    stats = latent_stats(data.latent_spec, config.model.latent_channels, ranks.device)
    with StopSignal() as stop:
        losses = heldout.losses(model, stats, stop)
    assert losses["pairs"]["text_loss"] > 0
    found.append(counters["stats"]["unique_graphs"])
    backward(model, batches, ranks, config.parallel, spec=data.latent_spec, targets=100, images=10)
    return [*found, counters["stats"]["unique_graphs"]]


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_an_evaluation_runs_the_graphs_of_training(
    world_size: int, tmp_path: Path, tokenizer: Tokenizer, sources: dict[str, Path]
) -> None:
    """One graph for all blocks, batches, training and evaluation."""
    heldout = make_source(tmp_path / "heldout", tokenizer, pairs(20, seed=77))
    argv = settings(
        tmp_path / "run", tokenizer, sources, data__lanes=8, micro_batch_size=2, parallel__compile=True,
        evaluation__interval_steps=4, evaluation__heldout__pairs=heldout, evaluation__lanes=8,
    )  # fmt: skip
    for graphs in run_ranks(_graphs, world_size, load_config(PretrainConfig, argv), timeout_s=180.0):
        assert graphs == [1, 1, 1, 1]
