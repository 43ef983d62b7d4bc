"""Bad updates: which ones are skipped, and which documents were in their batches (P8).

An update is bad if its gradient norm is not finite or, optionally, far above its running mean. The norm is global, so
all ranks skip alike, on the device and without waiting for it; skipped updates are reviewed when a row is logged. The
lanes and documents named are those of the micro-batches whose loss is not finite, else of the one with the highest.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from data.loader import StepBatch
from train.distributed.agreement import first_few
from train.distributed.ranks import Ranks
from train.step import StepLoss

HORIZON = 100  # good updates over which the running mean of the gradient norm extends


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    # Also skip an update whose gradient norm is more than this many times its mean over the last 100 good updates, > 1;
    # null: skip only norms that are not finite.
    spike_factor: float | None = None
    spike_after: int = 100  # good updates before `spike_factor` applies, >= 1
    max_bad_in_a_row: int = 5  # skipped updates in a row after which the next log row acts (goes back or stops), >= 1
    # How often the run goes back to a checkpoint and continues without the batches that led there, >= 0; after that, or
    # with 0, it stops.
    max_rollbacks: int = 0
    # Batches right before the skipped updates that are then left out too, >= 0. Skipped updates never touched the
    # weights; those just before may have damaged them (PaLM went back about 100 steps; Chowdhery et al. 2022, 5.1).
    exclude_before: int = 100

    def __post_init__(self) -> None:
        if self.spike_factor is not None and not 1 < self.spike_factor < math.inf:
            raise ValueError(f"guard.spike_factor={self.spike_factor}: expected more than 1, or null")
        if min(self.spike_after, self.max_bad_in_a_row) < 1 or min(self.max_rollbacks, self.exclude_before) < 0:
            raise ValueError(
                f"guard.spike_after={self.spike_after}, max_bad_in_a_row={self.max_bad_in_a_row}, max_rollbacks="
                f"{self.max_rollbacks}, exclude_before={self.exclude_before}: expected at least 1, 1, 0 and 0"
            )


@dataclass(frozen=True)
class BadUpdate:
    """A skipped update, and the lanes and documents to blame."""

    step: int
    in_a_row: int  # skipped updates up to this one
    grad_norm: float
    lanes: list[int]
    documents: list[str]

    def __str__(self) -> str:
        documents = first_few(self.documents, ", ") or "none"
        return f"step {self.step} (gradient norm {self.grad_norm:.3g}; lanes {self.lanes}; documents {documents})"


class Guard:
    """Judges each update of a run. Its state is `counts`, f32 [4]: skipped, skipped in a row, good; mean norm."""

    def __init__(self, config: GuardConfig, device: torch.device) -> None:
        self.config = config
        self.counts = torch.zeros(4, device=device)
        self._steps: list[_Step] = []  # since the last review
        self._in_a_row: list[BadUpdate] = []  # those right before the last review

    def judge(self, norm: torch.Tensor) -> torch.Tensor:
        """Return f32 [], 1.0 if the update with this gradient norm must be skipped, else 0.0; and count it."""
        skipped, in_a_row, good, mean = self.counts.unbind()
        bad = ~torch.isfinite(norm)
        if self.config.spike_factor is not None:
            bad |= (good >= self.config.spike_after) & (norm > self.config.spike_factor * mean)
        skip = bad.to(torch.float32)
        mean.copy_(torch.where(bad, mean, mean + (norm - mean) / (good + 1).clamp(max=HORIZON)))
        good.add_(1 - skip)
        skipped.add_(skip)
        in_a_row.add_(1).mul_(skip)
        return skip

    @property
    def in_a_row(self) -> int:
        """Return how many updates were skipped since the last good one; waits for the device."""
        return int(self.counts[1])

    def note(self, batch: StepBatch, losses: list[StepLoss], norm: torch.Tensor) -> None:
        """Remember a step until the next review: device scalars, and the positions of its documents."""
        lanes, rows = list(batch.documents.items()), len(batch.micro_batches[0].input_ids)
        micro_batches = [
            (loss, micro_batch.num_text_targets, micro_batch.num_images, dict(lanes[i * rows : (i + 1) * rows]))
            for i, (micro_batch, loss) in enumerate(zip(batch.micro_batches, losses, strict=True))
        ]
        self._steps.append(_Step(batch.step, norm, self.counts[1].clone(), micro_batches))

    def review(self, name_of: Callable[[tuple], str], ranks: Ranks) -> tuple[list[BadUpdate], list[BadUpdate]]:
        """Return the bad updates since the last review, and those of the last row of `max_bad_in_a_row` or more.

        `name_of` maps a document's position to its name. Collective; waits for the device.
        """
        in_a_row = torch.stack([step.in_a_row for step in self._steps]).int().tolist() if self._steps else []
        bad = [step for step, count in zip(self._steps, in_a_row, strict=True) if count]
        self._steps.clear()
        found = _blame(bad, name_of, ranks) if bad else []
        too_many, updates = [], iter(found)
        for count in in_a_row:
            if count <= 1:
                self._in_a_row = []
            if count:
                self._in_a_row.append(next(updates))
            if count >= self.config.max_bad_in_a_row:
                too_many = [*self._in_a_row]
        return found, too_many


@dataclass(frozen=True)
class _Step:
    """What a review needs to know of a step."""

    number: int
    norm: torch.Tensor  # f32 []
    in_a_row: torch.Tensor  # f32 []; 0: a good update
    micro_batches: list[tuple[StepLoss, int, int, dict]]  # text targets, images, positions of documents by lane


def _blame(bad: list[_Step], name_of: Callable[[tuple], str], ranks: Ranks) -> list[BadUpdate]:
    """Return who is to blame for each of the bad updates. Collective."""
    mine = [[_suspect(*micro_batch, name_of) for micro_batch in step.micro_batches] for step in bad]
    found = []
    for step, of_ranks in zip(bad, zip(*ranks.gather(mine), strict=True), strict=True):
        suspects = [suspect for of_rank in of_ranks for suspect in of_rank]
        infinite = [suspect for suspect in suspects if not math.isfinite(suspect[0])]
        blamed = infinite or [max(suspects, key=lambda suspect: suspect[0])]
        lanes = [lane for _, its_lanes, _ in blamed for lane in its_lanes]
        documents = [name for _, _, names in blamed for name in names]
        found.append(BadUpdate(step.number, int(step.in_a_row), step.norm.item(), lanes, documents))
    return found


def _suspect(
    loss: StepLoss, targets: int, images: int, documents: dict, name_of: Callable[[tuple], str]
) -> tuple[float, list[int], list[str]]:
    """Return a micro-batch's mean text loss + mean image loss, its lanes and the names of its documents."""
    mean = loss.text_nll.item() / max(targets, 1) + loss.image_error.item() / max(images, 1)
    return mean, list(documents), [name_of(position) for positions in documents.values() for position in positions]
