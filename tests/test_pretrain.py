"""The training program as people and schedulers meet it: killed, stopped, resumed, refused, starved, out of disk."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from data.loader import Loader, open_data
from data.manifest import Manifest
from data.tokenizer import Tokenizer, train_tokenizer
from tests.disks import small_disk
from tests.runs import (
    SAVE_EVERY,
    STEPS,
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
from tests.sources import make_source, pairs
from train import pretrain
from train.config import load_config
from train.recipe import PretrainConfig

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def sources(pairs_folder: Path, texts_folder: Path) -> dict[str, Path]:
    return {"pairs": pairs_folder, "texts": texts_folder}


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer, sources: dict[str, Path]) -> Path:
    """A run on two ranks that nothing happened to."""
    run_dir = tmp_path_factory.mktemp("runs") / "undisturbed"
    finish(settings(run_dir, tokenizer, sources), 2)
    return run_dir


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

    assert "from " in finish(changed(optim__steps=33), None)
    assert saved_steps(run_dir) == [30, 33]

    changes = {
        "seed=1": "seed was 0, is 1",
        "data.lanes=4": "lanes was 5, is 4",
        "data.sequence_length=80": "sequence_length was 64, is 80",
        "data.shuffle_block=9": "shuffle_block was 8, is 9",
        "data.order.caption_first=0.5": "order was ",
        "data.sources.pairs.repeat=false": "sources was ",
        "model.transformer.heads=4": "model.transformer.heads was 2, is 4",  # of the same shapes
        "model.transformer.rope_theta=500": "model.transformer.rope_theta was 10000.0, is 500.0",
        "diffusion.prediction=v": "diffusion.prediction was eps, is v",
    }
    state = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file() and "attempt" not in path.name}
    _assert_refused([([*argv, *changes], list(changes.values()))])
    for path, content in state.items():
        assert path.read_bytes() == content or path.name == ".lock", f"{path} was touched"


def _assert_refused(starts: list[tuple[list[str], list[str]]], world_size: int | None = None) -> None:
    """Each start, all side by side, exits 2 with its words in one message and without a traceback."""
    with ExitStack() as stack:
        runs = [stack.enter_context(launch(argv, world_size)) for argv, _ in starts]
        statuses = [run.wait() for run in runs]
        for run, status, (_, words) in zip(runs, statuses, starts, strict=True):
            for log in run.logs:
                message = [line for line in log.read_text().splitlines() if "Warning" not in line]
                assert len(message) == 1 and "train.pretrain: " in message[0], (words, message)
                assert [word for word in words if word not in message[0]] == [], message
            assert set(status) == {2}, (words, status, run.output)


def test_what_cannot_work_is_refused_before_it_starts(
    tmp_path: Path, tokenizer: Tokenizer, sources: dict[str, Path]
) -> None:
    """P10: config, folders, data, devices; one message each, exit 2, no traceback, nothing written."""
    other_vae = make_source(tmp_path / "other_vae", tokenizer, pairs(8), vae_hash="b" * 16)
    other_tokenizer = tmp_path / "other.model"
    train_tokenizer((f"green triangles, {i} of them, small or large" for i in range(200)), other_tokenizer, 290)
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()

    def changed(**changes: Any) -> list[str]:
        return settings(tmp_path / f"run-{next(iter(changes))}", tokenizer, sources, **changes)

    more = "data__sources__more__path"
    refused_at_once = {
        "unknown key 'optim.step'; did you mean 'optim.steps'?": changed(optim__step=3),
        "optim.steps='many'": changed(optim__steps="many"),
        "optim.steps=0": changed(optim__steps=0),
        "run_dir is required": [a for a in changed(seed=0) if "run_dir" not in a],
        f"data folder {tmp_path}/nowhere does not exist": changed(**{more: tmp_path / "nowhere"}),
        f"data folder {tmp_path}/empty has no manifest.json": changed(**{more: tmp_path / "empty"}),
        "holds latents of VAE bbbb": changed(**{more: other_vae}),
        "was encoded with tokenizer": changed(data__tokenizer=other_tokenizer),
        "set model.latent_channels=2": changed(model__latent_channels=4),
        "fewer than data.lanes=55": changed(data__lanes=55),
        "more than data.sequence_length=11": changed(data__sequence_length=11),
        "and preview.prompts to draw": changed(preview__interval_steps=1),
    }
    for words, argv in refused_at_once.items():
        with pytest.raises((ValueError, OSError), match=re.escape(words)):
            pretrain.main(argv)
    refused_later = {
        "unknown key 'optim.step'": changed(optim__step=3),
        f"run folder {tmp_path}/file/run is not writable": settings(tmp_path / "file" / "run", tokenizer, sources),
        "no VAE: set vae=FOLDER": changed(preview__interval_steps=1, preview__prompts="[a circle]"),
    }
    if not torch.cuda.is_available():
        refused_later["device=cuda, but torch finds no CUDA device"] = changed(device="cuda")
    _assert_refused([(argv, [words]) for words, argv in refused_later.items()])
    assert not list(tmp_path.glob("run*/checkpoints/*")) and not list(tmp_path.glob("run*/metrics.jsonl"))


def test_what_only_some_ranks_could_notice_is_refused_by_all_without_a_hang(
    tmp_path: Path, tokenizer: Tokenizer, sources: dict[str, Path]
) -> None:
    """P10: more ranks than lanes; previews that only rank 0 would draw; a folder that only rank 0 would write."""
    (tmp_path / "file").write_text("")
    previews = {"preview__interval_steps": 1, "preview__prompts": "[a circle]"}
    starts = {
        "3 ranks, but data.lanes=2": settings(tmp_path / "lanes", tokenizer, sources, data__lanes=2),
        "no VAE: set vae=FOLDER": settings(tmp_path / "vae", tokenizer, sources, **previews),
        f"run folder {tmp_path}/file/run is not writable": settings(tmp_path / "file" / "run", tokenizer, sources),
    }
    _assert_refused([(argv, [words]) for words, argv in starts.items()], world_size=3)
    assert not (tmp_path / "lanes").exists() and not list((tmp_path / "vae").glob("*/*"))


def _copy(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))


def _garble(folder: Path, records: dict[int, list[int]]) -> list[str]:
    """Flip a bit in the middle of records, by shard; return their names."""
    manifest, names = Manifest.load(folder), []
    for shard, numbers_ in records.items():
        path = manifest.shard_path(shard)
        content = bytearray(path.read_bytes())
        for record in numbers_:
            offset, length, _ = manifest.load_index(shard).spans[record].tolist()
            content[offset + length // 2] ^= 1
            names.append(f"{path}#{record}")
        path.write_bytes(content)
    return names


def test_corrupt_records_are_skipped_counted_and_named_when_the_budget_is_spent(
    tmp_path: Path, tokenizer: Tokenizer, pairs_folder: Path, texts_folder: Path
) -> None:
    """P7: trained around, the same after a resume; past the budget all ranks stop in order, and what was trained is
    saved, so that the run goes on when the budget is raised."""
    damaged = _copy(pairs_folder, tmp_path / "pairs")
    names = _garble(damaged, {0: [3, 4, 17], 1: [2], 2: [0, 21]})
    sources = {"pairs": damaged, "texts": texts_folder}
    run_dir = tmp_path / "run"
    argv = settings(run_dir, tokenizer, sources, optim__steps=12)
    config = load_config(PretrainConfig, argv)
    data = open_data(config.data, config.seed, config.model.patch_size)
    loader = Loader(data, config.data, rank=0, world_size=1, micro_batch_size=5)
    batches = [loader.next(30) for _ in range(12)]
    loader.close()
    skipped = [batch.num_skipped for batch in batches]
    assert 6 <= skipped[-1] < 100, "each at least once in the first epochs"

    budget = skipped[-1] // 2
    with launch([*argv, f"data.max_bad_documents={budget}"], 2) as run:
        assert run.wait() == [1, 1]
    end = next(line for line in run.output.splitlines() if "more than data.max_bad_documents" in line)
    stopped = max(i + 1 for i, count in enumerate(skipped) if count <= budget)
    assert f"stopped after step {stopped}: {skipped[stopped]} documents were skipped" in end
    assert any(name in end for name in names) and "checksum" in end
    assert "Traceback" not in run.output and saved_steps(run_dir)[-1] == stopped
    finish(argv, 2)
    assert [row["skipped_documents"] for row in rows(run_dir)] == skipped
    assert saved_state(run_dir)[1] == {str(lane): state for lane, state in batches[-1].lane_states.items()}


def test_a_shard_that_vanishes_is_bad_data_and_one_that_cannot_be_indexed_stops_all_ranks(
    tmp_path: Path, tokenizer: Tokenizer, texts_folder: Path
) -> None:
    """P7: shards cut to nothing under a running job are counted and named; an unexpected fault of one rank's reader
    is known to every rank, which save and leave in order with that reader's own message."""
    folder = _copy(texts_folder, tmp_path / "texts")
    run_dir = tmp_path / "run"
    argv = settings(run_dir, tokenizer, {"texts": folder}, optim__steps=10**6, checkpoint__interval_steps=10**6)
    with launch(argv, 2) as run:
        wait_for(reached(run_dir, 3), run)
        os.truncate(folder / "00000.tar", 0)
        (folder / "00001.tar").unlink()
        (folder / "00001.tar").write_bytes(b"")
        assert run.wait() == [1, 1], run.output
    assert "documents were skipped, more than" in run.output and f"{folder}/00000.tar#" in run.output
    assert saved_steps(run_dir) == [rows(run_dir)[-1]["step"]]

    folder = _copy(texts_folder, tmp_path / "unindexed")
    index = folder / "00001.tar.idx"
    index.write_bytes(index.read_bytes()[:-1] + b"\xff")
    with launch(settings(tmp_path / "run2", tokenizer, {"texts": folder}), 2) as run:
        assert run.wait() == [1, 1], run.output
    end = [line for line in run.output.splitlines() if "stopped after step 0" in line]
    assert len(end) == 1 and "cannot read its data" in end[0] and str(index) in end[0], run.output


