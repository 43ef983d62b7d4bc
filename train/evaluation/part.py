"""What each part of an evaluation is given and returns, how ranks divide its items, and how it shows its progress."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from tqdm import tqdm

from model.sampler_config import SamplerConfig
from train.distributed.ranks import Ranks
from train.evaluation.scores import Score
from train.inference.pipeline import BAR_FORMAT, Pipeline

T = TypeVar("T")
# (what is done, this rank's rows) -> a progress bar with an ETA, silent but on rank 0.
Bar = Callable[[str, float], tqdm]


@dataclass(frozen=True)
class Inputs:
    """What is evaluated and how, alike for all parts."""

    pipeline: Pipeline
    sampler: SamplerConfig
    seed: int
    output: Path  # folder, which exists
    ranks: Ranks
    bar: Bar
    drawn_by: dict[str, Any]  # what a drawn picture depends on besides its prompt and number


class Part(NamedTuple):
    """Results of one part, alike on every rank but for `examples`, which rank 0 has."""

    scores: dict[str, Score]  # by their names in evaluation.json
    # Lines of examples.jsonl, one a sample; paths in them are relative to the output folder. `score` and `score_name`,
    # if given, tell the best from the worst: higher is better.
    examples: list[dict[str, Any]]
    data: dict[str, Any] = {}  # what was measured on: path, fingerprint, counts; goes into data.NAME


def bar_of(ranks: Ranks) -> Bar:
    """Return what opens a progress bar."""
    return lambda what, rows: tqdm(
        desc=what,
        total=rows + 1e-6,  # fractions of rows do not add up to whole ones
        bar_format=BAR_FORMAT,
        disable=not ranks.is_first,
        mininterval=1,
    )


def fingerprint_of(option: str, contents: Any, ranks: Ranks) -> str:
    """Return what tells the contents of an option from others; raise ValueError if ranks read others. Collective."""
    fingerprint = hashlib.sha256(repr(contents).encode()).hexdigest()[:16]
    ranks.require_alike({f"{option} (contents)": fingerprint})
    return fingerprint


def dealt(ranks: Ranks, items: Sequence[T]) -> tuple[range, list[T]]:
    """Return the numbers of this rank's items, and the items: rank r of W has r, r + W, r + 2W ..."""
    numbers = range(ranks.rank, len(items), ranks.world_size)
    return numbers, [items[number] for number in numbers]


def in_order(ranks: Ranks, mine: list[T]) -> list[T]:
    """Return all ranks' results in the order of the items that `dealt` has divided. Collective."""
    parts = ranks.gather(mine)
    total = sum(len(part) for part in parts)
    return [parts[i % len(parts)][i // len(parts)] for i in range(total)]
