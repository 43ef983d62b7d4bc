"""A reader of a run that is training gets a whole checkpoint, whatever retention removes meanwhile (P5)."""

import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from train.checkpoints import checkpoint
from train.checkpoints.checkpoint import CheckpointConfig
from train.checkpoints.lookup import MOST_CHOICES, find_checkpoint, read_while_there
from train.checkpoints.run_folder import RunFolder
from train.distributed.ranks import alone
from train.pages.checkpoint_tables import view_checkpoints

pytestmark = pytest.mark.usefixtures("one_thread")
PARTS = 8


def _save(run: RunFolder, step: int) -> Path:
    state = {"model": {f"w{part}": torch.full((64,), float(step)) for part in range(PARTS)}}
    return checkpoint.save(run, step, state, {"meta.json": b"{}", "config.yaml": b"", "lanes.json": b"{}"}, alone())


def _load(folder: Path) -> set[float]:
    """Return the values in a checkpoint, which are its step."""
    parts = {f"w{part}": torch.zeros(64) for part in range(PARTS)}
    checkpoint.load(folder, {"model": parts}, alone())
    return {float(value) for part in parts.values() for value in part}


def test_the_next_is_taken_where_the_run_removes_or_replaces_the_one_that_is_read(tmp_path: Path, caplog: Any) -> None:
    with RunFolder(tmp_path, alone()) as run:
        _save(run, 1)
        seen = []

        def read(folder: Path) -> set[float]:
            seen.append(checkpoint.step_of(folder))
            if len(seen) == 1:
                _save(run, 2)
                shutil.rmtree(folder)
            elif len(seen) == 2:
                shutil.copytree(folder, tmp_path / "as-it-was")
                _save(run, 2)  # the same step anew: another file under each name
                (folder / "checksums.json").write_bytes((folder / "checksums.json").read_bytes() + b"\n")
            return _load(folder)

        assert read_while_there(lambda: find_checkpoint(tmp_path, alone()), read, alone()) == {2.0}
        assert seen == [1, 2, 2] and caplog.text.count("was removed by its run while it was read") == 2

        def read_too_late(folder: Path) -> set[float]:
            _save(run, checkpoint.step_of(folder) + 1)
            shutil.rmtree(folder)
            return _load(folder)

        with pytest.raises(FileNotFoundError, match=f"{MOST_CHOICES - 1} others were removed .* raise its checkpoint"):
            read_while_there(lambda: find_checkpoint(tmp_path, alone()), read_too_late, alone())
        newest = find_checkpoint(tmp_path, alone())
        with pytest.raises(ValueError, match="w8 is not in the checkpoint"):  # no removal: said at once
            misfit = {"model": {"w8": torch.zeros(1)}}
            read_while_there(lambda: newest, lambda folder: checkpoint.load(folder, misfit, alone()), alone())


def test_no_moment_of_a_removal_makes_a_reader_see_damage(tmp_path: Path, caplog: Any) -> None:
    """A run that keeps one checkpoint and saves some a second, beside readers that choose, load and view."""
    run, stop, failures = RunFolder(tmp_path, alone()), threading.Event(), []
    _save(run, 1)

    def train() -> None:
        try:
            for step in range(2, 100_000):
                if stop.wait(0.2):
                    return
                _save(run, step)
                checkpoint.retain(run.checkpoints, CheckpointConfig(keep_last=1), alone())
        except Exception as error:
            failures.append(error)

    training = threading.Thread(target=train)
    training.start()
    try:
        steps: list[tuple] = []
        while not failures and len({folder for folder, _ in steps}) < 6:
            steps.append(read_while_there(lambda: find_checkpoint(tmp_path, alone()), lambda f: (f, _load(f)), alone()))
            assert not view_checkpoints(tmp_path, verify=True).damaged
    finally:
        stop.set()
        training.join()
        run.close()
    assert failures == []
    assert all(values == {float(checkpoint.step_of(folder))} for folder, values in steps), "whole, and of one step"
    assert "damaged" not in caplog.text
