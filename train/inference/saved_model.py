"""A model on disk: a run's sharded checkpoint, or the folder that train.export makes of one.

    <export>/model.safetensors   all parameters by name, unsharded
             config.yaml         the run's resolved config; `config=` reads it back
             tokenizer.*, vae/   copies of those the run names
             trained.keys        which records it was trained on, or a sample (train/checkpoints/trained_records.py)
             export.json         step, latent spec, grids, hashes; written last

Both can be read on any number of ranks, into whole parameters or into shards.
"""

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import xxhash
from safetensors import SafetensorError, safe_open

from data.manifest import LatentSpec
from data.strict_json import loads
from data.tokenizer import Tokenizer, find_copy
from model.autoencoders import load_latent_space
from model.latent_space import LatentSpace, Pixels
from model.transfusion import Transfusion
from train.checkpoints import checkpoint
from train.checkpoints.lookup import EXPORT_MARK, find_checkpoint, identity, read_while_there
from train.checkpoints.trained_records import TRAINED_FILE, TrainedRecords
from train.distributed.local_shards import first_element, local
from train.distributed.ranks import Ranks
from train.optim.ema import choose, is_label
from train.optim.groups import frozen_among
from train.pretrain_config import PretrainConfig, read_config

log = logging.getLogger(__name__)

T = TypeVar("T")
WEIGHTS_FILE, VAE_FOLDER = "model.safetensors", "vae"
PORTION = 1 << 28  # elements, of all ranks, read at once where they are converted


@dataclass(frozen=True)
class SavedModel:
    """A checkpoint or an export, found and verified; its weights are still on disk."""

    folder: Path
    exported: bool
    meta: dict[str, Any]  # what train/state.py writes next to the tensors: progress, fingerprint, latent_spec, grids
    config: PretrainConfig  # that it was trained with
    identity: str  # a hash of the contents, which differs between runs that used the same path
    trained_records: TrainedRecords | None  # None: written by an earlier version, which did not record them

    @classmethod
    def use(cls, path: str | Path, ranks: Ranks, read: Callable[["SavedModel"], T], key: str = "checkpoint") -> T:
        """Return what `read` returns for an export, a checkpoint, or a run's newest checkpoint that verifies.

        Collective, like `read`, which is called again with the next checkpoint if the run removes the one being read.
        `key` is the option that names `path`. Raises FileNotFoundError or ValueError if there is none.
        """
        path = Path(path)
        if (path / EXPORT_MARK).is_file():
            exported = cls._open(path)
            ranks.require_alike({f"{key} (contents)": exported.identity})
            return read(exported)
        return read_while_there(
            lambda: find_checkpoint(path, ranks, key),
            lambda folder: read(ranks.on_first(lambda: cls._open(folder))),
            ranks,
        )

    @classmethod
    def _open(cls, folder: Path) -> "SavedModel":
        """Read everything but the weights."""
        exported = (folder / EXPORT_MARK).is_file()
        if not exported:
            checkpoint.read_extra(folder, "config.yaml")  # verifies it
        meta, config = _read_meta(folder), read_config(folder / "config.yaml")
        if exported:
            config = replace(config, vae=config.vae and str(folder / VAE_FOLDER))
        if (found := identity(folder)) is None:
            raise FileNotFoundError(folder)
        return cls(folder, exported, meta, config, found, stored_records(folder))

    def on(self, base: str | None) -> "SavedModel":
        """Return this model with the source of its frozen parameters at another path; None: where it was."""
        from train.inference.base import with_base  # which uses this module

        return replace(self, config=with_base(self.config, base))

    @property
    def step(self) -> int:
        return self.meta["progress"]["step"]

    @property
    def latent_spec(self) -> LatentSpec | None:
        """Return the latent spec of the training data; None: the model was trained on text alone."""
        return LatentSpec.parse(self.meta["latent_spec"]) if self.meta["latent_spec"] else None

    @property
    def grids(self) -> list[tuple[int, int]]:
        """Return the latent grids of the training data, sorted."""
        return [(h, w) for h, w in self.meta["grids"]]

    def tokenizer(self, path: str | None = None) -> Tokenizer:
        """Return the tokenizer `path`; by default the copy in the export or run, else the one that its config names.

        Raises ValueError if none of them is the one that the model was trained with.
        """
        copies = [find_copy(folder) for folder in (self.folder, self.folder.parent.parent)]
        places = [path] if path else [*(str(copy) for copy in copies if copy), self.config.data.tokenizer]
        expected, tried = self.meta["fingerprint"]["tokenizer"], []
        for place in dict.fromkeys(places):
            try:
                tokenizer = Tokenizer(place)
            except (FileNotFoundError, ValueError) as error:  # a later place may have it
                tried.append(str(error))
                continue
            if tokenizer.hash == expected:
                return tokenizer
            tried.append(f"{place} ({tokenizer.hash})")
        raise ValueError(
            f"{self.folder} was trained with the tokenizer of hash {expected}, none of {', '.join(tried)}; "
            "set tokenizer=FILE"
        )

    def weights_hash(self) -> str:
        """Return a hash of the weights: of an export's file, or of the sizes and hashes of a checkpoint's files."""
        if not self.exported:
            return self.identity
        digest = xxhash.xxh3_128()
        with open(self.folder / WEIGHTS_FILE, "rb") as file:
            while piece := file.read(1 << 24):
                digest.update(piece)
        return digest.hexdigest()

    def names(self) -> set[str]:
        """Return the plain names of the model's parameters."""
        with torch.device("meta"):
            return {name for name, _ in Transfusion(self.config.model, 1).named_parameters()}

    def chosen(self, weights: str, key: str = "weights") -> str:
        """Return which weights `weights` means (see `choose`); `key` is the option that names them."""
        kept = [self.meta["weights"]] if self.exported else self.config.optim.weights
        return choose(weights, kept, self.folder, key)

    def read(
        self,
        weights: str,
        parameters: Mapping[str, torch.Tensor],
        ranks: Ranks,
        key: str = "weights",
        *,
        whole: bool = True,
    ) -> str:
        """Read `weights` into parameters or shards of them, by plain name; return which were read. Collective.

        They are all of the model's, or some with whole=False. Raises ValueError for weights that do not exist, and for
        parameters of other names or sizes.
        """
        chosen = self.chosen(weights, key)
        if self.exported:
            _read_weights(self.folder / WEIGHTS_FILE, parameters, whole)
            return chosen
        stored = ranks.on_first(lambda: checkpoint.tensors(self.folder, chosen))
        frozen: dict[str, torch.Tensor] = {}
        if "base" in self.meta:
            groups, adapts = self.config.optim.groups, self.config.model.lora.rank > 0
            absent = (name for name in parameters if name not in stored)
            frozen = {name: parameters[name] for name in frozen_among(absent, groups, adapts)}
        if frozen:
            from train.inference.base import read_base  # which uses this module

            read_base(self.config, frozen, self.meta["vocab_size"], self.meta["base"], ranks)
        trained = {name: tensor for name, tensor in parameters.items() if name not in frozen}
        _load(self.folder, chosen, trained, ranks, whole)
        return chosen


