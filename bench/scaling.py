"""Measure what FSDP and more ranks cost on CPUs: one plain process, then 1, 2 and 4 gloo ranks.

usage: python -m bench.scaling [--width 128] [--layers 4] [--rows 12] [--length 128] [--steps 10] [--rounds 3]

Every rank has one thread and the same rows (weak scaling), of captions with images; a step is forward, backward and
update. The plain process runs the same step on the bare model. The cases take turns; ratios are paired by round, and
medians over the rounds count. The honest measure is CPU-seconds a token, summed over ranks: with more ranks than cores
they wait for each other, so that wall times say nothing. Waiting for a peer costs no CPU with gloo; copying and
summing for it does. `fsdp_overhead` is 1 rank against plain, `efficiency` is CPU a token of 1 rank over that of N.
`collectives` is the share of the step's wall time in which rank 0 had a collective under way, and is left out where
ranks exceed cores. The last line is one JSON object. The defaults take a minute on two cores.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from bench.ranks import Processes
from bench.step import backward, sharded_model
from data.documents import Document, ImageSegment, TextSegment
from data.layout import lay_out
from data.loader import draw_images
from data.packing import PackedBatch, collate, pack
from data.tokenizer import SpecialIds
from model.diffusion import DiffusionConfig
from model.transformer import TransformerConfig
from model.transfusion import Transfusion, TransfusionConfig, init_weights
from train.distributed.parallelize import ParallelConfig
from train.distributed.ranks import Ranks, init_ranks
from train.optim.guard import GuardConfig
from train.optim.optimizer import OptimConfig, Optimizer
from train.step import latent_stats, micro_step
from train.streams import open_streams

VOCAB, CHANNELS, PATCH, CELLS, CAPTION = 512, 4, 2, 8, 10  # the demo's: 16 patches a picture, ten tokens about it
PLAIN, WARM_UP = "plain", 3  # the case without FSDP; steps before the clock starts
SPECIAL = SpecialIds(bos=1, eos=2, pad=3, boi=4, eoi=5)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=128, help="of the model (128, the demo's)")
    parser.add_argument("--layers", type=int, default=4, help="of the model (4, the demo's)")
    parser.add_argument("--rows", type=int, default=12, help="sequences a rank (12, the demo's)")
    parser.add_argument("--length", type=int, default=128, help="tokens of a sequence (128, the demo's)")
    parser.add_argument("--shard-blocks", action="store_true", help="each block its own FSDP unit; the demo has one")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="numbers of ranks; first 1 (1 2 4)")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of a case and round (10)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of all cases (3)")
    options = parser.parse_args()
    cases = [PLAIN, *map(str, options.ranks)]
    rounds: list[dict[str, dict[str, float]]] = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.rounds):
            rounds.append({case: run_case(case, options, Path(folder)) for case in cases})
            for case, found in rounds[-1].items():
                figures = ", ".join(f"{name} {value:.4g}" for name, value in found.items())
                print(f"round {number + 1} of {options.rounds}: {case}: {figures}", file=sys.stderr, flush=True)
    print(f"command: python -m bench.scaling {' '.join(sys.argv[1:])}")
    machine = {"machine": f"{os.cpu_count()} cores, {platform.machine()}", "torch": torch.__version__}
    print(json.dumps({"bench": "scaling", **vars(options), **summary(rounds), **machine}))
    return 0


def run_case(case: str, options: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Return what the ranks of one case measured: CPU seconds a token of all, wall seconds a step of rank 0."""
    world_size, result = 1 if case == PLAIN else int(case), folder / "result.json"
    arguments = [(case, options, result)] * world_size
    with Processes(measure, arguments, None) as processes:
        statuses = processes.wait(600)
    if any(statuses):
        raise RuntimeError(f"case {case}: ranks ended with {statuses}")
    return json.loads(result.read_text(encoding="utf-8"))


