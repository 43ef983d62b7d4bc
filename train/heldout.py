"""Losses on held-out data, which is never trained on: text and image loss of each source, during a run or after it.

Each document is read once with its caption first and no caption dropout, which measures texts and drawing from
captions; documents with images once more with the caption last, which measures describing, and once more with the
caption first at levels and with noise that no config changes, which measures the error of x0 (model/log_snr_bins.py).
Noise and timesteps depend on the seed alone, so two evaluations of one model agree on any number of ranks, up to the
order of float additions. Ranks vote before each batch as in training, so a stop signal ends an evaluation within a
batch and the collectives of a sharded model always match.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from data.arrangement import OrderConfig
from data.dataset import DataConfig, DataSet, open_data
from data.lane_state import Position
from data.layout import IGNORE
from data.loader import Loader
from data.manifest import LatentSpec, Manifest
from data.packing import NO_IMAGE, PackedBatch
from data.source import SourceConfig
from data.storage import Location
from data.tokenizer import SpecialIds
from model.latent_space import LatentStats
from model.log_snr_bins import BINS, mean_by_bin, mean_over_bins
from model.transfusion import Transfusion
from train.distributed.parallelize import reshard
from train.distributed.ranks import Ranks
from train.distributed.signals import StopKind, StopSignal
from train.evaluation.loss_intervals import by_document, intervals, of_documents
from train.evaluation.scores import perplexity
from train.next_batch import next_batch
from train.step import StepLoss, micro_step

if TYPE_CHECKING:
    from train.pretrain_config import PretrainConfig

log = logging.getLogger(__name__)

# Captions first: nats per text target, of texts and of captions before their image; mean squared error of an image's
# prediction (drawing). Captions last: nats per text target of the captions (describing). Captions first again, at noise
# levels spread evenly over the bins of log SNR: mean squared error of whitened x0, its mean over the bins.
KINDS = ("text_loss", "image_loss", "captioning_loss", "x0_error")
RAW, EMA = "heldout", "heldout_ema"  # of the weights as they are, and of their first average
X0_SEED = 0  # of the last, whatever a run's own: runs of several seeds are compared in the same noise


@dataclass(frozen=True, kw_only=True)
class HeldoutConfig:
    interval_steps: int | None = None  # steps between evaluations, >= 1; null: none during the run
    heldout: dict[str, Location] = field(default_factory=dict)  # encoded folders by name, never trained on
    # Sequences per batch over all ranks, at most the source's documents; more ranks than that idle. With
    # parallel.compile, micro_batch_size of them for each rank need no further compilation.
    lanes: int = 8
    ema: bool = True  # also measure the first average of the weights, if the run keeps one; takes as long again
    max_batches: int | None = None  # per source and pass, >= 1; null: each document once

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

    @property
    def measured(self) -> dict[str, Location]:
        """Return the folders that a run measures itself on."""
        return self.heldout if self.interval_steps is not None else {}

    def weights(self, has_average: bool) -> tuple[str, ...]:
        """Return which weights a run measures: RAW, and EMA if it keeps an average."""
        return (RAW, EMA) if self.ema and has_average else (RAW,)

    def due(self, step: int) -> bool:
        return self.interval_steps is not None and step % self.interval_steps == 0


class Heldout:
    """Held-out sources, opened and checked against what the model was trained on."""

    def __init__(
        self,
        config: HeldoutConfig,
        trained: "PretrainConfig",  # what the model was trained with
        spec: LatentSpec | None,  # of the training data; None: text alone
        ranks: Ranks,
        *,
        rows: int | None = None,  # at most, of a rank's micro-batch; None: any number
        like_training: bool = False,  # with gradients enabled, as compiled code otherwise differs and is compiled again
        intervals: bool = False,  # of the losses too, which keeps the losses of each document
    ) -> None:
        """Raise ValueError for another tokenizer or latent space; TrainedRecords refuses what was trained on."""
        self._config, self._ranks, self._rows, self._like_training = config, ranks, rows, like_training
        self._intervals = intervals
        self._diffusion = replace(
            trained.diffusion,
            before_caption_max_timestep=None,
            timestep_sampling="uniform",
            min_snr_gamma=None,
            loss="own",
        )
        self._sources: dict[str, tuple[DataConfig, dict[str, DataSet]]] = {}  # by name; data by pass
        self._warned: set[str] = set()  # of empty bins
        for name, path in config.heldout.items():
            source = DataConfig(
                sources={name: SourceConfig(path=path, repeat=False)},
                tokenizer=trained.data.tokenizer,
                lanes=min(config.lanes, Manifest.load(path).records),  # not by rank: ranks must not change a result
                sequence_length=trained.data.sequence_length,
                look_ahead=trained.data.look_ahead,
                order=OrderConfig(caption_first=1.0, caption_dropout=0.0),
                clean_copies=trained.data.clean_copies,
            )
            data = open_data(source, trained.seed, trained.model.patch_size)
            images, trained_on = (s.images if s is not None else "text alone" for s in (data.latent_spec, spec))
            if data.latent_spec is not None and images != trained_on:
                raise ValueError(
                    f"held-out source {name}: {path} holds {images}, the model was trained on {trained_on}; encode it "
                    "with the vae= of the training data"
                )
            passes = {"caption_first": data}
            if data.grids:
                passes["denoising"] = data.under(seed=X0_SEED)
                passes["image_first"] = data.under(order=OrderConfig(caption_first=0.0, caption_dropout=0.0))
            self._sources[name] = source, passes
            if data.too_long and ranks.is_first:
                log.warning("documents of held-out source %s are left out: %s", name, "; ".join(data.too_long[:8]))

    @classmethod
    def of_run(cls, config: "PretrainConfig", data: DataSet, ranks: Ranks) -> "Heldout | None":
        """Open what a run on `data` measures itself on, None for nothing; also refuse a best_metric it cannot give."""
        if not config.evaluation.measured:
            return None
        heldout = cls(
            config.evaluation,
            config,
            data.latent_spec,
            ranks,
            # Training's shapes, and thereby its compiled graphs, if a rank has as many rows; its memory in any case.
            rows=min(config.micro_batch_size, -(-config.data.lanes // ranks.world_size)),
            like_training=config.parallel.compile,
        )
        best = config.checkpoint.best_metric
        metrics = heldout.metrics(config.evaluation.weights(bool(config.optim.ema_half_lives)))
        if best is not None and best not in metrics:
            raise ValueError(f"checkpoint.best_metric={best}: expected one of {metrics}, which the data can give")
        return heldout

    def metrics(self, weights: Sequence[str]) -> list[str]:
        """Return the names of what `losses` can measure of each of the weights."""
        kinds = {name: KINDS if len(passes) > 1 else KINDS[:1] for name, (_, passes) in self._sources.items()}
        return [metric_name(name, kind, of) for of in weights for name, found in kinds.items() for kind in found]

    def losses(self, model: Transfusion, stats: LatentStats, stop: StopSignal) -> dict[str, dict[str, Any]] | StopKind:
        """Return the losses of each source (see KINDS), None where there is nothing to measure, and their counts.

        `x0_error_by_log_snr` has each bin's error and number of images; with an empty bin, `x0_error` is None.
        `intervals`, if asked for, has (low, high) of each loss at 95 %. If any rank receives a stop signal, returns
        which instead. Collective.
        """
        measured = {}
        for name, (config, passes) in self._sources.items():
            nothing = {"text_nll": 0.0, "image_error": 0.0, "text_targets": 0, "images": 0, "documents": 0}
            sums, x0_errors = {"image_first": nothing}, torch.zeros(3, len(BINS))
            documents = dict.fromkeys(passes, np.zeros((0, 4)))
            for order, data in passes.items():
                found = self._sums(config, data, order, model, stats, stop)
                if isinstance(found, StopKind):
                    return found
                totals, documents[order] = found
                of_losses, of_bins = totals.split([len(nothing), 3 * len(BINS)])
                sums[order] = dict(zip(nothing, of_losses.tolist(), strict=True))
                if order == "denoising":
                    x0_errors = of_bins.view(3, -1)
            first, last = sums["caption_first"], sums["image_first"]
            counts = {key: int(first[key]) for key in ("documents", "text_targets", "images")}
            counts["caption_targets"] = int(last["text_targets"])
            text_loss = first["text_nll"] / counts["text_targets"] if counts["text_targets"] else None
            measured[name] = {
                "text_loss": text_loss,
                "perplexity": None if text_loss is None else perplexity(text_loss),
                "image_loss": first["image_error"] / counts["images"] if counts["images"] else None,
                "captioning_loss": last["text_nll"] / last["text_targets"] if last["text_targets"] else None,
                **self._x0_errors(name, x0_errors),
                **counts,
            }
            if self._intervals:
                measured[name]["intervals"] = intervals(documents, x0_errors)
        return measured

    def _x0_errors(self, name: str, sums: torch.Tensor) -> dict[str, Any]:
        """Return the mean error over the bins and of each, none for texts; warn once of bins without images."""
        if "denoising" not in self._sources[name][1]:
            return {"x0_error": None, "x0_error_by_log_snr": {}}
        means, counts = mean_by_bin(sums), sums[1].int().tolist()
        empty = [of_bin for of_bin, count in zip(BINS, counts, strict=True) if not count]
        if any(counts) and empty and self._ranks.is_first and name not in self._warned:  # else none is drawn
            self._warned.add(name)
            log.warning(
                "held-out source %s: none of its images was measured at a log SNR in %s, so its x0_error is null; give "
                "it more images, raise evaluation.max_batches, or train with a schedule that reaches these levels",
                *(name, ", ".join(empty)),
            )
        by_bin = zip(BINS, means, counts, strict=True)
        return {
            "x0_error": mean_over_bins(means),
            "x0_error_by_log_snr": {of_bin: {"error": error, "images": count} for of_bin, error, count in by_bin},
        }

    @torch.no_grad()
    def _sums(
        self, config: DataConfig, data: DataSet, order: str, model: Transfusion, stats: LatentStats, stop: StopSignal
    ) -> tuple[torch.Tensor, np.ndarray] | StopKind:
        """Return all ranks' sums, f64 [5 + 3 bins], or why to stop: `_measure`'s, documents fifth. Collective.

        Also f64 [documents, 4]: text nll, text targets, image error and images of each, if intervals are asked for.
        """
        ranks = self._ranks
        most = self._config.max_batches or math.inf
        documents: set[Position] = set()
        each: list[torch.Tensor] = []
        sums = torch.zeros(4 + 3 * len(BINS), dtype=torch.float64, device=ranks.device)
        rows = self._rows or config.lanes
        loader = Loader(
            data, config, rank=ranks.rank, world_size=ranks.world_size, micro_batch_size=rows, may_idle=True
        )
        try:
            while True:
                agreed = next_batch(loader, ranks, stop)
                if agreed.vote.stop != StopKind.NONE:
                    return agreed.vote.stop
                batch = agreed.batch
                assert batch is not None  # only a stop leaves a rank without one
                if batch.step > most or agreed.vote.ranks_ended == ranks.world_size:
                    break
                documents.update(position for positions in batch.documents.values() for position in positions)
                for micro_batch in batch.micro_batches:
                    if order == "image_first":
                        micro_batch = captions_alone(micro_batch, data.settings.special)
                    if self._intervals:
                        micro_batch = by_document(micro_batch)
                    loss = self._measure(model, micro_batch, stats, uniform_log_snr=order == "denoising")
                    counts = torch.tensor([micro_batch.num_text_targets, micro_batch.num_images], device=ranks.device)
                    sums += torch.cat([loss.text_nll[None], loss.image_error[None], counts, loss.x0_errors.flatten()])
                    if self._intervals:
                        each.append(of_documents(micro_batch, loss, model.config.patch_size))
        finally:
            loader.close()
            reshard(model)
        sums = sums.cpu()
        sums = torch.cat([sums[:4], torch.tensor([len(documents)]), sums[4:]])
        dist.all_reduce(sums, group=ranks.vote_group)
        if not self._intervals:
            return sums, np.zeros((0, 4))
        mine = torch.cat(each).cpu().numpy() if each else np.zeros((0, 4))
        return sums, np.concatenate(ranks.gather(mine))

    def _measure(self, model: Transfusion, batch: PackedBatch, stats: LatentStats, uniform_log_snr: bool) -> StepLoss:
        with torch.set_grad_enabled(self._like_training):
            return micro_step(
                model,
                batch.to(self._ranks.device),
                stats=stats,
                diffusion=self._diffusion,
                image_weight=1.0,
                global_text_targets=1,
                global_images=1,
                uniform_log_snr=uniform_log_snr,
            )


def captions_alone(batch: PackedBatch, special: SpecialIds) -> PackedBatch:
    """Keep only the text targets that describe an image: those of documents that begin with one, but neither the BOI of
    another nor an EOS right after an image.
    """
    begins = (batch.position_ids == 2) & (batch.grid_positions == 0).all(-1)  # the first patch, right after BOS BOI
    documents = batch.document_ids + torch.arange(len(begins))[:, None] * begins.shape[1]  # distinct in the batch
    described = torch.isin(documents, documents[begins]).flatten()[batch.text_target_index]
    at_eoi = (batch.image_ids.flatten().roll(1) != NO_IMAGE)[batch.text_target_index]
    ends_image = at_eoi & (batch.text_targets == special.eos)
    kept = described & ~ends_image & (batch.text_targets != special.boi) & (batch.text_targets != IGNORE)
    targets = torch.where(kept, batch.text_targets, IGNORE)
    return replace(batch, text_targets=targets, num_text_targets=int(kept.sum()))


def metric_name(source: str, kind: str, weights: str = RAW) -> str:
    """Return a loss's name in metrics.jsonl and in `checkpoint.best_metric`; `weights` is RAW or EMA."""
    return f"{weights}/{source}/{kind}"
