"""Measure what a save costs: seconds for which training stands still, and how fast the background writes.

usage: python -m bench.checkpoint [--width 768] [--layers 3] [--ranks 2] [--rounds 3] [--folder DIR]

Ranks over gloo train a real model (weights, moments and EMA in float32) and save while they go on. `stall_s` is how
long the loop is blocked in a save: staging, and waiting for an earlier one. `slowdown_s` is what the steps beside the
write took longer than steps without one. Shares are of the time between saves at the default interval. Writing is
compared with one `dd conv=fsync` a rank, as many bytes, on the same disk, in turn with the saves; each in two ways:
beside training (`write_ratio_to_dd`) and with the ranks idle. Medians of the rounds. The last line is one JSON object.
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from bench.job import rank_environment
from data.documents import Document, TextSegment
from data.loader import draw_images
from data.packing import PackedBatch, collate, lay_out, pack
from data.tokenizer import SpecialIds
from model.diffusion import DiffusionConfig
from model.transformer import TransformerConfig
from model.transfusion import Transfusion, TransfusionConfig
from train.checkpoints.checkpoint import CheckpointConfig
from train.checkpoints.run_folder import RunFolder
from train.checkpoints.saver import Saver
from train.distributed.parallelize import ParallelConfig, initialize, parallelize
from train.distributed.ranks import Ranks, init_ranks
from train.optim.guard import GuardConfig
from train.optim.optimizer import OptimConfig, Optimizer
from train.state import TrainState
from train.step import latent_stats, micro_step
from train.streams import open_streams

VOCAB, BLOCK = 4096, 4 << 20  # token ids; bytes that dd writes at once
POLL_S = 0.005
RANK_FOLDER = "BENCH_CHECKPOINT_FOLDER"  # set for the ranks that this program starts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=768, help="of the model (768)")
    parser.add_argument("--layers", type=int, default=3, help="of the model (3)")
    parser.add_argument("--length", type=int, default=256, help="tokens a step and rank (256)")
    parser.add_argument("--ranks", type=int, default=2, help="processes (2)")
    parser.add_argument("--rounds", type=int, default=3, help="saves of each kind (3)")
    parser.add_argument("--steps", type=int, default=5, help="steps without a save before each (5)")
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: a temporary folder")
    options = parser.parse_args()
    if RANK_FOLDER in os.environ:
        return run_rank(options, Path(os.environ[RANK_FOLDER]))
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        return start_ranks(options, Path(folder))


def start_ranks(options: argparse.Namespace, folder: Path) -> int:
    """Start this program once a rank, in torchrun's environment, and print what rank 0 measured."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes = []
    for rank in range(options.ranks):
        variables = os.environ | rank_environment(rank, options.ranks, store.port) | {RANK_FOLDER: str(folder)}
        processes.append(subprocess.Popen([sys.executable, "-m", "bench.checkpoint", *sys.argv[1:]], env=variables))
    if statuses := [status for process in processes if (status := process.wait())]:
        return statuses[0]
    print(f"command: python -m bench.checkpoint {' '.join(sys.argv[1:])}")
    print((folder / "result.json").read_text(encoding="utf-8"))
    return 0


def run_rank(options: argparse.Namespace, folder: Path) -> int:
    ranks = init_ranks(timeout_s=600, device="cpu")
    config = CheckpointConfig()
    with RunFolder(folder / "run", ranks) as run:
        trainee = Trainee(options, ranks)
        saver = Saver(run, config, ranks)
        rounds, start = [], time.perf_counter()
        for number in range(options.rounds + 1):  # the first is left out
            rounds.append(Round(trainee, saver, run, ranks).measure(options.steps))
            left = (time.perf_counter() - start) / (number + 1) * (options.rounds - number)
            if ranks.is_first:
                print(f"round {number} of {options.rounds}: {left:.0f} s left", file=sys.stderr, flush=True)
        rounds = rounds[1:]
        saver.settle()
        if ranks.is_first:
            record = summary(rounds, config.interval_steps)
            record = {"bench": "checkpoint", **{k: v for k, v in vars(options).items() if k != "folder"}, **record}
            record["machine"] = f"{os.cpu_count()} cores, {platform.machine()}"
            record["torch"] = torch.__version__
            (folder / "result.json").write_text(json.dumps(record), encoding="utf-8")
    ranks.close()
    return 0


