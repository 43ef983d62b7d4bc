"""The checkpoints of a run on disk: which are whole, which one a resume takes, what an interrupted save left behind.

It only reads, so a run may be looked at while it trains.
"""

import json
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from data.strict_json import loads
from train.checkpoints import checkpoint
from train.checkpoints.checkpoint import CheckpointConfig
from train.checkpoints.listing import LISTING, WrittenFile, read_listing
from train.distributed.ranks import alone
from train.pretrain_config import read_config

T = TypeVar("T")
LEFTOVERS = {
    "tmp": "incomplete: a save in progress, or one that was killed; the next start removes it",
    "replaced": "moved away while another save of its step was committed; the next start restores or removes it",
    "removing": "being removed; the next start removes the rest",
}


@dataclass(frozen=True)
class ListedCheckpoint:
    """One committed checkpoint."""

    folder: Path
    files: dict[str, WrittenFile]  # by name; empty where the listing cannot be read
    saved_at: float  # seconds since 1970
    progress: dict[str, int]  # step, tokens_seen, images_seen; empty where meta.json cannot be read
    metrics: dict[str, float]  # of held-out data
    problems: list[str] | None = None  # what is wrong with it; None: not verified

    @property
    def step(self) -> int:
        return int(self.progress.get("step", checkpoint.step_of(self.folder) if _is_step(self.folder) else 0))

    @property
    def num_bytes(self) -> int:
        return sum(file.num_bytes for file in self.files.values()) or _size_on_disk(self.folder)

    @property
    def num_ranks(self) -> int:
        """Return how many ranks wrote tensors; each writes its own files."""
        ranks = (re.fullmatch(r"__(\d+)_\d+\.distcp", name) for name in self.files)
        return len({found[1] for found in ranks if found})

    @property
    def damaged_files(self) -> set[str]:
        """Return the files that verification found damaged."""
        return {name for name in self.files if any(problem.startswith(f"{name}:") for problem in self.problems or ())}

    @classmethod
    def of(cls, folder: Path) -> "ListedCheckpoint":
        """Read the small files of a checkpoint."""
        try:
            files = read_listing(folder)
        except (OSError, ValueError):
            files = {}
        try:
            meta = loads(checkpoint.read_extra(folder, checkpoint.META))
        except (OSError, ValueError, RecursionError):
            meta = {}
        listing = folder / LISTING  # written last
        saved_at = (listing if listing.exists() else folder).stat().st_mtime
        return cls(folder, files, saved_at, meta.get("progress", {}), meta.get("metrics", {}))


@dataclass(frozen=True)
class CheckpointListing:
    """What a run, its checkpoints folder, or the path of one checkpoint holds, oldest step first."""

    checkpoints: list[ListedCheckpoint]
    leftovers: list[tuple[str, int, str]] = field(default_factory=list)  # (folder, bytes, what it is)
    attempt: dict[str, Any] | None = None  # of attempt.json
    retention: CheckpointConfig | None = None  # of the run's config; None: it cannot be read
    surplus: list[Path] = field(default_factory=list)  # what retention would remove next
    remarks: list[str] = field(default_factory=list)

    @classmethod
    def open(cls, path: Path) -> "CheckpointListing":
        """List without verifying. Raises FileNotFoundError where there is neither a checkpoint nor a leftover."""
        for root in (path / "checkpoints", path):
            leftovers = _leftovers(root)
            if (folders := checkpoint.saved(root)) or leftovers:
                listed = []
                for folder in folders:
                    with suppress(FileNotFoundError):  # the run has just removed it
                        listed.append(ListedCheckpoint.of(folder))
                run = root.parent if root.name == "checkpoints" else None
                remarks: list[str] = []
                retention = _read(run, "config.yaml", lambda path: read_config(path).checkpoint, remarks)
                surplus = checkpoint.surplus(root, retention) if retention is not None else []
                return cls(
                    listed, leftovers, _read(run, "attempt.json", _attempt, remarks), retention, surplus, remarks
                )
        if path.is_dir() and (_is_step(path) or (path / LISTING).is_file()):
            return cls([ListedCheckpoint.of(path)])
        raise FileNotFoundError(
            f"checkpoint={path}: {'nothing there' if not path.exists() else 'no checkpoint in it'}; expected a run_dir "
            "of train.pretrain (its checkpoints/step-*), a folder of checkpoints, or one checkpoint"
        )

    @property
    def num_bytes(self) -> int:
        return sum(one.num_bytes for one in self.checkpoints)

    @property
    def resumes(self) -> ListedCheckpoint | None:
        """Return the checkpoint a resume takes: the newest that verifies, or the newest where none was verified."""
        return next((one for one in reversed(self.checkpoints) if not one.problems), None)

    def verified(self, on_read: Callable[[int], object]) -> "CheckpointListing":
        """Return the listing with every byte of every checkpoint read; `on_read` gets the number of bytes.

        Checkpoints that the run removed in the meantime are left out: they are not damaged.
        """
        there, remarks = [], list(self.remarks)
        for one in self.checkpoints:
            problems = checkpoint.verify(one.folder, alone(), on_read)
            if one.folder.exists():
                there.append(replace(one, problems=problems))
            else:
                remarks.append(f"{one.folder.name}: removed by the run while this was read.")
        return replace(self, checkpoints=there, remarks=remarks)

    def kept(self, one: ListedCheckpoint) -> str:
        """Return why retention keeps a checkpoint at the next save, or that it does not."""
        if (rules := self.retention) is None:
            return "unknown"
        if one.folder in self.surplus:
            return "newest whole" if one == self.resumes else "to be removed"
        if one in self.checkpoints[-rules.keep_last :]:
            return f"last {rules.keep_last}"
        if rules.keep_every_steps and one.step % rules.keep_every_steps == 0:
            return f"every {rules.keep_every_steps:,} steps"
        return f"best {rules.best_metric}"


def _is_step(folder: Path) -> bool:
    return re.fullmatch(r"step-\d{8,}", folder.name) is not None


def _size_on_disk(folder: Path) -> int:
    """Return the bytes of the files that are there; the run may remove some in the meantime."""
    size = 0
    with suppress(FileNotFoundError):
        for file in folder.iterdir():
            size += file.stat().st_size
    return size


def _leftovers(root: Path) -> list[tuple[str, int, str]]:
    found = [(folder, meaning) for kind, meaning in LEFTOVERS.items() for folder in root.glob(f".{kind}-step-*")]
    if root.name == "checkpoints":
        abandoned = "abandoned: damaged, or the run went back before it"
        found += [(folder, abandoned) for folder in root.parent.glob("abandoned-*/step-*")]
    return [(str(folder), _size_on_disk(folder), meaning) for folder, meaning in sorted(found)]


def _read(run: Path | None, name: str, parse: Callable[[Path], T], remarks: list[str]) -> T | None:
    """Return what a file of the run says, None without it; a remark tells if it cannot be read."""
    if run is None or not (run / name).is_file():
        return None
    try:
        return parse(run / name)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        remarks.append(f"{run / name} cannot be read: {type(error).__name__}: {error}")
        return None


def _attempt(path: Path) -> dict[str, Any]:
    """Return who started the run last, without the run folder's token."""
    attempt = json.loads(path.read_bytes())
    return {name: attempt[name] for name in ("attempt", "started", "host", "pid")}
