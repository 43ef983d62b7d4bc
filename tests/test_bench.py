"""The benchmarks run completely on CPU at a tiny size, and refuse to run without the GPU that they need."""

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import gpu, gpu_report, gpu_step, gpu_trace
from bench.gpu import Case
from bench.gpu_ceiling import Ceiling, roofline_s
from bench.gpu_setting import MICRO_STEPS, Setting
from model.transformer import SIZES, TransformerConfig
from model.transfusion import TransfusionConfig
from train.planning.kernels import Kernels

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


def measured(run_here: Callable, folder: Path, *options: str) -> tuple[dict[str, Any], str]:
    """Run bench.gpu on a CPU; return its record and table, which agree with its last line."""
    record = json.loads(run_here("gpu", "--device", "cpu", "--keep", str(folder), *options)[0])
    assert record == json.loads((folder / "gpu-cpu.json").read_text())
    assert not record["errors"] and not record["skipped"], record["errors"]
    assert all(check["passed"] is not False for check in record["checks"])
    return record, (folder / "gpu-cpu.md").read_text()


def test_one_gpu_is_measured_end_to_end_on_a_cpu(run_here: Callable, tmp_path: Path) -> None:
    """A step, its profile and its saves, attention, sampling, encoding, a start: the code that a GPU will run."""
    record, table = measured(run_here, tmp_path / "kept", "--only", "toy", "attention", "start", "sampling", "encoding")
    step = record["cases"]["toy"]
    assert step["layers"] == step["layers_of_the_size"] == 2 and step["tokens_per_s"] > 0
    assert sum(step["breakdown"].values()) == pytest.approx(1, abs=0.2)  # kinds of work, and idle
    assert min(step["breakdown"][kind] for kind in ("gemm", "attention", "optimizer", "cross_entropy", "mask")) > 0
    assert 0 < step["roofline_share"] < 1 and step["planned_peak_gib"] > 0
    assert step["save"]["gb"] > 12 * step["parameters"] / 1e9  # weights and two moments
    assert record["cases"]["attention"]["toy"]["flex_is_right"]
    assert 0 < record["cases"]["attention"]["toy"]["pairs_of_causal"] < 1.2
    assert record["cases"]["start"]["cold_s"] > 0 and record["cases"]["encoding"]["images_per_s"] > 0
    assert record["cases"]["sampling"]["images_per_s"].keys() == {"1", "2"}
    assert "| toy | 2 | 2 | none |" in table and "toy: mask" in table
    with pytest.raises(ValueError, match="smoke run on a CPU"):
        Kernels.read(tmp_path / "kept" / "gpu-cpu.json")
    speeds = Kernels.read(tmp_path / "kept" / "gpu-cpu.json", allow_cpu=True).at("linear", 32)
    assert speeds.product > 0 and speeds.attention > 0 and 0 <= speeds.idle < 1


@pytest.mark.slow
def test_text_alone_and_a_unet_are_measured_too(run_here: Callable, tmp_path: Path) -> None:
    record, _ = measured(run_here, tmp_path, "--only", "toy", "toy-text", "toy-unet")
    toy, text, unet = (record["cases"][name] for name in ("toy", "toy-text", "toy-unet"))
    assert text["counts"]["image_tokens"] == 0 < toy["counts"]["image_tokens"]
    assert unet["parameters"] > toy["parameters"] and unet["breakdown"]["convolution"] > 0
    assert any(check["name"] == "toy: share of text-only speed" for check in record["checks"])


def test_a_case_that_fails_or_has_no_time_costs_the_others_nothing(tmp_path: Path) -> None:
    """It is named with its last words; those after it run as long as there is time."""
    cases = [Case("dies", _dies, (), 0), Case("long", _answers, (), 1000), Case("answers", _answers, (), 0)]
    record = gpu.measure(cases, Setting(tmp_path / "data", "cpu"), 600)
    assert "ended with status 1: ValueError: no memory" in record["errors"]["dies"]
    assert record["skipped"] == ["long"] and record["cases"] == {"answers": {"answer": 42}}