def test_a_killed_rank_takes_its_peers_down_with_a_clear_line(
    tmp_path: Path, tokenizer: Tokenizer, sources: dict[str, Path]
) -> None:
    """At once, not at the timeout."""
    run_dir = tmp_path / "run"
    argv = settings(run_dir, tokenizer, sources, optim__steps=10**6)
    with launch(argv, 3) as run:
        wait_for(reached(run_dir, SAVE_EVERY + 1), run)
        run.signal(signal.SIGKILL, rank=1)
        killed = time.monotonic()
        assert run.wait() == [1, -signal.SIGKILL, 1]
        assert time.monotonic() - killed < 15
        for rank in (0, 2):
            words = [line for line in run.logs[rank].read_text().splitlines() if "lost a peer" in line]
            assert len(words) == 1 and f"rank {rank} of 3" in words[0] and "at step " in words[0]
            assert "Traceback" not in run.logs[rank].read_text()
    assert saved_steps(run_dir)


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


def test_a_full_disk_stops_the_run_clearly_and_loses_nothing(
    tmp_path: Path, tokenizer: Tokenizer, sources: dict[str, Path], undisturbed: Path
) -> None:
    """P5: the save fails on all ranks with one message; with space again the same command ends with the same bits."""
    with small_disk(tmp_path / "disk", kib=16 * 1024) as disk:
        run_dir, filler = disk / "run", disk / "filler"
        argv = settings(run_dir, tokenizer, sources)
        with launch(argv, 2) as run:
            wait_for(lambda: (run_dir / "checkpoints" / f"step-{SAVE_EVERY:08d}").exists(), run)
            with pytest.raises(OSError), filler.open("wb", buffering=0) as file:
                while file.write(bytes(1 << 16)):
                    pass
            assert run.wait() == [1, 1], run.output
        assert run.output.count("No space left on device") >= 1 and "was not written" in run.output
        assert "Traceback" not in run.output
        assert saved_steps(run_dir)
        filler.unlink()
        finish(argv, 2)
        assert numbers(run_dir) == numbers(undisturbed)
        assert_same_end(run_dir, undisturbed)


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


