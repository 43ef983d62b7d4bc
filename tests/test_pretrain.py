"""The training program as people and schedulers meet it: killed, stopped, resumed, starved for data."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data.tokenizer import Tokenizer
from tests.runs import (
    SAVE_EVERY,
    STEPS,
    assert_refused,
    assert_same_end,
    finish,
    launch,
    numbers,
    reached,
    rows,
    saved_state,
    saved_steps,
    settings,
    wait_for,
)

ROOT = Path(__file__).parent.parent


def test_a_run_reaches_its_end_and_leaves_what_it_promised(undisturbed: Path) -> None:
    """A row for each step, the last two checkpoints, the resolved config, and nothing half-written."""
    assert [row["step"] for row in rows(undisturbed)] == list(range(1, STEPS + 1))
    assert saved_steps(undisturbed) == [STEPS // SAVE_EVERY * SAVE_EVERY, STEPS]
    assert (undisturbed / "config.yaml").read_text().startswith(f"run_dir: {undisturbed}")
    names = {str(path.relative_to(undisturbed)) for path in undisturbed.rglob("*") if path.is_file()}
    assert not [name for name in names if "tmp" in name or name.endswith(".new")]
    first, last = rows(undisturbed)[0], rows(undisturbed)[-1]
    assert last["idle_row_share"] == 3 / 8, "five lanes on two ranks are two micro-steps of two rows each"
    assert last["text_loss"] < first["text_loss"] and last["skipped_documents"] == 0


def test_killed_at_any_instant_a_run_ends_with_the_same_bits(
    tmp_path: Path, tokenizer: Tokenizer, sources: dict[str, Path], undisturbed: Path
) -> None:
    """P4, P5: `kill -9` of all ranks during the start, steps, saves and commits; every step is logged once, and each
    checkpoint that has its name verifies whenever one looks."""
    run_dir = tmp_path / "run"
    checkpoints = run_dir / "checkpoints"
    instants = [
        lambda: True,  # wherever the start-up is then
        lambda: any(checkpoints.glob(".tmp-step-*/__*")),
        reached(run_dir, SAVE_EVERY + 3),
        lambda: any(checkpoints.glob(f"step-*{2 * SAVE_EVERY}")),
    ]
    _kill_and_finish(run_dir, settings(run_dir, tokenizer, sources), instants, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_killed_a_dozen_times_at_random_a_run_ends_with_the_same_bits(
    tmp_path: Path, tokenizer: Tokenizer, sources: dict[str, Path], undisturbed: Path, seed: int
) -> None:
    """P4, P5: instants nobody chose, loader workers included."""
    run_dir, luck = tmp_path / "run", random.Random(seed)
    argv = settings(run_dir, tokenizer, sources, data__num_workers=seed, checkpoint__interval_steps=2)
    _kill_and_finish(run_dir, argv, [_after(2 * luck.random()) for _ in range(12)], undisturbed)


def _after(seconds: float) -> Callable[[], bool]:
    ends: list[float] = []  # begins when it is first asked

    def passed() -> bool:
        ends[:] = ends or [time.monotonic() + seconds]
        return time.monotonic() > ends[0]

    return passed


def _kill_and_finish(run_dir: Path, argv: list[str], instants: list[Callable[[], object]], expected: Path) -> None:
    """Kill all ranks at each instant in turn, then run to the end, which must be the expected one."""
    luck = random.Random(4)
    for instant in instants:
        with launch(argv, 2) as run:
            while run.running and not instant():
                time.sleep(0.002)
            time.sleep(0.03 * luck.random())
            run.signal(signal.SIGKILL)
            run.wait()
        saved_steps(run_dir)  # each verifies
    finish(argv, 2)
    assert numbers(run_dir) == numbers(expected)
    assert_same_end(run_dir, expected)
    assert not list((run_dir / "checkpoints").glob(".*"))
    logs = next(Path(a.split("=")[1]).parent for a in argv if a.startswith("data.tokenizer="))
    assert not _printing_to(logs), "a process outlived its run"


def _printing_to(folder: Path) -> list[int]:
    """Return the processes whose standard output is a file in `folder`."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(process / "fd" / "1").startswith(str(folder)):
                found.append(int(process.name))
        except OSError:  # it ended while we looked
            continue
    return found


