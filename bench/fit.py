"""Planned against measured memory of real training steps on one GPU, and what staging a checkpoint costs there.

    python -m bench.fit [--device cuda]

The step is the trainer's own: FSDP2 on one rank, the fullest batch, bf16, blocks of the 1.4B model, with each kind of
activation checkpointing. `peak_ratio` is planned over measured memory (train/planning/rehearsal.py; aim: within 10 %
with full checkpointing, 20 % with the others). `stall_s` is how long a save blocks the training loop while it copies to
pinned memory, which the first save also allocates. Part of bench/gpu.sh; `--device cpu` runs the same code at a tiny
size, where memory is not measured. The last line is one JSON object.
"""

import argparse
import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from bench.step import backward, sharded_model
from data.dataset import DataConfig
from model.transformer import SIZES, TransformerConfig
from model.transfusion import TransfusionConfig
from train.checkpoints.checkpoint import META
from train.checkpoints.run_folder import RunFolder
from train.checkpoints.saver import Saver, Snapshot
from train.distributed.parallelize import ParallelConfig
from train.distributed.ranks import Device, Ranks, init_ranks
from train.optim.optimizer import OptimConfig, Optimizer
from train.planning.estimate import GIB, largest_batches_of
from train.planning.rehearsal import rehearse
from train.pretrain_config import PretrainConfig
from train.streams import open_streams

GRID, VOCAB = (32, 32), 32_768
MODES: tuple[Literal["full", "selective", "none"], ...] = ("full", "selective", "none")


def measure(device: Device) -> dict:
    """Return planned and measured peaks by kind of activation checkpointing, and a save's stall."""
    cuda = device == "cuda"
    trunk = replace(SIZES["1.4b"], layers=8) if cuda else TransformerConfig(width=64, layers=2, heads=2)
    config = PretrainConfig(
        run_dir="",
        micro_batch_size=2,
        model=TransfusionConfig(transformer=trunk),
        data=DataConfig(tokenizer="", lanes=2, sequence_length=4096 if cuda else 512),
        optim=OptimConfig(ema_half_lives=(1000,)),
    )
    vocab = VOCAB if cuda else 512
    configs = {mode: replace(config, parallel=ParallelConfig(activation_checkpointing=mode)) for mode in MODES}
    # Before the process group is up: a rehearsal creates its own.
    planned = {mode: rehearse(c, vocab, 1, largest_batches_of(c, 1, [GRID]), cuda=cuda) for mode, c in configs.items()}
    ranks = init_ranks(timeout_s=600, device=device)
    record: dict = {"parameters": None, "modes": {}}
    for mode, of_mode in configs.items():
        model, optimizer, found = _train(of_mode, vocab, ranks)
        record["parameters"] = sum(parameter.numel() for parameter in model.parameters())
        peak = sum(planned[mode].peak.values()) / GIB
        found |= {"planned_peak_gib": round(peak, 3), "peak_in": planned[mode].peak_phase}
        found["peak_ratio"] = round(peak / found["measured_peak_gib"], 3) if cuda else None
        record["modes"][mode] = found
        print(f"{mode}: {found}", file=sys.stderr, flush=True)
        if mode == MODES[-1]:
            record["save"] = _save(model, optimizer, ranks)
        del model, optimizer
    ranks.close()
    return record


def _train(config: PretrainConfig, vocab: int, ranks: Ranks) -> tuple[torch.nn.Module, Optimizer, dict]:
    """Take three steps over the fullest batches and measure the last."""
    model = sharded_model(config.model, vocab, ranks, config.parallel)
    optimizer = Optimizer(model, config.optim, config.guard)
    for step in (1, 2, 3):
        if ranks.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start, batches = time.perf_counter(), largest_batches_of(config, 1, [GRID])
        targets = sum(batch.num_text_targets for batch in batches)
        images = max(sum(batch.num_images for batch in batches), 1)
        backward(model, batches, ranks, config.parallel, targets=targets, images=images)
        norm = optimizer.update(step).item()  # waits for the device
    assert norm > 0, norm
    measured = torch.cuda.max_memory_allocated() / GIB if ranks.device.type == "cuda" else None
    return model, optimizer, {"measured_peak_gib": measured, "step_s": round(time.perf_counter() - start, 4)}


def _save(model: torch.nn.Module, optimizer: Optimizer, ranks: Ranks) -> dict:
    """Save twice; the second save reuses the pinned memory, as every later save of a run does."""
    tensors: dict[str, dict[str, torch.Tensor]] = {"model": dict(model.named_parameters())}
    tensors |= {name: dict(ema.weights) for name, ema in optimizer.emas.items()}
    size, stalls = sum(tensor.numel() * 4 for part in tensors.values() for tensor in part.values()), []
    with tempfile.TemporaryDirectory() as folder, RunFolder(Path(folder), ranks) as run:
        config = PretrainConfig(run_dir=folder).checkpoint
        saver = Saver(run, config, ranks)
        for step in (1, 2):
            start = time.perf_counter()
            saver.start(Snapshot(step, tensors, {META: b"{}"}))
            stalls.append(round(time.perf_counter() - start, 4))
            start = time.perf_counter()
            saver.settle(tolerate=False)
        written = size / (time.perf_counter() - start) / 1e6
    return {
        "gb": round(size / 1e9, 3),
        "first_stall_s": stalls[0],
        "stall_s": stalls[1],
        "written_mb_per_s": round(written),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a tiny smoke run (cuda)")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("bench.fit: needs a CUDA GPU and finds none; --device cpu runs a smoke test", file=sys.stderr)
        return 2
    name = "cpu" if options.device == "cpu" else torch.cuda.get_device_name()
    print(json.dumps({"bench": "fit", "device": name, "torch": torch.__version__, **measure(options.device)}))
    return 0


if __name__ == "__main__":
    open_streams()
    sys.exit(main())
