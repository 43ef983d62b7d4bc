"""The batch that all ranks run next: each votes when it has one, and goes on voting while it has none (P6, P7).

So a stop signal, a failed save or a dead reader reaches every rank at the same step, whoever waits for data.
"""

import time
import traceback
from dataclasses import dataclass, replace

from data.loader import Loader, StepBatch
from train.distributed.ranks import Ranks
from train.distributed.signals import StopKind, StopSignal
from train.distributed.vote import Ballot, PendingVote, Vote

POLL_SECONDS = 5.0  # a rank without a batch votes this often, so that stops and errors still reach everybody


class CannotGoOn(RuntimeError):
    """Why work ends early, known to every rank: all raise it with the same message at the same step."""


@dataclass(frozen=True)
class AgreedBatch:
    batch: StepBatch | None  # None only where the vote says stop
    vote: Vote
    data_wait_s: float  # until this rank had its batch
    peers_wait_s: float  # from then until all had theirs: the rank that waits least is the one they wait for


class SkipBudget:
    """Ends a run that has skipped more than `most` documents, each counted once whatever lanes and epochs meet it."""

    def __init__(self, most: int, known: int) -> None:
        """`known`: documents of which it was known at the start that they cannot be used; lanes do not count them."""
        self._most, self._known = most, known
        self._passed = 0  # of the lanes' sum, which counts a document once a lane

    def check(self, vote: Vote, batch: StepBatch, ranks: Ranks) -> None:
        """Raise CannotGoOn when the budget is spent, naming the last of them (P7). Collective."""
        if vote.documents_skipped <= max(self._passed, self._most - self._known):
            return
        states = [state for of_rank in ranks.gather(batch.lane_states) for state in of_rank.values()]
        skipped = self._known + len({tuple(place) for state in states for place in state["skipped_documents"]})
        if skipped <= self._most:
            self._passed = vote.documents_skipped
            return
        names = [name for state in states for name in state["skipped_names"]]
        raise CannotGoOn(
            f"{skipped} documents were skipped, more than data.max_bad_documents={self._most}; among the last: "
            f"{'; '.join(names[:8])}. Repair the data set, or allow more"
        )


def next_batch(loader: Loader, ranks: Ranks, stop: StopSignal, write_failed: bool = False) -> AgreedBatch:
    """Return this rank's batch and what all ranks agreed on, once all have one or any must stop. Collective.

    `write_failed` is told to the others, which is all that happens with it. Raises CannotGoOn when any rank's reader
    failed.
    """
    start, batch, failure = time.monotonic(), None, None
    while True:
        try:
            batch = batch or loader.next(POLL_SECONDS)
        except Exception as error:  # whatever it is, the peers must hear of it before this rank leaves
            failure = f"rank {ranks.rank} cannot read its data: {type(error).__name__}: {error}"
            if not isinstance(error, (ValueError, OSError)):
                traceback.print_exc()  # nobody's expected mistake
        ready = time.monotonic()
        ballot = Ballot(has_batch=False) if batch is None else _ballot(batch)
        ballot = replace(ballot, stop=stop.kind, data_failed=failure is not None, write_failed=write_failed)
        vote = PendingVote(ballot, ranks).wait()
        if vote.ranks_data_failed:
            raise CannotGoOn("; ".join(words for words in ranks.gather(failure) if words))
        if vote.stop != StopKind.NONE or vote.ranks_with_batch == ranks.world_size:
            return AgreedBatch(batch, vote, ready - start, time.monotonic() - ready)


def _ballot(batch: StepBatch) -> Ballot:
    return Ballot(
        text_targets=batch.num_text_targets,
        images=batch.num_images,
        tokens=batch.num_tokens,
        documents_skipped=batch.num_skipped,
        ended=batch.ended,
    )
