"""Between two log rows no step waits for its device: nothing in it reads a tensor's values on the host.

A CPU shows which operators run; on a GPU, bench/gpu_step.py collects CUDA's own warnings of host waits.
"""

from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench.step import sharded_model
from data.dataset import open_data
from data.loader import Loader
from data.tokenizer import Tokenizer
from model.attention import block_mask, dense_mask
from model.diffusion import DiffusionConfig
from model.transformer import TransformerConfig
from model.transfusion import TransfusionConfig
from model.unet import UNetConfig
from tests.ranks import run_ranks
from tests.sources import data_config
from train.distributed.parallelize import ParallelConfig
from train.distributed.ranks import Ranks
from train.optim.guard import GuardConfig
from train.optim.optimizer import OptimConfig, Optimizer
from train.step import forward_backward, latent_stats

TRUNK = TransformerConfig(width=24, layers=2, heads=2, ffn_multiple_of=8, rope_2d=False)
UNET = TransfusionConfig(
    transformer=TRUNK, latent_channels=2, patches="unet", unet=UNetConfig(channels=(8, 12), timestep_width=16)
)
PARALLEL = ParallelConfig(dtype="bfloat16", activation_checkpointing="selective")
# On a GPU the host waits for each: their results' sizes or values are needed on the host, or the values are there.
WAITING = {"_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "_unique2", "unique_dim"}
WAITING |= {"lift_fresh"}


class NoReads(TorchDispatchMode):
    """Raises where an operator would read values on the host, or make a tensor of values that are there."""

    def __torch_dispatch__(self, operator: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = operator.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        by_mask = any(index is not None and index.dtype == torch.bool for index in indices)
        if name in WAITING or by_mask or str(operator) == "aten.repeat_interleave.Tensor":
            raise RuntimeError(f"the host would wait in {operator}")
        return operator(*args, **(kwargs or {}))


def _step(ranks: Ranks, data_settings: Any, of: TransfusionConfig, optim: OptimConfig) -> int:
    data = open_data(data_settings, 3, of.patch_size)
    model = sharded_model(of, data.tokenizer.vocab_size, ranks, PARALLEL, seed=7)
    optimizer = Optimizer(model, optim, GuardConfig(spike_factor=3.0))
    loader = Loader(data, data_settings, rank=ranks.rank, world_size=ranks.world_size, micro_batch_size=2)
    batches, stats = [loader.next(30) for _ in range(2)], latent_stats(data.latent_spec, 2, ranks.device)
    loader.close()
    for step, batch in enumerate(batches, start=1):
        # What is made once may wait. Documents are found on the host, on a CPU; a GPU's mask is made besides.
        with NoReads() if step > 1 else nullcontext(), patch("train.step.document_mask", dense_mask):
            losses = []
            for number, micro_batch in enumerate(batch.micro_batches, start=1):
                block_mask(micro_batch.document_ids, micro_batch.image_ids, micro_batch.visible_until)
                loss = forward_backward(
                    model,
                    micro_batch.to(ranks.device),
                    stats=stats,
                    diffusion=DiffusionConfig(min_snr_gamma=5.0),
                    image_weight=5.0,
                    parallel=PARALLEL,
                    global_text_targets=100,
                    global_images=10,
                    is_last=number == len(batch.micro_batches),
                )
                losses.append(loss)
            norm = optimizer.update(step)
            optimizer.guard.note(batch, losses, norm)
    return len(batches[1].micro_batches)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_reads_nothing_on_the_host(optimizer: Any, tokenizer: Tokenizer, sources: dict[str, Path]) -> None:
    config = data_config(tokenizer, sources, lanes=4, sequence_length=64)
    optim = OptimConfig(optimizer=optimizer, state_dtype="bfloat16", ema_half_lives=(10,), warmup_steps=0)
    assert run_ranks(_step, 1, config, UNET, optim) == [2]


def test_a_read_is_noticed() -> None:
    ones = torch.ones(3)
    for read in (lambda: ones.sum().item(), lambda: bool(ones[0]), lambda: ones[ones > 0], lambda: torch.tensor([1.0])):
        with pytest.raises(RuntimeError, match="the host would wait"), NoReads():
            read()
