"""The training program when config, data, disk, ranks or numbers are wrong: a clear end, and nothing lost."""

import os
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from data.dataset import open_data
from data.lane_state import LaneState
from data.loader import Loader
from data.tokenizer import Tokenizer, train_tokenizer
from tests import runs
from tests.damage import garble
from tests.disks import fill, small_disk
from tests.runs import SAVE_EVERY, STEPS, Arguments, DrawingRun
from tests.sources import make_source, pairs
from train import pretrain
from train.config import load_config
from train.pretrain_config import PretrainConfig


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
        return runs.settings(tmp_path / f"run-{next(iter(changes))}", tokenizer, sources, **changes)

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
        "a rank's states take ": changed(model__transformer__width=65536, model__transformer__layers=64),
    }
    for words, argv in refused_at_once.items():
        with pytest.raises((ValueError, OSError), match=re.escape(words)):
            pretrain.main(argv)
    refused_later = {
        "unknown key 'optim.step'": changed(optim__step=3),
        f"run folder {tmp_path}/file/run is not writable": runs.settings(tmp_path / "file" / "run", tokenizer, sources),
        "no VAE: set vae=FOLDER": changed(preview__interval_steps=1, preview__prompts="[a circle]"),
    }
    if not torch.cuda.is_available():
        refused_later["device=cuda, but torch finds no CUDA device"] = changed(device="cuda")
    runs.assert_refused(*((argv, [words]) for words, argv in refused_later.items()))
    assert not list(tmp_path.glob("run*/checkpoints/*")) and not list(tmp_path.glob("run*/metrics.jsonl"))


def test_what_only_some_ranks_could_notice_is_refused_by_all_without_a_hang(
    tmp_path: Path, tokenizer: Tokenizer, sources: dict[str, Path]
) -> None:
    """P10: more ranks than lanes; previews that only rank 0 would draw; a folder that only rank 0 would write."""
    (tmp_path / "file").write_text("")
    previews = {"preview__interval_steps": 1, "preview__prompts": "[a circle]"}
    starts = {
        "3 ranks, but data.lanes=2": runs.settings(tmp_path / "lanes", tokenizer, sources, data__lanes=2),
        "no VAE: set vae=FOLDER": runs.settings(tmp_path / "vae", tokenizer, sources, **previews),
        f"run folder {tmp_path}/file/run is not writable": runs.settings(tmp_path / "file" / "run", tokenizer, sources),
    }
    runs.assert_refused(*((argv, [words]) for words, argv in starts.items()), world_size=3)
    assert not (tmp_path / "lanes").exists() and not list((tmp_path / "vae").glob("*/*"))


def test_corrupt_records_are_skipped_counted_and_named_when_the_budget_is_spent(
    tmp_path: Path, run_dir: Path, tokenizer: Tokenizer, pairs_folder: Path, texts_folder: Path
) -> None:
    """P7: skipped, and the same ones after a resume; past the budget all ranks save and stop in an orderly way, so that
    the run continues once the budget is raised."""
    damaged = shutil.copytree(pairs_folder, tmp_path / "pairs")
    names = garble(damaged, {0: [3, 4, 17], 1: [2], 2: [0, 21]})
    sources = {"pairs": damaged, "texts": texts_folder}
    argv = runs.settings(run_dir, tokenizer, sources, optim__steps=12)
    config = load_config(PretrainConfig, argv)
    data = open_data(config.data, config.seed, config.model.patch_size)
    loader = Loader(data, config.data, rank=0, world_size=1, micro_batch_size=5)
    batches = [loader.next(30) for _ in range(12)]
    loader.close()
    skipped = [batch.num_skipped for batch in batches]
    states = [batch.lane_states.values() for batch in batches]
    documents = [len({place for state in of for place in state.skipped_documents}) for of in states]
    assert documents[-1] == 6 < skipped[-1], "several lanes meet each of them"

    output = runs.finish([*argv, "data.max_bad_documents=3"], 2, status=1)
    end = next(line for line in output.splitlines() if "more than data.max_bad_documents" in line)
    stopped = max(i + 1 for i, count in enumerate(documents) if count <= 3)
    assert f"stopped after step {stopped}: {documents[stopped]} documents were skipped" in end
    assert any(name in end for name in names) and "checksum" in end
    assert runs.saved_steps(run_dir)[-1] == stopped
    runs.finish([*argv, "data.max_bad_documents=6"], 2)  # the number of bad documents; the lanes' counts sum to more
    assert [row["skipped_documents"] for row in runs.rows(run_dir)] == skipped
    saved = {int(lane): LaneState.from_json(state) for lane, state in runs.saved_state(run_dir)[1].items()}
    assert saved == batches[-1].lane_states


