"""The benchmarks run completely on CPU at a tiny size, and refuse to run without the GPU that they need."""

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]


def run_bench(bench: str, *options: str) -> dict[str, Any]:
    """Run a benchmark in a process of its own; return its JSON object."""
    command = [sys.executable, "-m", f"bench.{bench}", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def run_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., tuple[str, str]]:
    """Run a benchmark in this process, which has imported torch, to its status; return its last line and errors."""

    def run(bench: str, *options: str, status: int = 0) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", [bench, *options])
        ended, (out, err) = importlib.import_module(f"bench.{bench}").main(), capsys.readouterr()
        assert ended == status, err
        return out.rpartition("\n")[0].rpartition("\n")[2], err

    return run


def test_smoke_run_ends_with_one_json_object(run_here: Callable) -> None:
    record = json.loads(run_here("gpu", "--device", "cpu")[0])
    (parts,) = record["sizes"].values()
    assert parts["attention"]["flex_is_right"] and parts["training"]["step_tflop"] > 0
    assert record["patches"]["unet"]["parameters"] > record["patches"]["linear"]["parameters"]
    assert record["encoding"]["images_per_s"] > 0
    assert record["sampling"]["images_per_s"] > 0 and record["sampling"]["largest_difference"] < 0.1  # in bf16


@pytest.mark.slow
def test_planned_memory_and_the_stall_of_a_save_are_measured_on_a_rank_of_its_own() -> None:
    record = run_bench("fit", "--device", "cpu")
    planned = [record["modes"][mode]["planned_peak_gib"] for mode in ("full", "selective", "none")]
    assert planned == sorted(planned) and planned[0] > 0 and record["save"]["stall_s"] > 0


def test_sampling_draws_the_same_with_and_without_its_cache(run_here: Callable) -> None:
    options = ("--size", "0.16b", "--layers", "1", "--prefix", "40", "--steps", "2", "--batches", "1", "2")
    record = json.loads(run_here("sampling", *options, "--repeats", "1", "--device", "cpu")[0])
    assert record["largest_difference"] <= 1e-4
    assert record["cached_speedup"] > 0 and set(record["images_per_s"]) == {"1", "2"}


@pytest.mark.slow
def test_the_data_side_is_measured_on_one_core() -> None:
    """Figures that do not depend on the machine also hold at this size."""
    record = run_bench("loader", "--pairs", "1024", "--texts", "1024", "--rounds", "1", "--images", "10")
    assert record["fill"] >= 0.98 and 0.9 < record["fill_pairs_only"] < 1
    assert record["state_bytes_1024_lanes"] < 1 << 20
    speeds = ("latent_documents_per_s", "text_tokens_per_s", "ratio_to_webdataset", "encode_ratio_to_pillow")
    assert all(record[name] > 0 for name in speeds)


@pytest.mark.slow
def test_a_save_is_measured_during_training(tmp_path: Path) -> None:
    """It starts ranks that train, save and are compared with dd; their files are removed afterwards."""
    options = ("--width", "64", "--layers", "1", "--length", "32", "--rounds", "1", "--steps", "2")
    record = run_bench("checkpoint", *options, "--folder", str(tmp_path))
    assert record["bytes"] > 4 * 4 * 2 * 4096 * 64  # weights, two moments and EMA of the embedding and the text head
    assert 0 < record["stall_share"] < 1 and record["write_ratio_to_dd"] > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_refuses_and_names_the_remedy(run_here: Callable) -> None:
    assert "--device cpu" in run_here("gpu", status=2)[1]
