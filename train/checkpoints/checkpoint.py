"""Checkpoints of a run: committed by rename, verified before use, agreed on by all ranks (P4, P5).

    <root>/step-00000123/          __<rank>_0.distcp (tensors), index.json (where each tensor is), the extra files,
                                   and checksums.json with size and XXH3 of each
    <root>/.tmp-step-00000123-2/   attempt 2 is writing
    <root>/.replaced-step-…, .removing-step-…   see `_commit` and `_remove`; `clean` settles what a kill leaves of them

A folder without a leading dot was complete when it got its name; `verify` says whether it still is. storage.py reads
and writes the bytes. Functions that take `ranks` are collective on `ranks.checkpoint_group` and use no other group, so
a background thread may run `save` and `retain` on staged copies.
"""

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
from typing import TYPE_CHECKING, Any

import torch

from data.durable import sync_folder
from data.strict_json import loads
from train.checkpoints.listing import WrittenFile, problem_of, read_extra, read_listing
from train.checkpoints.run_folder import RunFolder, RunTakenOver
from train.distributed.agreement import first_few
from train.distributed.ranks import Ranks
from train.nested import leaves

if TYPE_CHECKING:  # DCP takes half a second to import: only the functions that move tensors do
    from torch.distributed.checkpoint.metadata import Metadata

log = logging.getLogger(__name__)

State = dict[str, Any]  # nested dicts whose leaves are tensors or DTensors
META = "meta.json"  # the extra file with counters, fingerprint and metrics
MOST_MINUTES = 100_000  # of a timeout


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    interval_steps: int = 1000  # steps between saves, >= 1; a stop signal and the end of the run save too
    keep_last: int = 2  # newest checkpoints to keep, >= 1; the newest that verifies is always kept
    keep_every_steps: int | None = None  # also keep those whose step is a multiple of this, >= 1; null: none
    keep_best: int = 0  # also keep this many with the lowest `best_metric`, >= 0
    # heldout/NAME/text_loss, image_loss, captioning_loss or x0_error. Ranks only checkpoints whose step was also
    # evaluated (see `evaluation`); null: none.
    best_metric: str | None = None
    max_failures_in_a_row: int = 3  # failed background writes in a row that stop the run, >= 1
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
                f"{self.interval_steps}, as no other steps are saved"
            )
        if self.keep_best < 0 or bool(self.keep_best) != (self.best_metric is not None):
            raise ValueError(
                f"checkpoint.keep_best={self.keep_best}, best_metric={self.best_metric}: expected 0 and null, or a "
                "number of checkpoints and a metric to rank them by"
            )


class CheckpointError(RuntimeError):
    """A checkpoint was not written (on any rank); earlier ones are unharmed."""


def training_state(
    model: torch.nn.Module, optimizers: torch.optim.Optimizer | Sequence[torch.optim.Optimizer]
) -> State:
    """Return the live tensors of model and optimizers under parameter names, the same for every world size.

    Loading a checkpoint into them loads the model, but for frozen parameters, which are left out. An optimizer that
    has not stepped yet gets its state first. Its hyper-parameters are left out: they come from the config, so a resume
    may change them.
    """
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        get_optimizer_state_dict,
    )

    optimizer_state = get_optimizer_state_dict(model, optimizers)["state"]
    trained = get_model_state_dict(model, options=StateDictOptions(ignore_frozen_params=True))
    return {"model": trained, "optimizer": optimizer_state}


