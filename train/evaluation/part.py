"""What each part of an evaluation is given and returns, and how it shows its progress."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from model.sampler_config import SamplerConfig
from train.distributed.ranks import Ranks
from train.evaluation.scores import Score
from train.inference.pipeline import BAR_FORMAT, Pipeline

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


def in_order(ranks: Ranks, mine: list) -> list:
    """Return all ranks' results in the order of the items, of which rank r of W has r, r + W, r + 2W ... Collective."""
    parts = ranks.gather(mine)
    total = sum(len(part) for part in parts)
    return [parts[i % len(parts)][i // len(parts)] for i in range(total)]
