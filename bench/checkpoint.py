"""Measure what a save costs: seconds for which training stands still, and how fast the background writes.

usage: python -m bench.checkpoint [--width 768] [--layers 3] [--ranks 2] [--rounds 3] [--folder DIR]

Ranks over gloo train a real model (weights, moments and EMA in float32) and save it. `stall_s` is how long a save
blocks the training loop: staging, and waiting for an earlier save. `slowdown_s` is the extra time of the steps during
the write. Shares are of the time between saves at the default interval. Writing is compared with one
`dd conv=fsync` per rank, of as many bytes on the same disk, alternating with the saves; both are measured during
training (`write_ratio_to_dd`) and with idle ranks. Then train.pretrain itself is killed with -9 behind a save of the
same model and started again: `restart` has the seconds to its first step, by part (bench/restart.py). Medians of the
rounds. The last line is one JSON object.
"""

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch

from bench.ranks import Processes
from bench.restart import measure_restarts
from bench.step import backward, sharded_model
from data.documents import Document, TextSegment
from data.layout import lay_out
from data.loader import draw_images
from data.packing import PackedBatch, collate, pack
from data.tokenizer import SpecialIds
from model.transformer import TransformerConfig
from model.transfusion import TransfusionConfig
from train.checkpoints.checkpoint import CheckpointConfig
from train.checkpoints.run_folder import RunFolder
from train.checkpoints.saver import Saver
from train.distributed.ranks import Ranks, init_ranks
from train.optim.guard import GuardConfig
from train.optim.optimizer import OptimConfig, Optimizer
from train.pretrain_config import PretrainConfig
from train.state import TrainState
from train.streams import open_streams

VOCAB, BLOCK = 4096, 4 << 20  # token ids; bytes per write of dd
POLL_S, LATE_S = 0.005, 600


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=768, help="of the model (768)")
    parser.add_argument("--layers", type=int, default=3, help="of the model (3)")
    parser.add_argument("--length", type=int, default=256, help="tokens a step and rank (256)")
    parser.add_argument("--ranks", type=int, default=2, help="processes (2)")
    parser.add_argument("--rounds", type=int, default=3, help="measured rounds (3)")
    parser.add_argument("--steps", type=int, default=5, help="steps without a save before each (5)")
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: a temporary folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        result = Path(folder) / "result.json"
        with Processes(measure, [(options, Path(folder), result)] * options.ranks, None) as processes:
            statuses = processes.wait(24 * 3600)
        if any(statuses):
            print(f"bench.checkpoint: ranks ended with {statuses}", file=sys.stderr)
            return 1
        shutil.rmtree(Path(folder) / "run")  # room for another of the size
        record = json.loads(result.read_text(encoding="utf-8")) | measure_restarts(options, Path(folder))
        print(f"command: python -m bench.checkpoint {' '.join(sys.argv[1:])}")
        print(json.dumps(record))
    return 0


def measure(options: argparse.Namespace, folder: Path, result: Path) -> None:
    """Run all rounds on one rank; rank 0 writes the JSON object to `result`."""
    ranks = init_ranks(timeout_s=600, device="cpu")
    config = CheckpointConfig()
    with RunFolder(folder / "run", ranks) as run:
        trainee = Trainee(options, ranks)
        saver = Saver(run, config, ranks)
        rounds, start = [], time.perf_counter()
        for number in range(options.rounds + 1):  # the first warms up
            rounds.append(Round(trainee, saver, run, ranks).measure(options.steps))
            left = (time.perf_counter() - start) / (number + 1) * (options.rounds - number)
            if ranks.is_first:
                print(f"round {number} of {options.rounds}: {left:.0f} s left", file=sys.stderr, flush=True)
        rounds = rounds[1:]
        saver.settle()
        if ranks.is_first:
            given = {key: value for key, value in vars(options).items() if key != "folder"}
            record = {"bench": "checkpoint", **given, **summary(rounds, config.interval_steps)}
            record |= {"machine": f"{os.cpu_count()} cores, {platform.machine()}", "torch": torch.__version__}
            result.write_text(json.dumps(record), encoding="utf-8")
    ranks.close()


