"""Checkpoints of a run: written beside, committed by rename, verified before use, agreed on by all ranks (P5).

    <root>/step-00000123/          whole or absent: __<rank>_0.distcp (tensors), index.json (what lies where), the
                                   extra files, and checksums.json with size and XXH3 of each
    <root>/.tmp-step-00000123-2/   attempt 2 is writing
    <root>/.replaced-step-…, .removing-step-…   see `_commit` and `_remove`; `clean` settles what a kill left of them

A folder without a leading dot was complete when it got its name; whether it still is, `verify` says. The bytes are
train/checkpoints/storage.py's business. Functions that take `ranks` are collective on `ranks.checkpoint_group` and
touch no other group, so a background thread may run `save` and `retain` on staged copies.
"""

import json
import logging
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

from data.durable import sync_folder
from train.checkpoints.run_folder import RunFolder, RunTakenOver
from train.checkpoints.storage import (
    CheckedReader,
    HashingWriter,
    WrittenFile,
    problem_of,
    read_checked,
    read_index,
    read_listing,
)
from train.distributed.ranks import Ranks
from train.nested import leaves

log = logging.getLogger(__name__)

State = dict[str, Any]  # nested dicts whose leaves are tensors or DTensors
META = "meta.json"  # the extra file with counters, fingerprint and metrics
MOST_MINUTES = 100_000  # of a timeout
NAMED_MISFITS = 8  # of those that do not fit, in one message


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    interval_steps: int = 1000  # steps between saves, >= 1; a stop signal and the end of the run save as well
    keep_last: int = 2  # newest checkpoints to keep, >= 1; the newest that verifies is kept in any case
    keep_every_steps: int | None = None  # also keep for ever those whose step is a multiple of this, >= 1; null: none
    keep_best: int = 0  # also keep so many with the lowest `best_metric`, >= 0
    # heldout/NAME/text_loss, image_loss or captioning_loss: counts for checkpoints of steps that are evaluated too
    # (`evaluation`)
    best_metric: str | None = None
    max_failures_in_a_row: int = 3  # writes in the background that fail before the run stops, >= 1
    timeout_minutes: float = 30.0  # a save or load that waits longer for another rank's disk ends the run, > 0

    def __post_init__(self) -> None:
        for name in ("interval_steps", "keep_last", "keep_every_steps", "max_failures_in_a_row"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"checkpoint.{name}={value}: expected at least 1")
        if not 0 < self.timeout_minutes <= MOST_MINUTES:
            raise ValueError(f"checkpoint.timeout_minutes={self.timeout_minutes}: expected in (0, {MOST_MINUTES}]")
        if self.keep_every_steps is not None and self.keep_every_steps % self.interval_steps:
            raise ValueError(
                f"checkpoint.keep_every_steps={self.keep_every_steps}: expected a multiple of interval_steps="
                f"{self.interval_steps}, for no others are saved"
            )
        if self.keep_best < 0 or bool(self.keep_best) != (self.best_metric is not None):
            raise ValueError(
                f"checkpoint.keep_best={self.keep_best}, best_metric={self.best_metric}: expected 0 and null, or a "
                "number of checkpoints and the metric that ranks them"
            )


class CheckpointError(RuntimeError):
    """A checkpoint was not written, on any rank; those saved before are unharmed."""


def training_state(
    model: torch.nn.Module, optimizers: torch.optim.Optimizer | Sequence[torch.optim.Optimizer]
) -> State:
    """Return the tensors of model and optimizers under parameter names, which hold for every world size.

    They are the live tensors: loading into them is loading. An optimizer that has not stepped gets its state first.
    Its hyper-parameters are not part: they come from the config, so a resume may change them.
    """
    optimizer_state = get_optimizer_state_dict(model, optimizers)["state"]
    return {"model": get_model_state_dict(model), "optimizer": optimizer_state}


def save(run: RunFolder, step: int, state: State, extra: Mapping[str, bytes], ranks: Ranks) -> Path:
    """Write checkpoint `step` of `run` and return its folder. `extra` (file name -> content) counts on rank 0.

    Raises CheckpointError, with the same message on every rank, if any rank could not write; nothing bears the final
    name then. Raises RunTakenOver if a later attempt owns the run. A checkpoint of the same step, damaged or left by
    an abandoned continuation, is replaced.
    """
    _assert_only_tensors(state)
    final = run.checkpoints / f"step-{step:08d}"
    beside = run.checkpoints / f".tmp-{final.name}-{run.attempt}"

    def commit() -> None:
        run.assert_current()
        _commit(beside, final)

    try:
        ranks.on_first(lambda: _make_empty(beside))
        writer = HashingWriter(beside, extra, commit)
        with _group_of(ranks) as group:
            dcp.save(state, storage_writer=writer, **group)
    except (CheckpointException, OSError) as error:
        if ranks.is_first:  # every rank has stopped writing: each reported its outcome
            shutil.rmtree(beside, ignore_errors=True)
        raise _same_error_everywhere(error, final) from None
    return final


