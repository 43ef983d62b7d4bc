"""The batch that all ranks run next, after the one vote of the step (P6, P7).

Each rank votes once it has its batch, and every few seconds while it still waits for it. So a stop signal, a failed
save or a failed reader on any rank is known to all of them at the same step.
"""

import time
import traceback
from dataclasses import dataclass, replace

from data.loader import Loader, StepBatch
from train.distributed.ranks import Ranks
from train.distributed.signals import StopKind, StopSignal
from train.distributed.vote import Ballot, PendingVote, Vote

POLL_SECONDS = 5.0  # between the votes of a rank that waits for data


class CannotContinue(RuntimeError):
    """Why a run ends early; all ranks raise it with the same message at the same step."""


@dataclass(frozen=True)
class AgreedBatch:
    batch: StepBatch | None  # None only if the vote says stop
    vote: Vote
    data_wait_s: float  # until this rank had its batch
    peers_wait_s: float  # from then until all had theirs; the slowest rank waits least


class SkipBudget:
    """Ends a run that has skipped more than `most` documents, each counted once across lanes and epochs."""

    def __init__(self, most: int, known: int) -> None:
        """`known`: documents left out from the start, which lanes do not count."""
        self._most, self._known = most, known
        self._passed = 0  # the lanes' sum that was last found within the budget; it counts a document once per lane

    def check(self, vote: Vote, batch: StepBatch, ranks: Ranks) -> None:
        """Raise CannotContinue when the budget is exceeded, naming the last documents skipped (P7). Collective."""
        if vote.documents_skipped <= max(self._passed, self._most - self._known):
            return
        states = [state for of_rank in ranks.gather(batch.lane_states) for state in of_rank.values()]
        skipped = self._known + len({place for state in states for place in state.skipped_documents})
        if skipped <= self._most:
            self._passed = vote.documents_skipped
            return
        names = [name for state in states for name in state.skipped_names]
        raise CannotContinue(
            f"{skipped} documents were skipped, more than data.max_bad_documents={self._most}; among the last: "
            f"{'; '.join(names[:8])}. Repair the data set, or allow more"
        )


def next_batch(loader: Loader, ranks: Ranks, stop: StopSignal, write_failed: bool = False) -> AgreedBatch:
    """Return this rank's batch and the vote, once all ranks have a batch or any must stop. Collective.

    `write_failed` is passed on to the vote. Raises CannotContinue when any rank's reader failed.
    """
    start, batch, failure = time.monotonic(), None, None
    while True:
        try:
            batch = batch or loader.next(POLL_SECONDS)
        except Exception as error:  # of any kind: the peers must know before this rank leaves
            failure = f"rank {ranks.rank} cannot read its data: {type(error).__name__}: {error}"
            if not isinstance(error, (ValueError, OSError)):
                traceback.print_exc()  # a bug rather than bad data
        ready = time.monotonic()
        ballot = Ballot(has_batch=False) if batch is None else _ballot(batch)
        ballot = replace(ballot, stop=stop.kind, data_failed=failure is not None, write_failed=write_failed)
        vote = PendingVote(ballot, ranks).wait()
        if vote.ranks_data_failed:
            raise CannotContinue("; ".join(words for words in ranks.gather(failure) if words))
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
