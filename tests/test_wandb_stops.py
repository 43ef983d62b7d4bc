"""The wandb page of real runs that are stopped, requeued, killed and taken back: each row once, on the right page."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import runs
from tests.ranks import children
from tests.runs import Arguments
from tests.test_wandb_page import is_service, page, steps_of

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))


def assert_complete(run_dir: Path, finished: bool = True) -> None:
    """Each row of metrics.jsonl is on the page once, in order and to the last digit; the summary is of the last."""
    shown, summary, exited = page(run_dir)
    written = [row for row in runs.rows(run_dir) if "text_loss" in row]
    assert steps_of(shown) == steps_of(written)
    assert [row["text_loss"] for row in shown] == [row["text_loss"] for row in written]
    assert summary["step"] == written[-1]["step"] and summary["loss"] == written[-1]["loss"]
    assert exited == finished


@pytest.mark.parametrize(
    ("stops", "world_size"),
    [
        ([(signal.SIGUSR1, 75, 6)], 1),
        pytest.param([(signal.SIGUSR1, 75, 6), (signal.SIGKILL, -9, 18)], 2, marks=pytest.mark.slow),
    ],
)
def test_a_page_survives_signals_to_all_processes_and_requeues(
    run_dir: Path, arguments: Arguments, stops: list[tuple[signal.Signals, int, int]], world_size: int
) -> None:
    """SIGUSR1 to ranks and wandb alike, as Slurm sends it; then SIGKILL to all of them; then to the end."""
    argv = arguments(log__wandb="offline", optim__steps=30, checkpoint__interval_steps=10)
    for number, status, until in stops:
        with runs.launch(argv, world_size) as run:
            runs.wait_for(runs.reached(run_dir, until), run)
            services = [pid for process in run.processes for pid in children(process.pid) if is_service(pid)]
            assert len(services) <= 1, "rank 0's alone"
            for pid in services:
                os.kill(pid, number)
            run.signal(number)
            assert set(run.wait()) == {status}, run.output
        if status == 75:
            assert_complete(run_dir)
    runs.finish(argv, world_size)
    assert_complete(run_dir)
    assert len(runs.rows(run_dir)) == 30


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "to"),
    [
        (signal.SIGTERM, "agent"),  # torchrun signals its ranks and waits for them
        (signal.SIGINT, "group"),  # Ctrl-C in a terminal
        (signal.SIGUSR1, "ranks"),
        (signal.SIGTERM, "all"),  # scancel, a preemption, systemd
    ],
)
def test_under_torchrun_too(run_dir: Path, arguments: Arguments, tmp_path: Path, number: int, to: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "train.pretrain", *arguments(log__wandb="offline", optim__steps=100000)]
    with (tmp_path / "log").open("wb") as log:
        run = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
    deadline = time.monotonic() + 120
    while not runs.reached(run_dir, 8)() and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    ranks = [pid for pid in children(run.pid) if b"train.pretrain" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    services = [pid for rank in ranks for pid in children(rank) if is_service(pid)]
    time.sleep(1)  # a rank has more to send than one row
    if to == "group":
        os.killpg(run.pid, number)
    for pid in {"agent": [run.pid], "group": [], "ranks": ranks, "all": [run.pid, *ranks, *services]}[to]:
        os.kill(pid, number)
    assert run.wait(90) != 0
    words = (tmp_path / "log").read_text()
    assert f"stopped by {signal.Signals(number).name}" in words and "; saved" in words, words
    assert_complete(run_dir)
