"""Measure one GPU in under ten minutes: the trainer's own step at the paper's sizes, attention, sampling, encoding,
saves and starts; and check the aims.

usage: python -m bench.gpu [--only 7b attention ...] [--budget 540] [--keep bench/results] [--device cuda]

Each case runs in a process of its own, so that one that runs out of memory or dies costs the others nothing. Cases are
ordered by importance; those for which no time is left are skipped, by name. A line per case goes to stderr; the last
line of stdout is one JSON object. Exit status: 0 if every check that applies passed and no case failed, else 1; 2
without a GPU. `--device cpu` runs all of it on a tiny model in half a minute: its numbers mean nothing.
`bash bench/gpu.sh` without options keeps the record and a table in bench/results.
"""

import argparse
import datetime
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench import gpu_attention, gpu_inference, gpu_report, gpu_start, gpu_step
from bench.gpu_setting import Patcher, Setting
from bench.ranks import Processes
from train import hardware
from train.streams import open_streams

GRACE_S = 20  # that the last case may take beyond the budget
START_LIMIT_S = 150  # of one start of train.pretrain


@dataclass(frozen=True)
class Case:
    name: str
    work: Callable[..., dict[str, Any]]  # of the setting and `arguments`
    arguments: tuple
    seconds: float  # about, on an H200: skipped if less is left


def step(
    size: str, patches: Patcher = "linear", seconds: float = 40, *, text_only: bool = False, saves: bool = False
) -> Case:
    name = f"{size}-text" if text_only else size if patches == "linear" else f"{size}-{patches}"
    return Case(name, gpu_step.measure, (size, patches, text_only, saves), seconds)


GPU_CASES = (
    step("7b", seconds=90),
    step("1.4b", seconds=60),
    step("0.16b", saves=True),
    step("0.76b"),
    step("1.4b", text_only=True, seconds=30),
    Case("attention", gpu_attention.measure, (["0.76b", "7b"],), 30),
    step("7b", "unet", 60),
    step("0.76b", "unet", 30),
    Case("start", gpu_start.measure, ("0.16b", START_LIMIT_S), 90),
    Case("sampling", gpu_inference.measure_sampling, ("0.76b", [1, 8, 32]), 25),
    Case("encoding", gpu_inference.measure_encoding, (), 25),
    step("0.16b", "unet", 30),
    step("1.4b", "unet", 40),
)
CPU_CASES = (
    step("toy", saves=True),
    step("toy", text_only=True),
    step("toy", "unet"),
    Case("attention", gpu_attention.measure, (["toy"],), 0),
    Case("start", gpu_start.measure, ("toy", START_LIMIT_S), 0),
    Case("sampling", gpu_inference.measure_sampling, ("toy", [1, 2]), 0),
    Case("encoding", gpu_inference.measure_encoding, (), 0),
)


def facts(setting: Setting) -> dict[str, Any]:
    """Return what the device is."""
    if not setting.on_cuda:
        return {"device": "cpu", "memory_gib": None, "peak_tflops": None}
    name = torch.cuda.get_device_name()
    gpu = hardware.find(name)
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    return {"device": name, "memory_gib": memory, "peak_tflops": gpu and gpu.peak_tflops}


def run_case(work: Callable[..., dict[str, Any]], arguments: tuple, result: Path) -> None:
    """Write what `work` returns; the body of a case's process."""
    result.write_text(json.dumps(work(*arguments)), encoding="utf-8")


def run_apart(case: Case, setting: Setting, limit_s: float) -> dict[str, Any] | str:
    """Return what a case finds in a process of its own, or why it ended without finding anything."""
    result, log = setting.folder / f"{case.name}.json", setting.folder / f"{case.name}.log"
    work = (case.work, (setting, *case.arguments), result)
    with Processes(run_case, [work], log, torchrun=False) as process:
        (status,) = process.wait(limit_s)
    said = process.output.strip().splitlines()
    if status == 0 and result.exists():
        return json.loads(result.read_text(encoding="utf-8"))
    print("\n".join(said[-30:]), file=sys.stderr)
    if status is None:
        return f"was stopped after {limit_s:.0f} s"
    return f"ended with status {status}: {said[-1] if said else 'it said nothing'}"


def measure(cases: list[Case], setting: Setting, budget_s: float) -> dict[str, Any]:
    """Run the cases while time is left; return the record."""
    start, on_cuda = time.monotonic(), setting.on_cuda
    setting.make()
    found = run_apart(Case("device", facts, (), 0), setting, 120)
    assert isinstance(found, dict), found
    record: dict[str, Any] = {"bench": "gpu", **found, "device_type": setting.device, "torch": torch.__version__}
    record |= {"cases": {}, "errors": {}, "skipped": []}
    for case in cases:
        left = budget_s - (time.monotonic() - start)
        if left < case.seconds:
            record["skipped"].append(case.name)
            text = f"{case.name}: skipped, it takes about {case.seconds:.0f} s"
        else:
            outcome = run_apart(case, setting, left + GRACE_S)
            if isinstance(outcome, str):
                record["errors"][case.name] = outcome
                text = f"{case.name}: FAILED, it {outcome}"
            else:
                record["cases"][case.name] = outcome
                text = gpu_report.case_text(case.name, outcome)
        elapsed = time.monotonic() - start
        times = [str(datetime.timedelta(seconds=round(s))) for s in (elapsed, max(0, budget_s - elapsed))]
        print(f"{text}\n    [{times[0]} elapsed, {times[1]} left]", file=sys.stderr, flush=True)
    record["checks"] = [check._asdict() for check in gpu_report.checks(record)]
    record["seconds"] = time.monotonic() - start
    assert on_cuda or record["device"] == "cpu"
    return record


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="CASE", help=f"some of {', '.join(c.name for c in GPU_CASES)}")
    parser.add_argument("--budget", type=float, default=540, help="seconds after which no case starts (540)")
    parser.add_argument("--keep", type=Path, help="folder to write gpu-DEVICE.json and a table, gpu-DEVICE.md, to")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a tiny smoke run (cuda)")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("bench.gpu: needs a CUDA GPU and finds none; --device cpu runs a smoke test", file=sys.stderr)
        return 2
    cases = list(GPU_CASES if options.device == "cuda" else CPU_CASES)
    if unknown := set(options.only or ()) - {case.name for case in cases}:
        parser.error(f"--only {' '.join(sorted(unknown))}: expected some of {' '.join(case.name for case in cases)}")
    cases = [case for case in cases if options.only is None or case.name in options.only]
    if options.keep is not None:
        options.keep.mkdir(parents=True, exist_ok=True)  # now, not after ten minutes
    if options.device == "cpu":
        print(
            "bench.gpu: a smoke run on a CPU: it shows that all of it runs; its numbers mean nothing", file=sys.stderr
        )
    with tempfile.TemporaryDirectory(prefix="bench-gpu-") as folder:
        record = measure(cases, Setting(Path(folder) / "data", options.device), options.budget)
    for check in record["checks"]:
        if check["passed"] is not None:
            print(
                f"{'pass' if check['passed'] else 'FAIL'}  {check['name']}: {check['value']}, aim {check['aim']}",
                file=sys.stderr,
            )
    if options.keep is not None:
        stem = f"gpu-{record['device'].lower().replace(' ', '-')}"
        (options.keep / f"{stem}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        (options.keep / f"{stem}.md").write_text(gpu_report.table(record), encoding="utf-8")
    print(json.dumps(record))
    failed = any(check["passed"] is False for check in record["checks"])
    return 1 if failed or record["errors"] else 0


if __name__ == "__main__":
    open_streams()
    sys.exit(main())
