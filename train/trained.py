"""A trained model as it lies on disk: a run's sharded checkpoint, or the folder that train.export makes of one.

    <export>/model.safetensors   all parameters by name, unsharded
             config.yaml         the run's resolved config; `config=` reads it back
             tokenizer.model, vae/   copies of what the run names
             export.json         step, latent spec, grids, hashes; written last

Either loads on any number of ranks, each of which gets the whole model.
"""

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from data.manifest import LatentSpec
from data.tokenizer import Tokenizer
from model.transfusion import Transfusion
from model.vae import load_vae, vae_hash
from train import checkpoint
from train.checkpoint_storage import LISTING
from train.config import load_config
from train.distributed import Ranks
from train.ema import choose, is_label
from train.recipe import PretrainConfig

WEIGHTS_FILE, TOKENIZER_FILE, VAE_FOLDER, EXPORT_MARK = "model.safetensors", "tokenizer.model", "vae", "export.json"


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
        """Load an export, a checkpoint, or the newest of a run that verifies. Collective.

        Raises FileNotFoundError or ValueError when there is none, or its tokenizer is not at hand.
        """
        path = Path(path)
        exported = (path / EXPORT_MARK).is_file()
        folder = path if exported else find_checkpoint(path, ranks)
        if exported:
            meta = _read_mark(folder)
        else:
            checkpoint.read_extra(folder, "config.yaml")  # verifies it
            meta = json.loads(checkpoint.read_extra(folder, "meta.json"))
        # Written resolved: an interpolation would read this machine's environment (P11).
        if "${" in (folder / "config.yaml").read_text():
            raise ValueError(f"{folder / 'config.yaml'} holds an interpolation (${{...}}), which no run writes")
        recipe = load_config(PretrainConfig, [f"config={folder / 'config.yaml'}"])
        if exported:  # what its config names lies beside it
            data = replace(recipe.data, tokenizer=str(folder / TOKENIZER_FILE))
            recipe = replace(recipe, data=data, vae=recipe.vae and str(folder / VAE_FOLDER))
        tokenizer = Tokenizer(recipe.data.tokenizer)
        if tokenizer.hash != meta["fingerprint"]["tokenizer"]:
            raise ValueError(f"{recipe.data.tokenizer} is not the tokenizer that {folder} was trained with")
        chosen = choose(weights, [meta["weights"]] if exported else recipe.optim.weights, folder)
        with torch.device("meta"):
            model = Transfusion(recipe.model, tokenizer.vocab_size)
        model.to_empty(device=ranks.device).eval()
        parameters = {name: parameter.data for name, parameter in model.named_parameters()}
        if exported:
            _read_weights(folder / WEIGHTS_FILE, parameters)
        else:
            checkpoint.load(folder, {chosen: parameters}, ranks)
        spec = LatentSpec(**meta["latent_spec"]) if meta["latent_spec"] else None
        grids = [tuple(grid) for grid in meta["grids"]]
        identity = hashlib.sha256((folder / (EXPORT_MARK if exported else LISTING)).read_bytes()).hexdigest()[:16]
        return cls(model, tokenizer, recipe, spec, grids, meta["progress"]["step"], chosen, identity)


def find_checkpoint(path: Path, ranks: Ranks, key: str = "checkpoint") -> Path:
    """Return a checkpoint folder from its own path, a run's, or a checkpoints folder's; verified.

    Raises FileNotFoundError where there is none, ValueError where none is whole; `key` is the option that named it.
    """
    for root in (path / "checkpoints", path):
        if not (folders := checkpoint.saved(root)):
            continue
        if (newest := checkpoint.latest(root, ranks)) is None:
            raise ValueError(f"{key}={path}: all {len(folders)} checkpoints in it are damaged")
        return newest
    if not (path / LISTING).is_file():
        raise FileNotFoundError(f"{key}={path}: neither a checkpoint, a run folder that holds one, nor an export")
    if problems := checkpoint.verify(path, ranks):
        raise ValueError(f"{key}={path} is damaged: {'; '.join(problems)}")
    return path


def load_codec(vae: str | None, spec: LatentSpec) -> torch.nn.Module:
    """Return the VAE `vae`, a folder or hub id; raise ValueError unless it is the one that made latents of `spec`."""
    if vae is None:
        raise ValueError("no VAE: set vae=FOLDER to the one the data was encoded with")
    codec = load_vae(vae)
    if (found := vae_hash(codec)) != spec.vae_hash:
        raise ValueError(f"vae={vae} has hash {found}, the data was encoded with {spec.vae_hash}")
    return codec


def _read_mark(folder: Path) -> dict:
    """Return what an export's mark says; raise ValueError for one that is not as train.export writes it."""
    mark = folder / EXPORT_MARK
    try:
        meta = json.loads(mark.read_text())
        if meta["settings"]["format"] == "llama":
            raise ValueError("it is a Llama export, the text side for transformers; export with format=transfusion")
        if meta["latent_spec"] is not None:
            LatentSpec(**meta["latent_spec"])
        for h, w in meta["grids"]:
            if min(h, w) < 1:
                raise ValueError(f"latent grid {h}x{w}")
        if meta["weights"] != "model" and not is_label(meta["weights"]):
            raise ValueError(f"weights {meta['weights']!r}")
        int(meta["progress"]["step"]), meta["fingerprint"]["tokenizer"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{mark}: not readable as an export ({error}); export the checkpoint again") from None
    return meta


def _read_weights(path: Path, parameters: dict[str, torch.Tensor]) -> None:
    """Copy the file's tensors into `parameters`, converting their dtype; raise ValueError for what does not fit."""
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            problems = [f"{name} is missing" for name in sorted(parameters.keys() - names)]
            problems += [f"{name} is not the model's" for name in sorted(names - parameters.keys())]
            for name in sorted(names & parameters.keys()):
                if (found := list(file.get_slice(name).get_shape())) != list(parameters[name].shape):
                    problems.append(f"{name} is {found}, expected {list(parameters[name].shape)}")
            if problems:
                raise ValueError(f"{path} does not fit its config: {'; '.join(problems[:8])}; export it again")
            for name, parameter in parameters.items():
                parameter.copy_(file.get_tensor(name))
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is damaged: {error}; export the checkpoint again") from None