def test_a_run_resumed_on_other_numbers_of_ranks_meets_the_same_batches(
    tmp_path: Path, tokenizer: Tokenizer, sources: dict[str, Path], undisturbed: Path
) -> None:
    """P3, P4, P6: 2 ranks, stopped by SIGTERM, then 1, stopped by SIGUSR1, then 3; losses as if nothing had been."""
    run_dir = tmp_path / "run"
    argv = settings(run_dir, tokenizer, sources)
    for world_size, until, number in [(2, 6, signal.SIGTERM), (1, 12, signal.SIGUSR1)]:
        with launch(argv, world_size) as run:
            wait_for(reached(run_dir, until), run)
            before = len(rows(run_dir))
            run.signal(number, rank=world_size - 1)
            assert run.wait() == [75] * world_size, run.output
            assert f"after step {saved_steps(run_dir)[-1]}; saved" in run.output
        assert rows(run_dir)[-1]["step"] == saved_steps(run_dir)[-1] <= before + 3, "within a step"
    finish(argv, 3)
    for found, expected in zip(numbers(run_dir), numbers(undisturbed), strict=True):
        assert found == pytest.approx(expected, rel=1e-5)
    (_, lanes, meta), (_, expected_lanes, expected_meta) = saved_state(run_dir), saved_state(undisturbed)
    assert (lanes, meta) == (expected_lanes, expected_meta)


def test_stopped_started_again_prolonged_and_refused(
    tmp_path: Path, tokenizer: Tokenizer, sources: dict[str, Path]
) -> None:
    """P6, P10: the life of one run, started directly: Ctrl-C is 130 and a second start goes on, SIGUSR2 is 75, a
    finished run does nothing, more steps go on; rate and intervals may change, what decides the batches may not."""
    run_dir = tmp_path / "run"
    argv = settings(run_dir, tokenizer, sources, optim__steps=30, log__interval_steps=4)

    def changed(**changes: Any) -> list[str]:
        return [*argv, *(f"{name.replace('__', '.')}={value}" for name, value in changes.items())]

    with launch(argv, None) as run:
        wait_for((run_dir / "attempt.json").exists, run)
        run.signal(signal.SIGTERM)  # while the model is built: kept for the first step
        assert run.wait() == [75], run.output
    assert saved_steps(run_dir) == [row["step"] for row in rows(run_dir)][-1:]
    for number, status, after in [(signal.SIGINT, 130, 4), (signal.SIGUSR2, 75, 12)]:
        with launch(argv, None) as run:
            wait_for(reached(run_dir, after), run)
            run.signal(number)
            assert run.wait() == [status], run.output
        stopped = saved_steps(run_dir)[-1]
        assert f"stopped by {signal.Signals(number).name} after step {stopped}; saved" in run.output
        last = rows(run_dir)[-1]
        assert (last["step"], last["interval_steps"]) == (stopped, stopped % 4 or 4), "no step is left out of the rows"
    finish(changed(optim__learning_rate=5e-4, checkpoint__keep_last=1), None)
    assert sum(row["interval_steps"] for row in rows(run_dir)) == 30
    assert saved_steps(run_dir) == [30]

    before = {path: path.read_bytes() for path in (run_dir / "checkpoints").rglob("*") if path.is_file()}
    assert "done after step 30" in finish(argv, None)
    assert all(path.read_bytes() == content for path, content in before.items())
    assert len(rows(run_dir)) == len({row["step"] for row in rows(run_dir)})

    assert "from " in finish(changed(optim__steps=33, optim__schedule="wsd"), None)
    assert saved_steps(run_dir) == [30, 33]

    changes = {
        "seed=1": "seed was 0, is 1",
        "data.lanes=4": "lanes was 5, is 4",
        "data.sequence_length=80": "sequence_length was 64, is 80",
        "data.shuffle_block=9": "shuffle_block was 8, is 9",
        "data.order.caption_first=0.5": "order was ",
        "data.sources.pairs.repeat=false": "source 0 was ",
        "model.transformer.heads=4": "model.transformer.heads was 2, is 4",  # of the same shapes
        "model.transformer.rope_theta=500": "model.transformer.rope_theta was 10000.0, is 500.0",
        "diffusion.prediction=v": "diffusion.prediction was eps, is v",
    }
    state = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file() and "attempt" not in path.name}
    assert_refused([([*argv, *changes], list(changes.values()))])
    for path, content in state.items():
        assert path.read_bytes() == content or path.name == ".lock", f"{path} was touched"


