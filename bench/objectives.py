"""Compare objectives, and captions, on the demo's scenes: `python -m bench.objectives`.

Each case trains the demo's model on as many tokens, half the demo's, from the same seeds; `train.evaluate` then scores
it on scenes that are never trained on: the judge's shares of what is drawn and described rightly, and the error of x0,
which is one unit for every objective within a space. Cases, by name:

  SPACE-OBJECTIVE[-logit]   SPACE is pixels (8x8 patches, no VAE; noise shifted by 3.5 unless -unshifted) or latents
                            (the demo's VAE, 2x2 patches). OBJECTIVE is eps, v, x0, x0-v (predicts x0, loss in v), flow
                            (straight line, predicts the velocity) or flow-x0-v (straight line, predicts x0, loss in v).
                            With -logit timesteps are logit-normal, else uniform
  captions-NUMBER-WORDINGS  latents and v; pictures to train on, and captions of each: one or three

Everything is made in `folder`: data, runs, logs. Two runs go at a time, one thread each; a finished one is not
repeated, so the same command goes on after an interruption. Tables go to stderr and `page`; the last line is one JSON
object. The defaults take three quarters of an hour on two cores.
"""

from dataclasses import dataclass
from typing import Any

from bench.comparison import BySeed, ComparisonConfig, Run, Settings, compare, heldout, judged
from bench.objectives_page import paragraphs, table
from bench.scene_data import SPACES, prepare
from data.storage import Location
from train.config import load_config, run_program

OBJECTIVES = {
    "eps": ("diffusion.prediction=eps",),
    "v": ("diffusion.prediction=v",),
    "x0": ("diffusion.prediction=x0",),
    "x0-v": ("diffusion.prediction=x0", "diffusion.loss=v"),
    "flow": ("diffusion.schedule=flow", "diffusion.prediction=v"),
    "flow-x0-v": ("diffusion.schedule=flow", "diffusion.prediction=x0", "diffusion.loss=v"),
}
LOGIT = ("diffusion.timestep_sampling=logit_normal",)
# eps at the noisiest timesteps divides by almost nothing: it starts below them, and x0 is kept in its range.
SAMPLERS = {"eps": ("spacing=leading",), "flow": ("sampler=euler",), "flow-x0-v": ("sampler=euler",)}
X0_BOUND = {"pixels": 1, "latents": 3}


@dataclass(frozen=True)
class Case:
    """One recipe: the demo's with these changes."""

    data: str  # key of scene_data.DATA
    train: Settings = ()  # of train.pretrain
    sample: Settings = ()  # of train.evaluate
    wave: int = 0  # which cases come first


def sampling(objective: str, space: str) -> Settings:
    """Return the settings of train.evaluate that suit an objective."""
    bound = (f"clip_x0={X0_BOUND[space]}",) if objective == "eps" else ()
    return (*SAMPLERS.get(objective, ()), *bound)


def _cases() -> dict[str, Case]:
    """Return the cases by name, the most telling ones first."""
    found = {}
    for space in SPACES:
        for name, switches in OBJECTIVES.items():
            sample = sampling(name, space)
            found[f"{space}-{name}"] = Case(space, switches, sample, 2 if name == "flow-x0-v" else 0)
            if name != "flow-x0-v":
                last = 0 if name == "flow" else 2
                found[f"{space}-{name}-logit"] = Case(space, (*switches, *LOGIT), sample, last)
    found["pixels-x0-unshifted"] = Case("pixels", (*OBJECTIVES["x0"], "diffusion.shift=1"), wave=1)
    found["captions-2000-one"] = Case("few", wave=1)
    found["captions-2000-three"] = Case("few-three", wave=1)
    found["captions-12000-three"] = Case("latents-three", wave=1)  # with one caption it is latents-v
    return dict(sorted(found.items(), key=lambda item: item[1].wave))


CASES = _cases()


@dataclass(frozen=True, kw_only=True)
class ObjectivesConfig(ComparisonConfig):
    folder: Location = "runs/objectives"  # everything is made here, 150 MB
    seeds: int = 2  # trainings of each case, >= 1

    bench, known = "objectives", tuple(CASES)


CONFIG = ObjectivesConfig


def main(argv: list[str]) -> int:
    config = load_config(CONFIG, argv)
    prepare(config.root, {CASES[name].data for name in config.cases}, ranks=config.jobs, smoke=config.smoke)
    return compare(config, argv, [runs(config)], summary, table, paragraphs)


def runs(config: ObjectivesConfig) -> list[Run]:
    """Return the runs, the first seed of a wave's cases first."""
    wanted = [(CASES[name].wave, seed, name) for name in config.cases for seed in range(config.seeds)]
    return [run_of(config, name, seed) for _, seed, name in sorted(wanted, key=lambda run: run[:2])]


def run_of(config: ObjectivesConfig, name: str, seed: int) -> Run:
    case = CASES[name]
    return Run(config, name, seed, config.steps, case.data, case.train, {name: case.sample})


def summary(_: str, by_seed: BySeed) -> dict[str, Any]:
    """Return [right, of] over all seeds for each of the judge's questions, and the rest by seed."""
    found: dict[str, Any] = {task: judged(by_seed, task) for task in ("text_to_image", "image_to_text")}
    found |= heldout(by_seed, "x0_error", "image_loss", "captioning_loss")
    (bins,) = heldout(by_seed, "x0_error_by_log_snr").values()
    found["x0_error_by_log_snr"] = {name: [of_seed[name]["error"] for of_seed in bins] for name in bins[0]}
    return found


if __name__ == "__main__":
    run_program(main)
