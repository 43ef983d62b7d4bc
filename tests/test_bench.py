"""The GPU benchmark runs whole on CPU at a tiny size, and refuses to pretend."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


def run_bench(*options):
    command = [sys.executable, "-m", "bench.gpu", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)


def test_smoke_run_ends_with_one_json_object():
    result = run_bench("--device", "cpu")
    assert result.returncode == 0, result.stderr
    record = json.loads(result.stdout.splitlines()[-1])
    assert record["attention"]["flex_is_right"]
    assert record["training"]["step_tflop"] > 0 and record["sampling"]["images_per_s"] > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_refuses_and_names_the_remedy():
    result = run_bench()
    assert result.returncode == 2
    assert "--device cpu" in result.stderr and "Traceback" not in result.stderr
