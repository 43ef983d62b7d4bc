"""Seconds from the start of a train.pretrain process to its first step, with a cold and a warm compile cache."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench.gpu_setting import Setting
from bench.job import rows

ROOT = Path(__file__).parents[1]


def measure(setting: Setting, size: str, limit_s: float) -> dict[str, Any]:
    """Start the program twice, each time in a new run folder; the second start finds what the first has compiled."""
    cache = setting.folder / "compile-cache"
    caches = {"TORCHINDUCTOR_CACHE_DIR": str(cache), "TRITON_CACHE_DIR": str(cache / "triton")}
    names = ("cold", "warm") if setting.on_cuda else ("cold",)  # nothing is compiled on a CPU
    return {"size": size} | {f"{name}_s": first_step(setting, size, name, caches, limit_s) for name in names}


def first_step(setting: Setting, size: str, name: str, environment: dict[str, str], limit_s: float) -> float:
    """Return the seconds until a new process has logged its first step; raise RuntimeError if it never does."""
    run_dir = setting.folder / "runs" / f"start-{name}"
    argv = [*setting.arguments(size, run_dir), "log.interval_steps=1", "optim.steps=1000", "optim.warmup_steps=1"]
    log, environment = setting.folder / f"start-{name}.log", os.environ | environment
    if setting.on_cuda:
        environment.pop("OMP_NUM_THREADS", None)  # one thread is for the cases' own processes
    with log.open("wb") as output:
        start = time.monotonic()
        command = [sys.executable, "-m", "train.pretrain", *argv]
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output, env=environment)
        try:
            while not rows(run_dir):
                if process.poll() is not None or time.monotonic() - start > limit_s:
                    said = log.read_text(encoding="utf-8", errors="replace")[-2000:]
                    raise RuntimeError(f"train.pretrain logged no step within {limit_s:.0f} s: {said}")
                time.sleep(0.02)
            return time.monotonic() - start
        finally:
            process.kill()  # its loader processes die with it
            process.wait()
