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

import json
from dataclasses import dataclass
from functools import partial
from typing import Any

from bench.ablation import UNET
from bench.comparison import SECONDS, BySeed, ComparisonConfig, Run, Settings, compare, heldout, judged
from bench.comparison_page import COLUMNS
from bench.objectives import LOGIT, OBJECTIVES, sampling
from bench.programs import cpu_seconds
from bench.recipes_page import paragraphs, table
from bench.scene_data import prepare
from data.storage import Location
from train.config import load_config, run_program

PAPER, BEST, WITHOUT = "paper", "best", "best-without-"
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
FACTORS: dict[str, Settings] = {  # of train.pretrain; data=NAME: another encoded folder
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
class RecipesConfig(ComparisonConfig):
    folder: Location = "runs/recipes"  # everything is made here, 1 GB
    steps: int = 400  # updates of each training, of half the demo's batch, >= 12; the demo has 800
    prompts: int = 50  # scenes of each split to draw and to describe, >= 1

    bench, known = "recipes", tuple(CASES)
    least_steps = 12
    runs_in, scores_in = "recipes-{steps}-steps", "scores-{case}-{prompts}"

    @property
    def half_life(self) -> int:
        """Updates of the average's half-life, as in the demo a twelfth of the run."""
        return max(1, self.steps // 12)


CONFIG = RecipesConfig


def main(argv: list[str]) -> int:
    config = load_config(CONFIG, argv)
    prepare(config.root, {"latents", *map(_data_of, config.cases)}, ranks=config.jobs, smoke=config.smoke)
    costs = costs_of_steps(config)
    ratios = {name: median for name, (median, _, _) in costs.items()}
    summary = partial(summary_of, config, ratios)
    return compare(config, argv, [runs(config, ratios)], summary, table, paragraphs, {"step_over_paper": costs})


def costs_of_steps(config: RecipesConfig) -> dict[str, list[float]]:
    """Return a step's CPU time over the paper's (median, lowest, highest) of the cases whose steps cost more.

    Each is measured once for a folder.
    """
    file = config.root / "step-costs.json"
    found: dict[str, list[float]] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    wanted = {name.removesuffix(SECONDS) for name in config.cases}
    if missing := [name for name in MEASURED if name in wanted and name not in found]:
        from bench.step_costs import costs_over

        recipes = {name: run_of(config, {}, name, 0).training[3:] for name in (PAPER, *missing)}
        found |= costs_over(recipes.pop(PAPER), recipes, rounds=2 if config.smoke else 21)
        file.write_text(json.dumps(found), encoding="utf-8")
    return found


def runs(config: RecipesConfig, ratios: dict[str, float]) -> list[Run]:
    """Return the runs, the first seed of all cases first."""
    trained = dict.fromkeys(map(trained_as, config.cases))
    return [run_of(config, ratios, name, seed) for seed in range(config.seeds) for name in trained]


def trained_as(name: str) -> str:
    """Return the case whose run a case is scored from: an average of the weights is a run's own."""
    return {EMA: PAPER, WITHOUT + EMA: BEST}.get(name, name)


def run_of(config: RecipesConfig, ratios: dict[str, float], name: str, seed: int) -> Run:
    """Return the training of one case, from which the cases of `trained_as` are scored."""
    settings = [setting for setting in _settings_of(name) if not setting.startswith("data=")]
    train = (*BASE, f"optim.ema_half_lives=[{config.half_life}]", *settings)
    objective = next((found for found in CASES[name] if found.removesuffix("-logit") in OBJECTIVES), "eps")
    sample = sampling(objective.removesuffix("-logit"), "latents")
    weights = {case: f"ema-{config.half_life}" if EMA in CASES[case] else "model" for case in config.cases}
    scored = {case: (*sample, f"weights={of}") for case, of in weights.items() if trained_as(case) == name}
    return Run(config, name, seed, config.steps_of(name, ratios), _data_of(name), train, scored)


def summary_of(config: RecipesConfig, ratios: dict[str, float], name: str, by_seed: BySeed) -> dict[str, Any]:
    """Return steps, losses, the judge's shares and CPU-seconds of training of a case, by seed."""
    found = {"steps": config.steps_of(name, ratios), "seeds": [*by_seed], **heldout(by_seed, "text_loss", of="texts")}
    found |= heldout(by_seed, "captioning_loss", "image_loss", "x0_error")
    for task in dict.fromkeys(task for task, _ in COLUMNS.values()):
        for goal, count in judged(by_seed, task).items():
            found[f"{task}/{goal}"] = [right / (count["of"] / len(by_seed) or 1) for right in count["by_seed"]]
    spent = [cpu_seconds(config.account(trained_as(name), seed)) for seed in by_seed]
    return {**found, "train_cpu_s": [seconds for seconds in spent if seconds]}


def _settings_of(name: str) -> list[str]:
    return [setting for factor in CASES[name] for setting in FACTORS[factor]]


def _data_of(name: str) -> str:
    """Return the key of scene_data.DATA that a case trains on."""
    return next((s.removeprefix("data=") for s in _settings_of(name) if s.startswith("data=")), "latents")


if __name__ == "__main__":
    run_program(main)
