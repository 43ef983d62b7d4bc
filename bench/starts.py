"""Compare starts from a language model, and weights of images' own, on the demo's scenes: `python -m bench.starts`.

A language model is trained on texts alone and exported to transformers' layout. From it, or from scratch, each case
trains the demo's model on as many tokens from the same seeds; `train.evaluate` then scores it on scenes and texts that
are never trained on: the text loss, the judge's shares of what is drawn and described rightly, and the error of x0.

  scratch-none|ffn|all        from scratch, by model.untied
  scratch-ffn|all-seconds     the same for as many seconds as scratch-none, by measured steps
  llm-none|all                from the language model, everything trained
  llm-frozen                  from it, text's side frozen, images' own weights trained (LMFusion)
  llm-lora                    from it, frozen but for adapters of rank 16 and patches

Everything is made in `folder`: data, runs, logs. Two runs go at a time, one thread each; a finished one is not
repeated, so the same command goes on after an interruption. Tables go to stderr and `page`; the last line is one JSON
object. The defaults take half an hour on two cores.
"""

import datetime
import json
import os
import platform
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from bench.job import rows as rows_of
from bench.objectives import Command, ObjectivesConfig, pairs, program, run, stages
from bench.objectives_page import BELOW, wilson
from data.storage import Location
from data.tokenizer import Tokenizer
from model.transfusion import Transfusion
from train.config import load_config, run_program
from train.planning.estimate import parameters, parameters_of_a_token
from train.pretrain_config import read_config

LMFUSION = (
    "optim.groups={images: {parameters: ['*.image.*', '*.image_norm.*', 'patches.*']}, "
    "text: {parameters: ['*'], frozen: true}}"
)
CASES: dict[str, tuple[str, ...]] = {
    **{f"scratch-{untied}": (f"model.untied={untied}",) for untied in ("none", "ffn", "all")},
    **{f"scratch-{untied}-seconds": (f"model.untied={untied}",) for untied in ("ffn", "all")},
    "llm-none": (),
    "llm-all": ("model.untied=all",),
    "llm-frozen": ("model.untied=all", LMFUSION),
    "llm-lora": ("model.lora.rank=16",),
}
LLM = "language-model"


@dataclass(frozen=True, kw_only=True)
class StartsConfig:
    folder: Location = "runs/starts"  # everything is made here, 150 MB
    seeds: int = 3  # trainings of each case, >= 1
    steps: int = 250  # updates of each training, of the language model too, >= 4
    prompts: int = 100  # scenes of each split to draw and to describe, >= 1
    jobs: int = 2  # runs at a time, >= 1
    page: Location | None = None  # Markdown page to write the table to; what it says below is kept
    smoke: bool = False  # toy data, for toy lengths: shows that it runs

    def __post_init__(self) -> None:
        for name, least in {"seeds": 1, "steps": 4, "prompts": 1, "jobs": 1}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least {least}")


CONFIG = StartsConfig


def main(argv: list[str]) -> int:
    config = load_config(CONFIG, argv)
    folder = Path(config.folder).resolve()
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    data = ObjectivesConfig(folder=config.folder, only=["latents-v"], jobs=config.jobs, smoke=config.smoke)
    for name, command in {**stages(data, folder), **language_model(config, folder)}.items():
        mark = folder / "logs" / f"{name.replace(' ', '-')}.done"
        if not mark.exists():
            print(name, file=sys.stderr)
            run(command, mark.with_suffix(".log"))
            mark.touch()
    errors: dict[str, str] = {}
    of_equal_steps = [name for name in CASES if not name.endswith("-seconds")]
    for names in (of_equal_steps, [name for name in CASES if name not in of_equal_steps]):  # the former decide steps
        train_and_score_all(config, folder, names, errors)
        record = record_of(config, folder, argv, errors)
        if config.page:
            rewrite(Path(config.page), record)
    print(table(record), file=sys.stderr)
    print(json.dumps(record))
    return 1 if errors else 0


