"""Threads and allocator of a rank that computes on the CPU: set once, and never over what the user set."""

import os
import resource
import subprocess
import sys

import pytest
import torch

from train.distributed.cpu_settings import describe_cpu, settle_cpu


def _faults_of_steps() -> None:
    """Print how many pages are faulted in while 16 MiB are allocated, filled and freed 20 times."""
    torch.set_num_threads(1)
    settle_cpu(1, computes=True)
    for number in range(25):
        if number == 5:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(3 << 20), torch.ones(4 << 20)
    print("faults", resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_a_step_reuses_the_memory_of_the_one_before() -> None:
    program = f"import tests.{__name__.rpartition('.')[2]} as test; test._faults_of_steps()"
    faults = {}
    for name, extra in (("ours", {}), ("the user's", {"MALLOC_TRIM_THRESHOLD_": "131072"})):
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))} | extra
        done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
        faults[name] = int(done.stdout.rpartition("faults ")[2])
    assert 10 * faults["ours"] < faults["the user's"] and faults["the user's"] > 20 * 4096  # pages of 16 MiB


@pytest.mark.parametrize(
    ("variable", "ranks", "expected"),
    [(None, 1, "all"), ("", 2, "half"), ("1", 2, "half"), ("3", 2, "3"), ("1", 1, "1"), (" 2,4", 2, "2")],
)
def test_threads_are_the_ranks_share_of_the_cores_unless_the_user_chose(
    variable: str | None, ranks: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, cores = torch.get_num_threads(), len(os.sched_getaffinity(0))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    try:
        torch.set_num_threads(int((variable or "1").split(",")[0]))  # as OpenMP does at the start
        settle_cpu(ranks, computes=False)
        wanted = {"all": cores, "half": max(1, cores // ranks)}.get(expected) or int(expected)
        assert torch.get_num_threads() == wanted
        assert f"{wanted} thread{'s' * (wanted != 1)} a rank" in describe_cpu()
    finally:
        torch.set_num_threads(before)


def test_threads_that_are_no_number_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """P10: OpenMP would use all cores, which would then be reported as wanted."""
    for value in ("abc", "0", "-2", "1.5", "2,x"):
        monkeypatch.setenv("OMP_NUM_THREADS", value)
        with pytest.raises(ValueError, match=f"OMP_NUM_THREADS={value}: expected a whole number of threads, 1 or more"):
            settle_cpu(1, computes=False)
