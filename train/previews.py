"""Sample pictures every so often, from the weights in training (their EMA if there is one)."""

from dataclasses import dataclass, field

from data.loader import DataSet
from train.distributed import Ranks
from train.metrics import MetricsLog
from train.optim import Optimizer
from train.run_folder import RunFolder


@dataclass(frozen=True, kw_only=True)
class PreviewConfig:
    interval_steps: int | None = None  # steps between sheets of sample pictures, >= 1; null: none
    prompts: list[str] = field(default_factory=list)  # captions to draw
    steps: int = 50  # sampler steps a picture
    guidance: float = 3.0  # classifier-free guidance scale, 1 is none

    def __post_init__(self) -> None:
        if self.interval_steps is not None and (self.interval_steps < 1 or not self.prompts):
            raise ValueError("preview.interval_steps: expected at least 1, and preview.prompts to draw")


class Previews:
    def __init__(self, config, data: DataSet, ranks: Ranks, folder: RunFolder, log: MetricsLog):
        self.config, self.data, self.ranks, self.folder, self.log = config.preview, data, ranks, folder, log

    def due(self, step: int) -> bool:
        return self.config.interval_steps is not None and step % self.config.interval_steps == 0

    def make(self, optimizer: Optimizer, step: int) -> None:
        raise NotImplementedError