def save(run: RunFolder, step: int, state: State, extra: Mapping[str, bytes], ranks: Ranks) -> Path:
    """Write checkpoint `step` of `run` and return its folder. `extra` maps file names to contents; rank 0's is written.

    Raises CheckpointError, with the same message on every rank, if any rank could not write; no folder has the final
    name then. Raises RunTakenOver if a later attempt owns the run. A checkpoint of the same step, damaged or left by
    an abandoned continuation, is replaced.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    from train.checkpoints.storage import HashingWriter

    _assert_only_tensors(state)
    final = run.checkpoints / f"step-{step:08d}"
    temporary = run.checkpoints / f".tmp-{final.name}-{run.attempt}"

    def prepare() -> None:
        _delete(temporary)
        temporary.mkdir(parents=True)

    def commit() -> None:
        run.assert_current()
        _commit(temporary, final)

    try:
        ranks.on_first(prepare)
        with _group_of(ranks) as group:
            dcp.save(state, storage_writer=HashingWriter(temporary, extra, commit), **group)
    except (CheckpointException, OSError) as error:
        if ranks.is_first:  # every rank has reported its outcome, so none still writes
            shutil.rmtree(temporary, ignore_errors=True)
        failures = error.failures if isinstance(error, CheckpointException) else {0: (error, None)}
        for cause, _ in failures.values():
            if isinstance(cause, RunTakenOver):
                raise RunTakenOver(str(cause)) from None
        causes = "; ".join(f"rank {rank}: {type(e).__name__}: {e}" for rank, (e, _) in sorted(failures.items()))
        raise CheckpointError(f"{final} was not written ({causes}); earlier checkpoints are unharmed") from None
    return final


def load(folder: Path, state: State, ranks: Ranks, *, whole: bool = True) -> None:
    """Read `folder` into the tensors of `state`, in place, whatever world size wrote it (P4).

    Pass a folder that `latest` or `verify` approved. `state` may have only some of the saved top-level entries (say,
    `model`), but each complete. Raises ValueError naming the tensors that do not fit, before any is changed.
    """
    import torch.distributed.checkpoint as dcp

    from train.checkpoints.storage import CheckedReader, read_index

    _assert_only_tensors(state)
    index = ranks.on_first(lambda: read_index(folder))
    if misfits := _misfits(index, state, whole):
        raise ValueError(
            f"checkpoint {folder} does not fit: {first_few(misfits)}. Resume with the config stored in it, or start in "
            "a new run folder"
        )
    with _group_of(ranks) as group:
        dcp.load(state, storage_reader=CheckedReader(folder, index), **group)


def entries(folder: Path) -> set[str]:
    """Return the names of the saved top-level entries, such as `model`."""
    from train.checkpoints.storage import read_index

    return {name.split(".")[0] for name in read_index(folder).state_dict_metadata}


def tensors(folder: Path, entry: str) -> set[str]:
    """Return the names of the tensors of a saved top-level entry, without its name."""
    from train.checkpoints.storage import read_index

    return {name.partition(".")[2] for name in read_index(folder).state_dict_metadata if name.startswith(f"{entry}.")}


def saved(root: Path) -> list[Path]:
    """Return the committed checkpoints under `root`, oldest step first; `verify` says whether they are intact."""
    folders = root.iterdir() if root.is_dir() else ()
    return sorted((folder for folder in folders if re.fullmatch(r"step-\d{8,}", folder.name)), key=step_of)


def step_of(folder: Path) -> int:
    """Return the step in a checkpoint folder's name."""
    return int(folder.name.removeprefix("step-"))


def verify(folder: Path, ranks: Ranks, on_read: Callable[[int], object] | None = None) -> list[str]:
    """Return what is wrong with a checkpoint, the same list on every rank; empty if it is intact.

    The files are divided among the ranks by size, and each is read once; `on_read` gets the number of bytes read.
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
    return sorted({problem for problems in ranks.gather(problems) for problem in problems})


def latest(root: Path, ranks: Ranks) -> Path | None:
    """Return the newest checkpoint that verifies, the same on every rank, or None.

    A warning names those passed over. They stay where they are: a run resumed from an older step replaces them when it
    saves that step again. Checkpoints that their run removes during the search are ignored.
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
    """Remove the checkpoints that `config` does not keep, and return them. The newest that verifies always stays.

    Verifies the newest one before it removes any, so that a faulty disk never costs the last good copy.
    """
    unwanted = ranks.on_first(lambda: surplus(root, config))
    newest = latest(root, ranks) if unwanted else None
    if newest is None:
        return []
    removed = [folder for folder in unwanted if folder != newest]
    ranks.on_first(lambda: _remove(removed))
    return removed


