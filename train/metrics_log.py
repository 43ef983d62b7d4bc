"""Where a run's rows, pictures and events go: its folder first; wandb and TensorBoard get copies (P13)."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from train.checkpoints.run_folder import RunFolder
from train.distributed.ranks import Ranks
from train.tensorboard_files import TensorboardFiles
from train.wandb_page import WandbPage

# What events.jsonl knows of a run besides its rows. A start that follows no stop means that the attempt before died.
EVENTS = {
    "start": "an attempt began, or resumed",
    "stop": "it ended: done, a stop signal, or an error",
    "skipped_update": "a bad update was skipped",
    "went_back": "the run continued from an earlier checkpoint",
    "save_failed": "a checkpoint could not be written",
}
ASKED = (75, 130)  # exit statuses after a stop signal: somebody asked for it
ALERTS = ("skipped_update", "went_back", "save_failed")  # and a stop by an error


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    interval_steps: int = 10  # steps between rows of metrics.jsonl, >= 1
    # null: the environment's WANDB_MODE, by default disabled. offline: written to the run folder or WANDB_DIR only;
    # online without a key or a network is offline.
    wandb: Literal["disabled", "offline", "online"] | None = None
    project: str | None = None  # wandb project; null: WANDB_PROJECT, else transfusion
    tensorboard: bool = False  # write event files to the run folder's tensorboard/ too

    def __post_init__(self) -> None:
        if self.interval_steps < 1:
            raise ValueError(f"log.interval_steps={self.interval_steps}: expected at least 1")


class MetricsLog:
    """Writes rows and events to the run folder and, as configured, to its wandb page and TensorBoard; rank 0 only."""

    def __init__(
        self,
        config: LogConfig,
        folder: RunFolder,
        ranks: Ranks,
        run_config: dict[str, Any],
        step: int = 0,
        went_back: int | None = None,
    ):
        """Start after `step`; `went_back`: on purpose. metrics.jsonl has been cut. Collective.

        Raises ValueError if a package that is asked for is missing.
        """
        self.folder, self.status = folder, 0
        self._files: TensorboardFiles | None = None

        def open_files() -> None:
            if config.tensorboard:
                self._files = TensorboardFiles(folder.path / "tensorboard", step)

        ranks.on_first(open_files)
        mode, dropped = config.wandb if ranks.is_first else "disabled", folder.metrics.dropped
        self._page = WandbPage(mode, config.project, folder.path, run_config, dropped, went_back)

    def write(self, row: dict[str, Any]) -> None:
        self.folder.append_metrics(row)
        self._page.wake()
        if self._files is not None:
            self._files.write(row)

    def event(self, kind: str, step: int, words: str, **facts: Any) -> None:
        """Note what happened to the run besides training: see EVENTS."""
        assert kind in EVENTS, kind
        row = {"time": time.time(), "attempt": self.folder.attempt, "step": step, "kind": kind, "words": words}
        self.folder.append("events.jsonl", [{**row, **facts}])
        if kind == "stop":
            self.status = facts.get("status", 0)
        if kind in ALERTS or self.status not in (0, *ASKED):
            self._page.alert(kind, words)
        if kind == "went_back":
            self._page.fork(facts["to"])
            if self._files is not None:
                self._files.go_back(facts["to"])

    def picture(self, path: Path, step: int) -> None:
        """Show a saved sheet of pictures."""
        self._page.picture(path)
        if self._files is not None:
            self._files.picture(path, step)

    def close(self) -> None:
        """Wait until the copies are written; the exit status is that of the stop event."""
        self._page.close(self.status)
        if self._files is not None:
            self._files.close()
