"""The benchmarks run completely on CPU at a tiny size, and refuse to run without the GPU that they need."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


def run_bench(*options, bench="gpu"):
    command = [sys.executable, "-m", f"bench.{bench}", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)


@pytest.fixture
def run_here(monkeypatch, capsys):
    """Run a benchmark in this process, which has imported torch; returns its status and what it printed."""

    def run(*options, bench="gpu"):
        monkeypatch.setattr(sys, "argv", [bench, *options])
        return importlib.import_module(f"bench.{bench}").main(), capsys.readouterr()

    return run


def test_smoke_run_ends_with_one_json_object(run_here):
    status, printed = run_here("--device", "cpu")
    assert status == 0, printed.err
    record = json.loads(printed.out.splitlines()[-1])
    (parts,) = record["sizes"].values()
    assert parts["attention"]["flex_is_right"] and parts["training"]["step_tflop"] > 0
    assert record["patches"]["unet"]["parameters"] > record["patches"]["linear"]["parameters"]
    assert record["encoding"]["images_per_s"] > 0
    assert record["sampling"]["images_per_s"] > 0 and record["sampling"]["largest_difference"] < 0.1  # in bf16


@pytest.mark.slow
def test_planned_memory_and_the_stall_of_a_save_are_measured_on_a_rank_of_its_own():
    result = run_bench("--device", "cpu", bench="fit")
    assert result.returncode == 0, result.stderr
    record = json.loads(result.stdout.splitlines()[-1])
    planned = [record["modes"][mode]["planned_peak_gib"] for mode in ("full", "selective", "none")]
    assert planned == sorted(planned) and planned[0] > 0 and record["save"]["stall_s"] > 0


def test_sampling_draws_the_same_with_and_without_its_cache(run_here):
    options = ("--size", "0.16b", "--layers", "1", "--prefix", "40", "--steps", "2", "--batches", "1", "2")
    status, printed = run_here(*options, "--repeats", "1", "--device", "cpu", bench="sampling")
    assert status == 0, printed.err
    record = json.loads(printed.out.splitlines()[-1])
    assert record["largest_difference"] <= 1e-4
    assert record["cached_speedup"] > 0 and set(record["images_per_s"]) == {"1", "2"}


@pytest.mark.slow
def test_the_data_side_is_measured_on_one_core():
    """Figures that do not depend on the machine also hold at this size."""
    options = ("--pairs", "1024", "--texts", "1024", "--rounds", "1", "--images", "10")
    result = run_bench(*options, bench="loader")
    assert result.returncode == 0, result.stderr
    record = json.loads(result.stdout.splitlines()[-1])
    assert record["fill"] >= 0.98 and 0.9 < record["fill_pairs_only"] < 1
    assert record["state_bytes_1024_lanes"] < 1 << 20
    speeds = ("latent_documents_per_s", "text_tokens_per_s", "ratio_to_webdataset", "encode_ratio_to_pillow")
    assert all(record[name] > 0 for name in speeds)


@pytest.mark.slow
def test_a_save_is_measured_during_training(tmp_path: Path):
    """It starts ranks that train, save and are compared with dd; their files are removed afterwards."""
    options = ("--width", "64", "--layers", "1", "--length", "32", "--rounds", "1", "--steps", "2")
    result = run_bench(*options, "--folder", str(tmp_path), bench="checkpoint")
    assert result.returncode == 0, result.stderr
    record = json.loads(result.stdout.splitlines()[-1])
    assert record["bytes"] > 4 * 4 * 2 * 4096 * 64  # weights, two moments and EMA of the embedding and the text head
    assert 0 < record["stall_share"] < 1 and record["write_ratio_to_dd"] > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_refuses_and_names_the_remedy(run_here):
    status, printed = run_here()
    assert status == 2 and "--device cpu" in printed.err
