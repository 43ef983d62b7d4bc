"""A sharded model and the gradients of a step, as in training but without its loop; for benchmarks and tests."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from data.manifest import LatentSpec
from data.packing import PackedBatch
from model.diffusion import DiffusionConfig
from model.transfusion import Transfusion, TransfusionConfig
from train.distributed.parallelize import ParallelConfig, compute_dtype, initialize, parallelize, set_micro_step
from train.distributed.ranks import Ranks
from train.optim.groups import GroupConfig, freeze
from train.step import latent_stats, micro_step

FLOAT32 = ParallelConfig(dtype="float32")


def sharded_model(
    config: TransfusionConfig,
    vocab_size: int,
    ranks: Ranks,
    parallel: ParallelConfig = FLOAT32,
    seed: int = 0,
    groups: Mapping[str, GroupConfig] | None = None,
) -> Transfusion:
    """Return an initialized model, sharded over the ranks; `groups` as in `optim.groups`. Collective."""
    with torch.device("meta"):
        model = Transfusion(config, vocab_size)
    freeze(model, groups or {}, compute_dtype(parallel, ranks.device), config.lora.rank > 0)
    parallelize(model, parallel, ranks)
    initialize(model, seed, ranks.device)
    return model


def backward(
    model: Transfusion,
    batches: Sequence[PackedBatch],
    ranks: Ranks,
    parallel: ParallelConfig = FLOAT32,
    *,
    spec: LatentSpec | None = None,
    targets: int,
    images: int,
) -> Tensor:
    """Accumulate the gradients of a step's micro-batches; return this rank's share of the loss (float32 scalar).

    `targets` and `images` are the global counts of text targets and images; without `spec` latents are not whitened.
    """
    total = torch.zeros((), device=ranks.device)
    stats = latent_stats(spec, model.config.latent_channels, ranks.device)
    for number, batch in enumerate(batches, start=1):
        set_micro_step(model, parallel, is_last=number == len(batches))
        loss = micro_step(
            model,
            batch.to(ranks.device),
            stats=stats,
            diffusion=DiffusionConfig(),
            image_weight=5.0,
            global_text_targets=targets,
            global_images=images,
        )
        loss.total.backward()
        total += loss.total.detach()
    return total
