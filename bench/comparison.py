"""Trainings of the demo's model that are compared: what bench.objectives, bench.starts and bench.recipes share.

A case is a recipe by its name. A run trains one from one seed, and is what one or several cases are scored from. Runs
go side by side; a finished one, which is one whose scores are there, is not repeated, so the same command goes on after
an interruption. The benchmarks say which cases there are, and what of their scores goes into the record.
"""

import datetime
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from bench import programs
from bench.comparison_page import COLUMNS, rewrite
from bench.programs import Command, program
from bench.scene_data import SPACES, space_of
from data.storage import Location

SECONDS = "-seconds"  # NAME-seconds is NAME with as many steps as take the seconds of what all are compared with
Settings = tuple[str, ...]
BySeed = dict[int, dict[str, Any]]  # what train.evaluate wrote of a case's finished runs


@dataclass(frozen=True, kw_only=True)
class ComparisonConfig:
    folder: Location = MISSING  # everything is made here
    only: list[str] = field(default_factory=list)  # names of cases, with * and ?; empty: all
    seeds: int = 3  # trainings of each case, >= 1
    steps: int = 400  # updates of each training, >= 2
    prompts: int = 100  # scenes of each split to draw and to describe, >= 1
    jobs: int = 2  # runs at a time, >= 1
    page: Location | None = None  # Markdown page to write the tables to; what it says below them is kept
    smoke: bool = False  # toy data, for toy lengths: shows that it runs

    bench = ""  # the program's name
    known = tuple[str, ...]()  # its cases
    least_steps = 2
    runs_in, scores_in = "{steps}-steps", "scores-{prompts}"  # folders: of all runs; of a case's scores, in its run's

    def __post_init__(self) -> None:
        for name, least in {"seeds": 1, "steps": self.least_steps, "prompts": 1, "jobs": 1}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least {least}")
        if unknown := [name for name in self.only if not any(fnmatch(case, name) for case in self.known)]:
            raise ValueError(f"only: {', '.join(unknown)} fits no case; there are {', '.join(self.known)}")

    @property
    def cases(self) -> list[str]:
        return [case for case in self.known if not self.only or any(fnmatch(case, name) for name in self.only)]

    @property
    def root(self) -> Path:
        return Path(self.folder).resolve()

    def steps_of(self, name: str, ratios: Mapping[str, float]) -> int:
        """Return the updates of a case; `ratios`: CPU time of a step over that of the reference, of NAME-seconds."""
        plain = name.removesuffix(SECONDS)
        return self.steps if plain == name else max(self.least_steps, round(self.steps / ratios[plain]))

    def place(self, name: str, seed: int) -> Path:
        """Return the run folder of a case's training."""
        return self.root / self.runs_in.format(steps=self.steps) / f"{name}-{seed}"

    def account(self, name: str, seed: int) -> Path:
        """Return the file with the CPU-seconds of a case's training."""
        return self.place(name, seed).with_suffix(".cpu-seconds")


@dataclass(frozen=True)
class Run:
    """One training from one seed, and the cases that are scored from it."""

    config: ComparisonConfig
    name: str  # of the case that is trained
    seed: int
    steps: int
    data: str  # key of scene_data.DATA
    trained: Settings  # of train.pretrain
    scored: Mapping[str, Settings]  # of train.evaluate, by the name of the case
    then: tuple[Command, ...] = ()  # what follows the training, as others need it

    @property
    def place(self) -> Path:
        return self.config.place(self.name, self.seed)

    @property
    def training(self) -> Command:
        """The command that trains the demo's model."""
        root = self.config.root
        return (
            *program("pretrain"),
            f"run_dir={self.place}",
            f"seed={self.seed}",
            "micro_batch_size=24",  # one forward a step
            f"optim.steps={self.steps}",
            f"optim.warmup_steps={min(30, self.steps // 2)}",
            f"checkpoint.interval_steps={max(200, self.steps // 2)}",
            "checkpoint.keep_last=1",
            "preview.interval_steps=null",
            "log.wandb=disabled",
            f"data.tokenizer={root}/tokenizer.model",
            f"data.sources.scenes.path={root}/encoded/{self.data}",
            f"data.sources.texts.path={root}/encoded/text",
            *(setting.format(folder=root) for setting in SPACES[space_of(self.data)]),
            *self.trained,
        )

    def scoring(self, case: str) -> Command:
        """Return the command that scores a case on held-out scenes and texts."""
        root = self.config.root
        return (
            *program("evaluate"),
            f"checkpoint={self.place}",
            f"output={self.output(case)}",
            f"scenes={root}/scenes/heldout",
            f"heldout.scenes={root}/encoded/{space_of(self.data)}-heldout",
            f"heldout.texts={root}/encoded/text_heldout",
            f"max_prompts={self.config.prompts}",
            *(("steps=4",) if self.config.smoke else ()),
            *self.scored[case],
        )

    def output(self, case: str) -> Path:
        return self.place / self.config.scores_in.format(case=case, prompts=self.config.prompts)

    def scores(self, case: str) -> dict[str, Any] | None:
        """Return what train.evaluate wrote of a case; None: it is not finished."""
        file = self.output(case) / "evaluation.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None

    def do(self) -> None:
        """Train and score; raise RuntimeError if either fails."""
        log = self.place.with_suffix(".log")
        programs.run(self.training, log, self.config.account(self.name, self.seed))
        for command in (*self.then, *map(self.scoring, self.scored)):
            programs.run(command, log)


