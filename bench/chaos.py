"""Disturb a real training in every way we can and check that it survives: `python -m bench.chaos faults=25 seed=3`.

Real processes train a small model on CPU, started through the command line only. Faults strike at random instants, one
per attempt; then the same command is started again, on the same or another number of ranks. After every few faults the
training ends and is compared with an undisturbed one, bit by bit on the same number of ranks. Progress goes to stderr,
the last line of stdout is one JSON object. Exit status 1, with the folder kept, if any fault was not survived. A seed
decides the faults; the exact instants depend on the machine.
"""

import datetime
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.faults import KINDS, Fault, NotSurvived
from bench.job import SMALL_RUN, Job, pretrain_main
from bench.loader import make_source
from bench.ranks import ProgramRanks
from bench.trajectory import WORLD_SIZE, Entry, Trajectory, Undisturbed
from data.tokenizer import Tokenizer, train_tokenizer
from train.config import load_config, run_program

ELASTIC = 0.25  # share of trainings that change their number of ranks
DISK = "size=24m"  # of the small disk: two checkpoints of 1.3 MB, and a third while it is written


@dataclass(frozen=True, kw_only=True)
class ChaosConfig:
    faults: int = 8  # number of faults, >= 1; 13 and more cover every kind
    seed: int = 0  # of which faults strike, when and on which ranks
    kinds: list[str] = field(default_factory=list)  # kinds of faults; empty: all
    steps: int = 120  # of each training, >= 24
    faults_per_training: int = 5  # >= 1
    folder: str | None = None  # working folder; null: a temporary one, which is kept only if a fault was not survived
    results: str | None = None  # file to which the JSON object is appended as a line

    def __post_init__(self) -> None:
        for name, least in {"faults": 1, "steps": 24, "faults_per_training": 1}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least {least}")
        if unknown := sorted(set(self.kinds) - KINDS.keys()):
            raise ValueError(f"kinds: {', '.join(unknown)} unknown; there are {', '.join(KINDS)}")


CONFIG = ChaosConfig


