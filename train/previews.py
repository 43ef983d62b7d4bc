"""Sample pictures at an interval, from the first EMA of the weights, or the weights themselves without one."""

import logging

import torch

from data.dataset import DataSet
from data.durable import atomic_write
from data.pictures import write_sheet
from model.transfusion import Transfusion
from train.checkpoints.run_folder import RunFolder
from train.distributed.parallelize import gather_weights
from train.distributed.ranks import Ranks
from train.distributed.signals import StopSignal
from train.inference.pipeline import Pipeline
from train.metrics_log import MetricsLog
from train.optim.optimizer import Optimizer
from train.pretrain_config import PretrainConfig

log = logging.getLogger(__name__)


class _Stopped(Exception):
    """A stop signal came while pictures were drawn."""


class Previews:
    """Draws on rank 0 from gathered weights, while the other ranks wait.

    Its model has weights only while it draws: a whole copy on one device, which train/planning counts.
    """

    def __init__(self, config: PretrainConfig, data: DataSet, ranks: Ranks, folder: RunFolder, log: MetricsLog):
        """Raise ValueError, on every rank, if previews are configured and cannot be decoded. Collective."""
        self.config, self.ranks, self.folder, self.log = config, ranks, folder, log
        self._pipeline: Pipeline | None = None  # rank 0's

        def prepare() -> None:
            with torch.device("meta"):
                model = Transfusion(config.model, data.tokenizer.vocab_size).eval()
            spec, grids = data.latent_spec, data.grids
            self._pipeline = Pipeline.of(model, data.tokenizer, config, spec, grids, config.vae, ranks.device)
            self._pipeline.require_pictures()
            (folder.path / "previews").mkdir(exist_ok=True)

        if config.preview.interval_steps is not None:
            ranks.on_first(prepare)

    def due(self, step: int) -> bool:
        interval = self.config.preview.interval_steps
        return interval is not None and step % interval == 0

    def make(self, optimizer: Optimizer, step: int, stop: StopSignal) -> None:
        """Save a sheet of the prompts' pictures, unless a stop signal comes. Collective; no global random state."""
        weights = gather_weights(optimizer.preferred_weights(), keep=self.ranks.is_first)
        # The other ranks wait here rather than in the next vote, whose timeout is shorter.
        self.ranks.on_first(lambda: self._draw(weights, step, stop))

    def _draw(self, weights: dict[str, torch.Tensor], step: int, stop: StopSignal) -> None:
        def poll(_: float) -> None:
            if stop.kind:
                raise _Stopped

        assert self._pipeline is not None
        config, model = self.config.preview, self._pipeline.model
        device = self.ranks.device
        model.load_state_dict({name: weight.to(device, torch.float32) for name, weight in weights.items()}, assign=True)
        try:
            sampler = config.sampler(self.config.diffusion)
            pictures = self._pipeline.draw(config.prompts, sampler, self.config.seed, poll)
        except _Stopped:
            return
        finally:
            model.to("meta")
        path = self.folder.path / "previews" / f"step-{step:08d}.png"
        try:
            with atomic_write(path) as file:
                write_sheet(file, pictures, config.prompts)
        except OSError as error:  # a full disk costs the preview, not the run
            log.warning("no preview of step %d: %s", step, error)
            return
        self.log.picture(path, step)
