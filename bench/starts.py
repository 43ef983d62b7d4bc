"""Start from a language model, in miniature, and untie images' weights: `python -m bench.starts`, on the demo's scenes.

Every case trains the demo's model at equal steps or seconds on the same scenes and texts; `train.evaluate` then scores
it on held-out ones. The language model is trained on texts alone, exported with `train.export format=hf`, and read with
`init_from_llm`. Cases, by name:

  language            texts alone; what the four below start from (its text loss is theirs before the first step)
  llm-free            all parameters are trained
  llm-free-all        the same with model.untied=all: images have a copy of the trunk
  llm-frozen-all      the same, the text side frozen (LMFusion)
  llm-lora            the trunk frozen beside adapters of rank 8
  none, ffn, all      from scratch with model.untied of this name; `none` is what all are compared with
  ffn-seconds, all-seconds   as many steps as take the seconds of `none`, by the ratio that bench.untied measures

Everything is made in `folder`: data, runs, logs; data made there by bench.objectives is taken. Two runs go at a time,
one thread each; a finished one is not repeated, so the same command goes on after an interruption. Tables go to stderr
and `page`; the last line is one JSON object. The defaults take half an hour on two cores.
"""

import datetime
import json
import os
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from bench.objectives import (
    SPACES,
    Command,
    ObjectivesConfig,
    judged,
    prepare,
    run,
    score_command,
    side_by_side,
    train_command,
)
from bench.starts_page import rewrite, table
from bench.untied import parameters
from data.storage import Location
from data.tokenizer import Tokenizer
from model.transfusion import Transfusion
from train.config import load_config, run_program
from train.distributed.parallelize import compute_dtype
from train.optim.groups import freeze
from train.pretrain_config import read_config

LANGUAGE = "language"
UNTIED = "model.untied={}"
FROZEN = (
    'optim.groups={images: {parameters: ["*.image.*", "*.image_norm.*"]}, '
    'text: {parameters: ["transformer.*", "text_*"], frozen: true}}'
)
CASES: dict[str, tuple[str, ...]] = {  # settings of train.pretrain
    LANGUAGE: ("data.sources.scenes.weight=1e-12",),  # none; the data stays known, so that the rest is told alike
    "none": (),
    "llm-free": (),
    "llm-frozen-all": (UNTIED.format("all"), FROZEN),
    "all": (UNTIED.format("all"),),
    "ffn": (UNTIED.format("ffn"),),
    "llm-lora": ("model.lora.rank=8",),
    "llm-free-all": (UNTIED.format("all"),),
    "all-seconds": (UNTIED.format("all"),),
    "ffn-seconds": (UNTIED.format("ffn"),),
}
DEMO = ("--widths=128", "--layers=4", "--head-width=32", "--ffn=192", "--rows=24", "--length=128", "--threads=1")


@dataclass(frozen=True, kw_only=True)
class StartsConfig:
    folder: Location = "runs/starts"  # everything is made here, 150 MB
    seeds: int = 3  # trainings of each case, >= 1
    steps: int = 200  # updates of each training, >= 2; the demo has 800
    prompts: int = 100  # scenes of each split to draw and to describe, >= 1
    jobs: int = 2  # runs at a time, >= 1
    page: Location | None = None  # Markdown page to write the tables to; what it says below them is kept
    smoke: bool = False  # toy data, for toy lengths: shows that it runs

    def __post_init__(self) -> None:
        for name, least in {"seeds": 1, "steps": 2, "prompts": 1, "jobs": 1}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least {least}")


CONFIG = StartsConfig


def main(argv: list[str]) -> int:
    config = load_config(CONFIG, argv)
    folder = Path(config.folder).resolve()
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    prepare(ObjectivesConfig(only=["latents-v"], folder=str(folder), smoke=config.smoke, jobs=config.jobs), folder)
    ratios, errors = ratios_of_steps(config, folder), dict[str, str]()
    for _ in train_and_score_all(config, folder, ratios, errors):
        if config.page:
            rewrite(Path(config.page), record_of(config, folder, argv, ratios, errors))
    record = record_of(config, folder, argv, ratios, errors)
    if config.page:
        rewrite(Path(config.page), record)
    print(table(record["cases"]), file=sys.stderr)
    print(json.dumps(record))
    return 1 if errors else 0


def ratios_of_steps(config: StartsConfig, folder: Path) -> dict[str, float]:
    """Return the CPU time of a step by `model.untied` over that without it, measured once."""
    file, rounds = folder / "untied.json", "--rounds=3" if config.smoke else "--rounds=31"
    if not file.exists():
        log = folder / "logs" / "untied.log"
        run((sys.executable, "-m", "bench.untied", *DEMO, rounds, "--dtype=auto", "--optimizer=muon"), log)
        file.write_text(log.read_text(encoding="utf-8").splitlines()[-1], encoding="utf-8")
    (found,) = json.loads(file.read_text(encoding="utf-8"))["widths"].values()
    return {kind: found[kind]["cpu_over_none"] for kind in ("ffn", "all")}