def _dies(_: Setting) -> dict[str, Any]:
    raise ValueError("no memory")


def _answers(_: Setting) -> dict[str, Any]:
    return {"answer": 42}


def test_layers_are_left_out_until_the_plan_fits_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device with the memory that one layer needs; with less than that the case is refused."""
    config, cpu = Setting(tmp_path, "cpu").config("toy", tmp_path / "run"), torch.device("cpu")
    whole, _ = gpu_step.largest_that_fits(config, 512, cpu)
    assert whole.model.transformer.layers == 2 and whole.parallel.activation_checkpointing == "none"
    shallow = replace(config, model=replace(config.model, transformer=replace(config.model.transformer, layers=1)))
    needed = sum(gpu_step.largest_that_fits(shallow, 512, cpu)[1].peak.values())
    monkeypatch.setattr(gpu_step, "memory_of", lambda _: needed)
    fitted, plan = gpu_step.largest_that_fits(config, 512, cpu)
    assert fitted.model.transformer.layers == 1 and sum(plan.peak.values()) <= needed
    monkeypatch.setattr(gpu_step, "memory_of", lambda _: needed // 4)
    with pytest.raises(MemoryError, match="one layer of width 32 does not fit"):
        gpu_step.largest_that_fits(config, 512, cpu)


def test_a_roofline_is_products_attention_and_bytes() -> None:
    """Closed form: 100 GFLOP of attention at 50 TFLOP/s, 2 micro-steps of 3 ms, bytes at 1,000 GB/s."""
    config = TransfusionConfig(transformer=TransformerConfig(width=64, layers=2, heads=2, ffn_hidden=128))
    ceiling = Ceiling(gemm_tflops=50.0, gemm_s=0.003, copy_gb_per_s=1000.0)
    least = roofline_s(
        ceiling, config, micro_steps=2, tokens=1000, attention_flops=1e11, parameters=10**6, element_bytes=2
    )
    moved = 1000 * 2 * 3 * 2 * (14 * 64 + 3 * 128) + 32 * 10**6
    assert least == pytest.approx(0.006 + 0.002 + moved / 1e12)


def test_on_a_gpu_the_cases_are_the_papers_presets(tmp_path: Path) -> None:
    """Compiled, at 4,096 tokens, with the loader's processes; their sizes, sequences and micro-steps as stated."""
    for case in gpu.GPU_CASES:
        if case.work is gpu_step.measure:
            size, patches, text_only, _ = case.arguments
            config = Setting(tmp_path, "cuda").config(size, tmp_path / "run", patches, text_only=text_only)
            assert config.model.transformer == SIZES[size] and config.model.patches == patches
            assert config.parallel.compile and config.data.sequence_length == 4096 and config.data.num_workers == 4
            assert config.data.lanes == config.micro_batch_size * MICRO_STEPS[size]
            assert config.data.sources.keys() == ({"texts"} if text_only else {"pairs", "texts"})


def _event(cat: str, name: str, start: float, duration: float, **args: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "ts": start, "dur": duration, "pid": 1, "tid": 1, "args": args}


