"""A run folder has one owner, refuses a second one by name, and keeps one row of metrics per step."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from tests.disks import can_mount, fill, own_mounts, small_disk
from tests.ranks import run_ranks
from train.checkpoints import checkpoint
from train.checkpoints.run_folder import RunFolder, RunTakenOver
from train.distributed import shared_folder
from train.distributed.ranks import Ranks, alone
from train.distributed.shared_folder import require_shared

HOLD = """
import sys, time
from train.distributed.ranks import alone
from train.checkpoints.run_folder import RunFolder
import os
run = RunFolder(sys.argv[1], alone())
if os.fork() == 0:  # like a forked loader worker, which outlives a kill -9 of the rank for a while
    time.sleep(60)
print(run.attempt, flush=True)
time.sleep(60)
"""


@contextmanager
def held(path: Path, **variables: str) -> Iterator[subprocess.Popen]:
    """Yield a process that holds the folder, with a forked child."""
    options: dict = {"text": True, "start_new_session": True, "env": {**os.environ, **variables}}
    with subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=-1, **options) as holder:
        try:
            assert holder.stdout.readline() == "1\n"
            yield holder
        finally:
            os.killpg(holder.pid, signal.SIGKILL)


def test_a_second_copy_is_refused_at_once_and_a_killed_one_leaves_the_folder_free(tmp_path: Path) -> None:
    """P5, P10: the message names the holder; `kill -9` of the rank frees the folder even while its workers live."""
    with held(tmp_path) as holder:
        with pytest.raises(BlockingIOError, match=f"in use by pid {holder.pid} on "):
            RunFolder(tmp_path, alone())
        assert json.loads((tmp_path / "attempt.json").read_text())["attempt"] == 1
        holder.kill()
        holder.wait()
        with RunFolder(tmp_path, alone()) as run:
            assert run.attempt == 2


def test_a_later_attempt_takes_the_folder_from_an_earlier_one(tmp_path: Path) -> None:
    """P5: the attempt's token catches what no lock does, such as a requeued job on another host."""
    early = RunFolder(tmp_path, alone())
    early.assert_current()
    early.close()  # as if its lock had no effect here
    late = RunFolder(tmp_path, alone())
    late.assert_current()
    with pytest.raises(RunTakenOver, match="taken over from attempt 1 by attempt 2 "):
        early.assert_current()
    late.append_metrics({"step": 1})
    early.append_metrics({"step": 2})  # the late predecessor writes nothing, not even a row
    early.append("bad_updates.jsonl", [{"step": 2}])
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'
    assert not (tmp_path / "bad_updates.jsonl").exists()
    late.close()
    (tmp_path / "attempt.json").unlink()
    with pytest.raises(RunTakenOver):
        late.assert_current()


