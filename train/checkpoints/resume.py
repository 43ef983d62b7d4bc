"""Where a run starts: its own newest checkpoint, one that was asked for, or from scratch.

The same command started again goes on, whatever it asked for the first time: a step to go back to, or another run's
checkpoint, is where a continuation begins; once that has checkpoints of its own, those count. Nothing is deleted:
what a run leaves behind when it goes back is put aside in <run>/abandoned-<number>/, its metrics too.
"""

import json
import logging
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from train.checkpoints import checkpoint
from train.checkpoints.lookup import find_checkpoint
from train.checkpoints.run_folder import RunFolder
from train.distributed.ranks import Ranks

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ResumePoint:
    """What to load; None: nothing, the run starts from scratch."""

    checkpoint: Path | None
    back_to: int | None = None  # the step that this continuation was told to go back to

    def __str__(self) -> str:
        back = ", where it was told to go back to" if self.back_to is not None else ""
        return f"from {self.checkpoint}{back}" if self.checkpoint else "from scratch"


def find_resume_point(resume: str, folder: RunFolder, ranks: Ranks) -> ResumePoint:
    """Return where `resume` (see PretrainConfig) says to start, verified. Collective.

    Raises ValueError or FileNotFoundError for what is not there, damaged, or would leave checkpoints behind.
    """
    checkpoint.clean(folder.checkpoints, ranks)
    saved = ranks.on_first(lambda: checkpoint.saved(folder.checkpoints))
    if resume == "none" and saved:
        raise ValueError(
            f"resume=none, but {folder.path} holds {len(saved)} checkpoints; give another run_dir, or move them away"
        )
    step = _own_step(resume, folder)
    if step is not None and not ranks.on_first(lambda: _went_back_already(step, saved)):
        return ResumePoint(_go_back(step, saved, folder, ranks), back_to=step)
    newest = checkpoint.latest(folder.checkpoints, ranks)
    if newest is None and saved:
        raise ValueError(
            f"all {len(saved)} checkpoints in {folder.checkpoints} are damaged; restore one, or remove them to start "
            "from scratch"
        )
    if step is not None and ranks.is_first:
        log.warning(
            "resume=%s was done by an earlier start, which has gone on to %s: going on from there. To go back once "
            "more, move the checkpoints after step %d away",
            resume,
            newest,
            step,
        )
    if newest is None and resume not in ("auto", "none"):
        if not Path(resume).exists():
            raise FileNotFoundError(f"resume={resume}: expected auto, none, a step of this run, or a path that exists")
        return ResumePoint(find_checkpoint(Path(resume), ranks, "resume"))
    if newest is not None and newest != saved[-1]:  # damaged ones would count among those that retention keeps
        damaged = [path for path in saved if checkpoint.step_of(path) > checkpoint.step_of(newest)]
        ranks.on_first(lambda: _put_aside(damaged, folder, f"damaged, after {newest}"))
    return ResumePoint(newest)


def go_back_before(step: int, folder: RunFolder, ranks: Ranks) -> Path | None:
    """Return the newest whole checkpoint before `step`, with the later ones put aside; None without one. Collective."""
    saved = ranks.on_first(lambda: checkpoint.saved(folder.checkpoints))
    for path in reversed(saved):
        if checkpoint.step_of(path) < step and not checkpoint.verify(path, ranks):
            _leave(path, saved, folder, ranks)
            return path
    return None


def _own_step(resume: str, folder: RunFolder) -> int | None:
    """Return the step that `resume` names of this run, as a number or as the checkpoint's path; else None."""
    if resume.isdecimal():
        return int(resume)
    path = Path(resume).resolve()
    own = path.parent == folder.checkpoints.resolve() and re.fullmatch(r"step-\d+", path.name)
    return checkpoint.step_of(path) if own else None


def _went_back_already(step: int, saved: list[Path]) -> bool:
    """Return whether a checkpoint after `step` is of a continuation that began there."""

    def origin(path: Path) -> int | None:
        try:
            return json.loads(checkpoint.read_extra(path, checkpoint.META))["back_to"]
        except (OSError, ValueError, KeyError, TypeError):  # damaged: it says nothing
            return None

    return any(origin(path) == step for path in saved if checkpoint.step_of(path) > step)


def _go_back(step: int, saved: list[Path], folder: RunFolder, ranks: Ranks) -> Path:
    """Return the checkpoint of `step`, verified, after putting aside the later ones and a copy of the metrics."""
    path = next((path for path in saved if checkpoint.step_of(path) == step), None)
    if path is None:
        there = ", ".join(str(checkpoint.step_of(path)) for path in saved) or "none"
        raise FileNotFoundError(f"resume={step}: {folder.checkpoints} has no such step; it has {there}")
    if problems := checkpoint.verify(path, ranks):
        raise ValueError(f"resume={step}: {path} is damaged: {'; '.join(problems)}")
    _leave(path, saved, folder, ranks)
    return path


def _leave(path: Path, saved: list[Path], folder: RunFolder, ranks: Ranks) -> None:
    """Put aside what came after a checkpoint that the run goes back to. Collective."""
    step = checkpoint.step_of(path)
    later = [other for other in saved if checkpoint.step_of(other) > step]
    if later or ranks.on_first(lambda: folder.has_rows_after(step)):
        ranks.on_first(lambda: _put_aside(later, folder, f"what came after step {step}"))


def _put_aside(paths: list[Path], folder: RunFolder, what: str) -> None:
    """Move checkpoints out of the way, with a copy of the metrics as they were; rank 0 only."""
    numbers = [int(path.name.removeprefix("abandoned-")) for path in folder.path.glob("abandoned-*")]
    aside = folder.path / f"abandoned-{max(numbers, default=0) + 1}"
    aside.mkdir()
    if (metrics := folder.path / "metrics.jsonl").exists():
        shutil.copy2(metrics, aside)
    for path in paths:
        path.rename(aside / path.name)
    log.warning("put aside in %s: %s", aside, what)