def load(folder: Path, state: State, ranks: Ranks) -> None:
    """Read `folder` into the tensors of `state`, in place, whatever world size wrote it.

    Give a folder that `latest` or `verify` approved. `state` may hold some of the saved top-level entries (only
    `model`, say), each complete. Raises ValueError naming the tensors that do not fit, before any is written.
    """
    _assert_only_tensors(state)
    index = ranks.on_first(lambda: read_index(folder))
    if misfits := _misfits(index, state):
        more = f"; and {len(misfits) - NAMED_MISFITS} more" if len(misfits) > NAMED_MISFITS else ""
        raise ValueError(
            f"checkpoint {folder} does not fit: {'; '.join(misfits[:NAMED_MISFITS])}{more}. Resume with the "
            "configuration that is stored in it, or start in a new run folder"
        )
    with _group_of(ranks) as group:
        dcp.load(state, storage_reader=CheckedReader(folder, index), **group)


def entries(folder: Path) -> set[str]:
    """Return the names of the saved top-level entries, such as `model`."""
    return {name.split(".")[0] for name in read_index(folder).state_dict_metadata}


def read_extra(folder: Path, name: str) -> bytes:
    """Return an extra file of a checkpoint; raises ValueError if it is not as written, FileNotFoundError if absent."""
    return read_checked(folder, name)


def saved(root: Path) -> list[Path]:
    """Return the committed checkpoints under `root`, oldest step first; whether they are intact, `verify` says."""
    folders = root.iterdir() if root.is_dir() else ()
    return sorted((folder for folder in folders if re.fullmatch(r"step-\d{8,}", folder.name)), key=step_of)


def step_of(folder: Path) -> int:
    """Return the step that a checkpoint's folder is named after."""
    return int(folder.name.removeprefix("step-"))


def verify(folder: Path, ranks: Ranks, on_read: Callable[[int], object] | None = None) -> list[str]:
    """Return what is wrong with a checkpoint, the same list on every rank; an empty one means intact.

    The files are dealt out to the ranks by size, and each is read once; `on_read` is told how many bytes were.
    """
    problems = []
    try:
        listing = read_listing(folder)
    except (OSError, ValueError) as error:
        listing, problems = {}, [str(error)]
    shares: list[list[WrittenFile]] = [[] for _ in range(ranks.world_size)]
    for file in sorted(listing.values(), key=lambda file: (-file.num_bytes, file.name)):
        min(shares, key=lambda share: sum(file.num_bytes for file in share)).append(file)
    problems += [problem for file in shares[ranks.rank] if (problem := problem_of(folder, file, on_read))]
    return sorted({problem for of_rank in ranks.gather(problems) for problem in of_rank})


def latest(root: Path, ranks: Ranks) -> Path | None:
    """Return the newest checkpoint that verifies, the same on every rank, or None.

    Those passed over are named in a warning and stay in their place: the run that goes on from an older step
    replaces them when it comes to save that step again. One that its run removes meanwhile counts as never seen.
    """
    folders = ranks.on_first(lambda: saved(root))
    while folders:
        folder = folders.pop()
        problems = verify(folder, ranks)
        if not problems:
            return folder
        if not ranks.on_first(folder.exists):
            folders = ranks.on_first(lambda: saved(root))
        elif ranks.is_first:
            log.warning("passing over %s, which is damaged: %s", folder, "; ".join(problems))
    return None


def retain(root: Path, config: CheckpointConfig, ranks: Ranks) -> list[Path]:
    """Remove the checkpoints that `config` does not keep and return them. The newest that verifies always stays.

    Reads back the newest one before it removes anything, so a disk that garbles what it is given costs no good copy.
    """
    unwanted = ranks.on_first(lambda: surplus(root, config))
    whole = latest(root, ranks) if unwanted else None
    if whole is None:
        return []
    removed = [folder for folder in unwanted if folder != whole]
    ranks.on_first(lambda: _remove(removed))
    return removed


