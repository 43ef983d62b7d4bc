"""A run's numbers and pictures as TensorBoard's event files: another copy, beside metrics.jsonl and the wandb page.

Each attempt writes a file of its own, whose first record tells TensorBoard to forget what earlier ones say of the steps
that it runs again.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
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
        self._folder, self._works = folder, True
        self.go_back(step)

    def go_back(self, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        with self._harmless():
            self._writer = SummaryWriter(str(self._folder), purge_step=step + 1)

    def write(self, row: dict[str, Any]) -> None:
        with self._harmless():
            for name, value in row.items() if self._works else ():
                if isinstance(value, int | float) and (shown := page_name(name)) is not None:
                    self._writer.add_scalar(shown, value, row["step"], row.get("time"))

    def picture(self, path: Path, step: int) -> None:
        with self._harmless():
            for number, (picture, prompt) in enumerate(read_sheet(path)) if self._works else ():
                self._writer.add_image(f"previews/{number} {prompt}", np.array(picture), step, dataformats="HWC")

    def close(self) -> None:
        with self._harmless():
            if self._works:
                self._writer.close()

    @contextmanager
    def _harmless(self) -> Iterator[None]:
        """Give up after an error, such as a full disk: no copy stops training (P13)."""
        try:
            yield
        except Exception as error:  # of a thread of its own, or of a library
            self._works = False
            log.warning("log.tensorboard is off: %s; metrics.jsonl has everything", error)
