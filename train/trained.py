"""A trained model in memory, whole on every rank, with what it was trained on: for samplers and evaluations."""

from dataclasses import dataclass
from pathlib import Path

import torch

from data.manifest import LatentSpec
from data.tokenizer import Tokenizer
from model.transfusion import Transfusion
from model.vae import load_vae, vae_hash
from train.distributed import Ranks
from train.recipe import PretrainConfig
from train.stored import Stored


@dataclass(frozen=True)
class Trained:
    """A model in evaluation mode, with what it was trained on."""

    model: Transfusion
    tokenizer: Tokenizer
    recipe: PretrainConfig
    latent_spec: LatentSpec | None  # None: trained on text alone
    grids: list[tuple[int, int]]  # latent grids of the training data, sorted
    step: int
    weights: str  # model, or the label of an EMA
    identity: str  # hash of the contents: another run under the same path and step has another

    @classmethod
    def load(cls, path: str | Path, ranks: Ranks, weights: str = "auto") -> "Trained":
        """Load an export, a checkpoint, or the newest of a run that verifies and stays. Collective.

        Raises FileNotFoundError or ValueError when there is none, or its tokenizer is not at hand.
        """
        return Stored.use(path, ranks, lambda stored: cls._of(stored, ranks, weights))

    @classmethod
    def _of(cls, stored: Stored, ranks: Ranks, weights: str) -> "Trained":
        tokenizer = Tokenizer(stored.recipe.data.tokenizer)
        if tokenizer.hash != stored.meta["fingerprint"]["tokenizer"]:
            raise ValueError(
                f"{stored.recipe.data.tokenizer} is not the tokenizer that {stored.folder} was trained with"
            )
        with torch.device("meta"):
            model = Transfusion(stored.recipe.model, tokenizer.vocab_size)
        model.to_empty(device=ranks.device).eval()
        chosen = stored.read(weights, {name: parameter.data for name, parameter in model.named_parameters()}, ranks)
        grids = [tuple(grid) for grid in stored.meta["grids"]]
        of_stored = stored.recipe, stored.latent_spec, grids, stored.step, chosen, stored.identity
        return cls(model, tokenizer, *of_stored)


def load_codec(vae: str | None, spec: LatentSpec) -> torch.nn.Module:
    """Return the VAE `vae`, a folder or hub id; raise ValueError unless it is the one that made latents of `spec`."""
    if vae is None:
        raise ValueError("no VAE: set vae=FOLDER to the one the data was encoded with")
    codec = load_vae(vae)
    if (found := vae_hash(codec)) != spec.vae_hash:
        raise ValueError(f"vae={vae} has hash {found}, the data was encoded with {spec.vae_hash}")
    return codec