def _load(folder: Path, weights: str, parameters: Mapping[str, torch.Tensor], ranks: Ranks, whole: bool) -> None:
    """Read from a checkpoint, which holds float32, also into parameters of other dtypes; those a few at a time."""
    others = {name: tensor for name, tensor in parameters.items() if tensor.dtype != torch.float32}
    if not (parameters or whole):
        return
    if not others:
        checkpoint.load(folder, {weights: dict(parameters)}, ranks, whole=whole)
        return
    checkpoint.load(
        folder, {weights: {name: parameters[name] for name in parameters.keys() - others}}, ranks, whole=False
    )
    portion: dict[str, torch.Tensor] = {}
    for i, (name, tensor) in enumerate(others.items(), start=1):
        portion[name] = torch.empty_like(tensor, dtype=torch.float32)
        if i == len(others) or sum(tensor.numel() for tensor in portion.values()) > PORTION:
            checkpoint.load(folder, {weights: portion}, ranks, whole=False)
            for loaded, exact in portion.items():
                local(others[loaded]).copy_(local(exact))
            portion = {}


def stored_records(folder: Path) -> TrainedRecords | None:
    """Return which records the model in a checkpoint or an export was trained on; None: an earlier version wrote it."""
    path = folder / TRAINED_FILE
    if not path.is_file():
        return None
    exported = (folder / EXPORT_MARK).is_file()
    return TrainedRecords.from_bytes(path.read_bytes() if exported else checkpoint.read_extra(folder, TRAINED_FILE))