def measure(case: str, options: argparse.Namespace, result: Path) -> None:
    """Time the steps of one case on this rank; rank 0 writes the figures."""
    ranks = init_ranks(timeout_s=600, device="cpu")
    trunk = TransformerConfig(width=options.width, layers=options.layers, heads=max(1, options.width // 32))
    config = TransfusionConfig(transformer=trunk, patch_size=PATCH, latent_channels=CHANNELS)
    batch = batch_of(options.rows, options.length, ranks.rank)
    step = plain_step(config, batch) if case == PLAIN else sharded_step(config, batch, options, ranks)
    for _ in range(WARM_UP):
        step()
    ranks.gather(None)
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(options.steps):
        step()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    tokens = batch.input_ids.numel() * options.steps * ranks.world_size
    found = {"cpu_us_per_token": 1e6 * sum(ranks.gather(cpu)) / tokens, "wall_s": wall / options.steps}
    if 1 < ranks.world_size <= len(os.sched_getaffinity(0)):
        found["collectives"] = share_of_collectives(step, options.steps)
    if ranks.is_first:
        result.write_text(json.dumps(found), encoding="utf-8")
    ranks.gather(None)
    ranks.close()


def batch_of(rows: int, length: int, seed: int) -> PackedBatch:
    """Return `rows` full of pictures with captions."""
    rng = np.random.default_rng(seed)
    packed = []
    for _ in range(rows):
        pieces = [
            lay_out(_document(rng), SPECIAL, PATCH) for _ in range(length // (CAPTION + CELLS**2 // PATCH**2 + 4))
        ]
        packed.append(pack(pieces, length, SPECIAL.pad))
    return collate(packed, [draw_images(0, seed, lane, row) for lane, row in enumerate(packed)], PATCH)


def _document(rng: np.random.Generator) -> Document:
    moments = rng.normal(size=(2 * CHANNELS, CELLS, CELLS)).astype(np.float16)
    return Document((TextSegment(rng.integers(6, VOCAB, CAPTION)), ImageSegment(moments)))


def plain_step(config: TransfusionConfig, batch: PackedBatch) -> Callable[[], object]:
    """Return a step of the bare model."""
    model = Transfusion(config, VOCAB)
    init_weights(model, 0)
    optimizer, stats = Optimizer(model, OptimConfig(), GuardConfig()), latent_stats(None, CHANNELS, torch.device("cpu"))

    def step() -> None:
        loss = micro_step(
            model,
            batch,
            stats=stats,
            diffusion=DiffusionConfig(),
            image_weight=5.0,
            global_text_targets=batch.num_text_targets,
            global_images=batch.num_images,
        )
        loss.total.backward()
        optimizer.update(1)

    return step


def sharded_step(
    config: TransfusionConfig, batch: PackedBatch, options: argparse.Namespace, ranks: Ranks
) -> Callable[[], object]:
    """Return a step as in training: sharded by FSDP, gradients summed over the ranks. Collective."""
    parallel = ParallelConfig(dtype="float32", shard_blocks=options.shard_blocks)
    model = sharded_model(config, VOCAB, ranks, parallel)
    optimizer = Optimizer(model, OptimConfig(), GuardConfig())
    counts = ranks.gather((batch.num_text_targets, batch.num_images))
    targets, images = (sum(column) for column in zip(*counts, strict=True))

    def step() -> None:
        backward(model, [batch], ranks, parallel, targets=targets, images=images)
        optimizer.update(1)

    return step


def share_of_collectives(step: Callable[[], object], num_steps: int) -> float:
    """Return the share of the wall time in which a collective of this rank was under way."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        start = time.perf_counter()
        for _ in range(num_steps):
            step()
        seconds = time.perf_counter() - start
    spans = [event.time_range for event in profiler.events() if event.name.startswith("gloo:")]
    return covered([(span.start, span.end) for span in spans]) / 1e6 / seconds


def covered(spans: Sequence[tuple[float, float]]) -> float:
    """Return the length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def summary(rounds: Sequence[dict[str, dict[str, float]]]) -> dict[str, object]:
    """Return medians over the rounds of CPU time a token by case, and of its ratios, paired by round."""
    cpu = [{case: found["cpu_us_per_token"] for case, found in one.items()} for one in rounds]
    over_plain = medians([{case: value / one[PLAIN] for case, value in one.items() if case != PLAIN} for one in cpu])
    return {
        "cpu_us_per_token": medians(cpu),
        "cpu_over_plain": over_plain,
        "fsdp_overhead": round(over_plain["1"] - 1, 4),
        "efficiency": medians(
            [{case: one["1"] / value for case, value in one.items() if case != PLAIN} for one in cpu]
        ),
        "collectives": medians([{c: f["collectives"] for c, f in one.items() if "collectives" in f} for one in rounds]),
    }


def medians(rounds: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return the median over the rounds of each entry."""
    return {name: round(statistics.median(one[name] for one in rounds), 4) for name in rounds[0]}


if __name__ == "__main__":
    open_streams()
    sys.exit(main())
