"""The trainer's own step on one GPU: its time, MFU and memory, where the time goes, and what must not happen in it.

The run is put together by train.pretrain's own `start`, its batches come from the real loader with its processes, and
each step is train.pretrain's `run_step` after the vote of `next_batch`. Where a model does not fit the device, layers
are left out until the plan says that it fits with `selective` recomputation or none; the record says what was left.
"""

import importlib
import math
import time
import warnings
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch._dynamo.utils import counters

from bench import gpu_ceiling, gpu_trace
from bench.gpu_setting import Patcher, Setting
from bench.loader import GRID
from data.loader import Loader
from data.packing import PackedBatch
from train.checkpoints.run_folder import RunFolder
from train.distributed.parallelize import compute_dtype
from train.distributed.process import wait_for
from train.distributed.ranks import init_ranks, own_device
from train.distributed.signals import StopSignal
from train.flops import Flops
from train.hardware import find, memory_of
from train.metrics import Interval
from train.next_batch import next_batch
from train.planning.dry_run import dry_run
from train.planning.estimate import GIB, largest_batches_of, usable_bytes
from train.planning.rehearsal import Rehearsal, rehearse
from train.pretrain_config import PretrainConfig
from train.profile import ProfileConfig
from train.run import Run
from train.training_data import open_training_data

WARM, TIMED, TRACED = {"cpu": 1, "cuda": 3}, {"cpu": 1, "cuda": 5}, {"cpu": 1, "cuda": 2}  # steps, by device
LEVELS: tuple[Literal["none", "selective"], ...] = ("none", "selective")  # of recomputation, the fastest first
MARGIN = 0.92  # of the device's usable memory: a plan that is too bold must not cost the case


