"""The checkpoints of a run, as they lie on disk: which are whole, which one a resume takes, what is left half-done.

Reads alone and changes nothing, so a run that is training may be looked at.
"""

import json
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from train.checkpoints import checkpoint
from train.checkpoints.storage import LISTING, WrittenFile, read_listing
from train.distributed.ranks import alone
from train.pretrain_config import read_config

LEFTOVERS = {
    "tmp": "half-written: a save in progress, or one that was killed; the next start removes it",
    "replaced": "put aside while a save of the same step took its place; the next start settles it",
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
        """Return how many ranks wrote tensors: each its own files."""
        ranks = (re.fullmatch(r"__(\d+)_\d+\.distcp", name) for name in self.files)
        return len({found[1] for found in ranks if found})

    @property
    def damaged_files(self) -> set[str]:
        """Return the files that verification found damaged."""
        return {name for name in self.files if any(problem.startswith(f"{name}:") for problem in self.problems or ())}

    @classmethod
    def of(cls, folder: Path) -> "ListedCheckpoint":
        """Read the small files of a checkpoint; `verified` reads the rest."""
        try:
            files = read_listing(folder)
        except (OSError, ValueError):
            files = {}
        try:
            meta = json.loads(checkpoint.read_extra(folder, checkpoint.META))
        except (OSError, ValueError, RecursionError):
            meta = {}
        listing = folder / LISTING  # written last
        saved_at = (listing if listing.exists() else folder).stat().st_mtime
        return cls(folder, files, saved_at, meta.get("progress", {}), meta.get("metrics", {}))

    def verified(self, on_read: Callable[[int], object]) -> "ListedCheckpoint":
        """Read all bytes and return the checkpoint with what is wrong with it."""
        return replace(self, problems=checkpoint.verify(self.folder, alone(), on_read))


@dataclass(frozen=True)
class Leftover:
    """A folder that is no checkpoint of the run: no longer, or not yet."""

    folder: Path
    num_bytes: int
    meaning: str


@dataclass(frozen=True)
class CheckpointListing:
    """What `path` (a run, its checkpoints folder, or one checkpoint) holds, oldest step first."""

    path: Path
    checkpoints: list[ListedCheckpoint]
    leftovers: list[Leftover] = field(default_factory=list)
    run: Path | None = None
    attempt: dict[str, Any] | None = None  # of attempt.json
    surplus: list[Path] | None = None  # what retention would remove next; None: the run's config cannot be read
    remarks: list[str] = field(default_factory=list)

    @classmethod
    def open(cls, path: Path) -> "CheckpointListing":
        """List without verifying. Raises FileNotFoundError where there is neither a checkpoint nor the trace of one."""
        for root in (path / "checkpoints", path):
            leftovers = _leftovers(root)
            if (folders := checkpoint.saved(root)) or leftovers:
                listed = []
                for folder in folders:
                    with suppress(FileNotFoundError):  # removed in this moment
                        listed.append(ListedCheckpoint.of(folder))
                run = root.parent if root.name == "checkpoints" else None
                remarks: list[str] = []
                surplus = _surplus(root, run, remarks)
                return cls(path, listed, leftovers, run, _attempt(run, remarks), surplus, remarks)
        if path.is_dir() and (_is_step(path) or (path / LISTING).is_file()):
            return cls(path, [ListedCheckpoint.of(path)])
        raise FileNotFoundError(
            f"checkpoint={path}: {'nothing there' if not path.exists() else 'no checkpoint in it'}; expected a run_dir "
            "of train.pretrain (its checkpoints/step-*), a folder of checkpoints, or one checkpoint"
        )

    @property
    def num_bytes(self) -> int:
        return sum(one.num_bytes for one in self.checkpoints)

    @property
    def resumes(self) -> ListedCheckpoint | None:
        """Return the newest that verifies, which a resume takes; the newest of all where none was verified."""
        return next((one for one in reversed(self.checkpoints) if not one.problems), None)

    def verified(self, on_read: Callable[[int], object]) -> "CheckpointListing":
        """Return the listing with every byte of every checkpoint read; `on_read` is told of them.

        Without those that the run removed meanwhile: they are not damaged.
        """
        verified = [one.verified(on_read) for one in self.checkpoints]
        there = [one for one in verified if one.folder.exists()]
        gone = [one.folder.name for one in verified if one not in there]
        removed = [f"{', '.join(gone)}: removed by the run while this was read."] if gone else []
        return replace(self, checkpoints=there, remarks=self.remarks + removed)

    def keeps(self, one: ListedCheckpoint) -> bool | None:
        """Return whether the next save's retention leaves a checkpoint; None: unknown."""
        return None if self.surplus is None else one.folder not in self.surplus or one == self.resumes


def _is_step(folder: Path) -> bool:
    return re.fullmatch(r"step-\d{8,}", folder.name) is not None


def _size_on_disk(folder: Path) -> int:
    """Return the bytes of the files that are there: the run may remove them meanwhile."""
    size = 0
    with suppress(FileNotFoundError):
        for file in folder.iterdir():
            size += file.stat().st_size
    return size


def _leftovers(root: Path) -> list[Leftover]:
    found = []
    for kind, meaning in LEFTOVERS.items():
        for folder in sorted(root.glob(f".{kind}-step-*")):
            found.append(Leftover(folder, _size_on_disk(folder), meaning))
    for folder in sorted(root.parent.glob("abandoned-*/step-*")) if root.name == "checkpoints" else ():
        found.append(
            Leftover(folder, _size_on_disk(folder), "put aside: the run went back before it, or it was damaged")
        )
    return found


def _attempt(run: Path | None, remarks: list[str]) -> dict[str, Any] | None:
    """Return who started the run last, without the token that is nobody else's business."""
    if run is None or not (run / "attempt.json").is_file():
        return None
    try:
        attempt = json.loads((run / "attempt.json").read_bytes())
        return {name: attempt[name] for name in ("attempt", "started", "host", "pid")}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        remarks.append(f"{run / 'attempt.json'} is damaged: {type(error).__name__}: {error}")
        return None


def _surplus(root: Path, run: Path | None, remarks: list[str]) -> list[Path] | None:
    """Return what retention would remove by the run's own config."""
    config = run / "config.yaml" if run is not None else None
    if config is None or not config.is_file():
        return None
    try:
        return checkpoint.surplus(root, read_config(config).checkpoint)
    except ValueError as error:
        remarks.append(f"What retention keeps is unknown, since {config} cannot be read: {error}")
        return None
