"""A lease keeps the living apart, outlives nobody for long, and is only ever a hint."""

import multiprocessing
import os
import signal
import time
from multiprocessing.queues import Queue
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.servers import until
from train.encoding import leases
from train.encoding.leases import Leases

FORK = multiprocessing.get_context("fork")


def _hold(folder: Path, timeout_s: float, told: "Queue[bool]") -> None:
    with Leases(folder, timeout_s) as mine:
        told.put(mine.claim("a"))
        time.sleep(60)


def holder(folder: Path, timeout_s: float) -> multiprocessing.Process:
    """Another process that has claimed "a"."""
    told = FORK.Queue()
    process = FORK.Process(target=_hold, args=(folder, timeout_s, told), daemon=True)
    process.start()
    assert told.get(timeout=30)
    return process


def test_one_holds_what_another_claims_until_it_is_released(tmp_path: Path) -> None:
    with Leases(tmp_path / "l", 60) as one:
        process = holder(tmp_path / "l", 60)
        assert not one.claim("a") and one.claim("b") and one.claim("b")
        assert {p.name for p in (tmp_path / "l").iterdir()} == {"a.lease", "b.lease"}
        process.kill()
        process.join()
        one.release("b")
    assert {p.name for p in (tmp_path / "l").iterdir()} == {"a.lease"}  # not ours to remove


def test_the_lease_of_a_dead_process_of_this_machine_is_free_at_once(tmp_path: Path) -> None:
    """So that a killed job can be started again without waiting."""
    process = holder(tmp_path / "l", 60)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with Leases(tmp_path / "l", 60) as one:
        assert one.claim("a")
    assert not (tmp_path / "l").exists()  # the last one cleans up


def test_a_lease_without_a_heartbeat_is_taken_over_and_with_one_it_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stopped process stands for a machine that was cut off; its own clock plays no part, and ours is set here."""
    now, lease = 0.0, tmp_path / "l" / "a.lease"
    monkeypatch.setattr(leases, "time", SimpleNamespace(monotonic=lambda: now))
    process = holder(tmp_path / "l", 0.2)
    os.utime(lease, (0, 0))  # a clock that is wrong by decades

    def wait_for_a_beat() -> None:
        stamp = lease.stat().st_mtime_ns
        until(lambda: lease.stat().st_mtime_ns != stamp)

    with Leases(tmp_path / "l", 60) as one:
        for _ in range(5):
            assert not one.claim("a")
            now += 50
            wait_for_a_beat()
        os.kill(process.pid, signal.SIGSTOP)
        until(lambda: Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T")
        for seconds, stale in ((0, False), (59, False), (2, True)):
            now += seconds
            assert one.claim("a") == stale
        os.kill(process.pid, signal.SIGCONT)
        wait_for_a_beat()  # its heartbeat goes on, and harms nothing
        assert one.claim("a")
        process.kill()


def test_a_lease_whose_writing_was_cut_is_judged_by_its_silence(tmp_path: Path) -> None:
    (tmp_path / "l").mkdir()
    (tmp_path / "l" / "a.lease").write_text("")
    (tmp_path / "l" / "b.lease").write_text("elsewhere 17 4711")
    with Leases(tmp_path / "l", 0.05) as one:
        assert not one.claim("a") and not one.claim("b")
        time.sleep(0.1)
        assert one.claim("a") and one.claim("b")