def test_a_kernel_counts_where_it_was_launched_or_by_its_name() -> None:
    """A trace as CUPTI writes it: two streams overlap, 20 of 150 microseconds are idle, ranges decide before names."""
    launch = "cudaLaunchKernel"
    events = [
        _event("user_annotation", "bench optimizer", 0, 10),
        _event("cuda_runtime", launch, 2, 1, correlation=1),
        _event("cpu_op", "_LinearCrossEntropy", 20, 10),
        _event("cpu_op", "aten::mm", 21, 5),
        _event("cuda_driver", "cuLaunchKernelEx", 22, 1, correlation=2),
        _event("user_annotation", "FSDP::all_gather (blocks.0)", 40, 10),
        _event("cuda_runtime", launch, 41, 1, correlation=3),
        *(_event("cuda_runtime", launch, 60 + i, 1, correlation=4 + i) for i in range(5)),
        _event("kernel", "elementwise_kernel", 100, 30, correlation=1),
        _event("kernel", "nvjet_tst_128x256", 130, 20, correlation=2),
        _event("kernel", "split_with_sizes_copy", 140, 20, correlation=3),  # on another stream
        _event("kernel", "triton_tem_fused_flex_attention_backward_3", 160, 10, correlation=4),
        _event("kernel", "triton_red_fused__fused_rms_norm_backward_convert_element_type_2", 170, 10, correlation=5),
        _event("kernel", "cutlass_80_tensorop_bf16_s16816gemm", 200, 20, correlation=6),
        _event("kernel", "sm90_xmma_fprop_implicit_gemm_bf16bf16", 220, 20, correlation=7),
        _event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 240, 10, correlation=8),
    ]
    found = {kind: round(1e6 * seconds) for kind, seconds in gpu_trace.breakdown(events).items() if seconds}
    assert found == {
        "optimizer": 30,
        "cross_entropy": 20,
        "fsdp": 20,
        "attention": 10,
        "elementwise": 10,
        "gemm": 20,
        "convolution": 20,
        "copies": 10,
        "idle": 20,
        "window": 150,
    }


def _gpu_step(**changes: Any) -> dict[str, Any]:
    shares = {"mask": 0.002, "gemm": 0.9}
    fine = {"size": "7b", "patches": "linear", "text_only": False, "mfu": 0.56, "breakdown": shares, "step_s": 1.0}
    fine |= {"row_step_s": 1.001, "data_stall_share": 0.001, "graph_breaks": {}, "recompiled": 0, "host_waits": []}
    return fine | {"planned_over_measured": 1.1, "tokens_per_s": 98.0} | changes


@pytest.mark.parametrize(
    ("changes", "failed"),
    [
        ({}, []),
        ({"mfu": 0.54}, ["MFU"]),
        ({"breakdown": {"mask": 0.02}}, ["mask"]),
        ({"data_stall_share": 0.01}, ["data stall"]),
        ({"graph_breaks": {"print": 1}}, ["graph breaks"]),
        ({"recompiled": 1}, ["recompiled"]),
        ({"host_waits": ["train/step.py:1"]}, ["host waits"]),
        ({"planned_over_measured": 0.9}, ["planned over measured memory"]),
        ({"row_step_s": 0.95}, ["the log row's step time over the bench's"]),
        ({"tokens_per_s": 96.0}, ["share of text-only speed"]),
    ],
)
def test_an_aim_that_is_missed_fails_its_check(changes: dict[str, Any], failed: list[str]) -> None:
    """On an H200; each of a GPU's figures has a check of its own."""
    cases = {"7b": _gpu_step(**changes), "7b-text": _gpu_step(text_only=True, tokens_per_s=100.0)}
    found = gpu_report.checks({"device": "NVIDIA H200", "device_type": "cuda", "cases": cases})
    assert [check.name for check in found if check.passed is False] == [f"7b: {what}" for what in failed]
    assert sum(check.passed is True for check in found) == len(found) - len(failed)


def test_sampling_draws_the_same_with_and_without_its_cache(
    run_here: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.sampling.VOCAB", 2002)
    monkeypatch.setitem(SIZES, "0.16b", TransformerConfig(width=192, layers=1, heads=3))
    options = ("--size", "0.16b", "--layers", "1", "--rows", "2", "--prefix", "20", "--tokens", "4", "--steps", "1")
    record = json.loads(run_here("sampling", *options, "--batches", "1", "--repeats", "1", "--device", "cpu")[0])
    assert record["largest_difference"] <= 1e-4
    assert record["cached_speedup"] > 0
    counts = {name: case.get("tokens", 0) for name, case in record["cases"].items()}
    assert sorted(counts.values()) == [0, 0, 0, 0, 4, 4, 8, 8], counts
    for name, case in record["cases"].items():
        is_difference = "after" in name  # of two times, which a busy machine may turn around
        assert case["share_of_bound"] > 0 and (is_difference or case["per_row"] > 0), name


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