class Trainee:
    """A sharded model, one batch per rank, and a step as pretraining does it."""

    def __init__(self, options: argparse.Namespace, ranks: Ranks) -> None:
        trunk = TransformerConfig(width=options.width, layers=options.layers, heads=options.width // 64)
        model = sharded_model(TransfusionConfig(transformer=trunk), VOCAB, ranks)
        optimizer = Optimizer(model, OptimConfig(ema_half_lives=(1000,)), GuardConfig())
        config = PretrainConfig(run_dir="runs/bench")
        self.state = TrainState(model, optimizer, lambda step: {}, config, {"latent_spec": None, "grids": []})
        self.model, self.batch, self.ranks = model, random_batch(options.length, ranks.rank), ranks

    def step(self) -> float:
        """Make one update and return the seconds it took."""
        start = time.perf_counter()
        targets = self.batch.num_text_targets * self.ranks.world_size
        backward(self.model, [self.batch], self.ranks, targets=targets, images=0)
        self.state.progress.step += 1
        self.state.optimizer.update(self.state.progress.step)
        return time.perf_counter() - start


def random_batch(length: int, seed: int) -> PackedBatch:
    """Return one row of one text."""
    special = SpecialIds(bos=1, eos=2, pad=3, boi=4, eoi=5)
    tokens = np.random.default_rng(seed).integers(6, VOCAB, length - 2)
    row = pack([lay_out(Document((TextSegment(tokens),)), special, 2)], length, special.pad)
    return collate([row], [draw_images(0, 0, seed, row)], 2)


class Round:
    """One measurement of everything, on all ranks at once."""

    def __init__(self, trainee: Trainee, saver: Saver, run: RunFolder, ranks: Ranks) -> None:
        self.trainee, self.saver, self.run, self.ranks = trainee, saver, run, ranks
        self._dd_file = run.path / f"dd-{ranks.rank}"
        self._beside = ThreadPoolExecutor(1)  # waits for what takes place during training

    def measure(self, num_steps: int) -> dict[str, float]:
        plain = [self.trainee.step() for _ in range(num_steps)]
        found = {"step_s": statistics.median(plain)}
        final = self._final()
        found["stall_s"], write = self._start_save(final)
        found["write_s"], during = self._train_until(write)
        found["slowdown_s"] = max(0.0, sum(during) - len(during) * found["step_s"])
        self.saver.settle()
        size = self.ranks.on_first(lambda: sum(file.stat().st_size for file in final.iterdir()))
        dd = partial(self._dd, size // self.ranks.world_size)
        found["dd_s"], _ = self._train_until(self._beside.submit(dd))
        self._dd_file.unlink()
        self.trainee.step()  # another step to save
        _, write = self._start_save(self._final())
        found["idle_write_s"] = self.ranks.gather(write.result())[0]
        self.saver.settle()
        self.ranks.gather(None)
        found["idle_dd_s"] = max(self.ranks.gather(self._beside.submit(dd).result()))
        self._dd_file.unlink()
        found["bytes"] = size
        return found

    def _final(self) -> Path:
        return self.run.checkpoints / f"step-{self.trainee.state.progress.step:08d}"

    def _start_save(self, final: Path) -> tuple[float, Future[float]]:
        """Return how long the slowest rank was blocked, and the seconds until the commit."""
        self.ranks.gather(None)
        start = time.perf_counter()
        self.saver.start(self.trainee.state.snapshot(self.ranks))
        write = self._beside.submit(_poll, final)
        return max(self.ranks.gather(time.perf_counter() - start)), write

    def _train_until(self, seconds: Future[float]) -> tuple[float, list[float]]:
        """Train until `seconds` are there on every rank; return the most and those of the steps."""
        steps = []
        while not all(self.ranks.gather(seconds.done())):
            steps.append(self.trainee.step())
        return max(self.ranks.gather(seconds.result())), steps

    def _dd(self, num_bytes: int) -> float:
        """Write zeros with dd; return the seconds that it reports, without the start of its process."""
        count = max(1, num_bytes // BLOCK)
        command = ["dd", "if=/dev/zero", f"of={self._dd_file}", f"bs={BLOCK}", f"count={count}", "conv=fsync"]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | {"LC_ALL": "C"})
        seconds = re.search(r"copied, ([\d.e+-]+) s", done.stderr)
        assert seconds, done.stderr
        return float(seconds[1])


def _poll(path: Path) -> float:
    """Return the seconds until `path` exists."""
    start = time.perf_counter()
    while not path.exists():
        assert time.perf_counter() - start < LATE_S, f"{path} was not committed"
        time.sleep(POLL_S)
    return time.perf_counter() - start


def summary(rounds: list[dict[str, float]], interval_steps: int) -> dict:
    """Return the medians of the rounds, as seconds, shares, ratios and MB/s."""
    median = {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}
    between = interval_steps * median["step_s"]
    megabytes = median["bytes"] / 1e6
    ratios = sorted(one["dd_s"] / one["write_s"] for one in rounds)
    return {
        "stall_s": round(median["stall_s"], 3),
        "stall_share": round(median["stall_s"] / between, 6),
        "slowdown_s": round(median["slowdown_s"], 3),
        "slowdown_share": round(median["slowdown_s"] / between, 6),
        "write_ratio_to_dd": round(median["dd_s"] / median["write_s"], 3),
        "write_ratio_to_dd_range": [round(ratios[0], 3), round(ratios[-1], 3)],
        "write_ratio_to_dd_idle": round(median["idle_dd_s"] / median["idle_write_s"], 3),
        "write_mb_per_s": round(megabytes / median["write_s"]),
        "dd_mb_per_s": round(megabytes / median["dd_s"]),
        "write_mb_per_s_idle": round(megabytes / median["idle_write_s"]),
        "dd_mb_per_s_idle": round(megabytes / median["idle_dd_s"]),
        "bytes": int(median["bytes"]),
        "default_interval_steps": interval_steps,
        "step_s": round(median["step_s"], 3),
    }


if __name__ == "__main__":
    open_streams()
    sys.exit(main())
