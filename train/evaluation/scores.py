"""A score with its 95 % interval: what every part of an evaluation returns, and evaluation.json holds by name.

Shares of right answers have Wilson's interval; any other statistic of items has the bootstrap's, from a fixed seed.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

Z = 1.959964  # of 95 %
RESAMPLES = 1000


@dataclass(frozen=True)
class Score:
    """`low` and `high` are None where no interval can be given."""

    value: float
    low: float | None
    high: float | None
    items: int  # that it was measured on


def share(right: int, total: int) -> Score:
    """Return the share of right answers and its score interval (Wilson 1927); `total` >= 1."""
    value, weight = right / total, Z * Z / total
    centre = (value + weight / 2) / (1 + weight)
    half = Z / (1 + weight) * math.sqrt(value * (1 - value) / total + weight / (4 * total))
    low, high = max(centre - half, 0.0), min(centre + half, 1.0)
    return Score(value, min(low, value), max(high, value), total)  # which rounding could put outside


def bootstrap(
    items: np.ndarray, statistic: Callable[[np.ndarray], float] = np.mean, resamples: int = RESAMPLES
) -> Score:
    """Return `statistic` of items [N, ...] and the percentile interval of `resamples` draws of N with replacement."""
    random = np.random.default_rng(0)
    draws = [statistic(items[random.integers(len(items), size=len(items))]) for _ in range(resamples)]
    low, high = np.percentile(draws, [2.5, 97.5]).tolist() if len(items) > 1 else (None, None)
    return Score(float(statistic(items)), low, high, len(items))


def perplexity(text_loss: float) -> float:
    """Return e to the nats a text target, at most e^100: a diverged loss would overflow."""
    return math.exp(min(text_loss, 100.0))


def lines_of(scores: Mapping[str, Score]) -> Iterator[str]:
    """Yield a line for people to each score: its name, value, 95 % interval and number of items."""
    width = max(map(len, scores), default=0)
    for name, score in scores.items():
        interval = "" if score.low is None else f"  [{score.low:.4g}, {score.high:.4g}]"
        yield f"{name:{width}}  {score.value:.4g}{interval}  of {score.items:,}"