def surplus(root: Path, config: CheckpointConfig) -> list[Path]:
    """Return the checkpoints under `root` that no rule of `config` keeps, oldest step first."""
    folders, every = saved(root), config.keep_every_steps
    scores = {folder: metrics_of(folder).get(config.best_metric) for folder in folders} if config.keep_best else {}
    measured = sorted(
        (folder for folder, score in scores.items() if score is not None and isfinite(score)), key=scores.get
    )
    best = set(measured[: config.keep_best])
    older = folders[: -config.keep_last]
    return [folder for folder in older if folder not in best and (not every or step_of(folder) % every)]


def metrics_of(folder: Path) -> dict[str, float]:
    """Return what was measured on held-out data at a checkpoint's step; empty where nothing was, or it is damaged."""
    try:
        return json.loads(read_extra(folder, META))["metrics"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def clean(root: Path, ranks: Ranks) -> None:
    """Settle what a killed attempt left half-done; at every start, once a RunFolder says that the run is ours."""

    def settle() -> None:
        for folder in sorted(root.glob(".replaced-step-*")):
            final = root / folder.name.removeprefix(".replaced-")
            if not final.exists():  # killed between the two renames of `_commit`
                folder.rename(final)
        _remove(sorted(folder for kind in ("tmp", "replaced", "removing") for folder in root.glob(f".{kind}-step-*")))

    ranks.on_first(settle)


@contextmanager
def _group_of(ranks: Ranks) -> Iterator[dict[str, Any]]:
    """Yield DCP's arguments for `ranks`; for `alone()` also silence DCP's warning that there is no process group."""
    if ranks.checkpoint_group is not None:
        yield {"process_group": ranks.checkpoint_group}
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield {"no_dist": True}


def _commit(beside: Path, final: Path) -> None:
    """Give a complete folder its final name, putting aside what bears it."""
    replaced = final.with_name(f".replaced-{final.name}")
    if os.path.lexists(final):
        log.warning("replacing %s, an earlier checkpoint of the same step", final)
        _delete(replaced)
        final.rename(replaced)
    beside.rename(final)
    sync_folder(final.parent)
    _delete(replaced)


def _remove(folders: list[Path]) -> None:
    """Delete folders; each loses its name first, so that a kill leaves no half-empty checkpoint.

    A predecessor that is still alive and writing then fails to commit, rather than committing the remains.
    """
    for folder in folders:
        removing = folder.with_name(f".removing-{folder.name.removeprefix('.removing-').lstrip('.')}")
        if folder != removing:
            _delete(removing)
            folder.rename(removing)
        _delete(removing)


def _delete(path: Path) -> None:
    """Delete a folder, or what else stands under its name."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def _make_empty(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def _same_error_everywhere(error: BaseException, final: Path) -> RuntimeError:
    """Return the one error that every rank raises for a failed save."""
    failures = error.failures if isinstance(error, CheckpointException) else {0: (error, None)}
    for cause, _ in failures.values():
        if isinstance(cause, RunTakenOver):
            return RunTakenOver(str(cause))
    causes = "; ".join(f"rank {rank}: {type(e).__name__}: {e}" for rank, (e, _) in sorted(failures.items()))
    return CheckpointError(f"{final} was not written ({causes}); the checkpoints saved before are unharmed")


def _misfits(index: Metadata, state: State) -> list[str]:
    """Name the tensors in which `state` and a checkpoint differ: missing, left over, of another size or dtype."""
    here, there, problems = dict(leaves(state)), index.state_dict_metadata, []
    for name in sorted(here.keys() - there.keys()):
        problems.append(f"{name} is not in the checkpoint")
    for name in sorted(there.keys() - here.keys()):
        if name.split(".")[0] in state:
            problems.append(f"{name} is only in the checkpoint")
    for name in sorted(here.keys() & there.keys()):
        tensor, record = here[name], there[name]
        if (tensor.shape, tensor.dtype) != (record.size, record.properties.dtype):
            found = f"{list(record.size)} {record.properties.dtype}"
            problems.append(f"{name} is {found} in the checkpoint, {list(tensor.shape)} {tensor.dtype} here")
    return problems


def _assert_only_tensors(state: State) -> None:
    for name, leaf in leaves(state):
        assert isinstance(leaf, torch.Tensor) and not leaf.is_meta, f"{name}: {type(leaf)}; other things go to `extra`"