def train_and_score_all(
    config: StartsConfig, folder: Path, ratios: dict[str, float], errors: dict[str, str]
) -> Iterator[None]:
    """Do the runs that are not finished, seed by seed, what starts from the language model last; yield after each."""
    for seed in range(config.seeds):
        for is_start in (False, True):
            runs: dict[str, Callable[[], None]] = {}
            for name in CASES:
                if name.startswith("llm-") == is_start and _scores(config, folder, name, seed) is None:
                    runs[f"{name}-{seed}"] = partial(train_and_score, config, folder, ratios, name, seed)
            yield from side_by_side(runs, config.jobs, errors)


def commands(config: StartsConfig, folder: Path, ratios: dict[str, float], name: str, seed: int) -> tuple[Command, ...]:
    """Return the commands that train one case from one seed, export it if others start from it, and score it."""
    place, llm = _folder_of(config, folder, name, seed), _folder_of(config, folder, LANGUAGE, seed) / "llm"
    train = train_command(folder, place, seed, steps_of(config, ratios, name), "latents")
    train += (*(setting.format(folder=folder) for setting in SPACES["latents"]), *CASES[name])
    if name.startswith("llm-"):
        train += (f"init_from_llm={llm}",)
    score = score_command(folder, place, config.prompts, "latents", config.smoke)
    if name != LANGUAGE:
        return train, score
    export = (sys.executable, "-m", "train.export", f"checkpoint={place}", f"output={llm}", "format=hf")
    return train, export, (*score, "scenes=null")


def steps_of(config: StartsConfig, ratios: dict[str, float], name: str) -> int:
    """Return the updates of a case."""
    kind = name.removesuffix("-seconds")
    return max(2, round(config.steps / ratios[kind])) if kind != name else config.steps


def train_and_score(config: StartsConfig, folder: Path, ratios: dict[str, float], name: str, seed: int) -> None:
    """Train one case from one seed and evaluate it; raise RuntimeError if either fails."""
    for command in commands(config, folder, ratios, name, seed):
        run(command, _folder_of(config, folder, name, seed).with_suffix(".log"))


def record_of(
    config: StartsConfig, folder: Path, argv: list[str], ratios: dict[str, float], errors: dict[str, str]
) -> dict[str, Any]:
    """Return the JSON object of everything that is finished."""
    cases: dict[str, Any] = {}
    for name in CASES:
        scores = {seed: _scores(config, folder, name, seed) for seed in range(config.seeds)}
        if done := {seed: found for seed, found in scores.items() if found is not None}:
            cases[name] = {"steps": steps_of(config, ratios, name), **_summary(done)}
            cases[name]["parameters"] = _parameters(_folder_of(config, folder, name, min(done)) / "config.yaml")
    return {
        "bench": "starts",
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "versions": {"python": platform.python_version(), "torch": version("torch")},
        "command": " ".join(["python -m bench.starts", *(a for a in argv if not a.startswith("folder="))]),
        "seeds": config.seeds,
        "steps": config.steps,
        "prompts": config.prompts,
        "step_over_none": ratios,
        "cases": cases,
        "errors": errors,
    }


def _summary(by_seed: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """Return the judge's answers over all seeds and the held-out losses by seed."""
    found: dict[str, Any] = {"seeds": [*by_seed], "judge": {}}
    done = [*by_seed.values()]
    if any(name.startswith("scenes/") for name in done[0]["scores"]):
        found["judge"] = {task: judged(done, task) for task in ("text_to_image", "image_to_text")}
        for key in ("image_loss", "x0_error", "captioning_loss"):
            found[key] = [scores["heldout"]["scenes"][key] for scores in done]
    found["text_loss"] = [scores["heldout"]["texts"]["text_loss"] for scores in done]
    return found


@cache
def _parameters(config_file: Path) -> dict[str, int]:
    """Return how many parameters a run has, trains, and how many of its trunk a token meets."""
    config = read_config(config_file)
    assert config is not None
    with torch.device("meta"):
        model = Transfusion(config.model, Tokenizer(config.data.tokenizer).vocab_size)
    dtype = compute_dtype(config.parallel, torch.device("cpu"))
    freeze(model, config.optim.groups, dtype, config.model.lora.rank > 0)
    return {**parameters(model), "trained": sum(p.numel() for p in model.parameters() if p.requires_grad)}


def _scores(config: StartsConfig, folder: Path, name: str, seed: int) -> dict[str, Any] | None:
    """Return what train.evaluate wrote of a run; None: it is not finished."""
    file = _folder_of(config, folder, name, seed) / f"scores-{config.prompts}" / "evaluation.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def _folder_of(config: StartsConfig, folder: Path, name: str, seed: int) -> Path:
    return folder / f"starts-{config.steps}-steps" / f"{name}-{seed}"


if __name__ == "__main__":
    run_program(main)
