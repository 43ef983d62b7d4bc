"""A model as it lies on disk: a run's sharded checkpoint, or the folder that train.export makes of one.

    <export>/model.safetensors   all parameters by name, unsharded
             config.yaml         the run's resolved config; `config=` reads it back
             tokenizer.model, vae/   copies of what the run names
             export.json         step, latent spec, grids, hashes; written last

Either is read on any number of ranks, into whole parameters or into shards.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint.api import CheckpointException

from data.manifest import LatentSpec
from train import checkpoint
from train.checkpoint_storage import LISTING
from train.config import load_config
from train.distributed import Ranks
from train.ema import choose, is_label
from train.local_shards import first_element, local
from train.recipe import PretrainConfig

log = logging.getLogger(__name__)

T = TypeVar("T")
MOST_CHOICES = 20  # of a checkpoint to read, in a run that removes them meanwhile
WEIGHTS_FILE, TOKENIZER_FILE, VAE_FOLDER, EXPORT_MARK = "model.safetensors", "tokenizer.model", "vae", "export.json"


@dataclass(frozen=True)
class Stored:
    """A checkpoint or an export, found and verified; its weights are still on disk."""

    folder: Path
    exported: bool
    meta: dict  # what train/state.py writes beside the tensors: progress, fingerprint, latent_spec, grids
    recipe: PretrainConfig
    identity: str  # a hash of the contents: another run under the same path and step has another

    @classmethod
    def use(cls, path: str | Path, ranks: Ranks, use: Callable[["Stored"], T], key: str = "checkpoint") -> T:
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
    def _open(cls, folder: Path, exported: bool) -> "Stored":
        """Read the small files."""
        if exported:
            meta = _read_mark(folder)
        else:
            checkpoint.read_extra(folder, "config.yaml")  # verifies it
            meta = json.loads(checkpoint.read_extra(folder, checkpoint.META))
        recipe = read_recipe(folder / "config.yaml")
        if exported:  # what its config names lies beside it
            data = replace(recipe.data, tokenizer=str(folder / TOKENIZER_FILE))
            recipe = replace(recipe, data=data, vae=recipe.vae and str(folder / VAE_FOLDER))
        if (identity := _identity(folder)) is None:
            raise FileNotFoundError(folder)
        return cls(folder, exported, meta, recipe, identity)

    @property
    def step(self) -> int:
        return self.meta["progress"]["step"]

    @property
    def latent_spec(self) -> LatentSpec | None:
        """Return what the model's latents are; None: it was trained on text alone."""
        return LatentSpec(**self.meta["latent_spec"]) if self.meta["latent_spec"] else None

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
    if "${" in path.read_text():
        raise ValueError(f"{path} holds an interpolation (${{...}}), which no run writes")
    return load_config(PretrainConfig, [f"config={path}"])


def read_while_there(
    choose: Callable[[], Path], read: Callable[[Path], T], ranks: Ranks, chosen: Path | None = None
) -> T:
    """Return what `read` makes of the checkpoint that `choose` returns; choose again if its run removed it meanwhile.

    `chosen` is the first, where it is known. Collective; `read` must fail on every rank where the checkpoint is gone.
    Raises FileNotFoundError where a run removes each before it is read.
    """
    for _ in range(MOST_CHOICES):
        folder, chosen = chosen or choose(), None
        identity = partial(_identity, folder)
        before = ranks.on_first(identity)
        try:
            result = read(folder)
        except (OSError, ValueError, CheckpointException):
            if identity() == before is not None:  # asked of no other rank: the error may be this one's alone
                raise
        else:
            if ranks.on_first(identity) in (before, None):
                return result
        if ranks.is_first:
            log.warning("%s was removed by its run while it was read: taking the newest that is there", folder)
    raise FileNotFoundError(
        f"{folder} and {MOST_CHOICES - 1} others were removed by their run while they were read: raise its "
        "checkpoint.interval_steps or keep_last, or wait until it has ended"
    )


def _identity(folder: Path) -> str | None:
    """Return a hash of what a checkpoint or an export holds; None where it is gone."""
    for name in (EXPORT_MARK, LISTING):
        with suppress(OSError):
            return hashlib.sha256((folder / name).read_bytes()).hexdigest()[:16]
    return None


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
        if not ranks.on_first(path.exists):
            raise FileNotFoundError(f"{key}={path}: removed by its run meanwhile; give {key}=RUN, and take its newest")
        raise ValueError(f"{key}={path} is damaged: {'; '.join(problems)}")
    return path


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
