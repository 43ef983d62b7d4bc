"""Run the CPU benchmarks and compare them with the committed results: what has become more than 10 % worse?

usage: python -m bench.regressions [--only scaling loader] [--keep]     (`make bench`: all, in under ten minutes)

Machines differ, so only figures that are ratios within one run are compared: with a peer, with the rate of bare matrix
products, with the same work done plainly. A bench with a figure that seems worse runs once more, and only what is worse
both times counts: a neighbour on the machine must not look like a regression. `--keep` writes the figures of this run
to bench/results/cpu.jsonl instead, one JSON object a line, with its command, machine and versions. Exit status: 0, or 1
with each regression by name and both figures. The last line is one JSON object.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from train.streams import open_streams

RESULTS = Path(__file__).parent / "results" / "cpu.jsonl"
SLACK = 0.1  # of the committed figure: less is noise


@dataclass(frozen=True)
class Bench:
    arguments: str
    more: tuple[str, ...] = ()  # figures of which more is better, by their dotted keys in the JSON object
    less: tuple[str, ...] = ()  # figures of which less is better


BENCHES = {
    "compare": Bench(
        "--only plain --rounds 3 --pictures 4",
        more=tuple(
            f"works.{work}.{figure}"
            for work in ("fixed", "varied")
            for figure in ("ours.share_of_gemm", "speed_of_ours_over.plain")
        ),
        less=(
            *(f"works.{work}.peak_less_imports_mib_of_ours_over.plain" for work in ("fixed", "varied")),
            "sampling.seconds_of_ours_over.plain",
        ),
    ),
    "sampling": Bench(
        "--device cpu --steps 4 --batches 4",
        more=("cached_speedup", "cases.pictures.share_of_bound", "cases.text.share_of_bound"),
        less=("cases.pictures, last batch.per_row", "cases.text, mixed prompts.per_row"),
    ),
    "loader": Bench(
        "--rounds 3",
        more=("ratio_to_webdataset", "text_ratio_to_webdataset", "fill", "fill_pairs_only", "encode_ratio_to_pillow"),
        less=("attention_imbalance_8_ranks", "state_bytes_1024_lanes"),
    ),
    "checkpoint": Bench("--rounds 3 --steps 2 --length 64", less=("restart_over_import",)),
    "scaling": Bench("", less=("cpu_over_plain.1", "cpu_over_plain.2", "cpu_over_plain.4")),
}


@dataclass(frozen=True)
class Regression:
    bench: str
    figure: str
    committed: float
    measured: float

    def __str__(self) -> str:
        change = self.measured / self.committed - 1
        return f"{self.bench} {self.figure}: {self.measured:.4g}, committed {self.committed:.4g} ({change:+.0%})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=BENCHES, default=list(BENCHES), help="these benches (all)")
    parser.add_argument("--keep", action="store_true", help="write the figures as the results to compare with")
    parser.add_argument("--results", type=Path, default=RESULTS, help=f"file of the results ({RESULTS.name})")
    options = parser.parse_args()
    committed = read_results(options.results)
    found: list[Regression] = []
    for name in options.only:
        known = committed.get(name, {})
        if not options.keep and known.get("command") != command_of(name):
            print(f"bench.regressions: {options.results} has no {command_of(name)}; --keep adds it", file=sys.stderr)
            return 2
        measured = run(name)
        if options.keep:
            committed[name] = measured
            lines = [json.dumps(record) + "\n" for _, record in sorted(committed.items())]
            options.results.write_text("".join(lines), encoding="utf-8")
            continue
        if worse := regressions(name, known, measured):
            again = {(r.bench, r.figure) for r in regressions(name, known, run(name))}
            found += [r for r in worse if (r.bench, r.figure) in again]
        for figure in (*BENCHES[name].more, *BENCHES[name].less):
            print(f"{name:11}{figure:55}{value(measured, figure):10.4g}{value(known, figure):10.4g} committed")
    for regression in found:
        print(f"REGRESSION {regression}")
    print(json.dumps({"bench": "regressions", "compared": options.only, "regressions": [vars(r) for r in found]}))
    return 1 if found else 0


def read_results(path: Path) -> dict[str, dict[str, Any]]:
    """Return the committed record of each bench."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {record["bench"]: record for record in map(json.loads, lines)}


def command_of(name: str) -> str:
    return f"python -m bench.{name} {BENCHES[name].arguments}".strip()


def run(name: str) -> dict[str, Any]:
    """Run a bench and return its record; raises CalledProcessError if it fails."""
    print(f"bench.regressions: {command_of(name)}", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", f"bench.{name}", *BENCHES[name].arguments.split()]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    record = {"bench": name, "command": command_of(name), "machine": machine(), "torch": version("torch")}
    return json.loads(done.stdout.splitlines()[-1]) | record


def machine() -> str:
    models = re.findall(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    return f"{os.cpu_count()} cores, {models[0] if models else platform.machine()}"


def value(record: dict[str, Any], figure: str) -> float:
    """Return a figure by its dotted key."""
    found: Any = record
    for key in figure.split("."):
        found = found[key]
    return found


def regressions(name: str, committed: dict[str, Any], measured: dict[str, Any]) -> list[Regression]:
    """Return the figures of a bench that are worse than the committed ones by more than SLACK."""
    found = []
    for figure in (*BENCHES[name].more, *BENCHES[name].less):
        then, now = value(committed, figure), value(measured, figure)
        if now < then * (1 - SLACK) if figure in BENCHES[name].more else now > then * (1 + SLACK):
            found.append(Regression(name, figure, then, now))
    return found


if __name__ == "__main__":
    open_streams()
    sys.exit(main())
