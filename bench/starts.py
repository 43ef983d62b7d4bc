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

import json
import sys
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from bench.comparison import BySeed, ComparisonConfig, Run, Settings, compare, heldout, judged
from bench.programs import Command, run
from bench.scene_data import prepare
from bench.starts_page import LANGUAGE, paragraphs, table
from bench.untied import parameters
from data.storage import Location
from data.tokenizer import Tokenizer
from model.transfusion import Transfusion
from train.config import load_config, run_program
from train.distributed.parallelize import compute_dtype
from train.optim.groups import freeze
from train.pretrain_config import read_config

START = "llm-"  # of the cases that start from the language model
UNTIED = "model.untied={}"
FROZEN = (
    'optim.groups={images: {parameters: ["*.image.*", "*.image_norm.*"]}, '
    'text: {parameters: ["transformer.*", "text_*"], frozen: true}}'
)
CASES: dict[str, Settings] = {  # of train.pretrain
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
class StartsConfig(ComparisonConfig):
    folder: Location = "runs/starts"  # everything is made here, 150 MB
    steps: int = 200  # updates of each training, >= 2; the demo has 800

    bench, known = "starts", tuple(CASES)
    runs_in = "starts-{steps}-steps"

    def __post_init__(self) -> None:
        super().__post_init__()
        if LANGUAGE not in self.cases and (starts := [name for name in self.cases if name.startswith(START)]):
            raise ValueError(f"only: {starts[0]} starts from {LANGUAGE}; add {LANGUAGE}")


CONFIG = StartsConfig


def main(argv: list[str]) -> int:
    config = load_config(CONFIG, argv)
    prepare(config.root, ["latents"], ranks=config.jobs, smoke=config.smoke)
    ratios = ratios_of_steps(config)
    summary = partial(summary_of, config, ratios)
    return compare(config, argv, runs(config, ratios), summary, table, paragraphs, {"step_over_none": ratios})


def ratios_of_steps(config: StartsConfig) -> dict[str, float]:
    """Return the CPU time of a step by `model.untied` over that without it, measured once."""
    file, rounds = config.root / "untied.json", "--rounds=3" if config.smoke else "--rounds=31"
    if not file.exists():
        log = config.root / "logs" / "untied.log"
        run((sys.executable, "-m", "bench.untied", *DEMO, rounds, "--dtype=auto", "--optimizer=muon"), log)
        file.write_text(log.read_text(encoding="utf-8").splitlines()[-1], encoding="utf-8")
    (found,) = json.loads(file.read_text(encoding="utf-8"))["widths"].values()
    return {kind: found[kind]["cpu_over_none"] for kind in ("ffn", "all")}


def runs(config: StartsConfig, ratios: dict[str, float]) -> list[list[Run]]:
    """Return the runs seed by seed, each time those that start from the language model after the others."""
    return [
        [run_of(config, ratios, name, seed) for name in config.cases if name.startswith(START) == is_start]
        for seed in range(config.seeds)
        for is_start in (False, True)
    ]


def run_of(config: StartsConfig, ratios: dict[str, float], name: str, seed: int) -> Run:
    """Return the run of a case; that of the language model exports it."""
    llm, train, score, then = config.place(LANGUAGE, seed) / "llm", CASES[name], Settings(), tuple[Command, ...]()
    if name.startswith(START):
        train += (f"init_from_llm={llm}",)
    if name == LANGUAGE:
        export = ("train.export", f"checkpoint={config.place(name, seed)}", f"output={llm}", "format=hf")
        score, then = ("scenes=null",), ((sys.executable, "-m", *export),)
    return Run(config, name, seed, config.steps_of(name, ratios), "latents", train, {name: score}, then)


def summary_of(config: StartsConfig, ratios: dict[str, float], name: str, by_seed: BySeed) -> dict[str, Any]:
    """Return steps, the judge's answers over all seeds, the held-out losses by seed, and the parameters of a case."""
    found: dict[str, Any] = {"steps": config.steps_of(name, ratios), "seeds": [*by_seed], "judge": {}}
    if name != LANGUAGE:
        found["judge"] = {task: judged(by_seed, task) for task in ("text_to_image", "image_to_text")}
        found |= heldout(by_seed, "image_loss", "x0_error", "captioning_loss")
    found |= heldout(by_seed, "text_loss", of="texts")
    return {**found, "parameters": _parameters(config.place(name, min(by_seed)) / "config.yaml")}


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


if __name__ == "__main__":
    run_program(main)
