"""Which checkpoint a path names, and how to read it although the run that owns it may remove it."""

import hashlib
import logging
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

from train.checkpoints import checkpoint
from train.checkpoints.listing import LISTING
from train.distributed.ranks import Ranks

log = logging.getLogger(__name__)

T = TypeVar("T")
EXPORT_MARK = "export.json"  # in the folder that train.export writes
MOST_CHOICES = 20  # checkpoints tried, each removed by its run while it was read


def find_checkpoint(path: Path, ranks: Ranks, key: str = "checkpoint") -> Path:
    """Return a verified checkpoint, given its own path, a run's, or that of a folder of checkpoints.

    Raises FileNotFoundError if there is none, ValueError if none is intact; `key` is the option that named it.
    """
    for root in (path / "checkpoints", path):
        if not (folders := checkpoint.saved(root)):
            continue
        if (newest := checkpoint.latest(root, ranks)) is None:
            raise ValueError(f"{key}={path}: all {len(folders)} checkpoints in it are damaged")
        return newest
    if not (path / LISTING).is_file():
        raise FileNotFoundError(f"{key}={path}: expected a checkpoint, a run folder that holds one, or an export")
    if problems := checkpoint.verify(path, ranks):
        if not ranks.on_first(path.exists):
            raise FileNotFoundError(f"{key}={path} was removed by its run; give {key}=RUN for its newest checkpoint")
        raise ValueError(f"{key}={path} is damaged: {'; '.join(problems)}")
    return path


def read_while_there(
    choose: Callable[[], Path], read: Callable[[Path], T], ranks: Ranks, first: Path | None = None
) -> T:
    """Return `read(choose())`; choose again whenever the checkpoint's run removed it while it was read.

    `first` is the first choice, if already known. Collective; `read` must fail on every rank if the checkpoint is gone.
    Raises FileNotFoundError when that happens MOST_CHOICES times.
    """
    from torch.distributed.checkpoint.api import CheckpointException  # half a second: where something is read

    for _ in range(MOST_CHOICES):
        folder, first = first or choose(), None
        of_folder = partial(identity, folder)
        before = ranks.on_first(of_folder)
        try:
            result = read(folder)
        except (OSError, ValueError, CheckpointException):
            if of_folder() == before is not None:  # not a collective: the error may be this rank's alone
                raise
        else:
            if ranks.on_first(of_folder) in (before, None):
                return result
        if ranks.is_first:
            log.warning("%s was removed by its run while it was read: reading the newest instead", folder)
    raise FileNotFoundError(
        f"{folder} and {MOST_CHOICES - 1} others were removed by their run while they were read: raise its "
        "checkpoint.interval_steps or keep_last, or wait until it has ended"
    )


def identity(folder: Path) -> str | None:
    """Return a hash of what a checkpoint or an export holds; None if it is gone."""
    for name in (EXPORT_MARK, LISTING):
        with suppress(OSError):
            return hashlib.sha256((folder / name).read_bytes()).hexdigest()[:16]
    return None
