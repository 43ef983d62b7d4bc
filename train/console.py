"""What a person reads in the terminal while a program runs: plain lines, and one line per log interval.

In a terminal the latter is one line that changes in place, and warnings are coloured unless NO_COLOR is set; elsewhere
(a pipe, a file, Slurm) all are plain lines.
"""

import os
import sys
import time
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from train.config import SIGNAL_DELAY
from train.live_line import LINE, is_terminal, stand_out

if TYPE_CHECKING:
    from train.distributed.ranks import Ranks  # it imports torch, and the report has no need of it


def say(words: str) -> None:
    """Print a line for people; a standard output that cannot take it (a full disk) does not stop training (P13).

    In a terminal, lines that begin "warning:", or a program's name and that, stand out.
    """
    lines = [stand_out(line, sys.stdout) if "warning: " in line[:32] else line for line in words.split("\n")]
    with suppress(OSError):
        print("\n".join(lines), flush=True)


def plural(count: int, noun: str) -> str:
    """Return "1 rank", "2 ranks"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


class Console:
    """One line per log interval on rank 0: step, losses, speed, time left. Warns once if a stop may take too long.

    Use as a context: at its end, the last line stays.
    """

    def __init__(self, steps: int, first_step: int, ranks: "Ranks"):
        self.steps, self.first_step, self.ranks = steps, first_step, ranks
        self._start = time.monotonic()
        self._signal_delay_s = float(os.environ.get(SIGNAL_DELAY, "inf"))
        self._line = ""  # that changes in place

    def __enter__(self) -> "Console":
        return self

    def __exit__(self, *_: object) -> None:
        LINE.show("")
        if self._line:
            say(self._line)

    def show(self, row: dict[str, Any]) -> None:
        if not self.ranks.is_first:
            return
        done, left = row["step"] - self.first_step, self.steps - row["step"]
        seconds = min((time.monotonic() - self._start) / max(done, 1) * left, 1e9)
        losses = [f"{kind} {row[f'{kind}_loss']:.4f}" for kind in ("text", "image") if row[f"{kind}_loss"] is not None]
        begin, left_s = f"step {row['step']}/{self.steps}", f"{timedelta(seconds=round(seconds))} left"
        tokens, images = f"{row['tokens_per_s']:,.0f} tokens/s", f"{row['images_per_s']:,.1f} images/s"
        norm = f"norm {row['grad_norm']:.2f}  lr {row['learning_rate']:.1e}"
        mfu = [] if row["mfu"] is None else [f"MFU {row['mfu']:.1%}"]
        lag = []
        if row["slowest_lag_share"] > 0.1:
            lag = [f"waits {row['slowest_lag_share']:.0%} for rank {row['slowest_rank']} on {row['slowest_host']}"]
        if is_terminal(sys.stdout):  # what matters most comes first: a narrow one cuts the rest
            self._line = "  ".join([begin, *losses, tokens, *mfu, left_s, images, norm, *lag])
            LINE.show(self._line)
        else:
            say("  ".join([begin, *losses, norm, tokens, images, *mfu, left_s, *lag]))
        if row["stop_s"] is not None and row["stop_s"] > self._signal_delay_s:
            say(
                f"pretrain: warning: a stop takes a step and up to two saves, {row['stop_s']:.0f} s, and the signal "
                f"comes {self._signal_delay_s:.0f} s before the end: send it earlier "
                "(slurm.launch signal_delay=, sbatch --signal)"
            )
            self._signal_delay_s = float("inf")


def heldout_table(step: int, losses: dict[str, float]) -> str:
    """Return held-out losses as aligned lines: a row for each source and weights, a column for each kind.

    Names are heldout/SOURCE/KIND and heldout_ema/SOURCE/KIND; the error of x0 by bin is left out.
    """
    cells: dict[str, dict[str, str]] = {}  # by row, by kind
    for name, loss in losses.items():
        weights, _, rest = name.partition("/")
        source, _, kind = rest.rpartition("/")
        if weights in ("heldout", "heldout_ema") and not source.endswith("/x0_error"):
            cells.setdefault(source + (" (EMA)" if weights == "heldout_ema" else ""), {})[kind] = f"{loss:.4f}"
    kinds = list(dict.fromkeys(kind for row in cells.values() for kind in row))
    title = f"step {step}  held out"
    width = max(map(len, [title, *cells]))
    lines = [f"{title:<{width}}" + "".join(f"  {kind:>8}" for kind in kinds)]
    for source, row in cells.items():
        lines.append(f"{source:<{width}}" + "".join(f"  {row.get(kind, '-'):>{max(8, len(kind))}}" for kind in kinds))
    return "\n".join(lines)
