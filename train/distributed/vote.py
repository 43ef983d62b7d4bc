"""The one vote per step: what each rank reports about the coming step, and the result for all (P2, P6).

Rejected: one all-reduce per quantity; a vote is a single message however many questions it answers.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from train.distributed.ranks import Ranks
from train.distributed.signals import StopKind


@dataclass(frozen=True, kw_only=True)
class Ballot:
    """What one rank reports about the coming step."""

    text_targets: int = 0  # of this rank's rows
    images: int = 0
    tokens: int = 0  # without padding
    documents_skipped: int = 0  # since the run began, by this rank's lanes
    has_batch: bool = True  # False: this rank still waits for data, so the step cannot run
    ended: bool = False  # all lanes of this rank have ended
    write_failed: bool = False  # the background save failed; reported by rank 0 only, as all ranks fail together
    data_failed: bool = False  # this rank's reader failed
    stop: StopKind = StopKind.NONE


@dataclass(frozen=True)
class Vote:
    """The sums over all ranks, the same on every rank."""

    text_targets: int  # global: the denominators of the two losses
    images: int
    tokens: int
    documents_skipped: int
    ranks_with_batch: int
    ranks_ended: int
    ranks_write_failed: int
    ranks_data_failed: int
    stop: StopKind  # the greatest that any rank reported


class PendingVote:
    """A vote in flight: launched when the batch arrives, awaited before the step.

    Collective on `vote_group`, main thread only. A single SUM answers every question: each kind of stop is counted in
    its own slot, and the greatest kind with a count wins.
    """

    def __init__(self, ballot: Ballot, ranks: Ranks) -> None:
        counts = [value for name, value in vars(ballot).items() if name != "stop"]  # in the order of Vote's fields
        kinds = [ballot.stop == kind for kind in StopKind]
        self._sums = torch.tensor([*counts, *kinds], dtype=torch.int64)
        self._work = dist.all_reduce(self._sums, group=ranks.vote_group, async_op=True)

    def wait(self) -> Vote:
        """Return the result; raises RuntimeError if a peer is lost or the group's timeout passes."""
        self._work.wait()
        sums = self._sums.tolist()
        counts, kinds = sums[: -len(StopKind)], sums[-len(StopKind) :]
        stop = max(kind for kind, count in zip(StopKind, kinds, strict=True) if count)
        return Vote(*[*counts, stop])
