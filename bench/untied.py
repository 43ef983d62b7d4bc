"""Measure what weights of images' own (`model.untied`) cost a training step at equal width: none, ffn and all.

usage: python -m bench.untied [--widths 768 1024] [--layers 3] [--rows 4] [--length 512] [--rounds 5]

All three train on the same packed rows of captions with pictures, about half of whose tokens are patches, and take
turns in one process; a step is forward, backward and update. A token is multiplied by as many weights in each, so that
only this can cost time: the optimizer has up to twice the parameters, products have fewer rows, tokens are sorted.
`step_over_none` is the ratio of a round's step to that of `none`, the median over the rounds, with the lowest and the
highest; `update_over_none` is that of the optimizer's part, `cpu_over_none` that of CPU time, which other programs
disturb less. The last line is one JSON object. The defaults take three minutes on two cores.
"""

import argparse
import gc
import json
import os
import platform
import statistics
import sys
import time
from typing import Any, get_args

import torch

from bench.scaling import CHANNELS, PATCH, VOCAB, batch_of
from bench.step import backward, sharded_model
from data.packing import PackedBatch
from model.modalities import Untied
from model.transformer import TransformerConfig
from model.transfusion import Transfusion, TransfusionConfig
from train.distributed.parallelize import ParallelConfig
from train.distributed.ranks import Ranks, init_ranks
from train.optim.guard import GuardConfig
from train.optim.optimizer import OptimConfig, Optimizer
from train.streams import open_streams

KINDS: tuple[Untied, ...] = get_args(Untied)
Times = dict[str, float]  # seconds of a step, of its update, and of CPU, by name


class Contestant:
    def __init__(self, untied: Untied, width: int, options: argparse.Namespace, ranks: Ranks) -> None:
        heads, ffn = max(1, width // options.head_width), options.ffn or None
        trunk = TransformerConfig(width=width, layers=options.layers, heads=heads, ffn_hidden=ffn)
        config = TransfusionConfig(transformer=trunk, patch_size=PATCH, latent_channels=CHANNELS, untied=untied)
        self.parallel = ParallelConfig(dtype=options.dtype, shard_blocks=False)
        self.ranks = ranks
        self.model = sharded_model(config, VOCAB, ranks, self.parallel)
        self.optimizer = Optimizer(self.model, OptimConfig(optimizer=options.optimizer), GuardConfig())
        self.number = 0

    def step(self, batch: PackedBatch) -> Times:
        start, cpu = time.perf_counter(), time.process_time()
        targets, images = batch.num_text_targets, batch.num_images
        backward(self.model, [batch], self.ranks, self.parallel, targets=targets, images=images)
        update, self.number = time.perf_counter(), self.number + 1
        self.optimizer.update(self.number)
        end = time.perf_counter()
        return {"step": end - start, "update": end - update, "cpu": time.process_time() - cpu}


def parameters(model: Transfusion) -> dict[str, int]:
    """Return how many parameters the model has in all, and how many of the trunk's each token meets."""
    count = {name: parameter.numel() for name, parameter in model.named_parameters()}
    own = sum(number for name, number in count.items() if ".image." in name or ".image_norm." in name)
    trunk = sum(number for name, number in count.items() if name.startswith("transformer."))
    return {"all": sum(count.values()), "trunk_of_a_token": trunk - own}


def measure(width: int, options: argparse.Namespace, ranks: Ranks) -> dict[str, Any]:
    """Return the figures of the three at one width."""
    contestants = {kind: Contestant(kind, width, options, ranks) for kind in KINDS}
    batch = batch_of(options.rows, options.length, 0)
    for contestant in contestants.values():
        contestant.step(batch)
    rounds: list[dict[str, Times]] = []
    for number in range(options.rounds):
        order = KINDS if number % 2 == 0 else KINDS[::-1]
        rounds.append({kind: contestants[kind].step(batch) for kind in order})
    found: dict[str, Any] = {"image_share": round(batch.num_image_tokens(PATCH) / batch.input_ids.numel(), 3)}
    for kind, contestant in contestants.items():
        ratios = [one[kind]["step"] / one["none"]["step"] for one in rounds]
        found[kind] = {
            "step_s": round(statistics.median(one[kind]["step"] for one in rounds), 4),
            "update_s": round(statistics.median(one[kind]["update"] for one in rounds), 4),
            "step_over_none": round(statistics.median(ratios), 3),
            "lowest_and_highest": [round(min(ratios), 3), round(max(ratios), 3)],
            **{f"{part}_over_none": round(_ratio(rounds, kind, part), 3) for part in ("update", "cpu")},
            "parameters": parameters(contestant.model),
        }
        print(f"width {width}, {kind}: {found[kind]}", file=sys.stderr, flush=True)
    return found


def _ratio(rounds: list[dict[str, Times]], kind: str, part: str) -> float:
    return statistics.median(one[kind][part] / one["none"][part] for one in rounds)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[768, 1024], help="of the models (768 1024)")
    parser.add_argument("--layers", type=int, default=3, help="of the models (3)")
    parser.add_argument("--head-width", type=int, default=64, help="channels of a head (64)")
    parser.add_argument("--ffn", type=int, default=0, help="hidden channels of a feed-forward layer (0: Llama's)")
    parser.add_argument("--rows", type=int, default=4, help="sequences a step (4)")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence (512)")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each (5)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (2)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "auto"), help="(float32)")
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default="adamw", help="adamw or muon (adamw)")
    options = parser.parse_args()
    if min(options.rounds, options.layers, options.rows) < 1:
        parser.error("--rounds, --layers and --rows: expected at least 1")
    torch.set_num_threads(options.threads)
    ranks = init_ranks(timeout_s=600, device="cpu")
    record: dict[str, Any] = {"bench": "untied", "widths": {}}
    for width in options.widths:
        record["widths"][str(width)] = measure(width, options, ranks)
        gc.collect()
    ranks.close()
    record |= {name: value for name, value in vars(options).items() if name != "widths"}
    record |= {"machine": f"{os.cpu_count()} cores, {platform.machine()}", "torch": torch.__version__}
    record |= {"command": " ".join(["python", *sys.orig_argv[1:]])}
    print(json.dumps(record))
    return 0


if __name__ == "__main__":
    open_streams()
    sys.exit(main())
