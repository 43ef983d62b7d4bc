"""Which departures from the paper's recipe pay? `python -m bench.recipes`, on the demo's scenes, two shapes included.

Each case trains the demo's model from the same seeds on as many tokens; `train.evaluate` then scores it on scenes and
texts that are never trained on. Cases, by name:

  paper                 configs/paper at the demo's width: eps, linear patches, AdamW at the rate that suits this width,
                        80 % of captions first, no cap, no average of the weights
  v, x0, flow ...       the paper's with one factor changed: FACTORS below has the settings of each
  best                  the winners together
  best-without-FACTOR   the winners but for one, which is as the paper's
  NAME-seconds          NAME with as many steps as take the seconds of `paper`, by the CPU time of a step over the
                        paper's, the two taking turns (bench/step_costs.py)

Everything is made in `folder`: data, runs, logs; data made there by bench.objectives is taken. `jobs` runs go at a
time, one thread each, the first seed of all cases before the second; a finished one is not repeated, so the same
command goes on after an interruption. Tables go to stderr and `page`; the last line is one JSON object. The defaults
take two hours on two cores.
"""

import datetime
import json
import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench.ablation import UNET
from bench.objectives import (
    LOGIT,
    OBJECTIVES,
    SAMPLERS,
    SPACES,
    X0_BOUND,
    Command,
    ObjectivesConfig,
    judged,
    prepare,
    run,
    score_command,
    side_by_side,
    train_command,
)
from bench.objectives_page import COLUMNS
from bench.recipes_page import rewrite, table
from data.storage import Location
from train.config import load_config, run_program

PAPER, BEST, WITHOUT, SECONDS = "paper", "best", "best-without-", "-seconds"
# configs/paper on top of configs/demo/pretrain.yaml, whose size and data stay. The paper's rate of 3e-4 is for widths
# from 768 on; see "rate-twice". Of as many tokens, twice the steps of half the demo's batch learn more.
BASE = (
    *OBJECTIVES["eps"],
    "model.timestep_after_patches=false",
    "model.transformer.rope_2d=false",
    "diffusion.before_caption_max_timestep=null",
    "data.order.caption_first=0.8",
    "data.lanes=12",
    "micro_batch_size=12",
    "optim.optimizer=adamw",
    "optim.learning_rate=4e-3",
    "optim.min_learning_rate=2e-4",
    "optim.schedule=cosine",
    "optim.weight_decay=0.1",
)
EMA = "ema"
FACTORS: dict[str, tuple[str, ...]] = {  # settings of train.pretrain; data=NAME: another encoded folder
    "v": OBJECTIVES["v"],
    "x0": OBJECTIVES["x0"],
    "flow": OBJECTIVES["flow"],
    "flow-logit": (*OBJECTIVES["flow"], *LOGIT),
    "muon": ("optim.optimizer=muon", "optim.muon_update_rms=0.3"),
    "cap-500": ("diffusion.before_caption_max_timestep=500",),
    "cap-100": ("diffusion.before_caption_max_timestep=100",),
    "clean-context": ("diffusion.before_caption_max_timestep=0",),
    "clean-copies": ("data.clean_copies=true",),
    "captions-first-63": ("data.order.caption_first=0.63",),
    "untied-all": ("model.untied=all",),
    "untied-ffn": ("model.untied=ffn",),
    "unet": (*UNET, "model.unet.channels=[24,48]"),
    "qk-norm": ("model.transformer.qk_norm=true",),
    "rope-2d": ("model.transformer.rope_2d=true",),
    "timestep-after": ("model.timestep_after_patches=true",),
    "three-captions": ("data=latents-three",),
    "rate-twice": ("optim.learning_rate=8e-3", "optim.min_learning_rate=4e-4"),
    "lambda-1": ("loss.image_weight=1",),
    "lambda-2": ("loss.image_weight=2",),
    "lambda-10": ("loss.image_weight=10",),
    EMA: (),  # scored from the averaged weights of the same run
}
WINNERS = ("flow", "muon", "cap-100", "captions-first-63", "rope-2d", "timestep-after", "three-captions", EMA)
COSTLY = ("muon", "untied-all", "unet", BEST)  # steps that cost more: scored at equal seconds too
MEASURED = (*COSTLY, "untied-ffn", "qk-norm", "clean-copies")


def _cases() -> dict[str, tuple[str, ...]]:
    """Return the factors of each case by its name, in the order of the tables."""
    cases: dict[str, tuple[str, ...]] = {PAPER: (), **{name: (name,) for name in FACTORS}, BEST: WINNERS}
    cases |= {WITHOUT + name: tuple(other for other in WINNERS if other != name) for name in WINNERS}
    return cases | {name + SECONDS: cases[name] for name in COSTLY}


