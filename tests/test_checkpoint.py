"""A checkpoint is whole or absent, loads on any world size, and survives every accident we can cause (P4, P5)."""

import json
import os
import resource
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, zeros

from tests.disks import small_disk
from tests.ranks import FunctionRanks, run_ranks
from train.checkpoints import checkpoint
from train.checkpoints.checkpoint import CheckpointConfig, CheckpointError
from train.checkpoints.run_folder import RunFolder, RunTakenOver
from train.distributed.parallelize import gather_weights
from train.distributed.ranks import LOST_PEER, Ranks, alone
from train.nested import leaves


class Tiny(nn.Module):
    """Sizes that no world size divides, and norms with fewer elements than there are ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 6)
        self.middle = nn.Sequential(nn.Linear(6, 5), nn.RMSNorm(5), nn.Linear(5, 2), nn.RMSNorm(2))
        self.head = nn.Linear(2, 13)
        self.register_buffer("scale", torch.tensor(0.5))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.middle(self.embed(input_ids)) * self.scale)


def _trainee(ranks: Ranks, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)  # the same full parameters on every rank
    model = Tiny()
    mesh = init_device_mesh("cpu", (ranks.world_size,))
    fully_shard(model.middle, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, fused=True)


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, ranks: Ranks) -> None:
    for step in steps:
        input_ids = torch.randint(13, (12,), generator=torch.Generator().manual_seed(1000 * step + ranks.rank))
        nn.functional.cross_entropy(model(input_ids), input_ids).backward()
        optimizer.step()
        optimizer.zero_grad()


def _state(model: nn.Module, optimizer: torch.optim.Optimizer) -> checkpoint.State:
    ema = {name: parameter.detach() * 0.5 for name, parameter in model.named_parameters()}
    return {**checkpoint.training_state(model, optimizer), "ema": ema}


def _full(state: checkpoint.State) -> dict[str, torch.Tensor]:
    """Every tensor, gathered, by name."""
    return gather_weights(dict(leaves(state)))


def _same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    same = (one[n].dtype == other[n].dtype and torch.equal(one[n], other[n]) for n in one)
    return one.keys() == other.keys() and all(same)


def _train_and_save(ranks: Ranks, root: Path) -> dict[str, torch.Tensor]:
    model, optimizer = _trainee(ranks, seed=ranks.world_size)
    _train(model, optimizer, range(3), ranks)
    state = _state(model, optimizer)
    with RunFolder(root, ranks) as run:
        checkpoint.save(run, 3, state, {"world.json": json.dumps(ranks.world_size).encode()}, ranks)
    return _full(state)


def _load_all(ranks: Ranks, roots: list[Path]) -> list[dict[str, torch.Tensor]]:
    loaded = []
    for root in roots:
        model, optimizer = _trainee(ranks, seed=99)  # never stepped
        state = _state(model, optimizer)
        folder = checkpoint.latest(root / "checkpoints", ranks)
        assert checkpoint.verify(folder, ranks) == []
        checkpoint.load(folder, state, ranks)
        live = {"model": dict(model.named_parameters()) | dict(model.named_buffers())}
        assert _same_bits(_full({"model": state["model"]}), _full(live)), "loading reaches the live parameters"
        loaded.append(_full(state))
        if ranks.is_first:  # as a sampler would, while the peers are elsewhere
            ema = {"ema": {name: torch.zeros(tensor.shape) for name, tensor in Tiny().named_parameters()}}
            checkpoint.load(folder, ema, alone())
            assert all(torch.equal(tensor, loaded[-1][name]) for name, tensor in _full(ema).items())
    return loaded


@pytest.mark.parametrize(
    ("saving", "loading"),
    [((1, 4), (3,)), ((3,), (1, 4)), pytest.param((1, 2, 3, 4), (1, 2, 3, 4), marks=pytest.mark.slow)],
)
def test_every_world_size_loads_what_every_other_saved(
    saving: tuple[int, ...], loading: tuple[int, ...], tmp_path: Path
) -> None:
    """P4: more ranks and fewer, uneven and empty shards, optimizer and EMA: the same bits. (Slow: all pairs.)"""
    roots = [tmp_path / f"by{world_size}" for world_size in saving]
    written = [run_ranks(_train_and_save, size, root)[0] for size, root in zip(saving, roots, strict=True)]
    for world_size in loading:
        for loaded in run_ranks(_load_all, world_size, roots):
            assert all(_same_bits(one, other) for one, other in zip(written, loaded, strict=True)), world_size
    for world_size, root in zip(saving, roots, strict=True):
        assert checkpoint.read_extra(checkpoint.saved(root / "checkpoints")[0], "world.json") == b"%d" % world_size


def _train_through_a_restart(ranks: Ranks, root: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    model, optimizer = _trainee(ranks, seed=1)
    _train(model, optimizer, range(3), ranks)
    with RunFolder(root, ranks) as run:
        folder = checkpoint.save(run, 3, checkpoint.training_state(model, optimizer), {}, ranks)
    _train(model, optimizer, range(3, 7), ranks)
    resumed, resumed_optimizer = _trainee(ranks, seed=2)
    checkpoint.load(folder, checkpoint.training_state(resumed, resumed_optimizer), ranks)
    _train(resumed, resumed_optimizer, range(3, 7), ranks)
    undisturbed = _full(checkpoint.training_state(model, optimizer))
    return undisturbed, _full(checkpoint.training_state(resumed, resumed_optimizer))


def test_training_resumes_bit_for_bit_on_the_same_world_size(tmp_path: Path) -> None:
    """P4: parameters, both AdamW moments and the step count, on one rank and on three."""
    for world_size in (1, 3):
        for undisturbed, resumed in run_ranks(_train_through_a_restart, world_size, tmp_path / str(world_size)):
            assert _same_bits(undisturbed, resumed)
            assert resumed["optimizer.head.weight.step"] == 7


def _plain(seed: int, size: int = 1000) -> checkpoint.State:
    generator = torch.Generator().manual_seed(seed)
    return {"model": {"a": torch.randn(size, 3, generator=generator), "b": torch.randn(7, generator=generator)}}


def _saved_run(path: Path, *steps: int) -> list[Path]:
    with RunFolder(path, alone()) as run:
        return [checkpoint.save(run, step, _plain(step), {"meta.json": b'{"a": 1}'}, alone()) for step in steps]


def _flip(path: Path, position: float) -> None:
    content = bytearray(path.read_bytes())
    content[min(int(position * len(content)), len(content) - 1)] ^= 0x10
    path.write_bytes(content)


DAMAGES = {
    "first bit": lambda path: _flip(path, 0.0),
    "bit in the middle": lambda path: _flip(path, 0.5),
    "last bit": lambda path: _flip(path, 1.0),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "emptied": lambda path: path.write_bytes(b""),
    "missing": Path.unlink,
    "grown": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
}


@pytest.mark.parametrize("name", ["__0_0.distcp", "index.json", "meta.json"])
def test_every_damage_is_found_and_latest_falls_back(tmp_path: Path, name: str, caplog: Any) -> None:
    """P5: any file, any damage; the damaged checkpoint is named, not deleted."""
    older, newer = _saved_run(tmp_path, 10, 20)
    intact = shutil.copytree(newer, tmp_path / "intact")
    assert checkpoint.latest(newer.parent, alone()) == newer
    for what, damage in DAMAGES.items():
        damage(newer / name)
        assert [problem.split(":")[0] for problem in checkpoint.verify(newer, alone())] == [name], what
        assert checkpoint.latest(newer.parent, alone()) == older, what
        assert f"passing over {newer}" in caplog.text
        shutil.rmtree(newer)
        shutil.copytree(intact, newer)
    assert checkpoint.verify(newer, alone()) == []


def test_a_damaged_or_missing_listing_is_damage(tmp_path: Path) -> None:
    (folder,) = _saved_run(tmp_path, 10)
    listing = folder / "checksums.json"
    content = listing.read_bytes()
    for damaged in (content.replace(b"xxh3", b"xxh2", 1), content[:-3], b"[]", b'{"files": {}}', b"\xff"):
        listing.write_bytes(damaged)
        assert len(checkpoint.verify(folder, alone())) == 1, damaged
    listing.unlink()
    assert "checksums.json" in checkpoint.verify(folder, alone())[0]
    with pytest.raises(OSError, match=r"checksums\.json"):
        checkpoint.load(folder, _plain(0), alone())


def _verify_and_latest(ranks: Ranks, folder: Path) -> tuple[list[str], Path | None]:
    return checkpoint.verify(folder, ranks), checkpoint.latest(folder.parent, ranks)


def test_ranks_agree_on_what_is_damaged(tmp_path: Path) -> None:
    """P5: whichever rank reads the damaged file, all of them pass the checkpoint over."""
    older, newer = _saved_run(tmp_path, 10, 20)
    for name in ("__0_0.distcp", "meta.json"):  # dealt to different ranks
        _flip(newer / name, 0.5)
        answers = run_ranks(_verify_and_latest, 2, newer)
        assert answers[0] == answers[1] and answers[0][1] == older
    assert [problem.split(":")[0] for problem in answers[0][0]] == ["__0_0.distcp", "meta.json"]


def test_load_names_what_does_not_fit_and_touches_nothing(tmp_path: Path) -> None:
    """P10: another vocabulary, a missing layer, a left-over layer, another dtype."""
    (folder,) = _saved_run(tmp_path, 10)
    state = {"model": {"a": torch.zeros(900, 3), "c": torch.zeros(1)}}
    with pytest.raises(ValueError) as refusal:
        checkpoint.load(folder, state, alone())
    for part in ("model.c is not in the", "model.b is only in the", "model.a is [1000, 3] torch.float32 in the"):
        assert part in str(refusal.value)
    assert not state["model"]["a"].any()
    halves = {"model": {name: tensor.bfloat16() for name, tensor in _plain(0)["model"].items()}}
    with pytest.raises(ValueError, match="bfloat16 here"):
        checkpoint.load(folder, halves, alone())


def test_a_taken_over_attempt_cannot_commit(tmp_path: Path) -> None:
    """P5: a late predecessor writes all its bytes and then finds that it no longer owns the run."""
    early = RunFolder(tmp_path, alone())
    early.close()
    with RunFolder(tmp_path, alone()) as late:
        with pytest.raises(RunTakenOver, match="from attempt 1 by attempt 2"):
            checkpoint.save(early, 10, _plain(10), {}, alone())
        assert os.listdir(late.checkpoints) == []
        checkpoint.save(late, 10, _plain(10), {}, alone())


def test_a_step_saved_again_replaces_the_old_one_and_a_kill_between_the_renames_loses_neither(tmp_path: Path) -> None:
    older, newer = _saved_run(tmp_path, 10, 20)
    _flip(newer / "__0_0.distcp", 0.5)
    assert _saved_run(tmp_path, 20) == [newer]
    assert checkpoint.verify(newer, alone()) == []
    assert checkpoint.saved(newer.parent) == [older, newer] and len(os.listdir(newer.parent)) == 2
    newer.rename(newer.with_name(f".replaced-{newer.name}"))  # where a kill would leave it
    checkpoint.clean(newer.parent, alone())
    assert checkpoint.latest(newer.parent, alone()) == newer


def test_retention_keeps_the_last_that_verifies(tmp_path: Path) -> None:
    """P5: even if all newer ones are damaged; it also keeps what `keep_every_steps` asks for."""
    folders = _saved_run(tmp_path, 10, 20, 30, 40, 50)
    root = folders[0].parent
    for folder in folders[2:]:
        _flip(folder / "__0_0.distcp", 0.5)
    config = CheckpointConfig(interval_steps=10, keep_last=1, keep_every_steps=40)
    assert checkpoint.retain(root, config, alone()) == [folders[0], folders[2]]
    assert checkpoint.latest(root, alone()) == folders[1]
    _flip(folders[1] / "index.json", 0.5)
    assert checkpoint.retain(root, CheckpointConfig(keep_last=1), alone()) == [], "with nothing whole, nothing goes"
    _saved_run(tmp_path, 60)
    checkpoint.retain(root, CheckpointConfig(keep_last=1), alone())
    assert [checkpoint.step_of(folder) for folder in checkpoint.saved(root)] == [60]
    with pytest.raises(ValueError, match="keep_last=0"):
        CheckpointConfig(keep_last=0)


def _save_two(ranks: Ranks, path: Path, size: int, at_commit: bool) -> str:
    run = RunFolder(path, ranks)
    checkpoint.clean(run.checkpoints, ranks)
    checkpoint.save(run, 1, _plain(1), {}, ranks)
    if at_commit and ranks.is_first:
        run.assert_current = lambda: os.kill(os.getpid(), signal.SIGKILL)  # all is written, nothing renamed
    try:
        checkpoint.save(run, 2, _sharded(ranks, size), {}, ranks)
    except RuntimeError as error:
        return str(error)
    return "saved"


def _sharded(ranks: Ranks, size: int) -> checkpoint.State:
    mesh = init_device_mesh("cpu", (ranks.world_size,))
    return {"model": {"a": zeros(size, device_mesh=mesh, placements=[Shard(0)])}}


def _assert_next_start_is_clean(path: Path) -> None:
    with RunFolder(path, alone()) as run:
        checkpoint.clean(run.checkpoints, alone())
        assert os.listdir(run.checkpoints) == ["step-00000001"]
        folder = checkpoint.latest(run.checkpoints, alone())
        state = _plain(0)
        checkpoint.load(folder, state, alone())
        assert _same_bits(_full(state), _full(_plain(1)))


def test_killed_in_the_middle_of_a_save_the_previous_checkpoint_stays_the_newest(tmp_path: Path) -> None:
    """P5, P4: `kill -9` of all ranks once the second checkpoint's bytes are on their way."""
    processes = FunctionRanks(_save_two, 2, tmp_path, 40_000_000, False)
    beside = tmp_path / "checkpoints" / ".tmp-step-00000002-1"
    while not any(file.stat().st_size for file in beside.glob("__*")):
        time.sleep(0.001)
    processes.signal(signal.SIGKILL)
    assert processes.wait() == [-signal.SIGKILL] * 2
    assert beside.exists()
    _assert_next_start_is_clean(tmp_path)


