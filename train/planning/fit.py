"""Whether a run fits its devices, and with how much activation checkpointing: asked by plans and by a run's start.

`parallel.activation_checkpointing=auto` is the cheapest kind with which the largest step fits. Every rank must choose
alike, but a rehearsal takes seconds and needs a process group of its own. So rank 0 rehearses before the ranks meet,
and the choice is made by the least memory of any rank when they have met. Rejected: each rank by its own free memory.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Literal, TypeVar

import torch

from data.documents import ImageKind
from data.largest_batch import Grid
from train.distributed.ranks import Ranks
from train.hardware import memory_of
from train.planning.estimate import GIB, largest_batches_of, parameters, rows_per_rank, usable_bytes
from train.planning.rehearsal import Rehearsal, planned_model, rehearse
from train.pretrain_config import PretrainConfig

Config = TypeVar("Config", bound=PretrainConfig)
Level = Literal["none", "selective", "full"]
LEVELS: tuple[Level, ...] = ("none", "selective", "full")  # the cheapest first
ROUGH_STATES, ROUGH_ACTIVATIONS = 32, 128  # bytes per parameter; bytes per token, channel and layer


def rehearse_levels(config: Config, usable: float, rehearsed: Callable[[Config], Rehearsal]) -> dict[str, Rehearsal]:
    """Rehearse the kinds of checkpointing that `config` allows, the cheapest first, until one fits `usable` bytes."""
    asked, found = config.parallel.activation_checkpointing, dict[str, Rehearsal]()
    for level in LEVELS if asked == "auto" else (asked,):
        found[level] = rehearsed(_with_level(config, level))
        if _peak(found[level]) <= usable:
            break
    return found


def choose_level(config: Config, found: Mapping[str, Rehearsal], usable: float) -> tuple[Config, str]:
    """Return the config with `auto` replaced by the cheapest kind that fits `usable` bytes, and why, in words.

    A kind that is not among the rehearsals `found` is taken to fit; if none fits, it is the one that takes least.
    """
    if config.parallel.activation_checkpointing != "auto":
        return config, "as set"
    if not found:
        return _with_level(config, LEVELS[0]), "far from the limit of memory by a rough count"
    peaks = {level: _peak(rehearsal) / GIB for level, rehearsal in found.items()}
    level = next((level for level in LEVELS if peaks.get(level, 0.0) * GIB <= usable), LEVELS[-1])
    others = ", ".join(f"{name} {peak:.2f}" for name, peak in peaks.items() if name != level)
    words = f"the largest step takes {peaks[level]:.2f}" if level in peaks else "others do not fit"
    return _with_level(config, level), f"{words} of {usable / GIB:.2f} GiB" + (f"; {others}" if others else "")


def check_memory(
    config: PretrainConfig,
    vocab_size: int,
    world_size: int,
    grids: Sequence[Grid],
    device: torch.device,
    *,
    first: bool,
    kind: ImageKind = "moments",
) -> dict[str, Rehearsal]:
    """Return the rehearsals that decide what fits; called before process groups exist.

    Raises ValueError if the states alone are too large for this rank's device (see `refuse_unless_states_fit`).
    Rehearses nothing for small runs on a CPU, far from the limit by a rough count, and on ranks that are not `first`.
    """
    cuda, memory = device.type == "cuda", memory_of(device)
    trunk, (rows, _) = config.model.transformer, rows_per_rank(config, world_size)
    model = planned_model(config, vocab_size)
    trained, total = (parameters(model, trained=only)["total"] for only in (True, False))
    states = (ROUGH_STATES * trained + 4 * (total - trained)) * config.parallel.dp_replicate / world_size
    activations = ROUGH_ACTIVATIONS * rows * config.data.sequence_length * trunk.width * trunk.layers
    if not cuda and states + activations < memory / 4:
        return {}
    refuse_unless_states_fit(config, vocab_size, world_size, memory)
    if not first:
        return {}
    batches = largest_batches_of(config, world_size, grids, kind)
    usable = _usable(memory, device)
    return rehearse_levels(config, usable, lambda c: rehearse(c, vocab_size, world_size, batches, cuda=cuda))


def agree_on_memory(
    config: PretrainConfig, found: Mapping[str, Rehearsal], ranks: Ranks
) -> tuple[PretrainConfig, list[str]]:
    """Return the config with checkpointing decided, the same on every rank, and what to say about memory. Collective.

    `found` are rank 0's rehearsals; what they must fit is the least memory of any rank.
    """
    gathered = ranks.gather((memory_of(ranks.device), dict(found)))
    found, usable = gathered[0][1], _usable(min(memory for memory, _ in gathered), ranks.device)
    decided, why = choose_level(config, found, usable)
    level = decided.parallel.activation_checkpointing
    lines = [f"activation checkpointing: {level} ({why})"] if decided is not config else []
    warning = warning_unless_peak_fits(found[level], usable) if level in found else None
    return decided, lines + ([f"warning: {warning}"] if warning else [])


def refuse_unless_states_fit(config: PretrainConfig, vocab_size: int, world_size: int, memory_bytes: int) -> None:
    """Raise ValueError if a rank's states between steps exceed its device's memory (P10). Takes about a second."""
    states = rehearse(config, vocab_size, world_size, [], cuda=False).states
    total = sum(states.values())
    if total > memory_bytes:
        parts = ", ".join(f"{kind} {size / GIB:.2f}" for kind, size in states.items() if size)
        raise ValueError(
            f"a rank's states take {total / GIB:.2f} GiB ({parts}), more than the {memory_bytes / GIB:.2f} GiB of its "
            f"device, before any activation; use more ranks than {world_size}, parallel.dp_replicate=1, fewer averages "
            "or a smaller model (python -m train.plan says what would fit)"
        )


def warning_unless_peak_fits(rehearsal: Rehearsal, usable: float) -> str | None:
    """Return a warning if the peak of a step with the largest batch is likely to exceed `usable` bytes."""
    total = _peak(rehearsal)
    if total <= usable:
        return None
    parts = ", ".join(f"{kind} {size / GIB:.2f}" for kind, size in rehearsal.peak.items() if size >= 0.01 * total)
    return (
        f"the largest step is estimated at {total / GIB:.2f} GiB in {rehearsal.peak_phase} ({parts}), of "
        f"{usable / GIB:.2f} GiB that the device has for tensors; python -m train.plan says what would fit"
    )


def _usable(memory_bytes: int, device: torch.device) -> float:
    return usable_bytes(memory_bytes / GIB) if device.type == "cuda" else memory_bytes


def _peak(rehearsal: Rehearsal) -> float:
    return sum(rehearsal.peak.values())


def _with_level(config: Config, level: Level) -> Config:
    return replace(config, parallel=replace(config.parallel, activation_checkpointing=level))