def test_numbers_that_go_bad_stop_the_run_on_every_rank(
    tmp_path: Path, tokenizer: Tokenizer, sources: dict[str, Path]
) -> None:
    """P8: a rate that throws the weights away; every skipped update is counted, and all ranks leave in order."""
    run_dir = tmp_path / "run"
    argv = settings(run_dir, tokenizer, sources, optim__learning_rate=1e30, optim__max_nonfinite_in_a_row=3)
    with launch(argv, 2) as run:
        assert run.wait() == [1, 1], run.output
    assert "the last 3 updates had non-finite gradients" in run.output and "Traceback" not in run.output
    skipped = [row["skipped_updates"] for row in rows(run_dir)]
    assert skipped[-3:] == [1, 2, 3] and not any(skipped[:-3])


def test_a_run_whose_every_checkpoint_is_damaged_does_not_start_from_scratch(
    tmp_path: Path, undisturbed: Path, tokenizer: Tokenizer, sources: dict[str, Path]
) -> None:
    """P5, P10: weeks of training are not overwritten without a word."""
    run_dir = _copy(undisturbed, tmp_path / "run")
    for folder in (run_dir / "checkpoints").iterdir():
        (folder / "meta.json").write_text("{}")
    with launch(settings(run_dir, tokenizer, sources), 2) as run:
        assert run.wait() == [2, 2]
    assert "all 2 checkpoints" in run.output and "Traceback" not in run.output
    assert len(rows(run_dir)) == STEPS


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
