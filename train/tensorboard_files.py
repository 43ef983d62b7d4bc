"""A run's numbers and pictures as TensorBoard's event files: another copy, beside metrics.jsonl and the wandb page.

Each attempt writes a file of its own, whose first record tells TensorBoard to forget what earlier ones say of the steps
that it runs again.
"""

import logging
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from data.pictures import read_sheet
from train.metric_sections import page_name

log = logging.getLogger(__name__)


class TensorboardFiles:
    """Files in `folder` of a run that continues after `step`; raises ValueError without the package tensorboard."""

    def __init__(self, folder: Path, step: int) -> None:
        if find_spec("tensorboard") is None:
            raise ValueError("log.tensorboard=true: the package tensorboard is missing: pip install tensorboard")
        self._folder = folder
        self.go_back(step)

    def go_back(self, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self._folder), purge_step=step + 1)

    def write(self, row: dict[str, Any]) -> None:
        for name, value in row.items():
            if isinstance(value, int | float) and (shown := page_name(name)) is not None:
                self._writer.add_scalar(shown, value, row["step"], row.get("time"))

    def picture(self, path: Path, step: int) -> None:
        for number, (picture, prompt) in enumerate(read_sheet(path)):
            self._writer.add_image(f"previews/{number} {prompt}", np.array(picture), step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()
