"""TensorBoard's event files of a run, read back with its own reader."""

import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.pictures import write_sheet
from tests.disks import fill, small_disk
from train.checkpoints.run_folder import RunFolder
from train.distributed.ranks import alone
from train.metrics_log import LogConfig, MetricsLog
from train.tensorboard_files import TensorboardFiles


def test_each_step_is_shown_once_with_what_was_run_last(tmp_path: Path) -> None:
    """Killed after step 6, resumed after 4, taken back to 5 within the attempt; pictures with their prompts."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def rows(log: MetricsLog, attempt: int, *steps: int) -> None:
        for step in steps:
            row = {"step": step, "loss": float(attempt), "hfu": None, "x0_error/-6..-4": 0.5, "slowest_host": "a"}
            log.write({**row, "time": 1000.0 + step})

    sheet = tmp_path / "step-00000002.png"
    with sheet.open("wb") as file:
        write_sheet(file, [np.full((8, 8, 3), 200, np.uint8)], ["a red circle"])
    with RunFolder(tmp_path / "run", alone()) as folder:
        killed = MetricsLog(LogConfig(tensorboard=True), folder, alone(), {})
        rows(killed, 1, 1, 2)
        killed.picture(sheet, 2)
        rows(killed, 1, 3, 4, 5, 6)
        killed.close()
        resumed = MetricsLog(LogConfig(tensorboard=True), folder, alone(), {}, step=4)
        rows(resumed, 2, 5, 6, 7)
        resumed.event("went_back", 7, "back to step 5", to=5)
        rows(resumed, 3, 6, 7)
        resumed.close()
    shown = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert {(e.step, e.value, e.wall_time) for e in shown.Scalars("loss")} == {
        (step, value, 1000.0 + step) for step, value in enumerate([1, 1, 1, 1, 2, 3, 3], start=1)
    }
    assert len(shown.Scalars("loss")) == 7
    assert sorted(shown.Tags()["scalars"]) == ["loss", "loss/x0_error/-6..-4"]
    (name,) = shown.Tags()["images"]
    (picture,) = shown.Images(name)
    assert "a red circle" in name and picture.step == 2
    assert (np.asarray(Image.open(BytesIO(picture.encoded_image_string))) == 200).all()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_ends_the_copy_and_not_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """P13. The writer has a thread of its own, which raises its error in a later call."""
    with small_disk(tmp_path / "disk", kib=64) as disk:
        full, late = TensorboardFiles(disk / "tensorboard", 0), TensorboardFiles(disk / "late", 0)
        fill(disk / "filler")
        for step in range(1, 2000):
            full.write({"step": step, "loss": 1.0})
            if "tensorboard is off" in caplog.text:
                break
        late.write({"step": 1, "loss": 1.0})
        for files in (full, late, TensorboardFiles(disk / "filler" / "no folder", 0)):
            files.go_back(3)
            files.close()
    assert caplog.text.count("log.tensorboard is off") >= 3 and "metrics.jsonl has everything" in caplog.text


def test_without_the_package_it_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with RunFolder(tmp_path, alone()) as folder, pytest.raises(ValueError, match=r"tensorboard=true: .*: pip install"):
        MetricsLog(LogConfig(tensorboard=True), folder, alone(), {})