class Trainee:
    """A model on its ranks, one batch, and the step that pretraining runs."""

    def __init__(self, options: argparse.Namespace, ranks: Ranks) -> None:
        trunk = TransformerConfig(width=options.width, layers=options.layers, heads=options.width // 64)
        self.config = TransfusionConfig(transformer=trunk)
        with torch.device("meta"):
            model = Transfusion(self.config, VOCAB)
        parallelize(model, ParallelConfig(dtype="float32"), ranks)
        initialize(model, 0, ranks.device)
        optimizer = Optimizer(model, OptimConfig(ema_half_lives=(1000,)), GuardConfig())
        data = {"latent_spec": None, "grids": []}
        self.state = TrainState(model, optimizer, lambda step: {}, "", data)
        self.batch, self.ranks = random_batch(options.length, ranks.rank), ranks

    def step(self) -> float:
        """Make one update and return the seconds it took."""
        start = time.perf_counter()
        loss = micro_step(
            self.state.model,
            self.batch,
            stats=latent_stats(None, self.config.latent_channels, self.ranks.device),
            diffusion=DiffusionConfig(),
            image_weight=5.0,
            global_text_targets=self.batch.num_text_targets * self.ranks.world_size,
            global_images=0,
        )
        loss.total.backward()
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
    """One turn of everything that is measured, on every rank at once."""

    def __init__(self, trainee: Trainee, saver: Saver, run: RunFolder, ranks: Ranks) -> None:
        self.trainee, self.saver, self.run, self.ranks = trainee, saver, run, ranks
        self._dd_file = run.path / f"dd-{ranks.rank}"

    def measure(self, num_steps: int) -> dict[str, float]:
        plain = [self.trainee.step() for _ in range(num_steps)]
        found = {"step_s": statistics.median(plain)}
        final = self._final()
        found["stall_s"], write = self._start_save(final)
        found["write_s"], beside = self._train_until(write)
        found["slowdown_s"] = max(0.0, sum(beside) - len(beside) * found["step_s"])
        found["settle_s"] = self._settle()
        size = self.ranks.on_first(lambda: sum(file.stat().st_size for file in final.iterdir()))
        dd = partial(self._dd, size // self.ranks.world_size)
        found["dd_s"], _ = self._train_until(Watch(dd))
        self._dd_file.unlink()
        self.trainee.step()  # another step to save
        _, write = self._start_save(self._final())
        found["idle_write_s"] = self.ranks.gather(write.wait())[0]
        self._settle()
        self.ranks.gather(None)
        found["idle_dd_s"] = max(self.ranks.gather(Watch(dd).wait()))
        self._dd_file.unlink()
        found["bytes"] = size
        return found

    def _final(self) -> Path:
        return self.run.checkpoints / f"step-{self.trainee.state.progress.step:08d}"

    def _start_save(self, final: Path) -> tuple[float, "Watch"]:
        """Return how long the slowest rank was blocked, and what waits for the commit."""
        self.ranks.gather(None)
        start = time.perf_counter()
        self.saver.start(self.trainee.state.snapshot(self.ranks))
        write = Watch(lambda: _poll(final))
        return max(self.ranks.gather(time.perf_counter() - start)), write

    def _train_until(self, watch: "Watch") -> tuple[float, list[float]]:
        """Train until `watch` has ended on every rank; return its seconds and those of the steps."""
        steps = []
        while not all(self.ranks.gather(watch.seconds is not None)):
            steps.append(self.trainee.step())
        return max(self.ranks.gather(watch.seconds)), steps

    def _settle(self) -> float:
        start = time.perf_counter()
        self.saver.settle()
        return time.perf_counter() - start

    def _dd(self, num_bytes: int) -> float:
        """Write zeros and return the seconds that dd says it took, the start of its process left out."""
        count = max(1, num_bytes // BLOCK)
        command = ["dd", "if=/dev/zero", f"of={self._dd_file}", f"bs={BLOCK}", f"count={count}", "conv=fsync"]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | {"LC_ALL": "C"})
        return float(re.search(r"copied, ([\d.e+-]+) s", done.stderr)[1])


class Watch:
    """Something that goes on in a thread beside training and says how many seconds it took; it does little itself."""

    def __init__(self, work: Callable[[], float]) -> None:
        self.seconds: float | None = None
        self._thread = threading.Thread(target=self._run, args=(work,), daemon=True)
        self._thread.start()

    def wait(self) -> float:
        self._thread.join()
        return self.seconds

    def _run(self, work: Callable[[], float]) -> None:
        self.seconds = work()


def _poll(path: Path) -> float:
    """Return the seconds until `path` is there."""
    start = time.perf_counter()
    while not path.exists():
        time.sleep(POLL_S)
    return time.perf_counter() - start


def summary(rounds: list[dict[str, float]], interval_steps: int) -> dict:
    """Return the medians, and what the issue asks of them."""
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
