"""Sample pictures every so often, from the weights in training (their first EMA if there is one)."""

import logging

import torch

from data.dataset import DataSet
from data.durable import atomic_write
from data.pictures import contact_sheet
from model.transfusion import Transfusion
from train.checkpoints.run_folder import RunFolder
from train.distributed.parallelize import gather_weights
from train.distributed.ranks import Ranks
from train.distributed.signals import StopSignal
from train.inference.pipeline import Pipeline
from train.metrics import MetricsLog
from train.optim.optimizer import Optimizer
from train.pretrain_config import PretrainConfig

log = logging.getLogger(__name__)


class _Stopped(Exception):
    """A stop signal came while a picture was drawn."""


class Previews:
    """Draws on rank 0 from gathered weights; the other ranks wait at their next vote."""

    def __init__(self, recipe: PretrainConfig, data: DataSet, ranks: Ranks, folder: RunFolder, log: MetricsLog):
        """Raise ValueError, on every rank, when previews are asked for and cannot be decoded. Collective."""
        self.recipe, self.ranks, self.folder, self.log = recipe, ranks, folder, log
        self._generation: Pipeline | None = None

        def prepare() -> None:
            model = Transfusion(recipe.model, data.tokenizer.vocab_size).to(ranks.device).eval()
            spec, grids = data.latent_spec, data.grids
            self._generation = Pipeline.of(model, data.tokenizer, recipe, spec, grids, recipe.vae)
            (folder.path / "previews").mkdir(exist_ok=True)

        if recipe.preview.interval_steps is not None:
            ranks.on_first(prepare)

    def due(self, step: int) -> bool:
        interval = self.recipe.preview.interval_steps
        return interval is not None and step % interval == 0

    def make(self, optimizer: Optimizer, step: int, stop: StopSignal) -> None:
        """Save a sheet of the prompts' pictures, unless told to stop meanwhile. Collective; touches no random state."""
        weights = gather_weights(optimizer.preferred_weights(), keep=self.ranks.is_first)
        # The peers wait here rather than in the next vote, whose timeout is short.
        self.ranks.on_first(lambda: self._draw(weights, step, stop))

    def _draw(self, weights: dict[str, torch.Tensor], step: int, stop: StopSignal) -> None:
        def poll(_: float) -> None:
            if stop.kind:
                raise _Stopped

        self._generation.model.load_state_dict(weights)
        config = self.recipe.preview
        try:
            pictures = self._generation.draw(config.prompts, config.sampler, self.recipe.seed, poll)
        except _Stopped:
            return
        path = self.folder.path / "previews" / f"step-{step:08d}.png"
        try:
            with atomic_write(path) as file:
                contact_sheet(pictures, config.prompts).save(file, "PNG")
        except OSError as error:  # a full disk costs the picture
            log.warning("no preview of step %d: %s", step, error)
            return
        self.log.picture(path, step)
