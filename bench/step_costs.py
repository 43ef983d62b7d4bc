"""CPU time of training steps over that of another recipe's, the two taking turns in one process."""

import statistics
import time
from collections.abc import Iterable, Mapping

import torch

from bench.step import sharded_model
from data.loader import Loader
from train.config import load_config
from train.distributed.ranks import Ranks, init_ranks
from train.optim.optimizer import Optimizer
from train.pretrain_config import PretrainConfig
from train.step import forward_backward, latent_stats
from train.training_data import open_training_data


class Contestant:
    """A recipe that trains on batches of its own data, which are read beforehand."""

    def __init__(self, arguments: Iterable[str], steps: int, ranks: Ranks) -> None:
        self.config = load_config(PretrainConfig, [*arguments])
        data = open_training_data(self.config)
        loader = Loader(data, self.config.data, rank=0, world_size=1, micro_batch_size=self.config.micro_batch_size)
        batches = [loader.next(timeout_seconds=600) for _ in range(steps)]
        loader.close()
        self.batches = [batch for batch in batches if batch is not None]
        self.stats = latent_stats(data.latent_spec, self.config.model.latent_channels, ranks.device)
        self.model = sharded_model(self.config.model, data.tokenizer.vocab_size, ranks, self.config.parallel)
        self.optimizer = Optimizer(self.model, self.config.optim, self.config.guard)

    def step(self, number: int) -> float:
        """Do the step of this number, from 0; return its CPU-seconds."""
        start, batch = time.process_time(), self.batches[number]
        for count, micro_batch in enumerate(batch.micro_batches, start=1):
            forward_backward(
                self.model,
                micro_batch,
                stats=self.stats,
                diffusion=self.config.diffusion,
                image_weight=self.config.loss.image_weight,
                parallel=self.config.parallel,
                global_text_targets=batch.num_text_targets,
                global_images=batch.num_images,
                is_last=count == len(batch.micro_batches),
            )
        self.optimizer.update(number + 1)
        return time.process_time() - start


def costs_over(reference: Iterable[str], others: Mapping[str, Iterable[str]], rounds: int) -> dict[str, list[float]]:
    """Return each recipe's CPU time of a step over the reference's: median, lowest and highest of `rounds` pairs.

    Recipes are arguments of train.pretrain. The order within a pair alternates, and the first pair does not count.
    """
    torch.set_num_threads(1)
    ranks, found = init_ranks(timeout_s=600, device="cpu"), {}
    for name, arguments in others.items():
        pair = [Contestant(recipe, rounds + 1, ranks) for recipe in ([*reference], arguments)]
        ratios = []
        for number in range(rounds + 1):
            order = (0, 1) if number % 2 else (1, 0)
            seconds = {i: pair[i].step(number) for i in order}
            ratios.append(seconds[1] / seconds[0])
        counted = ratios[1:]
        found[name] = [round(value, 3) for value in (statistics.median(counted), min(counted), max(counted))]
    ranks.close()
    return found
