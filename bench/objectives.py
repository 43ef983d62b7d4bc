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

import datetime
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench.objectives_page import COLUMNS, rewrite, table
from data.storage import Location
from train.config import load_config, run_program

HERE = Path(__file__).resolve().parent.parent
Command = tuple[str, ...]
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
# A picture has 3,072 numbers, its latents 256: as much of it is seen at sqrt(3072 / 256) times the noise.
PIXELS = ("vae=pixels", "model.latent_channels=3", "model.patch_size=8", "diffusion.shift=3.5")
SPACES = {"pixels": PIXELS, "latents": ("vae={folder}/vae",)}
ALL, FEW = "[{folder}/scenes/train]", "[{folder}/scenes/train/00000.tar]"  # 12,000 and 2,000 pictures
THREE = "caption_keys={{captions: 1}}"
# Encoded folder -> what is encoded, and how.
DATA = {
    "pixels": (f"inputs={ALL}", "vae=pixels"),
    "latents": (f"inputs={ALL}", "vae={folder}/vae"),
    "latents-three": (f"inputs={ALL}", "vae={folder}/vae", THREE),
    "few": (f"inputs={FEW}", "vae={folder}/vae"),
    "few-three": (f"inputs={FEW}", "vae={folder}/vae", THREE),
}
SMOKE_SCENES = ("num_train=400", "shard_size=100", "num_text=200", "num_text_heldout=40", "num_heldout_two_shapes=8")


@dataclass(frozen=True, kw_only=True)
class ObjectivesConfig:
    folder: Location = "runs/objectives"  # everything is made here, 150 MB
    only: list[str] = field(default_factory=list)  # names of cases, with * and ?; empty: all
    seeds: int = 2  # trainings of each case, >= 1
    steps: int = 400  # updates of each training, >= 2
    prompts: int = 100  # scenes of each split to draw and to describe, >= 1
    jobs: int = 2  # runs at a time, >= 1
    page: Location | None = None  # Markdown page to write the tables to; what it says below them is kept
    smoke: bool = False  # toy data, for toy lengths: shows that it runs

    def __post_init__(self) -> None:
        for name, least in {"seeds": 1, "steps": 2, "prompts": 1, "jobs": 1}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least {least}")
        if unknown := [name for name in self.only if not any(fnmatch(case, name) for case in CASES)]:
            raise ValueError(f"only: {', '.join(unknown)} fits no case; there are {', '.join(CASES)}")

    @property
    def cases(self) -> list[str]:
        return [case for case in CASES if not self.only or any(fnmatch(case, name) for name in self.only)]


CONFIG = ObjectivesConfig


@dataclass(frozen=True)
class Case:
    """One recipe: the demo's with these changes."""

    space: str
    data: str  # key of DATA
    train: tuple[str, ...] = ()  # settings of train.pretrain
    sample: tuple[str, ...] = ()  # of train.evaluate
    wave: int = 0  # which cases come first


def _cases() -> dict[str, Case]:
    """Return the cases by name, the most telling ones first."""
    found = {}
    for space in SPACES:
        for name, switches in OBJECTIVES.items():
            sample: tuple[str, ...] = SAMPLERS.get(name, ())
            if name == "eps":
                sample += (f"clip_x0={X0_BOUND[space]}",)
            found[f"{space}-{name}"] = Case(space, space, switches, sample, 2 if name == "flow-x0-v" else 0)
            if name != "flow-x0-v":
                last = 0 if name == "flow" else 2
                found[f"{space}-{name}-logit"] = Case(space, space, (*switches, *LOGIT), sample, last)
    found["pixels-x0-unshifted"] = Case("pixels", "pixels", (*OBJECTIVES["x0"], "diffusion.shift=1"), wave=1)
    found["captions-2000-one"] = Case("latents", "few", wave=1)
    found["captions-2000-three"] = Case("latents", "few-three", wave=1)
    found["captions-12000-three"] = Case("latents", "latents-three", wave=1)  # with one caption it is latents-v
    return dict(sorted(found.items(), key=lambda item: item[1].wave))


CASES = _cases()


def main(argv: list[str]) -> int:
    config = load_config(CONFIG, argv)
    folder = Path(config.folder).resolve()
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    prepare(config, folder)
    errors: dict[str, str] = {}
    for _ in train_and_score_all(config, folder, errors):
        if config.page:
            rewrite(Path(config.page), record_of(config, folder, argv, errors))
    record = record_of(config, folder, argv, errors)
    if config.page:
        rewrite(Path(config.page), record)
    print(table(record["cases"]), file=sys.stderr)
    print(json.dumps(record))
    return 1 if errors else 0