def compare(
    config: ComparisonConfig,
    argv: list[str],
    groups: Sequence[Sequence[Run]],
    summary: Callable[[str, BySeed], dict[str, Any]],
    table: Callable[[dict[str, Any]], str],
    paragraphs: Callable[[dict[str, Any]], list[str]],
    measured: Mapping[str, Any] | None = None,
) -> int:
    """Do the runs that are not finished, group after group; print the record of all; return the exit status.

    `summary` makes a case's entry in the record from its scores, and `measured` is added to the record. `table` makes
    what goes to stderr from these entries; `paragraphs` makes the page, rewritten after each run, from the record.
    """
    runs, errors = [run for group in groups for run in group], dict[str, str]()

    def recorded() -> dict[str, Any]:
        """Return the record of what is finished, and rewrite the page."""
        cases = {}
        for name in config.cases:
            scores = {run.seed: run.scores(name) for run in runs if name in run.scored}
            if finished := {seed: found for seed, found in scores.items() if found is not None}:
                cases[name] = summary(name, finished)
        record = {
            "bench": config.bench,
            "date": datetime.date.today().isoformat(),
            "machine": f"{os.cpu_count()} cores, {platform.machine()}",
            "versions": {"python": platform.python_version(), "torch": version("torch")},
            "command": " ".join([f"python -m bench.{config.bench}", *(a for a in argv if not a.startswith("folder="))]),
            **{name: getattr(config, name) for name in ("seeds", "steps", "prompts")},
            **(measured or {}),
            "cases": cases,
            "errors": errors,
        }
        if config.page:
            rewrite(Path(config.page), record, paragraphs(record))
        return record

    for group in groups:
        unfinished = [run for run in group if any(run.scores(case) is None for case in run.scored)]
        for _ in side_by_side({f"{run.name}-{run.seed}": run.do for run in unfinished}, config.jobs, errors):
            recorded()
    record = recorded()
    print(table(record["cases"]), file=sys.stderr)
    print(json.dumps(record))
    return 1 if errors else 0


def side_by_side(runs: Mapping[str, Callable[[], None]], jobs: int, errors: dict[str, str]) -> Iterator[None]:
    """Do the runs, `jobs` at a time; yield after each. Fills `errors` with what those raised that failed."""
    start = time.monotonic()
    with ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(run): name for name, run in runs.items()}
        try:
            for done, future in enumerate(as_completed(futures), 1):
                name = futures[future]
                if error := future.exception():
                    errors[name] = str(error)
                left = datetime.timedelta(seconds=round((time.monotonic() - start) / done * (len(runs) - done)))
                print(f"{name}: {error or 'done'}; {done}/{len(runs)}, {left} left", file=sys.stderr)
                yield
        except KeyboardInterrupt:  # the running ones got it too, and save
            pool.shutdown(cancel_futures=True)
            raise


def judged(by_seed: BySeed, task: str) -> dict[str, Any]:
    """Return how many answers to each of the judge's questions were right, of how many, over all seeds and by seed."""
    prefix, nothing = f"scenes/{task}/", {"value": 0.0, "items": 0}
    done = [found["scores"] for found in by_seed.values()]
    asked = [name.removeprefix(prefix) for scores in done for name in scores if name.startswith(prefix)]
    counts: dict[str, Any] = {}
    for goal in dict.fromkeys([*(goal for _, goal in COLUMNS.values()), *asked]):
        shares = [scores.get(prefix + goal, nothing) for scores in done]
        right = [round(share["value"] * share["items"]) for share in shares]
        counts[goal] = {"right": sum(right), "of": sum(share["items"] for share in shares), "by_seed": right}
    return counts


def heldout(by_seed: BySeed, *names: str, of: str = "scenes") -> dict[str, list[Any]]:
    """Return held-out losses by name, a value a seed."""
    return {name: [found["heldout"][of][name] for found in by_seed.values()] for name in names}