def test_a_shard_that_vanishes_is_bad_data_and_one_that_cannot_be_indexed_stops_all_ranks(
    tmp_path: Path, run_dir: Path, tokenizer: Tokenizer, texts_folder: Path
) -> None:
    """P7: shards truncated under a running job are counted and named; an unexpected error of one rank's reader makes
    every rank save and leave in an orderly way, with that reader's message."""
    folder = shutil.copytree(texts_folder, tmp_path / "texts")
    argv = runs.settings(run_dir, tokenizer, {"texts": folder}, optim__steps=10**6, checkpoint__interval_steps=10**6)
    with runs.launch([*argv, "data.max_bad_documents=10"], 2) as run:
        runs.wait_for(runs.reached(run_dir, 3), run)
        os.truncate(folder / "00000.tar", 0)
        (folder / "00001.tar").unlink()
        (folder / "00001.tar").write_bytes(b"")
        output = runs.expect(run, 1)
    assert "documents were skipped, more than" in output and f"{folder}/00000.tar#" in output
    assert runs.saved_steps(run_dir) == [runs.rows(run_dir)[-1]["step"]]

    folder = shutil.copytree(texts_folder, tmp_path / "unindexed")
    index = folder / "00001.tar.idx"
    index.write_bytes(index.read_bytes()[:-1] + b"\xff")
    output = runs.finish(runs.settings(tmp_path / "run2", tokenizer, {"texts": folder}), 2, status=1)
    (end,) = [line for line in output.splitlines() if "stopped after step 0" in line]
    assert "cannot read its data" in end and str(index) in end


def test_a_killed_rank_takes_its_peers_down_with_a_clear_line(run_dir: Path, arguments: Arguments) -> None:
    """At once, not at the timeout."""
    with runs.launch(arguments(optim__steps=10**6), 3) as run:
        runs.wait_for((run_dir / "checkpoints" / f"step-{SAVE_EVERY:08d}").exists, run)
        run.signal(signal.SIGKILL, rank=1)
        killed = time.monotonic()
        assert run.wait() == [1, -signal.SIGKILL, 1]
        assert time.monotonic() - killed < 15
        for rank in (0, 2):
            printed = run.logs[rank].read_text()
            (line,) = [line for line in printed.splitlines() if "lost rank 1 at step " in line]
            assert f"rank {rank} of 3" in line and "Traceback" not in printed
    assert runs.saved_steps(run_dir)


def test_a_full_disk_stops_the_run_clearly_and_loses_nothing(
    tmp_path: Path, tokenizer: Tokenizer, sources: dict[str, Path], undisturbed: Path
) -> None:
    """P5: the save fails on all ranks with one message; with space again the same command ends with the same bits."""
    with small_disk(tmp_path / "disk", kib=16 * 1024) as disk:
        run_dir, filler = disk / "run", disk / "filler"
        argv = runs.settings(run_dir, tokenizer, sources)
        with runs.launch(argv, 2) as run:
            runs.wait_for((run_dir / "checkpoints" / f"step-{SAVE_EVERY:08d}").exists, run)
            fill(filler)
            output = runs.expect(run, 1)
        assert "No space left on device" in output and "was not written" in output
        assert runs.saved_steps(run_dir)
        filler.unlink()
        runs.finish(argv, 2)
        assert runs.numbers(run_dir) == runs.numbers(undisturbed)
        runs.assert_same_end(run_dir, undisturbed)


def test_numbers_that_go_bad_stop_the_run_on_every_rank(run_dir: Path, arguments: Arguments) -> None:
    """P8: with a learning rate that ruins the weights; every skipped update is counted."""
    output = runs.finish(arguments(optim__learning_rate=1e30, guard__max_bad_in_a_row=3), 2, status=1)
    assert re.search(r"the updates of steps \d+ to \d+ were skipped for their gradients", output)
    skipped = [row["skipped_updates"] for row in runs.rows(run_dir)]
    assert skipped[-3:] == [1, 2, 3] and not any(skipped[:-3])


def test_a_run_whose_every_checkpoint_is_damaged_does_not_start_from_scratch(
    run_dir: Path, arguments: Arguments, undisturbed: Path
) -> None:
    """P5, P10: weeks of training are not silently overwritten."""
    shutil.copytree(undisturbed, run_dir)
    for folder in (run_dir / "checkpoints").iterdir():
        (folder / "meta.json").write_text("{}")
    assert "all 2 checkpoints" in runs.finish(arguments(), 2, status=2)
    assert len(runs.rows(run_dir)) == STEPS


def test_a_stop_while_pictures_are_drawn_does_not_wait_for_them(run_dir: Path, drawn: DrawingRun) -> None:
    """P6: drawing them all would take minutes; the step is saved, and no unfinished sheet remains."""
    prompts = "[" + ", ".join(f"circle {i}" for i in range(40)) + "]"
    argv = [*drawn.argv, f"run_dir={run_dir}", f"preview.prompts={prompts}", "preview.steps=1000"]
    with runs.launch(argv, 2) as run:
        runs.wait_for(runs.reached(run_dir, 3), run)
        asked = time.monotonic()
        run.signal(signal.SIGTERM)
        runs.expect(run, 75)
        assert time.monotonic() - asked < 20
    assert runs.saved_steps(run_dir) == [3] and list((run_dir / "previews").iterdir()) == []


def test_repeated_stop_signals_do_not_turn_an_orderly_end_into_a_death(run_dir: Path, arguments: Arguments) -> None:
    """P6: SIGTERM every few milliseconds until the processes are gone."""
    with runs.launch(arguments(optim__steps=10**6), 2) as run:
        runs.wait_for(runs.reached(run_dir, 3), run)
        while run.running:
            run.signal(signal.SIGTERM)
            time.sleep(0.01)
        runs.expect(run, 75)
