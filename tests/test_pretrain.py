"""The training program as people and schedulers use it: killed, stopped, resumed, starved of data."""

import json
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
from tests import runs
from tests.ranks import children, is_running
from tests.runs import SAVE_EVERY, STEPS, Arguments
from tests.sources import make_source, pairs
from train.plan import main as plan

ROOT = Path(__file__).parent.parent


def test_a_run_reaches_its_end_and_leaves_what_it_promised(undisturbed: Path) -> None:
    """A row for each step, the last two checkpoints, the resolved config, and no unfinished files."""
    assert [row["step"] for row in runs.rows(undisturbed)] == list(range(1, STEPS + 1))
    assert runs.saved_steps(undisturbed) == [STEPS // SAVE_EVERY * SAVE_EVERY, STEPS]
    assert (undisturbed / "config.yaml").read_text().startswith(f"run_dir: {undisturbed}")
    names = {str(path.relative_to(undisturbed)) for path in undisturbed.rglob("*") if path.is_file()}
    assert not [name for name in names if "tmp" in name or name.endswith(".new")]
    first, last = runs.rows(undisturbed)[0], runs.rows(undisturbed)[-1]
    assert last["idle_row_share"] == 3 / 8, "five lanes on two ranks are two micro-steps of two rows each"
    assert last["text_loss"] < first["text_loss"] and last["skipped_documents"] == 0


@pytest.mark.slow
def test_a_plan_expects_what_a_run_logs(
    run_dir: Path, arguments: Arguments, tokenizer: Tokenizer, capsys: pytest.CaptureFixture
) -> None:
    """P9: FLOPs, tokens, targets and images of eight steps of eight lanes, with context and clean copies."""
    edits = [(image, words, image) for words, image in pairs(40, lengths=(2, 6))]
    folder = make_source(run_dir.parent / "edits", tokenizer, edits, roles=["context", "context", "target"])
    named = {"data__sources__edits__path": folder, "data__lanes": 8, "data__clean_copies": "true"}
    argv = arguments(**named, data__order__caption_first=0.4, data__order__image_dropout=0.3, optim__steps=8)
    runs.finish(argv, 2)
    plan([*argv, "world_size=2", "json=true"])
    expected, logged = json.loads(capsys.readouterr().out), runs.rows(run_dir)
    assert expected["tokens"] == logged[-1]["tokens_seen"]
    for name in ("text_targets", "clean_images"):
        assert expected[f"{name}_a_step"] * 8 == sum(row[name] for row in logged) > 0, name
    assert expected["images_a_step"] * 8 == logged[-1]["images_seen"]
    flop = [2 * row["model_tflops_per_s_per_rank"] * row["step_s"] for row in logged]
    assert expected["step_tflop"] * 8 == pytest.approx(sum(flop), rel=1e-9)


def test_killed_at_any_instant_a_run_ends_with_the_same_bits(
    run_dir: Path, arguments: Arguments, undisturbed: Path
) -> None:
    """P4, P5: `kill -9` of all ranks during the start, steps, saves and commits; every step is logged once, and each
    checkpoint that has its final name verifies at any time."""
    checkpoints = run_dir / "checkpoints"
    instants = [
        lambda: True,  # during the start-up
        lambda: any(checkpoints.glob(".tmp-step-*/__*")),
        runs.reached(run_dir, SAVE_EVERY + 3),
        lambda: any(checkpoints.glob(f"step-*{2 * SAVE_EVERY}")),
    ]
    _kill_and_finish(run_dir, arguments(), instants, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_killed_a_dozen_times_at_random_a_run_ends_with_the_same_bits(
    run_dir: Path, arguments: Arguments, undisturbed: Path, seed: int
) -> None:
    """P4, P5: at random instants, with loader workers too."""
    luck = random.Random(seed)
    argv = arguments(data__num_workers=seed, checkpoint__interval_steps=2)
    _kill_and_finish(run_dir, argv, [_after(2 * luck.random()) for _ in range(12)], undisturbed)


def _after(seconds: float) -> Callable[[], bool]:
    ends: list[float] = []  # set by the first call

    def passed() -> bool:
        ends[:] = ends or [time.monotonic() + seconds]
        return time.monotonic() > ends[0]

    return passed


def _kill_and_finish(run_dir: Path, argv: list[str], instants: list[Callable[[], object]], expected: Path) -> None:
    """Kill all ranks at each instant in turn, then run to the end, which must equal the expected one."""
    luck, killed = random.Random(4), []
    for instant in instants:
        with runs.launch(argv, 2) as run:
            killed.append(run)
            while run.running and not instant():
                time.sleep(0.002)
            time.sleep(0.03 * luck.random())
            run.signal(signal.SIGKILL)
            run.wait()
        runs.saved_steps(run_dir)  # each verifies
    runs.finish(argv, 2)
    assert runs.numbers(run_dir) == runs.numbers(expected)
    runs.assert_same_end(run_dir, expected)
    assert not list((run_dir / "checkpoints").glob(".*"))
    assert not [pid for run in killed for pid in run.leftovers()], "a process outlived its run"


def test_a_run_resumed_on_other_numbers_of_ranks_meets_the_same_batches(
    run_dir: Path, arguments: Arguments, undisturbed: Path
) -> None:
    """P3, P4, P6: 2 ranks, stopped by SIGTERM, then 1, stopped by SIGUSR1, then 3; the same losses as undisturbed."""
    argv = arguments()
    for world_size, until, number in [(2, 6, signal.SIGTERM), (1, 12, signal.SIGUSR1)]:
        with runs.launch(argv, world_size) as run:
            runs.wait_for(runs.reached(run_dir, until), run)
            run.signal(number, rank=world_size - 1)
            before = len(runs.rows(run_dir))
            output = runs.expect(run, 75)
        saved = runs.saved_steps(run_dir)[-1]
        assert f"after step {saved}; saved" in output
        assert runs.rows(run_dir)[-1]["step"] == saved <= before + 3, "within a step"
    runs.finish(argv, 3)
    for found, expected in zip(runs.numbers(run_dir), runs.numbers(undisturbed), strict=True):
        assert found == pytest.approx(expected, rel=1e-5)
    (_, lanes, meta), (_, expected_lanes, expected_meta) = runs.saved_state(run_dir), runs.saved_state(undisturbed)
    assert (lanes, meta) == (expected_lanes, expected_meta)


def test_stopped_started_again_prolonged_and_refused(run_dir: Path, arguments: Arguments) -> None:
    """P6, P10: the life of one run, started directly: Ctrl-C is 130 and a second start resumes, SIGUSR2 is 75, a
    finished run does nothing, more steps continue it; rate and intervals may change, but not the batches."""
    argv = arguments(optim__steps=30, log__interval_steps=4)

    def changed(**changes: Any) -> list[str]:
        return [*argv, *(f"{name.replace('__', '.')}={value}" for name, value in changes.items())]

    with runs.launch(argv, None) as run:
        runs.wait_for((run_dir / "attempt.json").exists, run)
        run.signal(signal.SIGTERM)  # while the model is built: it takes effect at the first step
        assert "dry run of the largest batch" in runs.expect(run, 75)
    assert runs.saved_steps(run_dir) == [row["step"] for row in runs.rows(run_dir)][-1:]
    for number, status, after in [(signal.SIGINT, 130, 4), (signal.SIGUSR2, 75, 12)]:
        runs.stop(argv, None, after, number, status=status)
        last = runs.rows(run_dir)[-1]
        assert last["interval_steps"] == (last["step"] % 4 or 4), "no step is missing from the rows"
    runs.finish(changed(optim__learning_rate=5e-4, checkpoint__keep_last=1), None)
    assert sum(row["interval_steps"] for row in runs.rows(run_dir)) == 30
    assert runs.saved_steps(run_dir) == [30]

    before = {path: path.read_bytes() for path in (run_dir / "checkpoints").rglob("*") if path.is_file()}
    output = runs.finish(argv, None)
    assert "done after step 30" in output
    assert "pretrain: activation checkpointing: none (far from the limit of memory by a rough count)" in output
    assert "activation_checkpointing: none" in (run_dir / "config.yaml").read_text(), "what ran, not auto"
    assert all(path.read_bytes() == content for path, content in before.items())
    assert len(runs.rows(run_dir)) == len({row["step"] for row in runs.rows(run_dir)})

    again = runs.finish(changed(optim__steps=33, optim__schedule="wsd"), None)
    assert "from " in again and "dry run" not in again, "nothing compiles on a CPU, and the batch has fitted before"
    assert runs.saved_steps(run_dir) == [30, 33]

    changes = {
        "seed=1": "seed was 0, is 1",
        "data.lanes=4": "lanes was 5, is 4",
        "data.sequence_length=80": "sequence_length was 64, is 80",
        "data.shuffle_block=9": "shuffle_block was 8, is 9",
        "data.order.caption_first=0.5": "order was ",
        "data.sources.pairs.repeat=false": "source 0 was ",
        "model.transformer.heads=4": "model.transformer.heads was 2, is 4",  # with the same shapes
        "model.transformer.rope_theta=500": "model.transformer.rope_theta was 10000.0, is 500.0",
        "diffusion.prediction=v": "diffusion.prediction was eps, is v",
    }
    state = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file() and "attempt" not in path.name}
    runs.assert_refused(([*argv, *changes], list(changes.values())))
    for path, content in state.items():
        assert path.read_bytes() == content or path.name == ".lock", f"{path} was touched"


def test_loader_workers_change_nothing_and_outlive_a_stop_signal(
    run_dir: Path, arguments: Arguments, undisturbed: Path
) -> None:
    """P3, P6: two workers per rank, which get SIGTERM as from Slurm; then one worker per rank: the same bits."""
    argv = arguments()
    with runs.launch([*argv, "data.num_workers=2"], 2) as run:
        runs.wait_for(runs.reached(run_dir, 4), run)
        workers = [child for process in run.processes for child in children(process.pid)]
        assert len(workers) == 4
        for worker in workers:
            os.kill(worker, signal.SIGTERM)
        runs.wait_for(runs.reached(run_dir, 14), run)  # far beyond what was prefetched
        run.signal(signal.SIGTERM)
        assert "dry run of the largest batch" in runs.expect(run, 75)
    assert not [pid for pid in workers if is_running(pid)]
    runs.finish([*argv, "data.num_workers=1"], 2)
    assert runs.numbers(run_dir) == runs.numbers(undisturbed)
    runs.assert_same_end(run_dir, undisturbed)


@pytest.mark.slow
def test_ranks_that_starve_for_data_still_stop_and_save(run_dir: Path, arguments: Arguments) -> None:
    """P6: with one rank's reader frozen, a signal to the other rank saves and ends both, without waiting for data."""
    with runs.launch(arguments(optim__steps=10**6, data__num_workers=1, data__prefetch_steps=1), 2) as run:
        runs.wait_for(runs.reached(run_dir, 4), run)
        (reader,) = children(run.processes[1].pid)
        os.kill(reader, signal.SIGSTOP)
        runs.wait_for(lambda: time.time() - (run_dir / "metrics.jsonl").stat().st_mtime > 1, run)
        started = time.monotonic()
        run.signal(signal.SIGTERM, rank=0)
        assert "dry run of the largest batch" in runs.expect(run, 75)
        assert time.monotonic() - started < 20
        assert not is_running(reader)
    assert runs.saved_steps(run_dir)[-1] == runs.rows(run_dir)[-1]["step"]


def test_data_that_ends_ends_the_run_and_every_document_was_trained_once(run_dir: Path, arguments: Arguments) -> None:
    """repeat=false: the run is done when the last lane is, on two ranks whose lanes end at different steps."""
    once = {f"data__sources__{name}__repeat": "false" for name in ("pairs", "texts")}
    assert "the data ended after step" in runs.finish(arguments(optim__steps=1000, **once), 2)
    last = runs.rows(run_dir)[-1]
    assert last["images_seen"] == 60
    assert runs.saved_steps(run_dir)[-1] == last["step"] < 100


@pytest.mark.slow
def test_torchrun_starts_it_too(run_dir: Path, arguments: Arguments, undisturbed: Path) -> None:
    """The command of the README, and the same bits; P13: although wandb cannot write."""
    run_dir.mkdir()
    (run_dir / "wandb").write_text("a file where wandb wants its folder")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "train.pretrain", *arguments(log__wandb="offline")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stderr.count("wandb is off") == 1, done.stderr
    runs.assert_same_end(run_dir, undisturbed)