def test_loader_workers_change_nothing_and_outlive_a_stop_signal(
    tmp_path: Path, tokenizer: Tokenizer, sources: dict[str, Path], undisturbed: Path
) -> None:
    """P3, P6: two workers a rank, which get SIGTERM as Slurm sends it to all; then one worker a rank: the same bits."""
    run_dir = tmp_path / "run"
    argv = settings(run_dir, tokenizer, sources)
    with launch([*argv, "data.num_workers=2"], 2) as run:
        wait_for(reached(run_dir, 4), run)
        workers = [child for process in run.processes for child in _children(process.pid)]
        assert len(workers) == 4
        for worker in workers:
            os.kill(worker, signal.SIGTERM)
        wait_for(reached(run_dir, 14), run)  # far beyond what was prefetched
        run.signal(signal.SIGTERM)
        assert run.wait() == [75, 75], run.output
    assert not [pid for pid in workers if _runs(pid)]
    finish([*argv, "data.num_workers=1"], 2)
    assert numbers(run_dir) == numbers(undisturbed)
    assert_same_end(run_dir, undisturbed)


@pytest.mark.slow
def test_ranks_that_starve_for_data_still_stop_and_save(
    tmp_path: Path, tokenizer: Tokenizer, sources: dict[str, Path]
) -> None:
    """P6: with one rank's reader frozen, a signal to the other rank saves and ends both, without waiting for data."""
    run_dir = tmp_path / "run"
    argv = settings(run_dir, tokenizer, sources, optim__steps=10**6, data__num_workers=1, data__prefetch_steps=1)
    with launch(argv, 2) as run:
        wait_for(reached(run_dir, 4), run)
        (reader,) = _children(run.processes[1].pid)
        os.kill(reader, signal.SIGSTOP)
        wait_for(lambda: _idle(run_dir, 1.0), run)
        started = time.monotonic()
        run.signal(signal.SIGTERM, rank=0)
        assert run.wait(30) == [75, 75], run.output
        assert time.monotonic() - started < 20
        assert not _runs(reader)
    assert saved_steps(run_dir)[-1] == rows(run_dir)[-1]["step"]


def _idle(run_dir: Path, seconds: float) -> bool:
    """Return whether nothing was logged for so long."""
    return time.time() - (run_dir / "metrics.jsonl").stat().st_mtime > seconds


def _children(pid: int) -> list[int]:
    return [
        int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
    ]


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_data_that_ends_ends_the_run_and_every_document_was_trained_once(
    tmp_path: Path, tokenizer: Tokenizer, sources: dict[str, Path]
) -> None:
    """repeat=false: the run is done when the last lane is, on two ranks whose lanes end at different steps."""
    run_dir = tmp_path / "run"
    once = {f"data__sources__{name}__repeat": "false" for name in sources}
    argv = settings(run_dir, tokenizer, sources, optim__steps=1000, **once)
    assert "the data ended after step" in finish(argv, 2)
    last = rows(run_dir)[-1]
    assert last["images_seen"] == 60
    assert saved_steps(run_dir)[-1] == last["step"] < 100


@pytest.mark.slow
def test_torchrun_starts_it_too(
    tmp_path: Path, tokenizer: Tokenizer, sources: dict[str, Path], undisturbed: Path
) -> None:
    """The command of the README, and the same bits; P13: although wandb cannot write."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "wandb").write_text("a file where wandb wants its folder")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "train.pretrain", *settings(run_dir, tokenizer, sources, log__wandb="offline")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stderr.count("wandb is off") == 1, done.stderr
    assert_same_end(run_dir, undisturbed)