def test_killed_at_the_commit_the_previous_checkpoint_stays_the_newest_and_no_peer_hangs(tmp_path: Path) -> None:
    started = time.monotonic()
    (killed, _), (_, answer) = FunctionRanks(_save_two, 2, tmp_path, 1000, True).outcomes()
    assert killed == -signal.SIGKILL and LOST_PEER.search(answer), answer
    assert time.monotonic() - started < 15
    _assert_next_start_is_clean(tmp_path)


def _save_despite_faults(ranks: Ranks, path: Path, filler: Path | None) -> tuple[str, list[str], list[str]]:
    """Save; save again with a full disk, or with a limit on rank 1's files; take the fault away; save again.

    Returns what the second save said, what it left there, and what is wrong with the other two.
    """
    with RunFolder(path, ranks) as run:
        root = run.checkpoints
        checkpoint.save(run, 1, _sharded(ranks, 100_000), {}, ranks)
        if filler:
            ranks.on_first(lambda: filler.write_bytes(bytes(7_500_000)))
        elif ranks.rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        try:
            checkpoint.save(run, 2, _sharded(ranks, 1_000_000), {}, ranks)
            message = "saved"
        except CheckpointError as error:
            message = str(error)
        left = ranks.on_first(lambda: sorted(os.listdir(root)))
        if filler:
            ranks.on_first(filler.unlink)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        problems = checkpoint.verify(root / "step-00000001", ranks)
        problems += checkpoint.verify(checkpoint.save(run, 3, _sharded(ranks, 1_000_000), {}, ranks), ranks)
    return message, left, problems


def test_a_full_disk_harms_nothing_saved_before(tmp_path: Path) -> None:
    """P5: the same error on every rank, no hang, nothing half-written; with space again the next save succeeds."""
    with small_disk(tmp_path / "disk", kib=8 * 1024) as disk:
        first, second = run_ranks(_save_despite_faults, 2, disk / "run", disk / "filler", timeout_s=30)
    assert second == first and first[1:] == (["step-00000001"], [])
    assert "step-00000002 was not written" in first[0] and "No space left on device" in first[0]


def test_a_fault_of_one_rank_is_an_error_of_all(tmp_path: Path) -> None:
    """P5: rank 1 alone cannot write its file, and rank 0 says so in the same words."""
    first, second = run_ranks(_save_despite_faults, 2, tmp_path, None, timeout_s=30)
    assert second == first and first[1:] == (["step-00000001"], [])
    assert "(rank 1: OSError: [Errno 27] File too large)" in first[0]
