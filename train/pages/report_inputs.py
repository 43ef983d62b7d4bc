"""What the report is made of: the outputs of a run and of the programs after it, read once.

A missing output is not an error, as a run in progress is reported too; a damaged one is, and so is a missing run.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.storage import Location
from train.pretrain_config import PretrainConfig, read_config


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    run: Location = "runs/pretrain"  # run folder of train.pretrain: config.yaml, metrics.jsonl, previews
    evaluation: Location | None = None  # folder of train.evaluate; null: none
    samples: Location | None = None  # folder of train.sample; null: none
    vae: Location | None = None  # autoencoder for the reconstructions; null: the run's
    stages: Location | None = None  # folder where train.demo records its finished stages; null: none
    num_right: int = 12  # right answers shown of each split, 0 or more; failures are all shown
    num_previews: int = 6  # preview sheets shown, from the first to the last, >= 2
    num_reconstructions: int = 8  # pictures passed through the VAE, 0 or more
    title: str = "Transfusion: training report"  # of the page
    output: Location | None = None  # file to write; null: report.html in the run folder

    def __post_init__(self) -> None:
        for name, least in (("num_right", 0), ("num_previews", 2), ("num_reconstructions", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least {least}")


@dataclass(frozen=True)
class ReportInputs:
    """The outputs that are there."""

    config: ReportConfig
    command: str
    recipe: PretrainConfig | None
    rows: list[dict[str, Any]]  # of metrics.jsonl
    evaluation: dict[str, Any] | None
    examples: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    seconds: dict[str, float]  # of each finished stage, in the order they finished
    unreadable: list[str]  # a sentence for each file with unreadable lines


def gather(config: ReportConfig, command: str) -> ReportInputs:
    """Read all inputs. Raises FileNotFoundError or ValueError if `run` is not a run folder or a file is damaged."""
    run = Path(config.run)
    if not run.is_dir():
        raise FileNotFoundError(f"run={run}: no such folder; give the run_dir of a `python -m train.pretrain`")
    if not any((run / name).is_file() for name in ("config.yaml", "metrics.jsonl")):
        raise ValueError(f"run={run}: not a run folder of train.pretrain: it has neither config.yaml nor metrics.jsonl")
    unreadable: list[str] = []
    recipe = read_config(run / "config.yaml") if (run / "config.yaml").is_file() else None
    evaluation = None
    if config.evaluation and (scores := Path(config.evaluation) / "evaluation.json").is_file():
        try:
            evaluation = json.loads(scores.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{scores}: damaged ({error}); run train.evaluate again") from None
    marks = Path(config.stages).glob("*.json") if config.stages else []  # written by rename: all are whole
    stages = {path.stem: json.loads(path.read_bytes()) for path in sorted(marks, key=lambda path: path.stat().st_mtime)}
    return ReportInputs(
        config=config,
        command=command,
        recipe=recipe,
        rows=[row for row in _json_lines(config.run, "metrics.jsonl", unreadable) if "step" in row],
        evaluation=evaluation,
        examples=_json_lines(config.evaluation, "examples.jsonl", unreadable),
        samples=_json_lines(config.samples, "results.jsonl", unreadable),
        seconds={name: mark["seconds"] for name, mark in stages.items() if "seconds" in mark},  # finished ones have it
        unreadable=unreadable,
    )


def _json_lines(folder: str | None, name: str, unreadable: list[str]) -> list[dict[str, Any]]:
    """Read one JSON object a line, none if there is no file; add a sentence to `unreadable` if lines are skipped."""
    if folder is None or not (path := Path(folder) / name).is_file():
        return []
    found, bad = [], 0
    for line in path.read_bytes().splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            bad += 1
    if bad:
        unreadable.append(f"{path}: {bad} unreadable line(s) left out, as left by a write in progress or a kill.")
    return found