def test_a_requeued_job_takes_the_folder_from_its_own_earlier_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P5: its lock may outlive it on a host that Slurm gave up. Any other second copy is still refused."""
    with held(tmp_path, SLURM_JOB_ID="17") as holder:
        for job, requeues in ((None, None), ("17", "0"), ("18", "1"), ("17", "1")):
            for name, value in (("SLURM_JOB_ID", job), ("SLURM_RESTART_COUNT", requeues)):
                monkeypatch.delenv(name, raising=False)
                if value is not None:
                    monkeypatch.setenv(name, value)
            if (job, requeues) != ("17", "1"):
                with pytest.raises(BlockingIOError, match=f"in use by pid {holder.pid} on .*job 17 requeued 0 times"):
                    RunFolder(tmp_path, alone())
        with RunFolder(tmp_path, alone()) as run:
            assert run.attempt == 2
            run.assert_current()


def test_a_folder_that_cannot_be_written_is_refused_with_a_remedy(tmp_path: Path) -> None:
    """P10."""
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"file/run is not writable \(Not a directory: .*give a folder"):
        RunFolder(tmp_path / "file" / "run", alone())


def _attempt_or_error(ranks: Ranks, path: Path) -> str:
    try:
        with RunFolder(path, ranks) as run:
            return f"attempt {run.attempt}"
    except OSError as error:
        return str(error)


def test_all_ranks_share_one_attempt_or_one_refusal(tmp_path: Path) -> None:
    assert run_ranks(_attempt_or_error, 2, tmp_path / "run") == ["attempt 1"] * 2
    with RunFolder(tmp_path / "run", alone()):
        first, second = run_ranks(_attempt_or_error, 2, tmp_path / "run")
    assert first == second and f"in use by pid {os.getpid()} on " in first


def test_resume_cuts_the_rows_that_it_will_write_again(tmp_path: Path) -> None:
    """One row per step of the final trajectory; a line torn by `kill -9` is dropped, the rest is unchanged."""
    with RunFolder(tmp_path, alone()) as run:
        for step in range(1, 6):
            run.append_metrics({"step": step, "loss": 1 / step})
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"step": 6, "lo')
    with RunFolder(tmp_path, alone()) as run:
        run.metrics.cut(last_step=3)
        assert path.read_bytes() == b"".join(whole.splitlines(keepends=True)[:3])
        run.append_metrics({"step": 4, "loss": 0.5})
        assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4]
        run.append_metrics({"step": 4, "heldout/x/text_loss": 0.6})
        run.metrics.cut(last_step=4)
        assert len(path.read_text().splitlines()) == 5
        run.metrics.cut(last_step=4, evaluated=False)  # the resumed run measures again
        assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4]


def test_an_event_after_one_that_a_kill_cut_short_stands_on_a_line_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"kind": "start"}\n{"kind": "sk')
    with RunFolder(tmp_path, alone()) as run:
        run.append("events.jsonl", [{"kind": "start"}])
        run.append("events.jsonl", [{"kind": "stop"}])
    assert path.read_bytes().split(b"\n")[2:] == [b'{"kind": "start"}', b'{"kind": "stop"}', b""]


def test_a_full_disk_delays_rows_but_loses_none(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", kib=256) as disk, RunFolder(disk / "run", alone()) as run:
        run.append_metrics({"step": 1})
        filler = disk / "filler"
        fill(filler)
        for step in range(2, 500):
            run.append_metrics({"step": step, "text": "x" * 40})
        filler.unlink()
        run.append_metrics({"step": 500})
        rows = [json.loads(line)["step"] for line in (disk / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows == list(range(1, 501))


def _use_a_disk_of_its_own(ranks: Ranks, folder: Path) -> tuple[list[str], str, list[str]]:
    """Mount a disk on rank 1; return the refusals at the start, and the failure if it is mounted later."""
    shared_folder.SEE_S = 0.5  # no network file system here
    with RunFolder(folder / "late", ranks) as run:
        ranks.gather(None)
        if ranks.rank == 1:
            own_mounts()
            for name in ("late", "start"):
                subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder / name], check=True)
            (folder / "late" / "checkpoints" / ".tmp-step-00000001-1").mkdir(parents=True)
        ranks.gather(None)
        refusals = []
        for key, start in (
            ("run_dir", lambda: RunFolder(folder / "start", ranks)),
            ("output", lambda: require_shared(folder / "start", "output", ranks)),
        ):
            with pytest.raises(OSError, match=f"{key}=.*: rank 1 .* cannot see there what rank 0") as refusal:
                start()
            refusals.append(str(refusal.value))
        state = {"model": {"weight": torch.zeros(4)}, "own": {str(ranks.rank): torch.ones(3)}}
        with pytest.raises(checkpoint.CheckpointError) as failure:
            checkpoint.save(run, 1, state, {}, ranks)
    return refusals, str(failure.value), [path.name for path in checkpoint.saved(run.checkpoints)]


@pytest.mark.skipif(not can_mount(), reason="needs mounts of its own")
def test_disks_of_each_nodes_own_are_refused_at_the_start_and_never_called_saved(tmp_path: Path) -> None:
    """P5, P10: each rank would find a folder of that name, but only its own files in it."""
    (tmp_path / "start").mkdir()
    (first, failure, saved), other = run_ranks(_use_a_disk_of_its_own, 2, tmp_path)
    assert (first, failure) == (other[0], other[1]), "the same words on every rank"
    assert "do all ranks see" in failure and saved == []
    assert sorted(path.name for path in (tmp_path / "start").iterdir()) == [".lock", "attempt.json", "checkpoints"]
