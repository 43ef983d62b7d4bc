"""Profiling a range of steps does not change a run (P13)."""

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from data.tokenizer import Tokenizer
from tests.runs import assert_same_end, finish, numbers, settings
from train.distributed.ranks import alone
from train.profile import ProfileConfig, Profiler


def _events(path: Path) -> list[dict]:
    with gzip.open(path) as stream:
        return json.load(stream)["traceEvents"]


@pytest.mark.slow
def test_a_profiled_run_makes_the_same_numbers(tmp_path: Path, tokenizer: Tokenizer, sources: dict[str, Path]) -> None:
    """P13: losses, weights, moments and lanes, bit for bit; a range that the run does not finish is written too."""
    plain, profiled = (settings(tmp_path / name, tokenizer, sources, optim__steps=4) for name in ("plain", "profiled"))
    finish(plain, None)
    finish([*profiled, "profile.steps=[3,9]", "profile.shapes=true", "profile.memory=true"], None)
    assert numbers(tmp_path / "profiled") == numbers(tmp_path / "plain")
    assert_same_end(tmp_path / "profiled", tmp_path / "plain")
    (trace,) = (tmp_path / "profiled" / "profile").iterdir()
    assert trace.name == "step-3-4-rank-0.trace.json.gz"
    events = _events(trace)
    names = [event.get("name", "") for event in events]
    assert sorted(name for name in names if name.startswith("step ")) == ["step 3", "step 4"]
    assert {"aten::mm", "aten::bmm", "_DocumentAttention", "[memory]"} <= set(names)
    assert sum("AdamW.step" in name for name in names) == 2
    assert any("Input Dims" in event.get("args", {}) for event in events)


def _profiled_loop(config: ProfileConfig, folder: Path, rank: int = 0) -> list[str]:
    """Run steps 1 to 5, each a product of its own size; return the names of what was written."""
    profiler = Profiler(config, folder, replace(alone(), rank=rank, world_size=2))
    for step in range(1, 6):
        profiler.before(step)
        torch.ones(step, 7) @ torch.ones(7, step)
        profiler.after(step)
        torch.linalg.inv(torch.eye(3))  # between steps: a log row, a save
    profiler.close()
    return sorted(path.name for path in folder.glob("profile/*"))


def test_only_the_configured_steps_and_ranks_are_recorded(tmp_path: Path) -> None:
    config = ProfileConfig(steps=[2, 3], ranks=[1], shapes=True)
    assert _profiled_loop(ProfileConfig(), tmp_path) == _profiled_loop(config, tmp_path) == []
    (name,) = _profiled_loop(config, tmp_path, rank=1)
    assert name == "step-2-3-rank-1.trace.json.gz"
    events = _events(tmp_path / "profile" / name)
    products = [event["args"]["Input Dims"] for event in events if event.get("name") == "aten::mm"]
    assert products == [[[2, 7], [7, 2]], [[3, 7], [7, 3]]]


def test_a_trace_that_cannot_be_written_is_a_warning(tmp_path: Path, caplog: Any) -> None:
    """P13: training continues, and nothing half-written stays."""
    (tmp_path / "profile").write_text("in the way")
    assert _profiled_loop(ProfileConfig(steps=[2, 3]), tmp_path) == []
    assert "no profile of steps 2 to 3: " in caplog.text and "File exists" in caplog.text


def test_wrong_ranges_and_ranks_are_refused(tmp_path: Path) -> None:
    """P10: on every rank, also those that would not record."""
    for steps in ([3], [0, 2], [5, 4], [1, 2, 3], []):
        with pytest.raises(ValueError, match=r"profile.steps=\[.*expected \[first, last\]"):
            ProfileConfig(steps=steps)
    with pytest.raises(ValueError, match=r"profile.ranks=\[0, 2\] on 2 ranks: expected some of 0 ... 1"):
        _profiled_loop(ProfileConfig(steps=[1, 2], ranks=[0, 2]), tmp_path)
