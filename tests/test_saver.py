"""A checkpoint is written while training continues; a failing disk is reported and survived, or ends the run (P5)."""

import gc
import json
import math
import shutil
import signal
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from data.tokenizer import Tokenizer
from tests.disks import fill, small_disk
from tests.ranks import run_ranks
from tests.runs import SAVE_EVERY, assert_same_end, launch, numbers, saved_steps, settings, wait_for
from train.checkpoints import checkpoint
from train.checkpoints.checkpoint import CheckpointConfig, CheckpointError
from train.checkpoints.run_folder import RunFolder, RunTakenOver
from train.checkpoints.saver import Saver, Snapshot
from train.checkpoints.staging import Staging
from train.distributed.ranks import Ranks, alone
from train.nested import leaves


def _snapshot(ranks: Ranks, step: int, filler: int = 0) -> Snapshot:
    mesh = init_device_mesh("cpu", (ranks.world_size,))
    whole = torch.full((1001,), float(step))
    tensors = {
        "model": {"a": distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None)},
        "optimizer": {"a": {"step": torch.tensor(float(step)), "exp_avg": distribute_tensor(-whole, mesh, [Shard(0)])}},
    }
    return Snapshot(step, tensors, {checkpoint.META: b"{}", "filler": bytes(filler)})


def _train_on_while_it_is_written(ranks: Ranks, root: Path) -> list[list[float]]:
    """Overwrite the live tensors as soon as `start` returns; return what two saves in a row left on disk."""
    found = []
    with RunFolder(root, ranks) as folder:
        saver = Saver(folder, CheckpointConfig(keep_last=2), ranks)
        for step in (1, 2):
            snapshot = _snapshot(ranks, step)
            saver.start(snapshot)
            for _, tensor in leaves(snapshot.tensors):
                (tensor.to_local() if isinstance(tensor, DTensor) else tensor).fill_(99)
        saver.settle()
        assert saver.saved_step == 2
        for path in checkpoint.saved(folder.checkpoints):
            assert checkpoint.verify(path, ranks) == []
            loaded = _snapshot(ranks, 0)
            checkpoint.load(path, loaded.tensors, ranks)
            a, moments = loaded.tensors["model"]["a"], loaded.tensors["optimizer"]["a"]
            found.append([*a.full_tensor().unique(), *moments["exp_avg"].full_tensor().unique(), moments["step"]])
    return [[float(value) for value in values] for values in found]


def test_training_does_not_change_what_is_being_written(tmp_path: Path) -> None:
    for world_size in (1, 3):
        for found in run_ranks(_train_on_while_it_is_written, world_size, tmp_path / str(world_size)):
            assert found == [[1, -1, 1], [2, -2, 2]]


def _fill_the_disk(ranks: Ranks, disk: Path) -> list[str]:
    said = []
    with RunFolder(disk / "run", ranks) as folder:
        saver = Saver(folder, CheckpointConfig(keep_last=1, max_failures_in_a_row=2), ranks)
        saver.start(_snapshot(ranks, 1))
        saver.settle()
        for step in (2, 3):
            saver.start(_snapshot(ranks, step, filler=4_000_000))  # more than the disk has
            while not saver.failed:
                time.sleep(0.01)
            try:
                saver.settle()
            except CheckpointError as error:
                said.append(str(error))
        assert not saver.failed and saver.saved_step == 1
        saver.start(_snapshot(ranks, 4))
        saver.settle(tolerate=False)
        said.append(str([checkpoint.step_of(path) for path in checkpoint.saved(folder.checkpoints)]))
    return said


def test_all_ranks_see_a_failed_write_and_only_several_in_a_row_are_an_error(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", kib=2048) as disk:
        for error, after in run_ranks(_fill_the_disk, 2, disk):
            assert "step-00000003 was not written" in error and "No space left on device" in error
            assert after == "[4]", "with space again the next save is whole, and the last kept"


def _save_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list:
    """Save two steps as rank 5 of a machine with GPUs would, from the CPU; return what it asked of CUDA, which is not
    here."""
    asked: list = []

    def refuse(*_: object) -> None:
        raise AssertionError("the saver waits for a CUDA stream")

    def lock(address: int, num_bytes: int, flags: int) -> int:
        asked.append(("lock", num_bytes))
        return 0

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", refuse)
    runtime = SimpleNamespace(cudaHostRegister=lock, cudaHostUnregister=lambda _: asked.append(("unlock",)))
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)

    def ask(name: str, device: torch.device) -> None:
        asked.append((threading.current_thread().name, name, device))

    for name in ("set_device", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, partial(ask, name))
    ranks = replace(alone(), device=torch.device("cuda", 5))
    with RunFolder(tmp_path, ranks) as folder:
        saver = Saver(folder, CheckpointConfig(), ranks)
        for step in (1, 2):
            saver.start(Snapshot(step, {"model": {"a": torch.full((1000,), float(step))}}, {checkpoint.META: b"{}"}))
        saver.settle(tolerate=False)
        for step, path in enumerate(checkpoint.saved(folder.checkpoints), 1):
            loaded = {"model": {"a": torch.zeros(1000)}}
            checkpoint.load(path, loaded, alone())
            assert loaded["model"]["a"].unique().tolist() == [step]
    return asked


def test_the_saver_names_its_ranks_gpu_and_waits_for_no_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread's device is GPU 0 until it names another, so each rank of a machine would open a context there."""
    device = torch.device("cuda", 5)
    asked = _save_on_a_gpu(tmp_path, monkeypatch)
    assert [what for what in asked if what[0] == "saver"] == [("saver", "set_device", device)] * 2
    assert [what for what in asked if what[0] == "MainThread"] == [("MainThread", "synchronize", device)] * 2