def train_and_score_all(config: StartsConfig, folder: Path, names: list[str], errors: dict[str, str]) -> None:
    """Do the runs of these cases that are not finished, the first seed of all first."""
    wanted = [(name, seed) for seed in range(config.seeds) for name in names]
    runs = [(name, seed) for name, seed in wanted if scores_of(config, folder, name, seed) is None]
    start = time.monotonic()
    with ThreadPoolExecutor(config.jobs) as pool:
        futures = {pool.submit(train_and_score, config, folder, *one): one for one in runs}
        for done, future in enumerate(as_completed(futures), 1):
            name, seed = futures[future]
            if error := future.exception():
                errors[f"{name}-{seed}"] = str(error)
            left = datetime.timedelta(seconds=round((time.monotonic() - start) / done * (len(runs) - done)))
            print(f"{name} seed {seed}: {error or 'done'}; {done}/{len(runs)}, {left} left", file=sys.stderr)


def train_and_score(config: StartsConfig, folder: Path, name: str, seed: int) -> None:
    for command in commands(config, folder, name, seed):
        run(command, run_folder(config, folder, name, seed).with_suffix(".log"))


def language_model(config: StartsConfig, folder: Path) -> dict[str, Command]:
    """Return the commands that train and export the language model, by name."""
    place = folder / f"{config.steps}-steps" / LLM
    settings = training(config, folder, place, 0, config.steps) | {
        "data.sources.scenes": "null",
        "vae": "null",
        "data.sources.texts.weight": 1,
        "evaluation.heldout.texts": folder / "encoded" / "text_heldout",
        "evaluation.interval_steps": config.steps,
    }
    export = {"checkpoint": place, "output": f"{place}-hf", "format": "hf", "weights": "model"}
    return {
        f"{LLM} {config.steps}": (*program("pretrain"), *pairs(settings)),
        f"{LLM} {config.steps} export": (sys.executable, "-m", "train.export", *pairs(export)),
    }


def commands(config: StartsConfig, folder: Path, name: str, seed: int) -> tuple[Command, Command]:
    """Return the commands that train one case from one seed, and that score it."""
    place, encoded = run_folder(config, folder, name, seed), folder / "encoded"
    steps = config.steps
    if name.endswith("-seconds"):
        ours, dense = (step_seconds(config, folder, of) for of in (name.removesuffix("-seconds"), "scratch-none"))
        steps = round(steps * dense / ours)
    settings = training(config, folder, place, seed, steps) | {
        "data.sources.scenes.path": encoded / "latents",
        "vae": folder / "vae",
    }
    if name.startswith("llm-"):
        settings["init_from_llm"] = folder / f"{config.steps}-steps" / f"{LLM}-hf"
    score = {
        "checkpoint": place,
        "output": place / f"scores-{config.prompts}",
        "scenes": folder / "scenes" / "heldout",
        "heldout.scenes": encoded / "latents-heldout",
        "heldout.texts": encoded / "text_heldout",
        "max_prompts": config.prompts,
        **({"steps": 4} if config.smoke else {}),
    }
    return (*program("pretrain"), *pairs(settings), *CASES[name]), (*program("evaluate"), *pairs(score))


