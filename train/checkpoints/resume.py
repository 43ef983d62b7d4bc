"""Where a run starts: its own newest checkpoint, the one that `resume` names, or from scratch.

The same command started again always continues. A step to go back to, or another run's checkpoint, counts only until
the run has saved a checkpoint since. Nothing is deleted: what a run leaves behind when it goes back is put aside in
<run>/abandoned-<number>/, with a copy of its metrics.
"""

import logging
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from train.checkpoints import checkpoint
from train.checkpoints.lookup import find_checkpoint, read_while_there
from train.checkpoints.run_folder import RunFolder
from train.distributed.ranks import Ranks

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class ResumePoint:
    """The checkpoint to load; None: start from scratch."""

    checkpoint: Path | None
    back_to: int | None = None  # the step that `resume=STEP` goes back to

    def __str__(self) -> str:
        back = ", going back as resume= says" if self.back_to is not None else ""
        return f"from {self.checkpoint}{back}" if self.checkpoint else "from scratch"


def find_resume_point(resume: str, folder: RunFolder, ranks: Ranks) -> ResumePoint:
    """Return the verified checkpoint that `resume` (see PretrainConfig) stands for. Collective.

    Raises ValueError or FileNotFoundError if it is missing or damaged, and for resume=none with checkpoints.
    """
    checkpoint.clean(folder.checkpoints, ranks)
    saved = ranks.on_first(lambda: checkpoint.saved(folder.checkpoints))
    if resume == "none" and saved:
        raise ValueError(f"resume=none, but {folder.path} holds {len(saved)} checkpoints; give another run_dir")
    step = _own_step(resume, folder)
    if step is not None and not ranks.on_first(lambda: _went_back_already(step, saved)):
        return ResumePoint(_go_back(step, saved, folder, ranks), back_to=step)
    newest = checkpoint.latest(folder.checkpoints, ranks)
    if newest is None and saved:
        raise ValueError(
            f"all {len(saved)} checkpoints in {folder.checkpoints} are damaged; restore one, or remove them to restart"
        )
    if step is not None and ranks.is_first:
        log.warning("resume=%s: an earlier start went back already; the run continues from there, %s", resume, newest)
        log.warning("to go back again, move the checkpoints after step %d away", step)
    if newest is None and resume not in ("auto", "none"):
        if not Path(resume).exists():
            raise FileNotFoundError(f"resume={resume}: expected auto, none, a step of this run, or a path that exists")
        return ResumePoint(find_checkpoint(Path(resume), ranks, "resume"))
    if newest is not None and newest != saved[-1]:  # retention would count damaged ones as kept
        damaged = [path for path in saved if checkpoint.step_of(path) > checkpoint.step_of(newest)]
        ranks.on_first(lambda: _put_aside(damaged, folder, f"damaged; resuming from {newest}"))
    return ResumePoint(newest)


def load_resume_point(
    point: ResumePoint, load: Callable[[Path, Ranks], T], resume: str, folder: RunFolder, ranks: Ranks
) -> tuple[ResumePoint, T]:
    """Return the point that `load` could load, and its result. Collective.

    A checkpoint of another run, which may still be training, can be removed while it is read: the next is loaded then.
    """

    def find() -> Path:
        found = find_resume_point(resume, folder, ranks).checkpoint
        assert found is not None  # as it was before: this run's own folder is locked
        return found

    path, result = read_while_there(find, lambda path: (path, load(path, ranks)), ranks, point.checkpoint)
    return replace(point, checkpoint=path), result


def go_back_before(step: int, folder: RunFolder, ranks: Ranks) -> Path | None:
    """Put aside the checkpoints after the newest intact one before `step`, and return that, or None. Collective."""
    saved = ranks.on_first(lambda: checkpoint.saved(folder.checkpoints))
    older = (path for path in reversed(saved) if checkpoint.step_of(path) < step)
    newest = next((path for path in older if not checkpoint.verify(path, ranks)), None)
    if newest is not None:
        ranks.on_first(lambda: _put_later_aside(newest, saved, folder))
    return newest


def _own_step(resume: str, folder: RunFolder) -> int | None:
    """Return the step of this run that `resume` names, as a number or a checkpoint's path; None: it names none."""
    if resume.isdecimal():
        return int(resume)
    path = Path(resume).resolve()
    own = path.parent == folder.checkpoints.resolve() and re.fullmatch(r"step-\d+", path.name)
    return checkpoint.step_of(path) if own else None


def _went_back_already(step: int, saved: list[Path]) -> bool:
    """Return whether any checkpoint after `step` was saved after a `resume=step`."""
    later = (path for path in saved if checkpoint.step_of(path) > step)
    return any(checkpoint.meta_of(path).get("back_to") == step for path in later)


def _go_back(step: int, saved: list[Path], folder: RunFolder, ranks: Ranks) -> Path:
    """Return the verified checkpoint of `step`, after putting aside the later ones and a copy of the metrics."""
    path = next((path for path in saved if checkpoint.step_of(path) == step), None)
    if path is None:
        there = ", ".join(str(checkpoint.step_of(path)) for path in saved) or "none"
        raise FileNotFoundError(f"resume={step}: {folder.checkpoints} has no such step; expected one of {there}")
    if problems := checkpoint.verify(path, ranks):
        raise ValueError(f"resume={step}: {path} is damaged: {'; '.join(problems)}")
    ranks.on_first(lambda: _put_later_aside(path, saved, folder))
    return path


def _put_later_aside(path: Path, saved: list[Path], folder: RunFolder) -> None:
    """Put aside what came after the checkpoint that the run goes back to; rank 0 only."""
    step = checkpoint.step_of(path)
    later = [other for other in saved if checkpoint.step_of(other) > step]
    if later or folder.metrics.has_rows_after(step):
        _put_aside(later, folder, f"what came after step {step}")


def _put_aside(paths: list[Path], folder: RunFolder, what: str) -> None:
    """Move checkpoints to a folder of their own, with a copy of the metrics; rank 0 only."""
    numbers = [int(path.name.removeprefix("abandoned-")) for path in folder.path.glob("abandoned-*")]
    aside = folder.path / f"abandoned-{max(numbers, default=0) + 1}"
    aside.mkdir()
    if (metrics := folder.path / "metrics.jsonl").exists():
        shutil.copy2(metrics, aside)
    for path in paths:
        path.rename(aside / path.name)
    log.warning("moved %s to %s: %s", ", ".join(path.name for path in paths), aside, what)
