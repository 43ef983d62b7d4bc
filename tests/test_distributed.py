"""Ranks agree in one message per step; a rank that fails reports why and ends the others."""

import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.ranks import FunctionRanks, run_ranks
from train.distributed.ranks import Ranks, alone, init_ranks, last_words
from train.distributed.signals import StopKind
from train.distributed.vote import Ballot, PendingVote, Vote


def _vote_several_times(ranks: Ranks) -> list[Vote]:
    first, second = ranks.rank == 0, ranks.rank == 1
    ballots = [
        Ballot(text_targets=10**12 + ranks.rank, images=ranks.rank, tokens=10 * ranks.rank, documents_skipped=7),
        Ballot(text_targets=5 * first, has_batch=not second, stop=StopKind.REQUEUE if second else StopKind.NONE),
        Ballot(stop=StopKind.REQUEUE if first else StopKind.CANCEL, write_failed=second, data_failed=not first),
        Ballot(ended=first),
    ]
    pending = [PendingVote(ballot, ranks) for ballot in ballots]  # several in flight at once
    return [vote.wait() for vote in pending]


def test_every_rank_gets_the_sums_and_the_greatest_stop() -> None:
    """P2, P6: one all-reduce for all questions, with counts beyond 32 bits."""
    votes = run_ranks(_vote_several_times, 3)
    quiet = Vote(**{**dict.fromkeys(vars(votes[0][0]), 0), "ranks_with_batch": 3, "stop": StopKind.NONE})
    counts = replace(quiet, text_targets=3 * 10**12 + 3, images=3, tokens=30, documents_skipped=21)
    starved = replace(quiet, text_targets=5, ranks_with_batch=2, stop=StopKind.REQUEUE)
    failed = replace(quiet, stop=StopKind.CANCEL, ranks_write_failed=1, ranks_data_failed=2)
    assert votes == [[counts, starved, failed, replace(quiet, ranks_ended=1)]] * 3


def _gather_and_decide(ranks: Ranks) -> tuple[list[int], str, str]:
    def refuse() -> None:
        raise FileNotFoundError("no such shards")

    decided = ranks.on_first(lambda: f"rank {ranks.rank} decided")
    with pytest.raises(FileNotFoundError) as refusal:
        ranks.on_first(refuse)
    return ranks.gather(ranks.rank), decided, str(refusal.value)


def test_what_rank_0_decides_or_refuses_applies_to_all() -> None:
    answer = ([0, 1], "rank 0 decided", "no such shards")
    assert run_ranks(_gather_and_decide, 2) == [answer] * 2
    assert _gather_and_decide(alone()) == ([0], "rank 0 decided", "no such shards")


def _be_one_rank(_: Ranks) -> tuple[int, Vote, int]:
    torch.distributed.destroy_process_group()
    for name in [name for name in os.environ if name in {"RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS"}]:
        del os.environ[name]
    ranks = init_ranks(timeout_s=5, device="cpu")
    vote = PendingVote(Ballot(text_targets=7), ranks).wait()
    ranks.close()
    return ranks.world_size, vote, torch.get_num_threads()


def test_a_plain_process_is_a_group_of_one_with_all_cores() -> None:
    """No launcher, no environment, no port."""
    ((world_size, vote, num_threads),) = run_ranks(_be_one_rank, 1)
    assert (world_size, vote.text_targets, vote.ranks_with_batch) == (1, 7, 1)
    assert num_threads == len(os.sched_getaffinity(0))


def _lose_rank_1(ranks: Ranks, folder: Path, frozen: bool) -> None:
    sys.stderr = (folder / f"{ranks.rank}.txt").open("w")
    with last_words(ranks, where=lambda: "step 7"):
        if ranks.rank == 1 and frozen:
            os.kill(os.getpid(), signal.SIGSTOP)
        elif ranks.rank == 1:
            raise IndexError("lane 5 is out of range")
        ranks.set_timeout(2 if frozen else 20)
        PendingVote(Ballot(), ranks).wait()


def test_a_rank_that_raises_ends_the_others_and_only_its_traceback_is_shown(tmp_path: Path) -> None:
    started = time.monotonic()
    outcomes = FunctionRanks(_lose_rank_1, 3, tmp_path, False).outcomes()
    assert [status for status, _ in outcomes] == [1, 1, 1]
    assert time.monotonic() - started < 15, "at once, not at the timeout"
    lost, culprit, also_lost = ((tmp_path / f"{rank}.txt").read_text() for rank in range(3))
    assert culprit.startswith("Traceback") and culprit.endswith("died at step 7: IndexError: lane 5 is out of range\n")
    assert "rank 1 of 3" in culprit
    for words in (lost, also_lost):
        assert "lost rank 1 at step 7" in words and words.count("\n") == 1


def test_a_frozen_rank_is_named_at_the_timeout(tmp_path: Path) -> None:
    """Two of the other three are merely blocked behind it. The timeout is the loop's, not that of the start."""
    with FunctionRanks(_lose_rank_1, 4, tmp_path, True, collective_timeout_s=300) as processes:  # ends the frozen one
        processes.wait(30, [0, 2, 3])
        for rank in (0, 2, 3):
            assert "lost rank 1 at step 7" in (tmp_path / f"{rank}.txt").read_text()
    assert processes.statuses == [1, -signal.SIGKILL, 1, 1]
