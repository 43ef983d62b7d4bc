"""One forward and backward of the largest batches, on the real model, before training starts.

Out-of-memory errors surface now rather than days in, and compilation happens here. Nothing of it is kept.
"""

import time
from collections.abc import Sequence

import torch

from data.documents import ImageKind
from data.largest_batch import Grid
from model.latent_space import LatentStats
from model.transfusion import Transfusion
from train.console import say
from train.distributed.local_shards import local
from train.distributed.process import wait_for
from train.distributed.ranks import Ranks
from train.optim.optimizer import Optimizer
from train.planning.estimate import largest_batches_of
from train.pretrain_config import PretrainConfig
from train.step import forward_backward


def dry_run(
    model: Transfusion,
    optimizer: Optimizer,
    config: PretrainConfig,
    grids: Sequence[Grid],
    stats: LatentStats,
    ranks: Ranks,
    *,
    is_resumed: bool,
    kind: ImageKind = "moments",
) -> None:
    """Run the largest batches with images of these `grids`; raise MemoryError where one does not fit. Collective."""
    start, on_cuda = time.monotonic(), ranks.device.type == "cuda"
    moments = 8 * sum(local(p).numel() for p in optimizer.parameters.values())  # allocated by the first update
    try:
        reserve = torch.empty(moments if on_cuda and not is_resumed else 0, dtype=torch.uint8, device=ranks.device)
        for batch in largest_batches_of(config, ranks.world_size, grids, kind):
            forward_backward(
                model,
                batch.to(ranks.device),
                stats=stats,
                diffusion=config.diffusion,
                image_weight=config.loss.image_weight,
                parallel=config.parallel,
                global_text_targets=1,
                global_images=1,
                is_last=True,
            )
        wait_for(ranks.device)
    except torch.OutOfMemoryError as error:
        raise MemoryError(
            f"the largest batch does not fit: {config.micro_batch_size} x {config.data.sequence_length} "
            "tokens (micro_batch_size x data.sequence_length); python -m train.plan says what would fit"
        ) from error
    del reserve
    model.zero_grad(set_to_none=True)
    if ranks.is_first:
        peak = f", peak {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB" if on_cuda else ""
        say(f"pretrain: dry run of the largest batch: {time.monotonic() - start:.1f} s{peak}")
