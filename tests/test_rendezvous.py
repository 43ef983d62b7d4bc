"""Ranks that were started with different settings, or that cannot meet, all say so at once."""

import os
import socket
from pathlib import Path

import pytest
import torch.distributed as dist

from data.tokenizer import Tokenizer, train_tokenizer
from tests.ranks import assert_ranks_refuse, run_without_torchrun
from tests.runs import settings
from tests.sources import make_source, pairs
from train import evaluate, pretrain, sample, vae
from train.distributed import rendezvous
from train.distributed.agreement import difference
from train.distributed.launcher import Place


@pytest.fixture(scope="module")
def argv(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer, pairs_folder: Path) -> list[str]:
    folder = tmp_path_factory.mktemp("alike")
    return settings(folder / "run", tokenizer, {"pairs": pairs_folder}, optim__steps=2)


def test_settings_and_data_that_differ_are_named_by_key_value_and_rank(
    argv: list[str], tmp_path: Path, tokenizer: Tokenizer
) -> None:
    """P10: before any collective; other sizes of the model would break one, other settings would go unnoticed."""
    data = make_source(tmp_path / "other", tokenizer, pairs(60, grids=[(4, 8), (4, 4)]), shard_sizes=[60])
    changed = {
        "optim.learning_rate": ("0.002", "optim.learning_rate is 0.001 on rank 0, 0.002 on rank 1"),
        "optim.weight_decay": ("0.3", "optim.weight_decay"),
        "seed": ("7", "seed is 0 on rank 0, 7 on rank 1"),
        "diffusion.prediction": ("v", "diffusion.prediction"),
        "model.transformer.width": ("64", "model.transformer.width is 32 on rank 0, 64 on rank 1"),
        "data.sources.pairs.path": (str(data), "data.sources.pairs.path (number, contents)"),
    }
    other = [*argv, *(f"{key}={value}" for key, (value, _) in changed.items())]
    words = [words for _, words in changed.values()]
    assert_ranks_refuse([(pretrain.main, argv), (pretrain.main, other)], tmp_path / "log", *words)


def test_every_program_whose_ranks_work_together_compares_before_it_reads(tmp_path: Path) -> None:
    (tmp_path / "a.tar").touch()
    of_program = {
        vae.main: [f"inputs=[{tmp_path / 'a.tar'}]", f"output={tmp_path / 'vae'}"],
        sample.main: ["checkpoint=nowhere", "prompt=a circle"],
        evaluate.main: ["checkpoint=nowhere", "scenes=nowhere"],
    }
    for main, argv in of_program.items():
        argv = [*argv, "device=cpu"]
        words = (f"{main.__module__}: ", "seed is 0 on rank 0, 3 on rank 1")
        assert_ranks_refuse([(main, argv), (main, [*argv, "seed=3"])], tmp_path / main.__module__, *words)


def test_a_refusal_of_one_rank_alone_reaches_the_others_before_they_wait(argv: list[str], tmp_path: Path) -> None:
    """Another tokenizer, and settings that cannot be: on either side of the store."""
    train_tokenizer((f"another text of {i} words" for i in range(200)), tmp_path / "other.model", 290)
    tokenizer = [*argv, f"data.tokenizer={tmp_path / 'other.model'}"]
    assert_ranks_refuse([(pretrain.main, argv), (pretrain.main, tokenizer)], tmp_path / "a", "with tokenizer")
    nonsense = [*argv, "micro_batch_size=0"]
    assert_ranks_refuse([(pretrain.main, nonsense), (pretrain.main, argv)], tmp_path / "b", "micro_batch_size=0")
    assert_ranks_refuse([(sample.main, ["n=0"])] * 2, tmp_path / "c", "n=0")


def test_paths_and_readers_of_each_rank_may_differ(
    argv: list[str], tmp_path: Path, tokenizer: Tokenizer, pairs_folder: Path
) -> None:
    """As long as their contents are the same."""
    (tmp_path / "copy").symlink_to(pairs_folder)
    (tmp_path / "t.model").write_bytes(Path(tokenizer.path).read_bytes())
    own = [*argv, f"data.sources.pairs.path={tmp_path / 'copy'}", f"data.tokenizer={tmp_path / 't.model'}"]
    own += ["data.num_workers=1", "data.prefetch_steps=1"]
    run = run_without_torchrun([(pretrain.main, argv), (pretrain.main, own)], tmp_path / "log")
    assert run.statuses == [0, 0], run.output


def test_a_port_in_use_is_refused_by_name_on_all_ranks(argv: list[str], tmp_path: Path) -> None:
    """By a silent process, with which a store's handshake would wait forever; rank 0 names it."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        own = {"MASTER_PORT": str(port)}
        run = assert_ranks_refuse([(pretrain.main, argv)] * 2, tmp_path / "log", f"MASTER_PORT={port}", **own)
    first, second = (log.read_text() for log in run.logs)
    assert f"pid {os.getpid()}" in first and "not rank 0 of this run" in second


def test_the_store_of_another_run_is_not_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither that of another program, nor one that already has a rank of this number."""
    monkeypatch.setattr(rendezvous, "ANSWER_S", 1.0)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    variables = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(rendezvous.RefusedTogether, match=f"MASTER_PORT={store.port} has nothing from rank 0"):
        rendezvous.meet(Place(1, 2), {}, timeout_s=5)
    with pytest.raises(rendezvous.RefusedTogether, match="another process is rank 1 at"):
        rendezvous.meet(Place(1, 2), {}, timeout_s=5)


def test_a_program_of_one_rank_refuses_half_of_a_rank(argv: list[str], tmp_path: Path) -> None:
    words = ("RANK is empty", "WORLD_SIZE=1", "torchrun")
    assert_ranks_refuse([(pretrain.main, argv)], tmp_path / "log", *words, RANK="")


def test_a_difference_is_told_in_one_short_sentence() -> None:
    alike = {"seed": "0", "data": "x" * 1000}
    assert difference({0: alike, 1: dict(alike)}) is None
    found = difference({0: alike, 1: {**alike, "seed": "1"}, 2: {"data": "y" * 1000}})
    assert "seed is 0 on rank 0, 1 on rank 1, nothing on rank 2; data is xxx" in found and len(found) < 600
    assert "seed is 0 on ranks 0, 2, 1 on rank 1" in difference({0: alike, 1: {**alike, "seed": "1"}, 2: alike})
