"""Which settings would make a run fit: combinations of a few switches, tried in the order of their cost."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, get_args, get_type_hints

from train.distributed.parallelize import ParallelConfig
from train.planning.estimate import rows_per_rank
from train.pretrain_config import PretrainConfig

TRIES = 24  # combinations tried, each some seconds


@dataclass(frozen=True)
class Switch:
    words: str  # as on the command line
    cost: float  # rough increase of the step time, as a share of it
    config: Callable[[PretrainConfig], PretrainConfig]


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
        return [*([f"world_size={ranks}"] if times > 1 else []), *(switch.words for switch in best)]
    return None


def _with(config: PretrainConfig, switches: list[Switch]) -> PretrainConfig:
    for switch in switches:
        config = switch.config(config)
    return config


def _parallel(cost: float, name: str, value: bool | int | str) -> Switch:
    def change(config: PretrainConfig) -> PretrainConfig:
        changes: dict[str, Any] = {name: value}
        return replace(config, parallel=replace(config.parallel, **changes))

    return Switch(f"parallel.{name}={str(value).lower()}", cost, change)


def _micro_batch(cost: float, size: int) -> Switch:
    return Switch(f"micro_batch_size={size}", cost, lambda config: replace(config, micro_batch_size=size))


def _families(config: PretrainConfig, world_size: int) -> Iterator[list[Switch]]:
    """Yield lists of alternatives, the weakest first; a combination has at most one of each list."""
    parallel = config.parallel
    if not parallel.shard_blocks:
        yield [_parallel(0.01, "shard_blocks", True)]
    if parallel.reshard_after_forward is not True:
        yield [_parallel(0.05, "reshard_after_forward", True)]
    rows, _ = rows_per_rank(config, world_size)
    halves = [rows >> n for n in range(1, rows.bit_length())]
    if halves:
        yield [_micro_batch(0.03 * (n + 1), size) for n, size in enumerate(halves)]
    levels = get_args(get_type_hints(ParallelConfig)["activation_checkpointing"])  # none first, full last
    costs = {"selective": 0.1, "full": 0.3}
    stronger = levels[levels.index(parallel.activation_checkpointing) + 1 :]
    if stronger:
        yield [_parallel(costs[level], "activation_checkpointing", level) for level in stronger]
    if parallel.accumulate_unsharded:
        yield [_parallel(0.1, "accumulate_unsharded", False)]
    if parallel.dp_replicate > 1:
        yield [_parallel(0.2, "dp_replicate", 1)]
    if config.optim.state_dtype != "bfloat16":
        low = replace(config.optim, state_dtype="bfloat16")
        yield [Switch("optim.state_dtype=bfloat16", 0.25, lambda config: replace(config, optim=low))]