def training(config: StartsConfig, folder: Path, place: Path, seed: int, steps: int) -> dict[str, Any]:
    return {
        "run_dir": place,
        "seed": seed,
        "micro_batch_size": 24,  # one forward a step
        "optim.steps": steps,
        "optim.warmup_steps": min(30, config.steps // 2),
        "checkpoint.interval_steps": max(200, config.steps // 2),
        "checkpoint.keep_last": 1,
        "preview.interval_steps": "null",
        "log.wandb": "disabled",
        "log.interval_steps": min(20, steps // 2),
        "data.tokenizer": folder / "tokenizer.model",
        "data.sources.texts.path": folder / "encoded" / "text",
    }


def step_seconds(config: StartsConfig, folder: Path, name: str) -> float:
    """Return the median seconds of a step, of all rows of all seeds but each run's first."""
    places = [run_folder(config, folder, name, seed) for seed in range(config.seeds)]
    rows = [[row["step_s"] for row in rows_of(place) if "step_s" in row][1:] for place in places]
    return statistics.median(second for of_run in rows for second in of_run)


def run_folder(config: StartsConfig, folder: Path, name: str, seed: int) -> Path:
    return folder / f"{config.steps}-steps" / f"{name}-{seed}"


def scores_of(config: StartsConfig, folder: Path, name: str, seed: int) -> dict[str, Any] | None:
    """Return what train.evaluate wrote of a run; None: it is not finished."""
    file = run_folder(config, folder, name, seed) / f"scores-{config.prompts}" / "evaluation.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def record_of(config: StartsConfig, folder: Path, argv: list[str], errors: dict[str, str]) -> dict[str, Any]:
    """Return the JSON object of everything that is finished."""
    own = [row for row in rows_of(folder / f"{config.steps}-steps" / LLM) if "heldout/texts/text_loss" in row]
    cases = {}
    for name in CASES:
        found = [scores_of(config, folder, name, seed) for seed in range(config.seeds)]
        if done := [scores for scores in found if scores is not None]:
            cases[name] = summary(config, folder, name, done)
    return {
        "bench": "starts",
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "versions": {"python": platform.python_version(), "torch": version("torch")},
        "command": " ".join(["python -m bench.starts", *(a for a in argv if not a.startswith("folder="))]),
        "text_loss_of_the_language_model": own[-1]["heldout/texts/text_loss"],
        **{name: getattr(config, name) for name in ("seeds", "steps", "prompts")},
        "cases": cases,
        "errors": errors,
    }


def summary(config: StartsConfig, folder: Path, name: str, scores: list[dict[str, Any]]) -> dict[str, Any]:
    """Return parameters, seconds a step, and the scores of each seed."""
    place = run_folder(config, folder, name, 0)
    of_run = read_config(place / "config.yaml")
    with torch.device("meta"):
        model = Transfusion(of_run.model, Tokenizer(folder / "tokenizer.model").vocab_size)
    asked = scores[0]["data"]["scenes"]["items_of_split"]
    return {
        "steps": of_run.optim.steps,
        "step_s": step_seconds(config, folder, name),
        "parameters": parameters(model)["total"],
        "parameters_of_a_token": parameters_of_a_token(model),
        "text_loss": [found["heldout"]["texts"]["text_loss"] for found in scores],
        "x0_error": [found["heldout"]["scenes"]["x0_error"] for found in scores],
        "drawn": {"right": [round(s["text_to_image"]["all"] * asked["seen"]) for s in scores], "of": asked["seen"]},
        "described": {"right": [round(s["image_to_text"]["all"] * asked["seen"]) for s in scores], "of": asked["seen"]},
    }


def table(record: dict[str, Any]) -> str:
    """Return a Markdown table, a row a case."""
    head = ["case", "steps", "s a step", "parameters (of a token)"]
    head += ["text loss", "x0 error", "drawn rightly", "described rightly"]
    lines = ["| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
    for name, case in record["cases"].items():
        cells = [name, str(case["steps"]), f"{case['step_s']:.3f}"]
        cells.append(f"{case['parameters'] / 1e6:.2f}M ({case['parameters_of_a_token'] / 1e6:.2f}M)")
        cells += [", ".join(f"{value:.4f}" for value in case[key]) for key in ("text_loss", "x0_error")]
        for key in ("drawn", "described"):
            right, of = case[key]["right"], case[key]["of"] * len(case[key]["right"])
            low, high = wilson(sum(right), of)
            cells.append(f"{sum(right) / of:.3f} [{low:.2f}, {high:.2f}] ({', '.join(map(str, right))})")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def rewrite(page: Path, record: dict[str, Any]) -> None:
    """Write the table to a page; keep what it says from BELOW on."""
    old = page.read_text(encoding="utf-8") if page.exists() else ""
    below = old[old.index(BELOW) :] if BELOW in old else f"{BELOW}\n"
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    failed = [f"Failed: {name}: {why}" for name, why in record["errors"].items()]
    text = [
        "# Starts from a language model, and weights of images' own",
        f"`{record['command']}`: {record['seeds']} seeds, {record['prompts']} scenes a split. {record['date']}, "
        f"{record['machine']}, {versions}. By seed: text loss in nats a token on held-out texts, error of x0 on "
        "held-out scenes, and known combinations that were drawn and described rightly, with Wilson intervals of 95 % "
        f"over all seeds. The language model's own text loss is {record['text_loss_of_the_language_model']:.4f}. "
        "`--help` explains the cases.",
        table(record),
        *failed,
        below,
    ]
    page.write_text("\n\n".join(text), encoding="utf-8")


if __name__ == "__main__":
    run_program(main)
