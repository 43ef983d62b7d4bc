"""What a person reads in the terminal while a program runs: plain lines, and one line per log interval."""

import os
import time
from contextlib import suppress
from datetime import timedelta
from typing import Any

from train.config import SIGNAL_DELAY
from train.distributed.ranks import Ranks


def say(words: str) -> None:
    """Print a line for people; a standard output that cannot take it (a full disk) does not stop training (P13)."""
    with suppress(OSError):
        print(words, flush=True)


def plural(count: int, noun: str) -> str:
    """Return "1 rank", "2 ranks"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


class Console:
    """One line per log interval on rank 0: step, losses, speed, time left. Warns once if a stop may take too long."""

    def __init__(self, steps: int, first_step: int, ranks: Ranks):
        self.steps, self.first_step, self.ranks = steps, first_step, ranks
        self._start = time.monotonic()
        self._signal_delay_s = float(os.environ.get(SIGNAL_DELAY, "inf"))

    def show(self, row: dict[str, Any]) -> None:
        if not self.ranks.is_first:
            return
        done, left = row["step"] - self.first_step, self.steps - row["step"]
        seconds = min((time.monotonic() - self._start) / max(done, 1) * left, 1e9)
        losses = [f"{kind} {row[f'{kind}_loss']:.4f}" for kind in ("text", "image") if row[f"{kind}_loss"] is not None]
        mfu = "" if row["mfu"] is None else f"MFU {row['mfu']:.1%}  "
        lag = ""
        if row["slowest_lag_share"] > 0.1:
            lag = f"  waits {row['slowest_lag_share']:.0%} for rank {row['slowest_rank']} on {row['slowest_host']}"
        say(
            f"step {row['step']}/{self.steps}  {'  '.join(losses)}  "
            f"norm {row['grad_norm']:.2f}  lr {row['learning_rate']:.1e}  {row['tokens_per_s']:,.0f} tokens/s  "
            f"{row['images_per_s']:,.1f} images/s  {mfu}{timedelta(seconds=round(seconds))} left{lag}",
        )
        if row["stop_s"] is not None and row["stop_s"] > self._signal_delay_s:
            say(
                f"pretrain: warning: a stop takes a step and up to two saves, {row['stop_s']:.0f} s, and the signal "
                f"comes {self._signal_delay_s:.0f} s before the end: send it earlier "
                "(slurm.launch signal_delay=, sbatch --signal)"
            )
            self._signal_delay_s = float("inf")