CASES = _cases()


@dataclass(frozen=True, kw_only=True)
class RecipesConfig:
    folder: Location = "runs/recipes"  # everything is made here, 1 GB
    only: list[str] = field(default_factory=list)  # names of cases, with * and ?; empty: all
    seeds: int = 3  # trainings of each case, >= 1
    steps: int = 400  # updates of each training, of half the demo's batch, >= 12; the demo has 800
    prompts: int = 50  # scenes of each split to draw and to describe, >= 1
    jobs: int = 2  # runs at a time, >= 1
    page: Location | None = None  # Markdown page to write the tables to; what it says below them is kept
    smoke: bool = False  # toy data, for toy lengths: shows that it runs

    def __post_init__(self) -> None:
        for name, least in {"seeds": 1, "steps": 12, "prompts": 1, "jobs": 1}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least {least}")
        if unknown := [name for name in self.only if not any(fnmatch(case, name) for case in CASES)]:
            raise ValueError(f"only: {', '.join(unknown)} fits no case; there are {', '.join(CASES)}")

    @property
    def cases(self) -> list[str]:
        return [case for case in CASES if not self.only or any(fnmatch(case, name) for name in self.only)]

    @property
    def half_life(self) -> int:
        """Updates of the average's half-life, as in the demo a twelfth of the run."""
        return max(1, self.steps // 12)


CONFIG = RecipesConfig


def main(argv: list[str]) -> int:
    config = load_config(CONFIG, argv)
    folder = Path(config.folder).resolve()
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    need = [
        "latents-v",
        *(["captions-12000-three"] if any(_data_of(name) != "latents" for name in config.cases) else []),
    ]
    prepare(ObjectivesConfig(only=need, folder=str(folder), smoke=config.smoke, jobs=config.jobs), folder)
    costs, errors = costs_of_steps(config, folder), dict[str, str]()
    for _ in train_and_score_all(config, folder, costs, errors):
        if config.page:
            rewrite(Path(config.page), record_of(config, folder, argv, costs, errors))
    record = record_of(config, folder, argv, costs, errors)
    if config.page:
        rewrite(Path(config.page), record)
    print(table(record["cases"]), file=sys.stderr)
    print(json.dumps(record))
    return 1 if errors else 0


def costs_of_steps(config: RecipesConfig, folder: Path) -> dict[str, list[float]]:
    """Return a step's CPU time over the paper's (median, lowest, highest) of the cases whose steps cost more.

    Each is measured once for a folder.
    """
    file = folder / "step-costs.json"
    found: dict[str, list[float]] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    wanted = {name.removesuffix(SECONDS) for name in config.cases}
    if missing := [name for name in MEASURED if name in wanted and name not in found]:
        from bench.step_costs import costs_over

        recipes = {name: training_of(config, folder, {}, name, 0)[3:] for name in (PAPER, *missing)}
        found |= costs_over(recipes.pop(PAPER), recipes, rounds=2 if config.smoke else 21)
        file.write_text(json.dumps(found), encoding="utf-8")
    return found


def train_and_score_all(
    config: RecipesConfig, folder: Path, costs: dict[str, list[float]], errors: dict[str, str]
) -> Iterator[None]:
    """Do what is not finished, the first seed of all cases first; yield after each run. Fills `errors`."""
    trained = list(dict.fromkeys(trained_as(name) for name in config.cases))
    wanted = {(name, seed): partial(train_and_score, config, folder, costs, name, seed)
              for seed in range(config.seeds) for name in trained}  # fmt: skip
    runs = {
        f"{name}-{seed}": work
        for (name, seed), work in wanted.items()
        if any(_scores(config, folder, case, seed) is None for case in scored_from(config, name))
    }
    yield from side_by_side(runs, config.jobs, errors)


def trained_as(name: str) -> str:
    """Return the case whose run a case is scored from: an average of the weights is a run's own."""
    return {EMA: PAPER, WITHOUT + EMA: BEST}.get(name, name)


def scored_from(config: RecipesConfig, trained: str) -> list[str]:
    return [name for name in config.cases if trained_as(name) == trained]


def training_of(config: RecipesConfig, folder: Path, costs: dict[str, list[float]], name: str, seed: int) -> Command:
    """Return the command that trains one case from one seed."""
    place, steps = _folder_of(config, folder, name, seed), steps_of(config, costs, name)
    train = train_command(folder, place, seed, steps, _data_of(name))
    space = [setting.format(folder=folder) for setting in SPACES["latents"]]
    settings = [setting for setting in _settings_of(name) if not setting.startswith("data=")]
    return (*train, *space, *BASE, f"optim.ema_half_lives=[{config.half_life}]", *settings)


def scoring_of(config: RecipesConfig, folder: Path, name: str, seed: int) -> Command:
    """Return the command that scores one case from the run of `trained_as`."""
    settings = _settings_of(name)
    sample: tuple[str, ...] = ()
    if "diffusion.schedule=flow" in settings:
        sample = SAMPLERS["flow"]
    elif OBJECTIVES["v"][0] not in settings and OBJECTIVES["x0"][0] not in settings:
        sample = (*SAMPLERS["eps"], f"clip_x0={X0_BOUND['latents']}")
    weights = f"weights=ema-{config.half_life}" if EMA in CASES[name] else "weights=model"
    place = _folder_of(config, folder, trained_as(name), seed)
    score = score_command(folder, place, config.prompts, "latents", config.smoke)
    return (*score, *sample, weights, f"output={_output_of(config, folder, name, seed)}")


def steps_of(config: RecipesConfig, costs: dict[str, list[float]], name: str) -> int:
    """Return the updates of a case."""
    plain = name.removesuffix(SECONDS)
    return config.steps if plain == name else max(12, round(config.steps / costs[plain][0]))


def train_and_score(config: RecipesConfig, folder: Path, costs: dict[str, list[float]], name: str, seed: int) -> None:
    """Train one case from one seed, score it and the cases of the same run; raise RuntimeError if any fails."""
    place = _folder_of(config, folder, name, seed)
    log, cost = place.with_suffix(".log"), place.with_suffix(".cpu-seconds")
    spent = float(cost.read_text(encoding="utf-8")) if cost.exists() else 0.0
    spent += run(training_of(config, folder, costs, name, seed), log)
    cost.write_text(f"{spent:.1f}", encoding="utf-8")
    for case in scored_from(config, name):
        run(scoring_of(config, folder, case, seed), log)


def record_of(
    config: RecipesConfig, folder: Path, argv: list[str], costs: dict[str, list[float]], errors: dict[str, str]
) -> dict[str, Any]:
    """Return the JSON object of everything that is finished."""
    cases: dict[str, Any] = {}
    for name in config.cases:
        scores = {seed: _scores(config, folder, name, seed) for seed in range(config.seeds)}
        if done := {seed: found for seed, found in scores.items() if found is not None}:
            cases[name] = {"steps": steps_of(config, costs, name), **_summary(done)}
            runs = [_folder_of(config, folder, trained_as(name), seed).with_suffix(".cpu-seconds") for seed in done]
            cases[name]["train_cpu_s"] = [float(file.read_text(encoding="utf-8")) for file in runs if file.exists()]
    return {
        "bench": "recipes",
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "versions": {"python": platform.python_version(), "torch": version("torch")},
        "command": " ".join(["python -m bench.recipes", *(a for a in argv if not a.startswith("folder="))]),
        "seeds": config.seeds,
        "steps": config.steps,
        "prompts": config.prompts,
        "step_over_paper": costs,
        "cases": cases,
        "errors": errors,
    }


def _summary(by_seed: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """Return losses and the judge's shares by seed."""
    done = [*by_seed.values()]
    found: dict[str, Any] = {"seeds": [*by_seed], "text_loss": [one["heldout"]["texts"]["text_loss"] for one in done]}
    for key in ("captioning_loss", "image_loss", "x0_error"):
        found[key] = [one["heldout"]["scenes"][key] for one in done]
    for task in dict.fromkeys(task for task, _ in COLUMNS.values()):
        for goal, count in judged(done, task).items():
            found[f"{task}/{goal}"] = [right / (count["of"] / len(done) or 1) for right in count["by_seed"]]
    return found


def _scores(config: RecipesConfig, folder: Path, name: str, seed: int) -> dict[str, Any] | None:
    """Return what train.evaluate wrote of a case; None: it is not finished."""
    file = _output_of(config, folder, name, seed) / "evaluation.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def _settings_of(name: str) -> list[str]:
    return [setting for factor in CASES[name] for setting in FACTORS[factor]]


def _data_of(name: str) -> str:
    """Return the key of objectives.DATA that a case trains on."""
    return next((s.removeprefix("data=") for s in _settings_of(name) if s.startswith("data=")), "latents")


def _folder_of(config: RecipesConfig, folder: Path, name: str, seed: int) -> Path:
    return folder / f"recipes-{config.steps}-steps" / f"{name}-{seed}"


def _output_of(config: RecipesConfig, folder: Path, name: str, seed: int) -> Path:
    return _folder_of(config, folder, trained_as(name), seed) / f"scores-{name}-{config.prompts}"


if __name__ == "__main__":
    run_program(main)