def test_a_save_locks_one_block_of_memory_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = _save_on_a_gpu(tmp_path, monkeypatch)
    assert [what for what in asked if what[0] == "lock"] == [("lock", 4032)]  # 4,000 bytes, to whole cache lines
    gc.collect()
    assert asked[-1] == ("unlock",)  # with the saver: else CUDA refuses to lock these addresses for another
    monkeypatch.setattr(torch.cuda, "cudart", lambda: SimpleNamespace(cudaHostRegister=lambda *_: 2))
    with pytest.raises(MemoryError, match=r"0\.0 GiB of states to page-locked host memory.*CUDA error 2"):
        Staging(torch.device("cuda")).copy({"a": torch.zeros(3)})


def test_staged_copies_share_one_block_and_no_storage() -> None:
    """DCP would copy a view of a larger storage before it writes it."""
    state = {
        "a": torch.arange(5, dtype=torch.bfloat16),
        "b": {"c": torch.tensor(7.0), "d": torch.zeros(0, 3), "e": torch.arange(40.0).view(4, 10).T},
    }
    staging = Staging(torch.device("cpu"))
    staged = staging.copy(state)
    copies = dict(leaves(staged))
    for name, tensor in leaves(state):
        assert torch.equal(copies[name], tensor) and copies[name].dtype == tensor.dtype
        assert copies[name].untyped_storage().nbytes() == tensor.nbytes
    assert staging.num_bytes == 64 + 64 + 0 + 192
    starts = sorted(copy.data_ptr() for copy in copies.values() if copy.numel())
    assert starts[-1] + 160 - starts[0] <= staging.num_bytes and all(start % 64 == starts[0] % 64 for start in starts)
    state["b"]["c"].fill_(8.0)
    assert staged["b"]["c"] == 7 and staging.copy(state)["b"]["c"].data_ptr() == copies["b.c"].data_ptr()


def test_a_run_that_was_taken_over_ends(tmp_path: Path) -> None:
    early = RunFolder(tmp_path, alone())
    early.close()
    saver = Saver(early, CheckpointConfig(), alone())
    with RunFolder(tmp_path, alone()):
        saver.start(Snapshot(5, {"model": {"a": torch.zeros(3)}}, {}))
        with pytest.raises(RunTakenOver, match="from attempt 1 by attempt 2"):
            saver.settle()


def test_a_disk_that_is_full_for_a_while_costs_a_checkpoint_and_not_the_run(
    tmp_path: Path, tokenizer: Tokenizer, sources: dict[str, Path], undisturbed: Path
) -> None:
    """P5: training continues, the next interval tries again, and the result has the undisturbed run's bits."""
    with small_disk(tmp_path / "disk", kib=16 * 1024) as disk:
        run_dir, filler = disk / "run", disk / "filler"
        checkpoints = run_dir / "checkpoints"
        argv = settings(run_dir, tokenizer, sources, checkpoint__max_failures_in_a_row=1000)
        with launch(argv, 2) as run:
            wait_for((checkpoints / f"step-{SAVE_EVERY:08d}").exists, run)
            fill(filler)
            wait_for(lambda: "the next save tries again (failure 1 of 1000)" in run.output, run)
            assert "No space left on device" in run.output
            filler.unlink()
            assert run.wait() == [0, 0], run.output
        assert numbers(run_dir) == numbers(undisturbed) and saved_steps(run_dir)[-1] == numbers(undisturbed)[-1][0]
        assert_same_end(run_dir, undisturbed)


def test_the_best_by_a_metric_and_every_kth_are_kept(tmp_path: Path) -> None:
    with RunFolder(tmp_path, alone()) as folder:
        scores = {10: 3.0, 20: 1.0, 30: 2.0, 40: None, 50: 5.0, 55: math.nan, 60: 4.0}
        for step, score in scores.items():
            metrics = {} if score is None else {"heldout/x/text_loss": score}
            meta = json.dumps({"metrics": metrics}).encode()
            checkpoint.save(folder, step, {"model": {"a": torch.zeros(3)}}, {checkpoint.META: meta}, alone())
        config = CheckpointConfig(
            interval_steps=10, keep_last=1, keep_best=2, best_metric="heldout/x/text_loss", keep_every_steps=40
        )
        checkpoint.retain(folder.checkpoints, config, alone())
        assert [checkpoint.step_of(path) for path in checkpoint.saved(folder.checkpoints)] == [20, 30, 40, 60]
        shutil.rmtree(folder.checkpoints / "step-00000020")
    with pytest.raises(ValueError, match="keep_best=2"):
        CheckpointConfig(keep_best=2)


def test_a_stop_during_a_save_waits_for_it_and_saves_the_present_step(
    tmp_path: Path, tokenizer: Tokenizer, sources: dict[str, Path]
) -> None:
    """P6: two saves, one after the other, and exit 75."""
    run_dir = tmp_path / "run"
    argv = settings(run_dir, tokenizer, sources, optim__steps=10**6, checkpoint__keep_last=100)
    with launch(argv, 2) as run:
        wait_for(lambda: any((run_dir / "checkpoints").glob(".tmp-step-*/__*")), run)
        run.signal(signal.SIGUSR2, rank=1)
        assert run.wait() == [75, 75], run.output
    assert SAVE_EVERY in saved_steps(run_dir)
    assert f"after step {saved_steps(run_dir)[-1]}; saved" in run.output
