"""Where a run's rows, pictures and events go: its folder first; wandb gets a copy (train/wandb_page.py) (P13)."""

import os
import time
from dataclasses import dataclass
from typing import Any, Literal

from train.checkpoints.run_folder import RunFolder
from train.console import say
from train.distributed.ranks import Ranks
from train.wandb_page import WandbPage

# What events.jsonl knows of a run besides its rows. A start that follows no stop means that the attempt before died.
EVENTS = {
    "start": "an attempt began, or resumed",
    "stop": "it ended: done, a stop signal, or an error",
    "skipped_update": "a bad update was skipped",
    "went_back": "the run continued from an earlier checkpoint",
    "save_failed": "a checkpoint could not be written",
}


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    interval_steps: int = 10  # steps between rows of metrics.jsonl, >= 1
    # null: the environment's WANDB_MODE, by default disabled. offline: written to the run folder or WANDB_DIR only;
    # online without a key or a network is offline.
    wandb: Literal["disabled", "offline", "online"] | None = None
    project: str | None = None  # wandb project; null: WANDB_PROJECT, else transfusion

    def __post_init__(self) -> None:
        if self.interval_steps < 1:
            raise ValueError(f"log.interval_steps={self.interval_steps}: expected at least 1")


class MetricsLog:
    """Writes rows and events to the run folder and, if configured and reachable, to its wandb page; rank 0 only."""

    def __init__(self, config: LogConfig, folder: RunFolder, ranks: Ranks, run_config: dict[str, Any]):
        self.folder = folder
        mode = config.wandb if ranks.is_first else "disabled"
        self._page = WandbPage(mode, config.project, folder.path, run_config)
        if self._page.place is not None:
            say(f"wandb: {self._page.place}")

    def write(self, row: dict[str, Any]) -> None:
        self.folder.append_metrics(row)
        self._page.log(row)

    def event(self, kind: str, step: int, words: str, **facts: Any) -> None:
        """Note what happened to the run besides training: see EVENTS."""
        assert kind in EVENTS, kind
        row = {"time": time.time(), "attempt": self.folder.attempt, "step": step, "kind": kind, "words": words}
        self.folder.append("events.jsonl", [{**row, **facts}])

    def picture(self, path: os.PathLike, step: int) -> None:
        """Show a saved picture on the wandb page."""
        self._page.picture(path, step)

    def close(self) -> None:
        self._page.close()
