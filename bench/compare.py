"""Measure a training step, its memory and sampling beside two peers, taking turns in one run.

usage: python -m bench.compare [--works fixed varied] [--only ours plain] [--rounds 5] [--threads 2] [--quick]

Contestants: ours; `plain`, PyTorch as everybody writes it (bench/peers/plain.py); transfusion_pytorch, from the package
registry in an environment of its own, which the first run makes (`--env`). All have the same width, depth and sizes of
attention and feed-forward, float32, and the same fused AdamW. `fixed`: 16 samples of a 24-token caption, 64 patches and
6 tokens; `varied`: 16 samples of 4 to 120 tokens and 16, 64 or 256 patches. A step is forward, backward and update.

Only useful tokens count: padding and special tokens of a peer's own do not. `share_of_gemm` is our model's FLOPs for
the work, by the actual mask, a second, over the rate of bare matrix products in the same round. Figures are medians
over rounds, ratios medians of the rounds' ratios. Memory is the peak of a process that did one work only.
Progress and a table go to stderr; the last line of stdout is one JSON object.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from bench.peers.worker import Worker
from bench.peers.works import Work
from train.streams import open_streams

PEERS = ("ours", "plain", "transfusion_pytorch")
QUICK: dict[str, Any] = {"number": 4, "width": 32, "layers": 1, "heads": 2, "ffn_hidden": 64}


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def measure(workers: dict[str, Worker], rounds: int) -> dict[str, Any]:
    """Train in turns; return each contestant's figures and our ratios to the others'."""
    ready = {name: worker.answer() for name, worker in workers.items()}
    answers = {name: [worker.order(do="train") for _ in range(2)] for name, worker in workers.items()}  # warm up
    answers = {name: [] for name in answers}
    for number in range(1, rounds + 1):
        for name, worker in workers.items():
            answers[name].append(worker.order(do="train"))
        say(f"  round {number}: " + ", ".join(f"{n} {a[-1]['seconds']:.3f} s" for n, a in answers.items()))
    seconds = {name: [answer["seconds"] for answer in found] for name, found in answers.items()}
    flops, gemm = ready["ours"]["flops"], ready["gemm"]["flops"]
    record: dict[str, Any] = {
        "useful_gflop": round(flops / 1e9, 2),
        "gemm_gflop_per_s": round(gemm / median(seconds["gemm"]) / 1e9, 1),
    }
    for name in workers:
        if name == "gemm":
            continue
        shares = [flops / gemm * g / s for g, s in zip(seconds["gemm"], seconds[name], strict=True)]
        peak = answers[name][-1]["peak_mib"]
        record[name] = {
            "step_s": round(median(seconds[name]), 4),
            "share_of_gemm": round(median(shares), 3),
            "peak_mib": round(peak),
            "peak_less_imports_mib": round(peak - ready[name]["imports_mib"]),
        } | {k: v for k, v in ready[name].items() if k not in ("flops", "imports_mib")}
    record["speed_of_ours_over"] = {
        name: round(median(t / o for t, o in zip(seconds[name], seconds["ours"], strict=True)), 2)
        for name in record
        if name in PEERS[1:]
    }
    return record


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--works", nargs="+", choices=("fixed", "varied"), default=["fixed", "varied"])
    parser.add_argument("--only", nargs="+", choices=PEERS, default=list(PEERS), help="contestants besides ours (all)")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each; the median counts (5)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of each contestant (2)")
    parser.add_argument("--quick", action="store_true", help="a toy size: the figures mean nothing")
    options = parser.parse_args()
    names = [name for name in PEERS if name == "ours" or name in options.only]
    record: dict[str, Any] = {"bench": "compare", "works": {}}
    with ExitStack() as stack:
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for kind in options.works:
            work = Work(kind=kind, **(QUICK if options.quick else {}))
            say(f"{kind}: {len(work.samples)} samples, {work.useful_tokens} useful tokens")
            workers = {}
            for name in ("gemm", *names):
                workers[name] = Worker.start(name, work, logs / f"{kind}-{name}.log", options.threads)
                stack.callback(workers[name].close)
            record["works"][kind] = measure(workers, options.rounds)
    record |= {"threads": options.threads, "machine": f"{os.cpu_count()} cores, {platform.machine()}"}
    record |= {"versions": {"torch": version("torch")}, "command": " ".join(sys.orig_argv[1:])}
    print(json.dumps(record))
    return 0


if __name__ == "__main__":
    open_streams()
    sys.exit(main())
