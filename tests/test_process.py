"""What a rank asks of the operating system and of CUDA before it meets the others."""

import os
import resource

import pytest
import torch

from tests.ranks import run_ranks
from train.distributed import process
from train.distributed.process import ALLOCATOR_NAMES, allow_open_files, set_allocator
from train.distributed.ranks import GLOO_GROUPS, Ranks, own_device


def _open_files(ranks: Ranks) -> tuple[int, int]:
    """Return how many files this rank has open once every group was used, and how many it may have."""
    for group in (None, ranks.vote_group, ranks.checkpoint_group, ranks.background_group):
        torch.distributed.all_reduce(torch.ones(8), group=group)
    ranks.gather(None)
    return len(os.listdir("/proc/self/fd")), resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def test_each_further_rank_takes_as_many_files_as_the_limit_is_checked_for() -> None:
    """Four groups on CPU, so 1,083 files with 256 ranks, more than the usual limit of 1,024."""
    two, four = (run_ranks(_open_files, world_size) for world_size in (2, 4))
    per_rank = GLOO_GROUPS + 1
    assert per_rank == 4
    for (before, limit), (after, _) in zip(two, four[:2], strict=True):
        assert after - before == 2 * per_rank
        assert before - per_rank <= process.OTHER_FILES
        assert limit == min(resource.getrlimit(resource.RLIMIT_NOFILE)[1], process.MOST_FILES)


def _limits(_: Ranks) -> tuple[list[int], str]:
    """Lower this process's limits, which it cannot take back; return the soft limits that follow, and the refusal."""
    found = []
    for world_size in (2, 100):
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, 800))
        allow_open_files(world_size, 3)
        found.append(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    try:
        allow_open_files(256, 3)
    except ValueError as error:
        return found, str(error)
    return found, ""


def test_a_limit_that_cannot_hold_all_ranks_is_refused_with_both_numbers() -> None:
    ((found, refusal),) = run_ranks(_limits, 1)
    assert found == [800, 800]
    assert "allows a process 800 open files, and one of 256 ranks needs at least 829" in refusal
    assert "ulimit -Hn" in refusal


def test_the_allocator_has_a_default_that_never_replaces_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ALLOCATOR_NAMES:
        monkeypatch.delenv(name, raising=False)
    own_device("cpu")  # what every program asks first, under any launcher
    assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    for name in ALLOCATOR_NAMES:
        monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
        monkeypatch.setenv(name, "max_split_size_mb:64")
        assert set_allocator() == f"{name}=max_split_size_mb:64"
        assert [other for other in ALLOCATOR_NAMES if other in os.environ] == [name]
        monkeypatch.delenv(name)
