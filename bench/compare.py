"""Measure a training step, its memory and sampling beside two peers, taking turns in one run.

usage: python -m bench.compare [--works fixed varied] [--only plain] [--rounds 5] [--threads 2] [--quick]

Contestants: ours; `plain`, PyTorch as everybody writes it (bench/peers/plain.py); transfusion_pytorch, from the package
registry in an environment of its own, which the first run makes. All have the same width and depth, the same sizes of
attention and feed-forward within 5 %, float32, and the same fused AdamW. `fixed`: 16 samples of a 24-token caption, 64
patches and 6 tokens; `varied`: 16 samples of 4 to 120 tokens and 16, 64 or 256 patches. A step is forward, backward and
update.

Only useful tokens count: padding and a peer's own special tokens do not. `share_of_gemm` is our model's FLOPs for the
work, by the actual mask, a second, over the rate of bare matrix products in the same round. Figures are medians over
rounds, ratios medians of the rounds' ratios. Memory is the peak of a process that did one work only. `sampling`: a
caption of 24 tokens, a picture of 64 patches, guidance, equal numbers of forwards. Progress and a table go to stderr;
the last line of stdout is one JSON object. The defaults take four minutes on two AVX-512 cores.
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

from bench.peers import environment
from bench.peers.worker import Worker
from bench.peers.works import Work
from train.streams import open_streams

PEERS = ("plain", "transfusion_pytorch")
QUICK: dict[str, Any] = {"number": 4, "width": 32, "layers": 1, "heads": 2, "ffn_hidden": 64}


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def take_turns(workers: dict[str, Worker], rounds: int, **order: Any) -> dict[str, list[dict[str, Any]]]:
    """Give each worker the same order in turn, `rounds` times; return their answers."""
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in workers}
    for number in range(1, rounds + 1):
        for name, worker in workers.items():
            answers[name].append(worker.order(**order))
        words = ", ".join(f"{name} {found[-1]['seconds']:.3f} s" for name, found in answers.items())
        say(f"  {order['do']} {number} of {rounds}: {words}")
    return answers


def speed_of_ours(seconds: dict[str, list[float]]) -> dict[str, float]:
    """Return how many times a peer's seconds ours go into, a median over rounds."""
    return {
        name: round(median(theirs / ours for theirs, ours in zip(seconds[name], seconds["ours"], strict=True)), 3)
        for name in PEERS
        if name in seconds
    }


def measure_training(workers: dict[str, Worker], rounds: int) -> dict[str, Any]:
    """Train in turns; return each contestant's figures and our ratios to the peers'."""
    ready = {name: worker.answer() for name, worker in workers.items()}
    take_turns(workers, 2, do="train")  # warm up
    answers = take_turns(workers, rounds, do="train")
    seconds = {name: [answer["seconds"] for answer in found] for name, found in answers.items()}
    flops, gemm = ready["ours"].pop("flops"), ready["gemm"]["flops"]
    record: dict[str, Any] = {
        "useful_gflop": round(flops / 1e9, 2),
        "gemm_gflop_per_s": round(gemm / median(seconds["gemm"]) / 1e9, 1),
    }
    contestants = [name for name in workers if name != "gemm"]
    for name in contestants:
        shares = [flops / gemm * g / s for g, s in zip(seconds["gemm"], seconds[name], strict=True)]
        peak, imports = answers[name][-1]["peak_mib"], ready[name].pop("imports_mib")
        record[name] = {
            "step_s": round(median(seconds[name]), 4),
            "share_of_gemm": round(median(shares), 3),
            "peak_mib": round(peak),
            "peak_less_imports_mib": round(peak - imports),
            **ready[name],
        }
    record["speed_of_ours_over"] = speed_of_ours(seconds)
    for kind in ("peak_mib", "peak_less_imports_mib"):
        record[f"{kind}_of_ours_over"] = {n: round(record["ours"][kind] / record[n][kind], 3) for n in contestants[1:]}
    return record


