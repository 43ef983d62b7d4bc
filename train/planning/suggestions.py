"""Which settings would make a run fit: combinations of a few switches, tried in the order of their cost."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from train.planning.estimate import rows_per_rank
from train.planning.fit import LEVELS
from train.pretrain_config import PretrainConfig

TRIES = 24  # combinations tried, each some seconds
CHUNK = 1024  # targets at once: logits of a large vocabulary may be the peak where most parameters are frozen


@dataclass(frozen=True)
class Switch:
    key: str  # as on the command line
    value: bool | int | str
    cost: float  # rough increase of the step time, as a share of it


def cheapest_fit(
    config: PretrainConfig, world_size: int, fits: Callable[[PretrainConfig, int], bool]
) -> list[str] | None:
    """Return the cheapest switches with which `fits(config, world_size)` holds, as words; None if none are found."""
    families = list(_families(config, world_size))
    combinations = [
        [switch for switch in chosen if switch is not None]
        for chosen in itertools.product(*([None, *alternatives] for alternatives in families))
    ]
    combinations.sort(key=lambda switches: sum(switch.cost for switch in switches))
    strongest = [alternatives[-1] for alternatives in families]
    for times in (1, 2, 4, 8, 16):  # more ranks only if nothing else helps
        ranks = world_size * times
        if ranks > config.data.lanes or not fits(_with(config, strongest), ranks):
            continue
        tried = combinations[:TRIES]
        best = next((switches for switches in tried if fits(_with(config, switches), ranks)), strongest)
        words = [f"{switch.key}={str(switch.value).lower()}" for switch in best]
        return [f"world_size={ranks}", *words] if times > 1 else words
    return None


def _with(config: PretrainConfig, switches: list[Switch]) -> PretrainConfig:
    for switch in switches:
        section, _, name = switch.key.rpartition(".")
        changes: dict[str, Any] = {name: switch.value}
        if section:
            changes = {section: replace(getattr(config, section), **changes)}
        config = replace(config, **changes)
    return config


def _families(config: PretrainConfig, world_size: int) -> Iterator[list[Switch]]:
    """Yield lists of alternatives, the weakest first; a combination has at most one of each list."""
    parallel = config.parallel
    if config.model.text_loss_chunk > CHUNK:
        yield [Switch("model.text_loss_chunk", CHUNK, 0.005)]
    if not parallel.shard_blocks:
        yield [Switch("parallel.shard_blocks", True, 0.01)]
    if parallel.group_size or parallel.keeps_gathered(world_size // parallel.dp_replicate):
        yield [Switch("parallel.reshard_after_forward", True, 0.05)]
    rows, _ = rows_per_rank(config, world_size)
    if rows > 1:
        yield [Switch("micro_batch_size", rows >> n, 0.03 * n) for n in range(1, rows.bit_length())]
    costs, level = {"selective": 0.1, "full": 0.3}, parallel.activation_checkpointing
    stronger = LEVELS[LEVELS.index(level) + 1 :] if level != "auto" else ()
    if stronger:
        yield [Switch("parallel.activation_checkpointing", level, costs[level]) for level in stronger]
    if parallel.accumulate_unsharded:
        yield [Switch("parallel.accumulate_unsharded", False, 0.1)]
    if parallel.dp_replicate > 1:
        yield [Switch("parallel.dp_replicate", 1, 0.2)]
    if config.optim.state_dtype != "bfloat16":
        yield [Switch("optim.state_dtype", "bfloat16", 0.25)]