def stored_spec(path: Path) -> LatentSpec | None:
    """Return the latent spec of an export, a checkpoint, or a run's newest checkpoint, without reading the weights.

    Raises FileNotFoundError if there is none, ValueError if it cannot be read.
    """
    if not (path / EXPORT_MARK).is_file():
        path = next((root[-1] for root in map(checkpoint.saved, (path / "checkpoints", path)) if root), path)
    meta = _read_meta(path)
    return LatentSpec.parse(meta["latent_spec"]) if meta["latent_spec"] else None


def _read_meta(folder: Path) -> dict[str, Any]:
    """Return SavedModel.meta; raise ValueError for an export.json that train.export would not write."""
    mark = folder / EXPORT_MARK
    if not mark.is_file():
        return loads(checkpoint.read_extra(folder, checkpoint.META))
    try:
        meta = json.loads(mark.read_text(encoding="utf-8"))
        if meta["settings"]["format"] != "transfusion":
            raise ValueError(f"it has format={meta['settings']['format']}; export with format=transfusion")
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


def _read_weights(path: Path, parameters: Mapping[str, torch.Tensor], whole: bool) -> None:
    """Copy the file's tensors into `parameters`, converting their dtype; raise ValueError if they do not match."""
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            problems = [f"{name} is missing" for name in sorted(parameters.keys() - names)]
            problems += [f"{name} is not the model's" for name in sorted(names - parameters.keys()) if whole]
            for name in sorted(names & parameters.keys()):
                if (found := list(file.get_slice(name).get_shape())) != list(parameters[name].shape):
                    problems.append(f"{name} is {found}, expected {list(parameters[name].shape)}")
            if problems:
                raise ValueError(f"{path} does not fit its config: {'; '.join(problems[:8])}; export it again")
            for name, parameter in parameters.items():
                mine = local(parameter)
                if mine.numel():  # read only the rows of this rank's shard
                    first = first_element(parameter) // parameter[0].numel()
                    mine.copy_(file.get_slice(name)[first : first + len(mine)])
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is damaged: {error}; export the checkpoint again") from None


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode, with its tokenizer."""

    model: Transfusion
    tokenizer: Tokenizer
    config: PretrainConfig  # of its training, with the path of this tokenizer
    weights: str  # model, or the label of an EMA
    saved: SavedModel  # where it was read from

    @classmethod
    def load(
        cls,
        path: str | Path,
        ranks: Ranks,
        weights: str = "auto",
        tokenizer: str | None = None,
        base: str | None = None,
    ) -> "LoadedModel":
        """Load an export, a checkpoint, or a run's newest checkpoint that verifies. Collective.

        `tokenizer` is a path; None: see SavedModel.tokenizer. `base` is where frozen parameters come from; None: from
        what the run started from. Raises FileNotFoundError or ValueError if there is none.
        """
        return SavedModel.use(path, ranks, lambda saved: cls.read(saved.on(base), ranks, weights, tokenizer))

    @classmethod
    def read(
        cls, saved: SavedModel, ranks: Ranks, weights: str, tokenizer_path: str | None, key: str = "weights"
    ) -> "LoadedModel":
        """Load what has been found; `key` is the option that names `weights`. Collective."""
        tokenizer = saved.tokenizer(tokenizer_path)
        config = replace(saved.config, data=replace(saved.config.data, tokenizer=str(tokenizer.path)))
        with torch.device("meta"):
            model = Transfusion(config.model, tokenizer.vocab_size)
        model.to_empty(device=ranks.device).eval()
        chosen = saved.read(weights, {name: parameter.data for name, parameter in model.named_parameters()}, ranks, key)
        return cls(model, tokenizer, config, chosen, saved)


def load_matching_space(path: str | None, spec: LatentSpec) -> LatentSpace:
    """Return the latent space at `path`, a folder or hub id; raise ValueError unless it encoded the images of `spec`.

    Pixels need no path.
    """
    if path is None and spec.kind != Pixels.kind:
        raise ValueError("no VAE: set vae=FOLDER to the one the data was encoded with")
    space = load_latent_space(path or Pixels.hash)
    if space.hash != spec.vae_hash:
        remedy = "leave vae out" if spec.kind == Pixels.kind else "set vae=FOLDER to that one"
        raise ValueError(f"vae={path} has hash {space.hash}, the data was encoded with {spec.vae_hash}; {remedy}")
    return space
