"""Losses on data that is never trained on: text loss and noise error of each source, during a run or after it.

Every document once, captions first, no dropout; noise and timesteps depend on the seed alone, so two evaluations of
one model agree whatever the number of ranks, up to the order of float additions. The ranks agree on each batch as in
training, so a stop signal ends an evaluation within a batch and a sharded model's collectives always match.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch import nn

from data.dataset import DataConfig, DataSet, open_data
from data.documents import OrderConfig
from data.lanes import SourceConfig
from data.loader import Loader
from data.manifest import Manifest
from model.diffusion import DiffusionConfig
from model.vae import LatentStats
from train.distributed import Ranks
from train.feed import next_batch
from train.parallelize import reshard
from train.signals import StopKind, StopSignal
from train.step import micro_step

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class HeldoutConfig:
    interval_steps: int | None = None  # steps between evaluations, >= 1; null: none during the run
    heldout: dict[str, str] = field(default_factory=dict)  # encoded folders by name, never trained on
    lanes: int = 8  # sequences of a batch over all ranks, >= the number of ranks
    max_batches: int | None = None  # of each source, >= 1; null: all of it, each document once

    def __post_init__(self) -> None:
        if self.interval_steps is not None and (self.interval_steps < 1 or not self.heldout):
            raise ValueError(
                f"evaluation.interval_steps={self.interval_steps}: expected at least 1, and evaluation.heldout.NAME="
                "FOLDER to measure on"
            )
        if self.lanes < 1 or (self.max_batches is not None and self.max_batches < 1):
            raise ValueError(
                f"evaluation.lanes={self.lanes}, max_batches={self.max_batches}: expected at least 1, or null for the "
                "latter"
            )

    def due(self, step: int) -> bool:
        return self.interval_steps is not None and step % self.interval_steps == 0


class Heldout:
    """Held-out sources, opened and checked against what the model was trained on."""

    def __init__(
        self,
        config: HeldoutConfig,
        training: DataConfig,
        seed: int,
        patch_size: int,
        diffusion: DiffusionConfig,
        vae_hash: str | None,  # of the training data's latents; None: text alone
        ranks: Ranks,
    ) -> None:
        """Raise ValueError for a source that is training data too, or of another tokenizer or VAE, or too small."""
        if ranks.world_size > config.lanes:
            raise ValueError(
                f"evaluation.lanes={config.lanes} on {ranks.world_size} ranks: expected at least one a rank; set "
                f"evaluation.lanes={ranks.world_size}"
            )
        check_disjoint(training, config.heldout)
        self._config, self._ranks = config, ranks
        self._diffusion = replace(
            diffusion, before_caption_max_timestep=None, timestep_sampling="uniform", min_snr_gamma=None
        )
        self._sources: dict[str, tuple[DataConfig, DataSet]] = {}
        for name, path in config.heldout.items():
            if (records := Manifest.load(path).records) < config.lanes:
                raise ValueError(
                    f"held-out source {name}: {path} has {records} documents, fewer than evaluation.lanes="
                    f"{config.lanes}; use fewer lanes or more data"
                )
            source = DataConfig(
                sources={name: SourceConfig(path=path, repeat=False)},
                tokenizer=training.tokenizer,
                lanes=config.lanes,
                sequence_length=training.sequence_length,
                look_ahead=training.look_ahead,
                order=OrderConfig(caption_first=1.0, caption_dropout=0.0),
            )
            data = open_data(source, seed, patch_size)
            if data.latent_spec is not None and data.latent_spec.vae_hash != vae_hash:
                raise ValueError(
                    f"held-out source {name}: {path} holds latents of VAE {data.latent_spec.vae_hash}, the model was "
                    f"trained on those of {vae_hash}; encode it with that VAE"
                )
            self._sources[name] = source, data
            if data.too_long and ranks.is_first:
                log.warning("held-out source %s leaves out %s", name, "; ".join(data.too_long[:8]))

    @property
    def metrics(self) -> list[str]:
        """Return the names of what `losses` can measure."""
        kinds = {
            name: ["text_loss", "image_loss"][: 2 if data.grids else 1] for name, (_, data) in self._sources.items()
        }
        return [metric_name(name, kind) for name, of_source in kinds.items() for kind in of_source]

    def losses(
        self, model: nn.Module, stats: LatentStats, stop: StopSignal
    ) -> dict[str, dict[str, float | None]] | StopKind:
        """Return `text_loss` (nats a text target) and `image_loss` (mean squared error, an image) of each source.

        None in place of a loss where there is nothing to measure. If any rank was told to stop meanwhile, returns what
        that asks for. Collective.
        """
        measured = {}
        for name in self._sources:
            sums = torch.zeros(4, dtype=torch.float64, device=self._ranks.device)
            for part in self._batches(name, model, stats, stop):
                if isinstance(part, StopKind):
                    return part
                sums += part
            sums = sums.cpu()
            dist.all_reduce(sums, group=self._ranks.vote_group)
            text_nll, image_error, targets, images = sums.tolist()
            measured[name] = {
                "text_loss": text_nll / targets if targets else None,
                "image_loss": image_error / images if images else None,
            }
        return measured

    @torch.no_grad()
    def _batches(
        self, name: str, model: nn.Module, stats: LatentStats, stop: StopSignal
    ) -> Iterator[torch.Tensor | StopKind]:
        """Yield (text nll, image error, text targets, images) of each micro-batch of this rank, or why to stop."""
        ranks, (config, data) = self._ranks, self._sources[name]
        loader = Loader(data, config, rank=ranks.rank, world_size=ranks.world_size, micro_batch_size=config.lanes)
        try:
            while True:
                fed = next_batch(loader, ranks, stop)
                if fed.vote.stop != StopKind.NONE:
                    yield fed.vote.stop
                    return
                done = self._config.max_batches is not None and fed.batch.step > self._config.max_batches
                if done or fed.vote.ranks_ended == ranks.world_size:
                    return
                for micro_batch in fed.batch.micro_batches:
                    loss = micro_step(
                        model,
                        micro_batch.to(ranks.device),
                        stats=stats,
                        diffusion=self._diffusion,
                        image_weight=1.0,
                        global_text_targets=1,
                        global_images=1,
                    )
                    counts = loss.text_nll.new_tensor([micro_batch.num_text_targets, micro_batch.num_images])
                    yield torch.cat([torch.stack([loss.text_nll, loss.image_error]), counts]).double()
        finally:
            loader.close()
            reshard(model)


def metric_name(source: str, kind: str) -> str:
    """Return a loss's name in metrics.jsonl and in `checkpoint.best_metric`."""
    return f"heldout/{source}/{kind}"


def check_disjoint(training: DataConfig, sources: dict[str, str]) -> None:
    """Raise ValueError if a held-out folder shares a shard with the training data (P10)."""
    trained = {}
    for source in training.sources.values():
        manifest = Manifest.load(source.path)
        trained.update({(e.bytes, e.index_crc32): manifest.shard_path(i) for i, e in enumerate(manifest.shards)})
    for name, path in sources.items():
        for shard in Manifest.load(path).shards:
            twin = trained.get((shard.bytes, shard.index_crc32))
            if twin is not None:
                raise ValueError(f"held-out source {name}: {path}/{shard.name} is training data too ({twin})")