def surplus(root: Path, config: CheckpointConfig) -> list[Path]:
    """Return the checkpoints under `root` that no rule of `config` keeps, oldest step first."""
    folders, every, metric = saved(root), config.keep_every_steps, config.best_metric
    scores = {folder: meta_of(folder).get("metrics", {}).get(metric) for folder in folders} if metric else {}
    measured = {folder: score for folder, score in scores.items() if score is not None and isfinite(score)}
    best = sorted(measured, key=lambda folder: measured[folder])[: config.keep_best]
    older = folders[: -config.keep_last]
    return [folder for folder in older if folder not in best and (not every or step_of(folder) % every)]


def meta_of(folder: Path) -> dict[str, Any]:
    """Return the counters, fingerprint and metrics of a checkpoint; empty if they are damaged."""
    try:
        return loads(read_extra(folder, META))
    except (OSError, ValueError):
        return {}


def clean(root: Path, ranks: Ranks) -> None:
    """Settle what a killed attempt left half-done. Call it at every start, once a RunFolder has claimed the run."""

    def settle() -> None:
        for folder in sorted(root.glob(".replaced-step-*")):
            final = root / folder.name.removeprefix(".replaced-")
            if not final.exists():  # killed between the two renames of `_commit`
                folder.rename(final)
        _remove(sorted(folder for kind in ("tmp", "replaced", "removing") for folder in root.glob(f".{kind}-step-*")))

    ranks.on_first(settle)


@contextmanager
def _group_of(ranks: Ranks) -> Iterator[dict[str, Any]]:
    """Yield DCP's arguments for `ranks`; for `alone()` also silence its warning that there is no process group."""
    if ranks.checkpoint_group is not None:
        yield {"process_group": ranks.checkpoint_group}
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield {"no_dist": True}


def _commit(temporary: Path, final: Path) -> None:
    """Give a complete folder its final name, first renaming whatever has that name."""
    replaced = final.with_name(f".replaced-{final.name}")
    if os.path.lexists(final):
        log.warning("replacing %s, an earlier checkpoint of the same step", final)
        _delete(replaced)
        final.rename(replaced)
    temporary.rename(final)
    sync_folder(final.parent)
    _delete(replaced)


def _remove(folders: list[Path]) -> None:
    """Delete folders; each is renamed first, so that a kill leaves no half-empty checkpoint.

    An earlier attempt that is still writing one of them fails to commit rather than commit the remains.
    """
    for folder in folders:
        removing = folder.with_name(f".removing-{folder.name.removeprefix('.removing-').lstrip('.')}")
        if folder != removing:
            _delete(removing)
            folder.rename(removing)
        _delete(removing)


def _delete(path: Path) -> None:
    """Delete a folder, or a file or link of that name."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def _misfits(index: "Metadata", state: State, whole: bool) -> list[str]:
    """Return how tensors of `state` and a checkpoint differ: missing, left over, of another size or dtype."""
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    here, there = dict(leaves(state)), index.state_dict_metadata
    left_over = sorted(name for name in there.keys() - here.keys() if whole and name.split(".")[0] in state)
    problems = [f"{name} is not in the checkpoint" for name in sorted(here.keys() - there.keys())]
    problems += [f"{name} is only in the checkpoint" for name in left_over]
    for name in sorted(here.keys() & there.keys()):
        tensor, record = here[name], there[name]
        assert isinstance(record, TensorStorageMetadata), name  # index.py reads nothing else
        if (tensor.shape, tensor.dtype) != (record.size, record.properties.dtype):
            found = f"{list(record.size)} {record.properties.dtype}"
            problems.append(f"{name} is {found} in the checkpoint, {list(tensor.shape)} {tensor.dtype} here")
    return problems


def _assert_only_tensors(state: State) -> None:
    for name, leaf in leaves(state):
        assert isinstance(leaf, torch.Tensor) and not leaf.is_meta, f"{name}: {type(leaf)}; put others in `extra`"
