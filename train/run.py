"""One training run: its parts, and what happens to them between steps: evaluation, previews, log rows, saves.

train/pretrain.py puts the parts together and runs the loop; train/rollback.py takes a run back after bad updates.
"""

import os
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

from data.dataset import DataSet
from data.loader import Loader
from data.loader_memory import loader_bytes
from model.latent_space import LatentStats
from train.checkpoints.resume import ResumePoint
from train.checkpoints.run_folder import RunFolder
from train.checkpoints.saver import Saver
from train.console import Console, heldout_table, plural, say
from train.distributed.cpu_settings import describe_cpu
from train.distributed.process import set_allocator, wait_for
from train.distributed.ranks import Ranks
from train.distributed.signals import StopKind, StopSignal, shield_worker
from train.heldout import EMA, KINDS, Heldout, metric_name
from train.metrics import Interval
from train.metrics_log import MetricsLog
from train.optim.optimizer import learning_rate
from train.pretrain_config import PretrainConfig
from train.previews import Previews
from train.profile import Profiler
from train.state import TrainState


@dataclass
class Run:
    """What one training run consists of."""

    config: PretrainConfig
    data: DataSet
    stats: LatentStats  # whitens the data's latents
    ranks: Ranks
    folder: RunFolder
    stop: StopSignal
    state: TrainState
    heldout: Heldout | None
    saver: Saver
    log: MetricsLog
    previews: Previews
    profiler: Profiler
    origin: ResumePoint
    started_from: str  # in words: a checkpoint, weights, or scratch
    groups: list[dict[str, Any]]  # what is done with the parameters of each group; see train/optim/groups.py

    def loader(self) -> Loader:
        """Return a reader that continues from the state's step and lanes; close it to end its processes."""
        return Loader(
            self.data,
            self.config.data,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
            micro_batch_size=self.config.micro_batch_size,
            first_step=self.state.progress.step + 1,
            states=self.state.lane_states,
            pin_memory=self.ranks.device.type == "cuda",
            worker_init_fn=partial(shield_worker, parent_pid=os.getpid()),
        )

    def save(self, final: bool = False) -> float:
        """Start saving the current step, and wait for it if `final`; return the seconds spent here. Collective."""
        start = self._clock()
        self.saver.settle()
        if self.saver.saved_step != self.state.progress.step:  # equal, 0, before the first update: nothing to save
            self.saver.start(self.state.snapshot(self.ranks))
            if final:
                self.saver.settle(tolerate=False)
        return time.monotonic() - start

    def evaluate(self, interval: Interval) -> StopKind:
        """Measure held-out losses if they are due and not yet known; return what stopped that, if any. Collective."""
        step = self.state.progress.step
        if not step or self.heldout is None or not self.config.evaluation.due(step) or self.state.metrics:
            return StopKind.NONE
        start, optimizer = self._clock(), self.state.optimizer
        losses: dict[str, float] = {}
        row: dict[str, float] = {}
        for weights in self.config.evaluation.weights(bool(optimizer.emas)):
            with optimizer.averaged() if weights == EMA else nullcontext():
                measured = self.heldout.losses(self.state.model, self.stats, self.stop)
            if isinstance(measured, StopKind):
                interval.evaluation_s += time.monotonic() - start
                return measured
            for name, found in measured.items():
                losses |= {metric_name(name, kind, weights): found[kind] for kind in KINDS if found[kind] is not None}
                row |= _heldout_row(name, found, weights)
        interval.evaluation_s += time.monotonic() - start
        self.state.metrics = losses
        if self.saver.saved_step == step:
            self.saver.saved_step = 0  # it was saved without these metrics: save it again
        self.log.write({"step": step, **losses, **row})
        if self.ranks.is_first:
            say(heldout_table(step, losses | row))
        return StopKind.NONE

    def draw_previews(self, interval: Interval) -> None:
        """Draw previews with the current weights, if they are due. Collective."""
        step = self.state.progress.step
        if self.previews.due(step):
            start = self._clock()
            self.previews.make(self.state.optimizer, step, self.stop)
            interval.evaluation_s += time.monotonic() - start

    def _clock(self) -> float:
        """Return the time once the steps so far are done: what follows must not be charged for them."""
        wait_for(self.ranks.device)
        return time.monotonic()

    def log_row(self, interval: Interval, console: Console) -> None:
        """Log the steps since the last row, if any made an update. Collective."""
        if not interval.num_steps:
            return
        progress = self.state.progress
        row = {name: getattr(progress, name) for name in ("step", "tokens_seen", "images_seen", "rollbacks")}
        row |= interval.row(self.state.lane_states)
        row["loss"] = (row["text_loss"] or 0) + self.config.loss.image_weight * (row["image_loss"] or 0)
        row["learning_rate"] = learning_rate(progress.step, self.config.optim)
        row["skipped_updates"] = int(self.state.optimizer.guard.counts[0])
        # The longest a stop can take: the current step, the save in progress, and the final one; null: not known yet.
        row["stop_s"] = None if self.saver.seconds is None else row["step_s"] + 2 * self.saver.seconds
        self.log.write(row)
        console.show(row)

    def describe(self) -> Iterator[str]:
        """Yield the lines that say what is about to be trained, on what, and in how much host memory."""
        config, data, ranks = self.config, self.data, self.ranks
        for name, source in zip(config.data.sources, data.sources, strict=True):
            tokens = sum(shard.tokens(config.model.patch_size) for shard in source.manifest.shards)
            later = "".join(f", {w:.3g} from step {step}" for step, w in source.config.weight_from.items())
            weight = f"weight {source.config.weight:.3g}{later}"
            yield f"source {name}: {plural(source.manifest.records, 'document')}, {tokens:,} tokens, {weight}"
        memory = loader_bytes(data, config.data, ranks.world_size)
        parts = ", ".join(f"{name} {size / 2**20:,.1f}" for name, size in memory.items() if size >= 2**16)
        yield f"data takes at most {sum(memory.values()) / 2**20:,.1f} MiB of host memory a rank: {parts or 'tables'}"
        start = "init_from" if config.init_from else "init_from_llm" if config.init_from_llm else None
        ignored = f" ({start} counts only without checkpoints)" if start and self.origin.checkpoint else ""
        num_parameters = sum(parameter.numel() for parameter in self.state.model.parameters())
        yield (
            f"{num_parameters / 1e6:.2f}M parameters, {plural(ranks.world_size, 'rank')} on {ranks.device.type}, "
            f"{config.data.lanes} x {config.data.sequence_length} tokens a step, {config.optim.steps} steps, "
            f"{self.started_from}{ignored}; config in {self.folder.path / 'config.yaml'}"
        )
        for row in self.groups:
            decay = "" if row["weight_decay"] is None else f", weight decay {row['weight_decay']:g}"
            how = "frozen" if row["frozen"] else f"learning rate x {row['lr_scale']:g}{decay}"
            yield f"group {row['group']}: {row['parameters']:,} parameters in {plural(row['tensors'], 'tensor')}, {how}"
        if ranks.device.type == "cpu":
            yield describe_cpu()
        if ranks.device.type == "cuda":
            yield f"CUDA's allocator: {set_allocator()}"
        if data.too_long:
            count = plural(len(data.too_long), "document")
            yield f"warning: left out of training: {count}: {'; '.join(data.too_long[:8])}"


def _heldout_row(name: str, found: dict[str, Any], weights: str) -> dict[str, float]:
    """Return what a row says of a held-out source beside its losses: perplexity, and x0_error by bin."""
    row = {} if found["perplexity"] is None else {metric_name(name, "perplexity", weights): found["perplexity"]}
    of_bins = found["x0_error_by_log_snr"].items()
    return row | {metric_name(name, f"x0_error/{of}", weights): bin_["error"] for of, bin_ in of_bins if bin_["images"]}
