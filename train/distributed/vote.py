"""The one vote a step: what each rank says about the coming step, and what all of them said."""

from dataclasses import dataclass, fields

import torch
import torch.distributed as dist

from train.distributed.ranks import Ranks
from train.distributed.signals import StopKind


@dataclass(frozen=True, kw_only=True)
class Ballot:
    """What one rank says about the coming step."""

    text_targets: int = 0  # of this rank's rows
    images: int = 0
    tokens: int = 0  # padding left out
    documents_skipped: int = 0  # since the run began, by this rank's lanes
    has_batch: bool = True  # False: this rank still waits for data, and the step cannot be run
    ended: bool = False  # every lane of this rank is at its end
    write_failed: bool = False  # the background save failed; said by rank 0 alone, for all ranks fail together
    data_failed: bool = False  # this rank's reader failed
    stop: StopKind = StopKind.NONE


@dataclass(frozen=True, kw_only=True)
class Vote:
    """What all ranks said, the same on every rank."""

    text_targets: int  # global: the denominators of the two losses
    images: int
    tokens: int
    documents_skipped: int
    ranks_with_batch: int
    ranks_ended: int
    ranks_write_failed: int
    ranks_data_failed: int
    stop: StopKind  # the gravest any rank asked for


class PendingVote:
    """A vote under way: launched when the batch arrives, awaited before the step, one per step and rank.

    Collective on `vote_group`, main thread only. One SUM answers every question: each kind of stop has a slot of
    its own, so that the greatest kind with a count is the maximum.
    """

    def __init__(self, ballot: Ballot, ranks: Ranks) -> None:
        counts = [value for name, value in vars(ballot).items() if name != "stop"]  # in the order of Vote's fields
        kinds = [ballot.stop == kind for kind in StopKind]
        self._sums = torch.tensor([*counts, *kinds], dtype=torch.int64)
        self._work = dist.all_reduce(self._sums, group=ranks.vote_group, async_op=True)

    def wait(self) -> Vote:
        """Return the result; raises RuntimeError when a peer is lost or the group's timeout passes."""
        self._work.wait()
        sums = self._sums.tolist()
        counts, kinds = sums[: -len(StopKind)], sums[-len(StopKind) :]
        stop = max(kind for kind, count in zip(StopKind, kinds, strict=True) if count)
        names = [field.name for field in fields(Vote)]
        return Vote(**dict(zip(names, [*counts, stop], strict=True)))