def train_and_score_all(config: ObjectivesConfig, folder: Path, errors: dict[str, str]) -> Iterator[None]:
    """Do the runs that are not finished, the first seed of a wave's cases first; yield after each. Fills `errors`."""
    wanted = [(CASES[name].wave, seed, name) for name in config.cases for seed in range(config.seeds)]
    wanted.sort(key=lambda run: run[:2])  # stable
    runs = {
        f"{name}-{seed}": partial(train_and_score, config, folder, name, seed)
        for _, seed, name in wanted
        if _scores(config, folder, name, seed) is None
    }
    yield from side_by_side(runs, config.jobs, errors)


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


def prepare(config: ObjectivesConfig, folder: Path) -> None:
    """Make the data that the cases need, each part once."""
    for name, command in stages(config, folder).items():
        mark = folder / "logs" / f"{name.replace(' ', '-')}.done"
        if not mark.exists():
            print(name, file=sys.stderr)
            run(command, mark.with_suffix(".log"))
            mark.touch()


def stages(config: ObjectivesConfig, folder: Path) -> dict[str, Command]:
    """Return the commands that make the data of the cases, by name, in order."""
    chosen = [CASES[name] for name in config.cases]
    need = {case.data for case in chosen} | {case.space for case in chosen}
    scenes, tokenizer = folder / "scenes", folder / "tokenizer.model"
    found: dict[str, Command] = {}
    found["scenes"] = (*program("scenes"), f"output={scenes}", *(SMOKE_SCENES if config.smoke else ()))
    inputs = f"inputs=[{scenes}/train,{scenes}/text]"
    found["tokenizer"] = (*program("tokenizer"), inputs, f"output={tokenizer}")
    if need != {"pixels"}:
        short = ("optim.steps=8", "optim.warmup_steps=2") if config.smoke else ()
        folders = (f"inputs=[{scenes}/train]", f"heldout=[{scenes}/heldout]", f"output={folder}/vae")
        found["vae"] = (*program("vae", ranks=config.jobs), *folders, *short)
    encode, encoded = (*program("encode"), f"tokenizer={tokenizer}"), folder / "encoded"
    for name in (name for name in DATA if name in need):
        settings = [setting.format(folder=folder) for setting in DATA[name]]
        if name not in SPACES:
            settings.append(f"stats_from={encoded}/latents")
        found[f"encode {name}"] = (*encode, *settings, f"output={encoded}/{name}")
    for name in (name for name in SPACES if name in need):
        held_out = (
            f"inputs=[{scenes}/heldout]",
            found[f"encode {name}"][len(encode) + 1],
            f"stats_from={encoded}/{name}",
        )
        found[f"encode {name} heldout"] = (*encode, *held_out, f"output={encoded}/{name}-heldout")
    for name in ("text", "text_heldout"):
        found[f"encode {name}"] = (*encode, "vae=null", f"inputs=[{scenes}/{name}]", f"output={encoded}/{name}")
    return found


def commands(config: ObjectivesConfig, folder: Path, name: str, seed: int) -> tuple[Command, Command]:
    """Return the commands that train one case from one seed, and that score it."""
    case, place = CASES[name], _folder_of(config, folder, name, seed)
    space = [setting.format(folder=folder) for setting in SPACES[case.space]]
    train = (*train_command(folder, place, seed, config.steps, case.data), *space, *case.train)
    return train, (*score_command(folder, place, config.prompts, case.space, config.smoke), *case.sample)


