"""Sample pictures every so often, from the weights in training (their first EMA if there is one)."""

from data.dataset import DataSet
from data.shards import atomic_write
from model.sampler import SamplerConfig
from model.transfusion import Transfusion
from train.distributed import Ranks
from train.figures import contact_sheet
from train.generation import Generation
from train.metrics import MetricsLog
from train.optim import Optimizer
from train.parallelize import gather_weights
from train.recipe import PretrainConfig
from train.run_folder import RunFolder


class Previews:
    """Draws on rank 0 from gathered weights; the other ranks wait at their next vote."""

    def __init__(self, recipe: PretrainConfig, data: DataSet, ranks: Ranks, folder: RunFolder, log: MetricsLog):
        """Raise ValueError, on every rank, when previews are asked for and cannot be decoded. Collective."""
        self.recipe, self.ranks, self.folder, self.log = recipe, ranks, folder, log
        self._generation: Generation | None = None

        def prepare() -> None:
            model = Transfusion(recipe.model, data.tokenizer.vocab_size).to(ranks.device).eval()
            spec, grids = data.latent_spec, data.grids
            self._generation = Generation.of(model, data.tokenizer, recipe, spec, grids, recipe.vae)
            (folder.path / "previews").mkdir(exist_ok=True)

        if recipe.preview.interval_steps is not None:
            ranks.on_first(prepare)

    def due(self, step: int) -> bool:
        interval = self.recipe.preview.interval_steps
        return interval is not None and step % interval == 0

    def make(self, optimizer: Optimizer, step: int) -> None:
        """Save a sheet of the prompts' pictures. Collective; the random state of training is not touched."""
        weights = gather_weights(optimizer.preferred_weights(), keep=self.ranks.is_first)
        if self._generation is None:
            return
        self._generation.model.load_state_dict(weights)
        config = self.recipe.preview
        sampler = SamplerConfig(sampler="ddim", steps=config.steps, guidance=config.guidance)
        pictures = self._generation.draw(config.prompts, sampler, self.recipe.seed)
        path = self.folder.path / "previews" / f"step-{step:08d}.png"
        with atomic_write(path) as file:
            contact_sheet(pictures, config.prompts).save(file, "PNG")
        self.log.picture(path, step)
