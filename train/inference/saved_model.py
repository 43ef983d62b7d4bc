"""A model as it lies on disk: a run's sharded checkpoint, or the folder that train.export makes of one.

    <export>/model.safetensors   all parameters by name, unsharded
             config.yaml         the run's resolved config; `config=` reads it back
             tokenizer.model, vae/   copies of what the run names
             trained.keys        which records it was trained on, or a sample (train/checkpoints/trained_records.py)
             export.json         step, latent spec, grids, hashes; written last

Either is read on any number of ranks, into whole parameters or into shards.
"""

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open

from data.manifest import LatentSpec
from data.tokenizer import Tokenizer
from model.transfusion import Transfusion
from model.vae import load_vae, vae_hash
from train.checkpoints import checkpoint
from train.checkpoints.lookup import EXPORT_MARK, find_checkpoint, identity, read_while_there
from train.checkpoints.run_folder import TOKENIZER_FILE
from train.checkpoints.trained_records import TRAINED_FILE, TrainedRecords
from train.distributed.local_shards import first_element, local
from train.distributed.ranks import Ranks
from train.optim.ema import choose, is_label
from train.pretrain_config import PretrainConfig, read_config

log = logging.getLogger(__name__)

T = TypeVar("T")
WEIGHTS_FILE, VAE_FOLDER = "model.safetensors", "vae"


@dataclass(frozen=True)
class SavedModel:
    """A checkpoint or an export, found and verified; its weights are still on disk."""

    folder: Path
    exported: bool
    meta: dict  # what train/state.py writes beside the tensors: progress, fingerprint, latent_spec, grids
    recipe: PretrainConfig
    identity: str  # a hash of the contents: another run under the same path and step has another
    trained: TrainedRecords | None  # what it was trained on; None: an earlier version did not say

    @classmethod
    def use(cls, path: str | Path, ranks: Ranks, use: Callable[["SavedModel"], T], key: str = "checkpoint") -> T:
        """Return what `use` makes of an export, a checkpoint, or the newest of a run that verifies and stays.

        Collective, as `use` is, which is called again with the next where the run removes the one that it reads. `key`
        is the option that names `path`. Raises FileNotFoundError or ValueError where there is none.
        """
        path = Path(path)
        if (path / EXPORT_MARK).is_file():
            return use(cls._open(path, True))
        return read_while_there(
            lambda: find_checkpoint(path, ranks, key),
            lambda folder: use(ranks.on_first(lambda: cls._open(folder, False))),
            ranks,
        )

    @classmethod
    def _open(cls, folder: Path, exported: bool) -> "SavedModel":
        """Read the small files."""
        if exported:
            meta = _read_mark(folder)
        else:
            checkpoint.read_extra(folder, "config.yaml")  # verifies it
            meta = json.loads(checkpoint.read_extra(folder, checkpoint.META))
        recipe = read_config(folder / "config.yaml")
        if exported:  # what its config names lies beside it
            recipe = replace(recipe, vae=recipe.vae and str(folder / VAE_FOLDER))
        if (found := identity(folder)) is None:
            raise FileNotFoundError(folder)
        return cls(folder, exported, meta, recipe, found, stored_records(folder))

    @property
    def step(self) -> int:
        return self.meta["progress"]["step"]

    @property
    def latent_spec(self) -> LatentSpec | None:
        """Return what the model's latents are; None: it was trained on text alone."""
        return LatentSpec.parse(self.meta["latent_spec"]) if self.meta["latent_spec"] else None

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


def stored_records(folder: Path) -> TrainedRecords | None:
    """Return which records the model of a checkpoint or an export was trained on; None: an earlier version wrote it."""
    path = folder / TRAINED_FILE
    if not path.is_file():
        return None
    exported = (folder / EXPORT_MARK).is_file()
    return TrainedRecords.from_bytes(path.read_bytes() if exported else checkpoint.read_extra(folder, TRAINED_FILE))


def stored_spec(path: Path) -> LatentSpec | None:
    """Return the latent spec of an export, a checkpoint, or a run's newest, from what lies beside the weights alone.

    Raises FileNotFoundError where there is none, ValueError for what is not readable.
    """
    if (path / EXPORT_MARK).is_file():
        meta = _read_mark(path)
    else:
        folder = next((root[-1] for root in map(checkpoint.saved, (path / "checkpoints", path)) if root), path)
        meta = json.loads(checkpoint.read_extra(folder, checkpoint.META))
    return LatentSpec.parse(meta["latent_spec"]) if meta["latent_spec"] else None


def _read_mark(folder: Path) -> dict:
    """Return what an export's mark says; raise ValueError for one that is not as train.export writes it."""
    mark = folder / EXPORT_MARK
    try:
        meta = json.loads(mark.read_text(encoding="utf-8"))
        if meta["settings"]["format"] == "llama":
            raise ValueError("it is a Llama export, the text side for transformers; export with format=transfusion")
        if meta["latent_spec"] is not None:
            LatentSpec.parse(meta["latent_spec"])
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


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode, with what it was trained on."""

    model: Transfusion
    tokenizer: Tokenizer
    recipe: PretrainConfig
    latent_spec: LatentSpec | None  # None: trained on text alone
    grids: list[tuple[int, int]]  # latent grids of the training data, sorted
    step: int
    weights: str  # model, or the label of an EMA
    stored: SavedModel  # where it lay

    @classmethod
    def load(cls, path: str | Path, ranks: Ranks, weights: str = "auto", tokenizer: str | None = None) -> "LoadedModel":
        """Load an export, a checkpoint, or the newest of a run that verifies and stays. Collective.

        `tokenizer`: its path; None: see SavedModel.tokenizer. Raises FileNotFoundError or ValueError where none is.
        """
        return SavedModel.use(path, ranks, lambda stored: cls._of(stored, ranks, weights, tokenizer))

    @classmethod
    def _of(cls, stored: SavedModel, ranks: Ranks, weights: str, tokenizer: str | None) -> "LoadedModel":
        ranks.require_alike({"checkpoint (contents)": stored.identity})
        used = stored.tokenizer(tokenizer)
        recipe = replace(stored.recipe, data=replace(stored.recipe.data, tokenizer=str(used.path)))
        with torch.device("meta"):
            model = Transfusion(recipe.model, used.vocab_size)
        model.to_empty(device=ranks.device).eval()
        chosen = stored.read(weights, {name: parameter.data for name, parameter in model.named_parameters()}, ranks)
        grids = [tuple(grid) for grid in stored.meta["grids"]]
        return cls(model, used, recipe, stored.latent_spec, grids, stored.step, chosen, stored)


def load_matching_vae(vae: str | None, spec: LatentSpec) -> torch.nn.Module:
    """Return the VAE `vae`, a folder or hub id; raise ValueError unless it is the one that made latents of `spec`."""
    if vae is None:
        raise ValueError("no VAE: set vae=FOLDER to the one the data was encoded with")
    codec = load_vae(vae)
    if (found := vae_hash(codec)) != spec.vae_hash:
        raise ValueError(f"vae={vae} has hash {found}, the data was encoded with {spec.vae_hash}")
    return codec
