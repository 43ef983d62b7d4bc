"""What one checkpoint holds: its tensors, counters, lanes and config, read without a model or its ranks.

Tensors are read one at a time and dropped once measured, so a laptop can look at a 7B run; those in files that did not
verify are not read. Damage is not an error here but part of the answer: it is named in `problems`, and the rest is
read.
"""

import json
import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data.lane_state import LaneState
from data.strict_json import loads
from train.checkpoints import checkpoint
from train.nested import leaves
from train.pretrain_config import PretrainConfig

if TYPE_CHECKING:  # DCP takes half a second to import: only the functions that read tensors do
    from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

    from train.checkpoints.storage import CheckedReader

PIECE = 1 << 20  # elements measured at once
MOMENT = re.compile(r"optimizer\..+\.(?P<kind>\w+)")


@dataclass
class Sums:
    """What adds up over tensors; `squares` and `largest` are of the finite values."""

    tensors: int = 0
    elements: int = 0
    num_bytes: int = 0
    nonfinite: int = 0
    squares: float = 0.0
    largest: float = 0.0  # magnitude
    measured: int = 0  # elements that could be read
    dtypes: set[str] = field(default_factory=set)

    @property
    def norm(self) -> float:
        return self.squares**0.5

    @property
    def rms(self) -> float:
        return (self.squares / max(1, self.measured - self.nonfinite)) ** 0.5

    def add(self, other: "Sums") -> None:
        for name in ("tensors", "elements", "num_bytes", "nonfinite", "squares", "measured"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.largest = max(self.largest, other.largest)
        self.dtypes |= other.dtypes

    def measure(self, tensor: torch.Tensor) -> None:
        """Add the values of a tensor, piece by piece."""
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


@dataclass
class CheckpointSummary:
    """One checkpoint, as far as it can be read."""

    folder: Path
    tensors: list[SavedTensor] = field(default_factory=list)
    progress: dict[str, Any] = field(default_factory=dict)
    guard: list[float] = field(default_factory=list)  # updates skipped, skipped in a row, good, mean gradient norm
    back_to: int | None = None  # the step that this attempt went back to, if its config asked for one
    metrics: dict[str, float] = field(default_factory=dict)
    fingerprint: dict[str, str] = field(default_factory=dict)
    lane_rows: list[int] = field(default_factory=list)  # sequences that each lane has packed
    skipped: Counter[str] = field(default_factory=Counter)  # documents, by reason
    config: list[tuple[str, Any, Any]] = field(default_factory=list)  # (key, stored, default) where they differ
    problems: list[str] = field(default_factory=list)

    def entries(self) -> dict[str, Sums]:
        """Return the tensors' sums by entry, in the checkpoint's order."""
        found: dict[str, Sums] = {}
        for tensor in self.tensors:
            found.setdefault(tensor.entry, Sums()).add(tensor.sums)
        return found

    @classmethod
    def read(cls, folder: Path, damaged: set[str], on_read: Callable[[int], object]) -> "CheckpointSummary":
        """Read a checkpoint; tensors in the files `damaged` are listed but not read. `on_read` gets bytes read."""
        summary = cls(folder)
        meta = summary._parsed(checkpoint.META, loads)
        summary.progress, summary.back_to = dict(meta.get("progress", {})), meta.get("back_to")
        summary.guard = list(meta.get("guard", []))
        summary.metrics, summary.fingerprint = dict(meta.get("metrics", {})), dict(meta.get("fingerprint", {}))
        summary.config = list(summary._parsed("config.yaml", differences))
        try:
            lanes = [LaneState.from_json(lane) for lane in summary._parsed("lanes.json", json.loads).values()]
        except (AttributeError, ValueError) as error:  # no mapping, or a damaged state
            summary.problems.append(f"lanes.json: {error}")
        else:
            summary.lane_rows = [lane.rows for lane in lanes]
            summary.skipped = sum((Counter(lane.skipped) for lane in lanes), Counter[str]())
        from train.checkpoints.storage import read_index

        try:
            index = read_index(folder)
        except (OSError, ValueError) as error:
            summary.problems.append(str(error))
        else:
            summary.tensors = list(_measured(folder, index, damaged, summary.problems, on_read))
        return summary

    def _parsed(self, name: str, parse: Callable[[bytes], Any]) -> Any:
        """Return what `parse` makes of a small file; {} and a problem where it cannot be read."""
        try:
            return parse(checkpoint.read_extra(self.folder, name))
        except (OSError, ValueError, RecursionError, OmegaConfBaseException, AttributeError) as error:
            self.problems.append(f"{name}: {error}")
            return {}


def differences(content: bytes) -> list[tuple[str, Any, Any]]:
    """Return (dotted key, value in a config.yaml, default) where they differ; "unknown" for what is no option today.

    Interpolations stay text: they would read this machine's environment (P11).
    """
    stored, defaults = (
        dict(leaves(cast(dict[str, Any], OmegaConf.to_container(config, resolve=False))))
        for config in (OmegaConf.create(content.decode()), OmegaConf.structured(PretrainConfig))
    )
    defaults.pop("data.sources")
    found = []
    for key, value in stored.items():
        default = defaults.get(key, "" if key.startswith("data.sources.") else "unknown")
        if value != default:
            found.append((key, value, "required" if default == "???" else default))
    return found


def _measured(
    folder: Path, index: "Metadata", damaged: set[str], problems: list[str], on_read: Callable[[int], object]
) -> Iterator[SavedTensor]:
    """Yield the tensors in the order of the index, each measured unless a damaged file holds some of it."""
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    from train.checkpoints.storage import CheckedReader

    files: dict[str, set[str]] = {}
    for place, stored in index.storage_data.items():
        files.setdefault(place.fqn, set()).add(stored.relative_path)
    reader, unread = CheckedReader(folder, index), Counter[str]()
    for name, record in index.state_dict_metadata.items():
        assert isinstance(record, TensorStorageMetadata), name  # read_index refuses others
        dtype, elements = record.properties.dtype, record.size.numel()
        sums = Sums(1, elements, elements * dtype.itemsize, dtypes={str(dtype).removeprefix("torch.")})
        if bad := sorted(files.get(name, set()) & damaged):
            unread.update(bad)
        else:
            try:
                sums.measure(_read(reader, name, record))
            except (CheckpointException, OSError) as error:
                problems.append(f"{name} cannot be read: {_cause(error)}")
            on_read(sums.num_bytes)
        yield SavedTensor(name, tuple(record.size), sums)
    problems += [f"{count:,} tensors are not read: {file} is damaged" for file, count in unread.items()]


def _read(reader: "CheckedReader", name: str, record: "TensorStorageMetadata") -> torch.Tensor:
    """Return one tensor, assembled from the shards of the ranks that wrote it."""
    import torch.distributed.checkpoint as dcp

    state = {name: torch.empty(record.size, dtype=record.properties.dtype)}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(state, storage_reader=reader, no_dist=True)
    return state[name]


def _cause(error: BaseException) -> str:
    """Return the first line of the error that DCP wraps."""
    from torch.distributed.checkpoint.api import CheckpointException

    if isinstance(error, CheckpointException):
        error = next((cause for cause, _ in error.failures.values()), error)
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