def train_command(folder: Path, place: Path, seed: int, steps: int, data: str) -> Command:
    """Return the command that trains the demo's model on the encoded folder `data`; `vae=` is missing."""
    settings: dict[str, Any] = {
        "run_dir": place,
        "seed": seed,
        "micro_batch_size": 24,  # one forward a step
        "optim.steps": steps,
        "optim.warmup_steps": min(30, steps // 2),
        "checkpoint.interval_steps": max(200, steps // 2),
        "checkpoint.keep_last": 1,
        "preview.interval_steps": "null",
        "log.wandb": "disabled",
        "data.tokenizer": folder / "tokenizer.model",
        "data.sources.scenes.path": folder / "encoded" / data,
        "data.sources.texts.path": folder / "encoded" / "text",
    }
    return (*program("pretrain"), *pairs(settings))


def score_command(folder: Path, place: Path, prompts: int, space: str, smoke: bool) -> Command:
    """Return the command that scores the run in `place` on held-out scenes and texts."""
    settings: dict[str, Any] = {
        "checkpoint": place,
        "output": place / f"scores-{prompts}",
        "scenes": folder / "scenes" / "heldout",
        "heldout.scenes": folder / "encoded" / f"{space}-heldout",
        "heldout.texts": folder / "encoded" / "text_heldout",
        "max_prompts": prompts,
        **({"steps": 4} if smoke else {}),
    }
    return (*program("evaluate"), *pairs(settings))


def train_and_score(config: ObjectivesConfig, folder: Path, name: str, seed: int) -> None:
    """Train one case from one seed and evaluate it; raise RuntimeError if either fails."""
    for command in commands(config, folder, name, seed):
        run(command, _folder_of(config, folder, name, seed).with_suffix(".log"))


def run(command: Command, log: Path) -> float:
    """Run a program with one thread, its output appended to `log`; return its CPU-seconds.

    Raises RuntimeError with its last line.
    """
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": str(HERE)}
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a", encoding="utf-8") as file:
        print("$", *command, file=file, flush=True)
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        raise RuntimeError(f"status {process.returncode}, {lines[-1].strip()} (see {log})")
    return used.ru_utime + used.ru_stime


def record_of(config: ObjectivesConfig, folder: Path, argv: list[str], errors: dict[str, str]) -> dict[str, Any]:
    """Return the JSON object of everything that is finished."""
    cases: dict[str, Any] = {}
    for name in config.cases:
        scores = [_scores(config, folder, name, seed) for seed in range(config.seeds)]
        if done := [of_seed for of_seed in scores if of_seed is not None]:
            cases[name] = _summary(done)
    return {
        "bench": "objectives",
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "versions": {"python": platform.python_version(), "torch": version("torch")},
        "command": " ".join(["python -m bench.objectives", *(a for a in argv if not a.startswith("folder="))]),
        "seeds": config.seeds,
        "steps": config.steps,
        "prompts": config.prompts,
        "cases": cases,
        "errors": errors,
    }


def _summary(seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """Return [right, of] over all seeds for each of the judge's questions, and the rest by seed."""
    found: dict[str, Any] = {task: judged(seeds, task) for task in ("text_to_image", "image_to_text")}
    losses = [scores["heldout"]["scenes"] for scores in seeds]
    for key in ("x0_error", "image_loss", "captioning_loss"):
        found[key] = [of_seed[key] for of_seed in losses]
    bins = [of_seed["x0_error_by_log_snr"] for of_seed in losses]
    found["x0_error_by_log_snr"] = {name: [of_seed[name]["error"] for of_seed in bins] for name in bins[0]}
    return found


def judged(seeds: list[dict[str, Any]], task: str) -> dict[str, Any]:
    """Return how many answers to each of the judge's questions were right, of how many, over all seeds and by seed."""
    prefix, nothing = f"scenes/{task}/", {"value": 0.0, "items": 0}
    asked = [name.removeprefix(prefix) for scores in seeds for name in scores["scores"] if name.startswith(prefix)]
    found: dict[str, Any] = {}
    for goal in dict.fromkeys([*(goal for _, goal in COLUMNS.values()), *asked]):
        shares = [scores["scores"].get(prefix + goal, nothing) for scores in seeds]
        right = [round(share["value"] * share["items"]) for share in shares]
        found[goal] = {"right": sum(right), "of": sum(share["items"] for share in shares), "by_seed": right}
    return found


def _scores(config: ObjectivesConfig, folder: Path, name: str, seed: int) -> dict[str, Any] | None:
    """Return what train.evaluate wrote of a run; None: it is not finished."""
    file = _folder_of(config, folder, name, seed) / f"scores-{config.prompts}" / "evaluation.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def _folder_of(config: ObjectivesConfig, folder: Path, name: str, seed: int) -> Path:
    return folder / f"{config.steps}-steps" / f"{name}-{seed}"


def program(name: str, ranks: int = 1) -> Command:
    """Return the start of the command of a program with the demo's config."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)) if ranks > 1 else ()
    return (sys.executable, *launcher, "-m", f"train.{name}", f"config={HERE}/configs/demo/{name}.yaml")


def pairs(settings: dict[str, Any]) -> Iterator[str]:
    return (f"{key}={value}" for key, value in settings.items())


if __name__ == "__main__":
    run_program(main)
