"""What one checkpoint holds: its entries, weights, counters, lanes and config, read without a model or its ranks.

Tensors are read one at a time and dropped once measured, so a laptop can look at a 7B run; those in files that did not
verify are not read.
Damage is no error here but part of the answer: it is named in `problems`, and the rest is read.
"""

import json
import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from train.checkpoints import checkpoint
from train.checkpoints.storage import CheckedReader, read_index
from train.nested import leaves
from train.planning.estimate import PARTS
from train.pretrain_config import PretrainConfig

MODEL = "model"  # the entry of the weights that are trained
PIECE = 1 << 20  # elements measured at once
DECADES, BINS_A_DECADE = (-8, 2), 8  # of the histograms of magnitudes; what lies beyond counts in the outermost
NAMES_KEPT = 20  # of skipped documents
MOMENT = re.compile(r"optimizer\.(?P<parameter>.+)\.(?P<kind>\w+)")
BLOCK = re.compile(r"transformer\.blocks\.(?P<layer>\d+)\.(?P<kind>attention|ffn)\.")


@dataclass
class Sums:
    """What adds up over tensors. Sums, extremes and histograms are of the finite values."""

    tensors: int = 0
    elements: int = 0
    num_bytes: int = 0
    nonfinite: int = 0
    squares: float = 0.0
    largest: float = 0.0  # magnitude
    measured: int = 0  # elements that could be read
    dtypes: set[str] = field(default_factory=set)
    histogram: np.ndarray = field(default_factory=lambda: np.zeros(magnitude_edges().size - 1, np.int64))
    zeros: int = 0  # weights that are 0, not in the histogram

    @property
    def norm(self) -> float:
        return self.squares**0.5

    @property
    def rms(self) -> float:
        return (self.squares / max(1, self.measured - self.nonfinite)) ** 0.5

    def add(self, other: "Sums") -> None:
        for name in ("tensors", "elements", "num_bytes", "nonfinite", "squares", "measured", "zeros"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.largest = max(self.largest, other.largest)
        self.dtypes |= other.dtypes
        self.histogram = self.histogram + other.histogram

    def measure(self, tensor: torch.Tensor, is_weight: bool) -> None:
        """Add the values of a tensor, piece by piece; only weights go into the histogram, which costs the most."""
        for piece in tensor.flatten().split(PIECE):
            values = piece.float()
            norm = torch.linalg.vector_norm(values, dtype=torch.float64).item()
            if not math.isfinite(norm):  # in float64 no sum of finite squares is
                values = values[values.isfinite()]
                norm = torch.linalg.vector_norm(values, dtype=torch.float64).item()
            self.measured += piece.numel()
            self.nonfinite += piece.numel() - values.numel()
            self.squares += norm**2
            if values.numel():
                self.largest = max(self.largest, torch.linalg.vector_norm(values, torch.inf).item())
            if is_weight:
                self._count(values.abs())

    def _count(self, magnitudes: torch.Tensor) -> None:
        zeros, (low, high) = magnitudes.numel() - int(magnitudes.count_nonzero()), DECADES
        exponents = magnitudes.log10_().clamp_(low, high)  # of 0: the lowest
        self.histogram += torch.histc(exponents, self.histogram.size, low, high).long().numpy()
        self.histogram[0] -= zeros
        self.zeros += zeros


@dataclass(frozen=True)
class SavedTensor:
    """A tensor of a checkpoint: what the index says of it, and what was measured."""

    name: str
    shape: tuple[int, ...]
    sums: Sums

    @property
    def entry(self) -> str:
        """model, ema-…; each kind of an optimizer's moments apart."""
        found = MOMENT.fullmatch(self.name)
        return f"optimizer {found['kind']}" if found else self.name.partition(".")[0]

    @property
    def parameter(self) -> str:
        found = MOMENT.fullmatch(self.name)
        return found["parameter"] if found else self.name.partition(".")[2]

    @property
    def part(self) -> str:
        """embeddings, blocks, patches, heads, or the top-level module where the model has others."""
        module = self.parameter.partition(".")[0]
        return PARTS.get(module, module)


@dataclass(frozen=True)
class SourceLanes:
    """How far the lanes are in one source."""

    name: str
    epochs: tuple[int, float, int]  # least, mean, most over lanes
    tokens: int  # drawn since the weights last changed
    pending: int  # documents drawn and not used up


@dataclass(frozen=True)
class Lanes:
    """All lanes of a checkpoint."""

    lanes: int
    rows: tuple[int, int]  # sequences made: fewest and most of a lane
    sources: list[SourceLanes]
    skipped: Counter  # documents by reason
    skipped_names: list[str]  # the last of them


@dataclass
class CheckpointSummary:
    """One checkpoint, as far as it can be read."""

    folder: Path
    tensors: list[SavedTensor] = field(default_factory=list)
    progress: dict[str, Any] = field(default_factory=dict)
    guard: list[float] = field(default_factory=list)  # updates skipped, skipped in a row, good, mean gradient norm
    back_to: int | None = None  # the step that this continuation began at, where it was told to go back to one
    metrics: dict[str, float] = field(default_factory=dict)
    fingerprint: dict[str, str] = field(default_factory=dict)
    lanes: Lanes | None = None
    config: list[tuple[str, Any, Any]] = field(default_factory=list)  # (key, stored, default) where they differ
    problems: list[str] = field(default_factory=list)

    def sums(self, key: Callable[[SavedTensor], Any]) -> dict[Any, Sums]:
        """Return the tensors' sums by `key`, in the checkpoint's order; None leaves a tensor out."""
        found: dict[Any, Sums] = {}
        for tensor in self.tensors:
            if (group := key(tensor)) is not None:
                found.setdefault(group, Sums()).add(tensor.sums)
        return found

    @classmethod
    def read(cls, folder: Path, damaged: set[str], on_read: Callable[[int], object]) -> "CheckpointSummary":
        """Read a checkpoint; tensors in the files `damaged` are listed and not read. `on_read` is told of bytes."""
        contents = cls(folder)
        meta = contents._json(checkpoint.META, {})
        contents.progress, contents.back_to = dict(meta.get("progress", {})), meta.get("back_to")
        contents.guard = list(meta.get("guard", []))
        contents.metrics, contents.fingerprint = dict(meta.get("metrics", {})), dict(meta.get("fingerprint", {}))
        stored = contents._config()
        contents.config = differences(stored)
        if (lanes := contents._json("lanes.json", None)) is not None:
            contents._summarize(lanes, list(stored.get("data", {}).get("sources", {})))
        try:
            index = read_index(folder)
        except (OSError, ValueError) as error:
            contents.problems.append(str(error))
        else:
            contents.tensors = list(_measured(folder, index, damaged, contents.problems, on_read))
        return contents

    def _extra(self, name: str) -> bytes | None:
        try:
            return checkpoint.read_extra(self.folder, name)
        except (OSError, ValueError) as error:
            self.problems.append(str(error))
            return None

    def _json(self, name: str, default: Any) -> Any:
        if (content := self._extra(name)) is None:
            return default
        try:
            return json.loads(content)
        except (ValueError, RecursionError) as error:
            self.problems.append(f"{name}: {error}")
            return default

    def _config(self) -> dict[str, Any]:
        """Return the stored config, nested. Interpolations stay text: they would read this machine's environment."""
        if (content := self._extra("config.yaml")) is None:
            return {}
        try:
            config = OmegaConf.to_container(OmegaConf.create(content.decode()), resolve=False)
        except (OmegaConfBaseException, ValueError) as error:
            self.problems.append(f"config.yaml: {error}")
            return {}
        return config if isinstance(config, dict) else {}

    def _summarize(self, states: dict[str, dict], names: list[str]) -> None:
        try:
            self.lanes = summarize(list(states.values()), names)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            self.problems.append(f"lanes.json: not the states of lanes ({type(error).__name__}: {error})")


def summarize(states: list[dict], names: list[str]) -> Lanes:
    """Sum up lane states (data/lanes.py); `names` are the sources', in the config's order."""
    sources = []
    for number in range(max(len(state["cursors"]) for state in states)):
        cursors = [state["cursors"][number] for state in states]
        epochs = [epoch for epoch, _, _ in cursors]
        pending = sum(document[0] == number for state in states for document in state["pending"])
        name = names[number] if number < len(names) else f"source {number}"
        spread = (min(epochs), sum(epochs) / len(epochs), max(epochs))
        sources.append(SourceLanes(name, spread, sum(tokens for _, _, tokens in cursors), pending))
    rows = [state["rows"] for state in states]
    skipped = sum((Counter(state["skipped"]) for state in states), Counter())
    skipped_names = [name for state in states for name in state["skipped_names"]][-NAMES_KEPT:]
    return Lanes(len(states), (min(rows), max(rows)), sources, skipped, skipped_names)


def differences(stored: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Return (dotted key, stored value, default) where they differ; "unknown" for a key that is no option today."""
    defaults = dict(leaves(OmegaConf.to_container(OmegaConf.structured(PretrainConfig), resolve=False)))
    defaults.pop("data.sources")
    found = []
    for key, value in leaves(stored):
        default = defaults.get(key, "" if key.startswith("data.sources.") else "unknown")
        if value != default:
            found.append((key, value, "required" if default == "???" else default))
    return found


def magnitude_edges() -> np.ndarray:
    """Return the borders of the histograms' bins."""
    low, high = DECADES
    return 10 ** np.linspace(low, high, (high - low) * BINS_A_DECADE + 1)


def _measured(
    folder: Path, index: Metadata, damaged: set[str], problems: list[str], on_read: Callable[[int], object]
) -> Iterator[SavedTensor]:
    """Yield the tensors in the order of the index, each measured unless it lies in a damaged file."""
    files: dict[str, set[str]] = {}
    for place, stored in index.storage_data.items():
        files.setdefault(place.fqn, set()).add(stored.relative_path)
    reader, unread = CheckedReader(folder, index), Counter()
    for name, record in index.state_dict_metadata.items():
        dtype, elements = record.properties.dtype, record.size.numel()
        sums = Sums(1, elements, elements * dtype.itemsize, dtypes={str(dtype).removeprefix("torch.")})
        if bad := sorted(files.get(name, set()) & damaged):
            unread.update(bad)
        else:
            try:
                sums.measure(_read(reader, name, record), is_weight=name.startswith(f"{MODEL}."))
            except (CheckpointException, OSError) as error:
                problems.append(f"{name} cannot be read: {_cause(error)}")
            on_read(sums.num_bytes)
        yield SavedTensor(name, tuple(record.size), sums)
    problems += [f"{count:,} tensors are not read: they lie in {file}" for file, count in unread.items()]


def _read(reader: CheckedReader, name: str, record: TensorStorageMetadata) -> torch.Tensor:
    """Return one tensor, put together from the shards of the ranks that wrote it."""
    state = {name: torch.empty(record.size, dtype=record.properties.dtype)}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(state, storage_reader=reader, no_dist=True)
    return state[name]


def _cause(error: BaseException) -> str:
    """Return the first line of what went wrong, without DCP's wrapping."""
    if isinstance(error, CheckpointException):
        error = next((cause for cause, _ in error.failures.values()), error)
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
