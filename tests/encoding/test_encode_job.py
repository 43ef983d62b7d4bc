"""An encoding job of many workers that come, go and die: the bytes of one undisturbed worker, nothing more or less."""

import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from data.manifest import Manifest
from data.tokenizer import Tokenizer
from tests.disks import small_disk
from tests.encoding.jobs import Contents, arguments, contents_of, picture_record, raw_folder

Command = Callable[..., list[str]]
SPAWN = multiprocessing.get_context("forkserver")


def _work(command: list[str], threads: int, environment: dict[str, str]) -> None:
    import torch

    from train.encode import main

    os.environ.update(environment)
    torch.set_num_threads(threads)
    main(command)


def start(command: list[str], threads: int = 1, **environment: str) -> multiprocessing.Process:
    process = SPAWN.Process(target=_work, args=(command, threads, environment), daemon=True)
    process.start()
    return process


def exit_codes(workers: list[multiprocessing.Process]) -> list[int | None]:
    """Wait for the workers to end."""
    for worker in workers:
        worker.join(timeout=120)
    return [worker.exitcode for worker in workers]


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten raw shards, enough to be in the middle of."""
    shards = {f"{i:02d}": [picture_record(12 * i + j) for j in range(12)] for i in range(16)}
    return raw_folder(tmp_path_factory.mktemp("raw") / "pictures", shards)


@pytest.fixture(scope="module")
def command(raw: Path, tokenizer: Tokenizer, vae_folder: Path) -> Command:
    def build(output: Path, **options: object) -> list[str]:
        return arguments(raw, output, tokenizer, vae=vae_folder, batch_size=1, **options)

    return build


@pytest.fixture(scope="module")
def expected(command: Command, tmp_path_factory: pytest.TempPathFactory) -> Contents:
    output = tmp_path_factory.mktemp("expected") / "out"
    assert exit_codes([start(command(output))]) == [0]
    return contents_of(output)


def test_workers_at_once_share_the_work_and_give_the_bytes_of_one(
    tmp_path: Path, command: Command, expected: Contents
) -> None:
    """Ranks of torchrun, tasks of a Slurm array, and a worker that knows nothing of others, on one folder."""
    out = tmp_path / "out"
    workers = [start(command(out), RANK=str(i), WORLD_SIZE="2") for i in range(2)]
    array = {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MIN": "5", "SLURM_ARRAY_TASK_MAX": "8"}
    workers += [start(command(out), **array), start(command(out))]
    assert exit_codes(workers) == [0] * 4
    assert contents_of(out) == expected


def test_killed_at_any_moment_and_started_with_other_workers_the_same_bytes_come_out(
    tmp_path: Path, command: Command, expected: Contents
) -> None:
    """kill -9 of one to three workers, again and again; the last ones finish."""
    rng = random.Random(0)
    out, kills = tmp_path / "out", 0
    for _ in range(6):
        workers = [start(command(out)) for _ in range(rng.randint(1, 3))]
        time.sleep(rng.uniform(0.05, 0.4))
        for worker in workers:
            kills += worker.is_alive()
            with suppress(ProcessLookupError):  # it ended by itself
                os.kill(worker.pid, signal.SIGKILL)
            worker.join()
        if out.is_dir():
            done = {name: content for name, content in contents_of(out).items() if name.endswith((".tar", ".idx"))}
            assert all(expected[name] == content for name, content in done.items())  # whole or absent
    assert kills > 3 and exit_codes([start(command(out)) for _ in range(2)]) == [0, 0]
    assert contents_of(out) == expected


def test_a_killed_job_started_again_gives_the_same_bytes(tmp_path: Path, command: Command, expected: Contents) -> None:
    """kill -9 once the first shard is done; it ran with another number of threads, too."""
    out = tmp_path / "out"
    first = start(command(out), threads=2)
    while not (out / "00.tar.json").exists():
        assert first.is_alive()
    first.kill()
    assert exit_codes([first, start(command(out))]) == [-signal.SIGKILL, 0] and contents_of(out) == expected


def test_a_worker_that_was_cut_off_and_comes_back_harms_nothing(
    tmp_path: Path, command: Command, expected: Contents
) -> None:
    """SIGSTOP in the middle of a file, beyond its lease: another does the file too, then both finish."""
    out = tmp_path / "out"
    first = start(command(out, lease_timeout_s=1))
    while not list(out.glob("*.tmp-*")) or not list(out.glob(".leases/0*.lease")):
        assert first.is_alive()
    os.kill(first.pid, signal.SIGSTOP)
    assert exit_codes([start(command(out, lease_timeout_s=1))]) == [0]
    assert {name: content for name, content in contents_of(out).items() if "tmp-" not in name} == expected
    os.kill(first.pid, signal.SIGCONT)
    assert exit_codes([first]) == [0]
    assert contents_of(out) == expected and Manifest.load(out).records == 192


def test_two_jobs_with_other_settings_do_not_undo_each_other(
    tmp_path: Path, command: Command, expected: Contents
) -> None:
    """The second is refused while the first is alive, and may begin once it is gone, killed or done."""
    out = tmp_path / "out"
    first = start(command(out, lease_timeout_s=1))
    while not list(out.glob(".leases/job-*.lease")):
        assert first.is_alive()
    os.kill(first.pid, signal.SIGSTOP)
    lease = next(out.glob(".leases/job-*.lease"))
    second = start(command(out, lease_timeout_s=3, resolution=16))  # a busy machine may let a beat below come late
    while second.is_alive():
        os.utime(lease)
        time.sleep(0.05)
    assert second.exitcode == 1
    os.kill(first.pid, signal.SIGCONT)
    assert exit_codes([first]) == [0] and contents_of(out) == expected
    assert exit_codes([start(command(out, resolution=16))]) == [0] and Manifest.load(out).grids() == {(4, 4)}


def test_a_full_disk_stops_the_job_and_harms_nothing_done(tmp_path: Path, command: Command, expected: Contents) -> None:
    """A real small file system; with room again the same command continues."""
    size = sum(map(len, expected.values()))
    with small_disk(tmp_path / "disk", size // 1024 // 2) as disk:
        assert exit_codes([start(command(disk / "out"))]) == [1]
        found = contents_of(disk / "out")
        assert len(found) >= 6 and not any(".tmp-" in name for name in found) and "manifest.json" not in found
        assert all(expected[name] == content for name, content in found.items())
        shutil.copytree(disk / "out", tmp_path / "out")
    assert exit_codes([start(command(tmp_path / "out"))]) == [0] and contents_of(tmp_path / "out") == expected