def main(argv: list[str]) -> int:
    config = load_config(CONFIG, argv)
    if config.folder and Path(config.folder).exists() and any(Path(config.folder).iterdir()):
        raise ValueError(f"folder={config.folder} is not empty; give another")
    folder = Path(config.folder or tempfile.mkdtemp(prefix="chaos-"))
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    result = survive(config, folder)
    result |= {
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}; torch {torch.__version__}",
        "commit": _commit(),
        "command": " ".join(["python -m bench.chaos", *(a for a in argv if not a.startswith(("folder=", "results=")))]),
    }
    if config.results:
        with open(config.results, "a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
    if result["failures"]:
        print(f"chaos: not everything was survived; kept {folder}", file=sys.stderr)
    elif config.folder is None:
        shutil.rmtree(folder)
    print(json.dumps(result))
    return 1 if result["failures"] else 0


def survive(config: ChaosConfig, folder: Path) -> dict[str, Any]:
    """Run all faults and return the JSON object."""
    settings = make_settings(folder, config.steps)
    kinds, reason = config.kinds or list(KINDS), _cannot_mount(folder)
    skipped = {kind: reason for kind in kinds if reason is not None and KINDS[kind].needs_mount}
    with ProgramRanks(pretrain_main(), ["--help"], 1, folder / "warm.log") as warm:  # the first start imports torch
        warm.wait(120)
    undisturbed = Undisturbed.run(Job(folder / "undisturbed", settings, folder / "logs" / "undisturbed"))
    waiting = plan(config, [kind for kind in kinds if kind not in skipped])
    trajectories: list[Trajectory] = []
    failures: list[dict[str, Any]] = []
    documents: Counter[str] = Counter()
    identical, start = 0, time.monotonic()
    while waiting:
        faults, waiting = waiting[: config.faults_per_training], waiting[config.faults_per_training :]
        name = f"{len(trajectories):03d}"
        with _disk(folder / name, any(KINDS[fault.kind].needs_mount for fault in faults)) as disk:
            job = Job(disk / "run", settings, folder / "logs" / name)
            trajectory = Trajectory(job, undisturbed)
            trajectories.append(trajectory)
            for place, fault in enumerate(faults):
                entry = trajectory.strike(fault, target_of(fault, place, job.newest_intact(), config))
                each_s = (time.monotonic() - start) / fault.number
                left = datetime.timedelta(seconds=round(each_s * (config.faults - fault.number)))
                print(f"{_line(entry, config, name)}  {left} left", file=sys.stderr, flush=True)
                if entry.what is not None:
                    waiting = faults[place + 1 :] + waiting
                    break
            else:
                entry.what, lost, repeated = _end(trajectory)
                documents += Counter(lost=lost, repeated=repeated)
                identical += len(faults) * (trajectory.same_world_size and entry.what is None)
                print(f"      training {name} {entry.what or 'ended as expected'}", file=sys.stderr, flush=True)
            if entry.what is not None:
                failure = {"seed": config.seed, "number": fault.number, "kind": fault.kind, "phase": fault.phase}
                failures.append({**failure, "step": entry.target, "what": entry.what, "logs": f"logs/{name}"})
                if os.path.ismount(disk):
                    shutil.copytree(disk, folder / f"{name}-kept")
    return summary(trajectories, identical, documents, failures, skipped)


def plan(config: ChaosConfig, kinds: list[str]) -> list[Fault]:
    """Draw the faults: every kind in turn, in a random order."""
    luck, each = random.Random(config.seed), config.faults_per_training
    drawn: list[str] = []
    while len(drawn) < config.faults:
        drawn += luck.sample(kinds, len(kinds))
    drawn, faults = drawn[: config.faults], []
    for first in range(0, config.faults, each):
        sizes = (1, 2, 3) if luck.random() < ELASTIC else (WORLD_SIZE,)
        # A second copy needs a first one that still trains for a while.
        chunk = sorted(drawn[first : first + each], key=lambda kind: kind != "second_copy")
        for number, kind in enumerate(chunk, first + 1):
            phase = luck.choice(KINDS[kind].phases)
            place, moment, size, seed = luck.random(), luck.random(), luck.choice(sizes), luck.randrange(1 << 31)
            size = max(size, KINDS[kind].least_ranks)
            faults.append(Fault(number, kind, phase, place, moment, size, luck.choice((0, 0, 1)), seed))
    return faults


def target_of(fault: Fault, place: int, resume: int, config: ChaosConfig) -> int:
    """Return the step that a fault waits for: in its share of the steps, after the newest checkpoint."""
    if fault.phase == "exit" and place == config.faults_per_training - 1:
        return config.steps
    first, last = resume + 1, config.steps * (place + 1) // (config.faults_per_training + 1)
    return min(first + int(fault.place * max(1, last - first)), config.steps)


def make_settings(folder: Path, steps: int) -> dict[str, Any]:
    """Write a tokenizer and two small encoded data sets; return the settings of the job that trains on them."""
    path, rng = folder / "tokenizer.model", np.random.default_rng(0)
    train_tokenizer((f"a large red circle beside {i} small blue squares" for i in range(200)), path, 300)
    tokenizer = Tokenizer(path)

    def tokens(least: int, most: int) -> np.ndarray:
        return rng.integers(4, 270, rng.integers(least, most + 1), dtype=np.int32)

    def latents(i: int) -> np.ndarray:
        return rng.normal(size=(4, 4, 8 if i % 2 else 4)).astype(np.float16)

    make_source(folder / "pairs", tokenizer, ([tokens(1, 8), latents(i)] for i in range(90)), channels=2, records=31)
    make_source(folder / "texts", tokenizer, ([tokens(1, 60)] for _ in range(70)), channels=2, records=23)
    make_source(folder / "heldout", tokenizer, ([tokens(1, 60)] for _ in range(12)), channels=2, records=12)
    return {
        **SMALL_RUN,
        "data.sources.pairs.path": folder / "pairs",
        "data.sources.texts.path": folder / "texts",
        "data.tokenizer": path,
        "optim.steps": steps,
        "checkpoint.interval_steps": 4,
        "evaluation.interval_steps": 7,
        "evaluation.heldout.texts": folder / "heldout",
        "evaluation.lanes": 4,
    }


def summary(
    trajectories: list[Trajectory],
    identical: int,
    documents: Counter,
    failures: list[dict[str, Any]],
    skipped: dict[str, str],
) -> dict[str, Any]:
    """Return the JSON object. All counts are of faults, except those of documents."""
    entries = [entry for trajectory in trajectories for entry in trajectory.entries]

    def counts(key: str) -> dict[str, dict[str, int]]:
        groups: dict[str, dict[str, int]] = {}
        for entry in sorted(entries, key=lambda entry: getattr(entry.fault, key)):
            group = groups.setdefault(getattr(entry.fault, key), {"faults": 0, "resumed": 0})
            group["faults"] += 1
            group["resumed"] += entry.resumed
        return groups

    without = [entry for entry in entries if entry.fault.kind == "wandb_unreachable"]
    return {
        "faults": len(entries),
        "resumed": sum(entry.resumed for entry in entries),
        "same_world_size": sum(len(trajectory.entries) for trajectory in trajectories if trajectory.same_world_size),
        "bit_identical": identical,
        "documents_lost": documents["lost"],
        "documents_repeated": documents["repeated"],
        "seconds_to_first_step": _spread([e.seconds_to_first_step for e in entries if e not in without]),
        "seconds_to_first_step_without_wandb": _spread([e.seconds_to_first_step for e in without]),
        "seconds_to_end": _spread([e.seconds_to_end for e in entries if e.fault.kind == "kill_rank"]),
        "seconds_to_end_frozen": _spread([e.seconds_to_end for e in entries if e.fault.kind == "sigstop"]),
        "frozen_outwaited": sum(entry.outwaited for entry in entries),  # peers still ran after the timeout
        "half_written": sum(entry.half_written for entry in entries),
        "by_kind": counts("kind"),
        "by_phase": counts("phase"),
        "skipped_kinds": skipped,
        "failures": failures,
    }


def _end(trajectory: Trajectory) -> tuple[str | None, int, int]:
    """Return what is wrong with a training's end, None if nothing, and the documents lost and repeated."""
    try:
        differences, lost, repeated = trajectory.finish()
    except NotSurvived as error:
        return str(error), 0, 0
    what = f"ended differently: {'; '.join(differences[:5])}" if differences else None
    if lost or repeated:
        what = f"{what or 'ended'}; {lost.total()} documents lost, {repeated.total()} repeated"
    return what, lost.total(), repeated.total()


def _line(entry: Entry, config: ChaosConfig, name: str) -> str:
    fault, seconds = entry.fault, ""
    if entry.seconds_to_first_step is not None:
        seconds += f"  first step {entry.seconds_to_first_step:.1f} s"
    if entry.seconds_to_end is not None:
        seconds += f"  peers ended {entry.seconds_to_end:.1f} s"
    return (
        f"{fault.number:3}/{config.faults}  training {name}  {fault.kind:17} {fault.phase:10} step {entry.target:3}  "
        f"{fault.world_size} ranks  {entry.what or 'ok'}{seconds}{'  half-written' if entry.half_written else ''}"
    )


def _spread(seconds: list[float | None]) -> dict[str, float] | None:
    known = [value for value in seconds if value is not None]
    return {"median": round(statistics.median(known), 2), "max": round(max(known), 2)} if known else None


@contextmanager
def _disk(folder: Path, small: bool) -> Iterator[Path]:
    """Make a folder; if a fault may fill or remount it (`small`), on a small disk of its own."""
    folder.mkdir()
    if small:
        subprocess.run(["mount", "-t", "tmpfs", "-o", DISK, "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        if small:
            subprocess.run(["umount", "--lazy", folder], check=True)


def _cannot_mount(folder: Path) -> str | None:
    """Return why file systems cannot be mounted here, None if they can."""
    try:
        with _disk(folder / "mounting", True):
            return None
    except (OSError, subprocess.CalledProcessError) as error:
        return f"mounting is not allowed: {error}"


def _commit() -> str:
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    return found.stdout.strip() or "unknown"


if __name__ == "__main__":
    run_program(main)