class Steps:
    """Takes steps of one run, as its loop does."""

    def __init__(self, run: Run, loader: Loader, vocab_size: int) -> None:
        self.run, self.loader = run, loader
        parallel = run.config.parallel
        self.flops = Flops.of(run.config.model, vocab_size, parallel.activation_checkpointing, parallel.compile)
        self.run_step = importlib.import_module("train.pretrain").run_step  # a program: not imported at the top
        self.batches: list[PackedBatch] = []  # of the last `take`

    def take(self, count: int, *, watch_syncs: bool = False) -> tuple[float, dict[str, Any], list[str]]:
        """Take `count` steps; return their seconds, the log row's metrics, and where the host waited in between."""
        run, device = self.run, self.run.ranks.device
        self.batches = []
        wait_for(device)
        interval, start = Interval(self.flops, run.ranks, list(run.config.data.sources)), time.perf_counter()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if watch_syncs and device.type == "cuda":
                torch.cuda.set_sync_debug_mode("warn")  # "error" would end the run at the first wait, and name no other
            for _ in range(count):
                run.profiler.before(run.state.progress.step + 1)
                agreed = next_batch(self.loader, run.ranks, run.stop, run.saver.failed)
                assert agreed.batch is not None
                losses, norm = self.run_step(run, agreed.batch, agreed.vote)
                interval.add(agreed, losses, norm)
                self.batches += agreed.batch.micro_batches
                run.profiler.after(run.state.progress.step)
            if watch_syncs and device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
        wait_for(device)
        seconds = time.perf_counter() - start
        waits = [f"{w.filename}:{w.lineno}" for w in caught if "synchronizing CUDA operation" in str(w.message)]
        return seconds, interval.row(run.state.lane_states), waits

    @property
    def counts(self) -> dict[str, float]:
        """Return what the last steps consisted of."""
        of_flops = self.flops
        model, again = map(sum, zip(*map(of_flops.of_batch, self.batches), strict=True))
        images = [(grid, batch) for micro in self.batches for grid, batch in micro.images.items()]
        pairs = sum(batch.num_attention_pairs for batch in self.batches)
        return {
            "tokens": sum(batch.input_ids.numel() - batch.num_padding for batch in self.batches),
            "image_tokens": sum(batch.num_valid * math.prod(grid) // of_flops.patch_cells for grid, batch in images),
            "text_targets": sum(batch.num_text_targets for batch in self.batches),
            "latent_cells": sum(batch.num_valid * math.prod(grid) for grid, batch in images),
            "model_flops": model,
            "hardware_flops": model + again,
            "attention_flops": (of_flops.per_pair + of_flops.again_per_pair) * pairs,
        }


def measure(setting: Setting, size: str, patches: Patcher, text_only: bool, saves: bool) -> dict[str, Any]:
    """Measure a run's step; `saves` also measures two saves of it."""
    name = "-".join([size, "text" if text_only else patches])
    run_dir = setting.folder / "runs" / name
    first = WARM[setting.device] + TIMED[setting.device] + 1
    recorded = ProfileConfig(steps=[first, first + TRACED[setting.device] - 1])
    config = replace(setting.config(size, run_dir, patches, text_only=text_only), profile=recorded)
    data, device = open_training_data(config), own_device(config.device)
    vocab_size = data.tokenizer.vocab_size
    layers = config.model.transformer.layers
    config, plan = largest_that_fits(config, vocab_size, device)
    ranks = init_ranks(timeout_s=600, device=config.device)
    with StopSignal() as stop, RunFolder(run_dir, ranks) as folder:
        start = time.perf_counter()
        run = importlib.import_module("train.pretrain").start(config, data, ranks, folder, stop)
        started = time.perf_counter() - start
        record: dict[str, Any] = {
            "size": size,
            "patches": patches,
            "text_only": text_only,
            "layers": config.model.transformer.layers,
            "layers_of_the_size": layers,
            "transformer": asdict(config.model.transformer),
            "vocab_size": vocab_size,
            "rows": config.micro_batch_size,
            "length": config.data.sequence_length,
            "micro_steps": config.data.lanes // config.micro_batch_size,
            "activation_checkpointing": config.parallel.activation_checkpointing,
            "compiled": config.parallel.compile,
            "parameters": sum(parameter.numel() for parameter in run.state.model.parameters()),
            "start_s": started,
        }
        record |= _measured(run, vocab_size, plan, saves)
        run.log.close()
        ranks.close()
    return record


def largest_that_fits(
    config: PretrainConfig, vocab_size: int, device: torch.device
) -> tuple[PretrainConfig, Rehearsal]:
    """Return the config with as many of its layers as the plan says fit the device, and the plan.

    Recomputes as little as these layers allow. Raises MemoryError if not even one layer fits.
    """
    cuda, whole = device.type == "cuda", config.model.transformer.layers
    usable = MARGIN * usable_bytes(memory_of(device) / GIB) if cuda else memory_of(device)
    for layers in (whole, *(n for n in (24, 20, 16, 12, 8, 4, 2, 1) if n < whole)):
        for level in LEVELS:
            trunk = replace(config.model.transformer, layers=layers)
            candidate = replace(
                config,
                model=replace(config.model, transformer=trunk),
                parallel=replace(config.parallel, activation_checkpointing=level),
            )
            plan = rehearse(candidate, vocab_size, 1, largest_batches_of(candidate, 1, [GRID]), cuda=cuda)
            if sum(plan.peak.values()) <= usable:
                return candidate, plan
    raise MemoryError(f"one layer of width {config.model.transformer.width} does not fit {usable / GIB:.1f} GiB")


def _measured(run: Run, vocab_size: int, plan: Rehearsal, saves: bool) -> dict[str, Any]:
    """Return the figures of the run's steps."""
    config, device = run.config, run.ranks.device
    found: dict[str, Any] = {}
    start = time.perf_counter()
    dry_run(run.state.model, run.state.optimizer, config, run.data.grids, run.stats, run.ranks, is_resumed=False)
    largest_gib = torch.cuda.max_memory_allocated() / GIB if device.type == "cuda" else 0.0
    with closing(run.loader()) as loader:
        steps = Steps(run, loader, vocab_size)
        steps.take(1)
        first_step_s = time.perf_counter() - start
        if more := WARM[device.type] - 1:
            steps.take(more)
        graphs, timed, traced = _graphs(), TIMED[device.type], TRACED[device.type]
        taken, row, _ = steps.take(timed)
        step_s, counts = taken / timed, {name: count / timed for name, count in steps.counts.items()}
        recompiled = _graphs() - graphs
        with gpu_trace.named_ranges():
            traced_s, _, _ = steps.take(traced)
        _, _, waits = steps.take(traced, watch_syncs=True)
        if saves:
            found["save"] = _saves(steps)
    (trace,) = (Path(config.run_dir) / "profile").glob("*.trace.json.gz")
    shares = gpu_trace.breakdown(gpu_trace.read_events(trace))
    window = shares.pop("window")
    peak = max(largest_gib, row["device_memory_gib"]) or None
    planned = sum(plan.peak.values()) / GIB
    gpu = find(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    peak_tflops = gpu and gpu.peak_tflops
    rate = counts["model_flops"] / step_s / 1e12
    found |= {
        "first_step_s": first_step_s,
        "step_s": step_s,
        "tokens_per_s": counts["tokens"] / step_s,
        "model_tflops_per_s": rate,
        "mfu": rate / peak_tflops if peak_tflops else None,
        "hfu": rate / peak_tflops * counts["hardware_flops"] / counts["model_flops"] if peak_tflops else None,
        "row_step_s": row["step_s"],
        "data_stall_share": row["data_stall_share"],
        "counts": counts,
        "peak_memory_gib": peak,
        "planned_peak_gib": planned,
        "planned_over_measured": planned / peak if peak else None,
        "traced_step_s": traced_s / traced,
        "breakdown_ms": {kind: 1e3 * seconds / traced for kind, seconds in shares.items()},
        "breakdown": {kind: seconds / window for kind, seconds in shares.items()},
        "graph_breaks": dict(counters["graph_break"]) if config.parallel.compile else None,
        "recompiled": recompiled if config.parallel.compile else None,
        "host_waits": sorted(set(waits)) if device.type == "cuda" else None,
    }
    return found | _roofline(run, counts, vocab_size, step_s)


def _graphs() -> int:
    """Return how many graphs have been compiled in this process."""
    return int(counters["stats"]["unique_graphs"])


def _roofline(run: Run, counts: dict[str, float], vocab_size: int, step_s: float) -> dict[str, Any]:
    """Return the measured ceilings and the share of the step that the roofline takes. Frees nothing of the run."""
    config, device = run.config, run.ranks.device
    dtype, micro_steps = compute_dtype(config.parallel, device), config.data.lanes // config.micro_batch_size
    tokens = config.micro_batch_size * config.data.sequence_length
    targets = round(counts["text_targets"] / micro_steps)
    ceiling = gpu_ceiling.measure(config.model, tokens, targets, vocab_size, dtype, device)
    least = gpu_ceiling.roofline_s(
        ceiling,
        config.model,
        micro_steps=micro_steps,
        tokens=counts["tokens"],
        attention_flops=counts["attention_flops"],
        parameters=sum(parameter.numel() for parameter in run.state.model.parameters()),
        element_bytes=dtype.itemsize,
    )
    return {"ceiling": asdict(ceiling), "roofline_s": least, "roofline_share": least / step_s}


def _saves(steps: Steps) -> dict[str, float]:
    """Save two steps; the second save reuses the pinned memory, as every later save of a run does."""
    run, stalls, written_s = steps.run, [], 0.0
    for _ in range(2):
        stalls.append(run.save())
        start = time.perf_counter()
        run.saver.settle(tolerate=False)
        written_s = time.perf_counter() - start
        steps.take(1)
    newest = max(run.folder.checkpoints.glob("step-*"))
    size = sum(file.stat().st_size for file in newest.iterdir())
    return {
        "gb": size / 1e9,
        "first_stall_s": stalls[0],
        "stall_s": stalls[1],
        "written_mb_per_s": size / written_s / 1e6,
    }
