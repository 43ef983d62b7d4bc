"""The weak model of autoguidance: which one is meant, and whether its predictions can be set against the model's.

It is an earlier checkpoint of the run, another run's, or other weights of the same checkpoint (an EMA of another
half-life). It may have another width and depth.
"""

from dataclasses import asdict

from train.distributed.ranks import Ranks
from train.inference.saved_model import LoadedModel, SavedModel

# Settings of diffusion that decide what a model learns best, not what its prediction means.
OF_TRAINING = (
    *("timestep_sampling", "logit_normal_mean", "logit_normal_std"),
    *("before_caption_max_timestep", "min_snr_gamma", "loss"),
)


def load_with_guide(
    checkpoint: str,
    weights: str,
    tokenizer: str | None,
    guide: str | None,
    guide_weights: str | None,
    base: str | None,
    ranks: Ranks,
) -> tuple[LoadedModel, LoadedModel | None]:
    """Load the `weights` of a checkpoint and those of its guide, if any; see PipelineConfig. Collective.

    Raises FileNotFoundError or ValueError for what cannot be read, and for a guide that cannot guide this model.
    """

    def read(saved: SavedModel) -> tuple[LoadedModel, LoadedModel | None]:
        saved = saved.on(base)
        model = LoadedModel.read(saved, ranks, weights, tokenizer)
        own = guide is None and guide_weights is not None
        return model, read_guide(saved, model) if own else None

    def read_guide(saved: SavedModel, model: LoadedModel) -> LoadedModel:
        require_comparable(saved, model.saved)
        path = str(model.tokenizer.path)
        found = LoadedModel.read(saved, ranks, guide_weights or "auto", path, key="guide_weights")
        if (saved.identity, found.weights) == (model.saved.identity, model.weights):
            raise ValueError(
                f"guide={guide}, guide_weights={guide_weights}: {model.weights} of {saved.folder} is the model itself; "
                "expected a weaker one: set guide to an earlier checkpoint, or guide_weights to other weights"
            )
        return found

    model, own_guide = SavedModel.use(checkpoint, ranks, read)
    if guide is None:
        return model, own_guide
    common = model.saved.meta.get("base")  # None: nothing is frozen

    def read_other(saved: SavedModel) -> LoadedModel:
        return read_guide(saved.on(base) if common is not None and saved.meta.get("base") == common else saved, model)

    return model, SavedModel.use(guide, ranks, read_other, "guide")


def require_comparable(guide: SavedModel, model: SavedModel) -> None:
    """Raise ValueError for a guide whose predictions mean something else."""
    ours, found = _meaning(model), _meaning(guide)
    if differing := [name for name in {**ours, **found} if ours.get(name) != found.get(name)]:
        what = "; ".join(f"{name} is {found.get(name)}, expected {ours.get(name)}" for name in differing)
        raise ValueError(
            f"guide={guide.folder} cannot guide {model.folder}: {what}, as the model has. Set guide to an earlier "
            "checkpoint of the model's run, or to one that was trained with the same data and diffusion"
        )


def _meaning(saved: SavedModel) -> dict[str, object]:
    """Return by name what two models' predictions must have in common to be subtracted."""
    model, spec = saved.config.model, saved.latent_spec
    diffusion = {name: value for name, value in asdict(saved.config.diffusion).items() if name not in OF_TRAINING}
    latents = {} if spec is None else {f"latent {name}": value for name, value in vars(spec).items()} | spec.statistics
    return {
        "tokenizer": saved.meta["fingerprint"]["tokenizer"],
        **latents,
        **{f"model.{name}": getattr(model, name) for name in ("patch_size", "image_attention")},
        **{f"diffusion.{name}": value for name, value in diffusion.items()},
    }
