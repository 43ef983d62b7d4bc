"""A model as it lies on disk: a run's sharded checkpoint, or the folder that train.export makes of one.

    <export>/model.safetensors   all parameters by name, unsharded
             config.yaml         the run's resolved config; `config=` reads it back
             tokenizer.model, vae/   copies of what the run names
             export.json         step, latent spec, grids, hashes; written last

Either is read on any number of ranks, into whole parameters or into shards.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from data.manifest import LatentSpec
from data.tokenizer import Tokenizer
from train import checkpoint
from train.checkpoint_storage import LISTING
from train.config import load_config
from train.distributed import Ranks
from train.ema import choose, is_label
from train.local_shards import first_element, local
from train.recipe import PretrainConfig
from train.run_folder import TOKENIZER_FILE

WEIGHTS_FILE, VAE_FOLDER, EXPORT_MARK = "model.safetensors", "vae", "export.json"


@dataclass(frozen=True)
class Stored:
    """A checkpoint or an export, found and verified; its weights are still on disk."""

    folder: Path
    exported: bool
    meta: dict  # what train/state.py writes beside the tensors: progress, fingerprint, latent_spec, grids
    recipe: PretrainConfig

    @classmethod
    def find(cls, path: str | Path, ranks: Ranks, key: str = "checkpoint") -> "Stored":
        """Find an export, a checkpoint, or the newest of a run that verifies; `key` is the option that names it.

        Collective. Raises FileNotFoundError or ValueError where there is none.
        """
        path = Path(path)
        exported = (path / EXPORT_MARK).is_file()
        folder = path if exported else find_checkpoint(path, ranks, key)
        if exported:
            meta = _read_mark(folder)
        else:
            checkpoint.read_extra(folder, "config.yaml")  # verifies it
            meta = json.loads(checkpoint.read_extra(folder, checkpoint.META))
        recipe = read_recipe(folder / "config.yaml")
        if exported:  # what its config names lies beside it
            recipe = replace(recipe, vae=recipe.vae and str(folder / VAE_FOLDER))
        return cls(folder, exported, meta, recipe)

    @property
    def step(self) -> int:
        return self.meta["progress"]["step"]

    @property
    def latent_spec(self) -> LatentSpec | None:
        """Return what the model's latents are; None: it was trained on text alone."""
        return LatentSpec(**self.meta["latent_spec"]) if self.meta["latent_spec"] else None

    @property
    def identity(self) -> str:
        """Return a hash of the contents: another run under the same path and step has another."""
        content = (self.folder / (EXPORT_MARK if self.exported else LISTING)).read_bytes()
        return hashlib.sha256(content).hexdigest()[:16]

    def tokenizer(self, path: str | None = None) -> Tokenizer:
        """Return the tokenizer `path`, by default the copy that lies with the weights, else the one that they name.

        Raises ValueError where none of them is the one that the model was trained with.
        """
        copies = [folder / TOKENIZER_FILE for folder in (self.folder, self.folder.parent.parent)]
        places = [path] if path else [*copies, self.recipe.data.tokenizer]
        found = {str(place): Tokenizer(place) for place in places if Path(place).is_file()}
        expected = self.meta["fingerprint"]["tokenizer"]
        for tokenizer in found.values():
            if tokenizer.hash == expected:
                return tokenizer
        tried = ", ".join(
            f"{place} ({found[place].hash if place in found else 'not there'})" for place in map(str, places)
        )
        raise ValueError(
            f"{self.folder} was trained with the tokenizer of hash {expected}, and that is none of {tried}; name it by "
            "tokenizer=FILE"
        )

    def read(self, weights: str, parameters: Mapping[str, torch.Tensor], ranks: Ranks) -> str:
        """Read `weights` (see `choose`) into parameters or shards of them, and return which they are. Collective.

        Raises ValueError for weights that are not there, and for parameters of other names or sizes.
        """
        chosen = choose(weights, [self.meta["weights"]] if self.exported else self.recipe.optim.weights, self.folder)
        if self.exported:
            _read_weights(self.folder / WEIGHTS_FILE, parameters)
        else:
            checkpoint.load(self.folder, {chosen: dict(parameters)}, ranks)
        return chosen


def read_recipe(path: Path) -> PretrainConfig:
    """Return the config that a run wrote at `path`; raises ValueError for what no run writes."""
    # Written resolved: an interpolation would read this machine's environment (P11).
    if "${" in path.read_text(encoding="utf-8"):
        raise ValueError(f"{path} holds an interpolation (${{...}}), which no run writes")
    return load_config(PretrainConfig, [f"config={path}"], expand=False)


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


def _read_mark(folder: Path) -> dict:
    """Return what an export's mark says; raise ValueError for one that is not as train.export writes it."""
    mark = folder / EXPORT_MARK
    try:
        meta = json.loads(mark.read_text(encoding="utf-8"))
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


def _read_weights(path: Path, parameters: Mapping[str, torch.Tensor]) -> None:
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
                mine = local(parameter)
                if mine.numel():  # of a shard, whose rows alone are read
                    first = first_element(parameter) // parameter[0].numel()
                    mine.copy_(file.get_slice(name)[first : first + len(mine)])
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is damaged: {error}; export the checkpoint again") from None