def measure_sampling(workers: dict[str, Worker], rounds: int, pictures: int, evaluations: int) -> dict[str, Any]:
    """Draw in turns; return seconds a picture and our share of the peers'."""
    order = {"do": "draw", "pictures": pictures, "evaluations": evaluations}
    take_turns(workers, 1, **order)  # warm up
    answers = take_turns(workers, rounds, **order)
    seconds = {name: [answer["seconds"] / pictures for answer in found] for name, found in answers.items()}
    record: dict[str, Any] = {"pictures_side_by_side": pictures, "forwards_a_picture": evaluations}
    record |= {name: {"seconds_a_picture": round(median(found), 4)} for name, found in seconds.items()}
    record["seconds_of_ours_over"] = {name: round(1 / ratio, 3) for name, ratio in speed_of_ours(seconds).items()}
    return record


def table(record: dict[str, Any]) -> str:
    """Return what a person wants to see first."""
    lines = [f"{'':30}{'step s':>9}{'of GEMM':>9}{'peak MiB':>10}{'- imports':>10}{'ours is':>9}{'parameters':>12}"]
    for kind, work in record["works"].items():
        for name in ("ours", *PEERS):
            if name in work:
                row, speed = work[name], work["speed_of_ours_over"].get(name)
                lines.append(
                    f"{kind:8}{name:22}{row['step_s']:9.3f}{row['share_of_gemm']:9.1%}{row['peak_mib']:10}"
                    f"{row['peak_less_imports_mib']:10}{'' if speed is None else f'{speed:.2f}x':>9}{row['all']:12,}"
                )
    for name, found in record.get("sampling", {}).items():
        if name in ("ours", *PEERS):
            lines.append(f"a picture: {name:19}{found['seconds_a_picture']:9.4f} s")
    return "\n".join(lines)


def run(options: argparse.Namespace, stack: ExitStack) -> dict[str, Any]:
    """Start the workers, measure, return the record; all workers of a work live, one at a time runs."""
    names = ["ours", *(peer for peer in PEERS if peer in options.only)]
    pythons = dict.fromkeys(("gemm", *names), sys.executable)
    if "transfusion_pytorch" in names:
        environment.make(options.env)
        pythons["transfusion_pytorch"] = str(environment.python_of(options.env))
    logs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    record: dict[str, Any] = {"bench": "compare", "works": {}}
    for kind in options.works:
        work = Work(kind=kind, **(QUICK if options.quick else {"ffn_hidden": options.ffn}))
        say(f"{kind}: {len(work.samples)} samples, {work.useful_tokens} useful tokens")
        workers = {}
        for name, python in pythons.items():
            workers[name] = Worker.start(name, work, logs / f"{kind}-{name}.log", options.threads, python)
            stack.callback(workers[name].close)
        record["works"][kind] = measure_training(workers, options.rounds)
    if options.pictures:
        del workers["gemm"]
        say(f"sampling: {options.pictures} pictures side by side, {options.forwards} forwards each")
        record["sampling"] = measure_sampling(workers, max(1, options.rounds // 2), options.pictures, options.forwards)
    return record


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--works", nargs="+", choices=("fixed", "varied"), default=["fixed", "varied"])
    parser.add_argument("--only", nargs="*", choices=PEERS, default=list(PEERS), help="these peers beside ours (both)")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each; the median counts (5)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of each contestant (2)")
    parser.add_argument("--ffn", type=int, default=704, help="hidden dimensions of ours and plain (704)")
    parser.add_argument("--pictures", type=int, default=8, help="pictures drawn side by side; 0: no sampling (8)")
    parser.add_argument("--forwards", type=int, default=30, help="forwards a picture, an even number (30)")
    parser.add_argument("--env", type=Path, default=environment.default_folder(), help="of transfusion-pytorch")
    parser.add_argument("--quick", action="store_true", help="a toy size: the figures mean nothing")
    options = parser.parse_args()
    if options.rounds < 1 or options.forwards < 2 or options.forwards % 2:
        parser.error(f"--rounds {options.rounds} --forwards {options.forwards}: expected 1 or more and an even number")
    try:
        with ExitStack() as stack:
            record = run(options, stack)
    except RuntimeError as error:
        say(f"bench.compare: {error}")
        return 2
    record |= {"threads": options.threads, "machine": f"{os.cpu_count()} cores, {platform.machine()}"}
    versions = {"python": platform.python_version(), "torch": version("torch")}
    if "transfusion_pytorch" in options.only:
        versions[environment.PACKAGE] = environment.VERSION
    record |= {"versions": versions, "command": " ".join(["python", *sys.orig_argv[1:]])}
    say(table(record))
    print(json.dumps(record))
    return 0


if __name__ == "__main__":
    open_streams()
    sys.exit(main())
