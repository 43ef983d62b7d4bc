"""What the report is made of: the outputs of runs and of the programs after them, read once.

A missing output is not an error, as a run in progress is reported too; a damaged one is, and so is a missing run.
Configs are read as plain YAML, without the classes that they fill: those import torch, and other versions have others.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.storage import Location
from data.strict_json import loads
from train.config_layers import read_yaml
from train.evaluation.scores import share
from train.pages.metric_columns import Columns, read_json_lines
from train.pages.reference_band import Band, Verdict, compare, load_band


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    # Run folders of train.pretrain (config.yaml, metrics.jsonl, previews); several, as run=A run=B or run=[A,B], are
    # shown side by side.
    run: list[Location] = field(default_factory=lambda: ["runs/pretrain"])
    evaluation: list[Location] = field(default_factory=list)  # folders of train.evaluate, side by side
    samples: Location | None = None  # folder of train.sample; null: none
    vae: Location | None = None  # autoencoder to show reconstructions of; null: none. It is slow: it imports torch
    stages: Location | None = None  # folder where train.demo records its finished stages; null: none
    num_right: int = 12  # right answers shown of each split, 0 or more; failures are all shown
    num_previews: int = 6  # preview sheets shown, from the first to the last, >= 2
    num_reconstructions: int = 8  # pictures passed through the VAE, 0 or more
    num_best: int = 6  # examples with the best and with the worst scores, each, 0 or more
    # Band of reference runs to compare with: a name in bench/results/bands, or a file of bench.bands; null: none.
    reference: Location | None = None
    title: str = "Transfusion: training report"  # of the page
    output: Location | None = None  # file to write; null: report.html in the first run folder

    def __post_init__(self) -> None:
        for name, least in (("num_right", 0), ("num_previews", 2), ("num_reconstructions", 0), ("num_best", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least {least}")
        if not self.run:
            raise ValueError("run=[]: expected the run_dir of at least one `python -m train.pretrain`")
        for name, folders in (("run", self.run), ("evaluation", self.evaluation)):
            if len({Path(folder) for folder in folders}) < len(folders):
                raise ValueError(f"{name}={folders}: expected each folder once")


class LeftOut(Exception):
    """A section has nothing to show; the message is printed in its place."""


@dataclass(frozen=True)
class RunInputs:
    """One run. `name` is as short as it can be and still tell the runs apart."""

    folder: Path
    name: str
    recipe: dict[str, Any]  # nested; empty without config.yaml
    columns: Columns
    events: list[dict[str, Any]]  # of events.jsonl; earlier versions wrote none
    bad_updates: list[dict[str, Any]]
    attempts: int  # starts so far, 0 if unknown

    def setting(self, name: str) -> Any:
        """Return a setting by its dotted name, None where the config lacks it."""
        found: Any = self.recipe
        for part in name.split("."):
            found = found.get(part) if isinstance(found, dict) else None
        return found


@dataclass(frozen=True)
class EvaluationInputs:
    """One evaluation; `facts` is empty and there are no examples as long as it is not finished."""

    folder: Path
    name: str
    facts: dict[str, Any]  # of evaluation.json
    scores: dict[str, dict[str, Any]]  # by name: value, low, high, items; the last three may be null
    examples: list[dict[str, Any]]


@dataclass(frozen=True)
class ReportInputs:
    """The outputs that are there."""

    config: ReportConfig
    command: str
    runs: list[RunInputs]
    evaluations: list[EvaluationInputs]
    samples: list[dict[str, Any]]
    seconds: dict[str, float]  # of each finished stage, in the order they finished
    unreadable: list[str]  # a sentence for each file with unreadable lines
    band: Band | None = None  # of the reference
    verdicts: dict[str, Verdict] = field(default_factory=dict)  # how each run compares with it, by name


def gather(config: ReportConfig, command: str) -> ReportInputs:
    """Read all inputs. Raises FileNotFoundError or ValueError if a run is no run folder or a file is damaged."""
    unreadable: list[str] = []
    runs = [_run(Path(path), name, unreadable) for path, name in zip(config.run, _names(config.run), strict=True)]
    folders = zip(config.evaluation, _names(config.evaluation), strict=True)
    evaluations = [_evaluation(Path(path), name, unreadable) for path, name in folders]
    marks = Path(config.stages).glob("*.json") if config.stages else []  # written by rename: all are whole
    stages = {path.stem: _object(path) for path in sorted(marks, key=lambda path: path.stat().st_mtime)}
    samples = _json_lines(Path(config.samples) / "results.jsonl", unreadable) if config.samples else []
    seconds = {name: mark["seconds"] for name, mark in stages.items() if "seconds" in mark}  # finished ones have it
    band = load_band(config.reference) if config.reference else None
    verdicts = {run.name: _verdict(run, band) for run in runs} if band else {}
    return ReportInputs(config, command, runs, evaluations, samples, seconds, unreadable, band, verdicts)


def _verdict(run: RunInputs, band: Band) -> Verdict:
    rows = run.columns.rows([*band.curves, *band.per_step])
    return compare(rows, band, run.recipe or None)


def _run(folder: Path, name: str, unreadable: list[str]) -> RunInputs:
    if not folder.is_dir():
        raise FileNotFoundError(f"run={folder}: no such folder; give the run_dir of a `python -m train.pretrain`")
    if not any((folder / name).is_file() for name in ("config.yaml", "metrics.jsonl")):
        raise ValueError(
            f"run={folder}: not a run folder of train.pretrain: it has neither config.yaml nor metrics.jsonl"
        )
    recipe = read_yaml(str(folder / "config.yaml")) if (folder / "config.yaml").is_file() else {}
    columns = Columns(folder / "metrics.jsonl")
    _remark(folder / "metrics.jsonl", columns.unreadable, unreadable)
    events = _json_lines(folder / "events.jsonl", unreadable)
    bad_updates = _json_lines(folder / "bad_updates.jsonl", unreadable)
    attempt = _object(folder / "attempt.json").get("attempt", 0) if (folder / "attempt.json").is_file() else 0
    return RunInputs(folder, name, recipe, columns, events, bad_updates, attempt)


def _evaluation(folder: Path, name: str, unreadable: list[str]) -> EvaluationInputs:
    path = folder / "evaluation.json"
    facts = _object(path, "run train.evaluate again") if path.is_file() else {}
    examples = _json_lines(folder / "examples.jsonl", unreadable)
    scores = facts.get("scores", {})
    if not isinstance(scores, dict) or not all(isinstance(score, dict) for score in scores.values()):
        raise ValueError(f"{path}: its scores are not those of train.evaluate; run that again")
    for task in ("text_to_image", "image_to_text"):  # where earlier versions had the scenes' shares
        for goal, value in (facts.get(task) or {}).items():
            split = goal.removeprefix("all_") if goal.startswith("all_") else "seen"
            count = sum(example.get("split") == split for example in examples)
            if value is not None and count:
                scores[f"scenes/{task}/{goal}"] = vars(share(round(value * count), count))
    return EvaluationInputs(folder, name, facts, scores, examples)


def _names(paths: list[str]) -> list[str]:
    """Return the last parts of paths, as many as tell them apart."""
    parts = [Path(path).parts for path in paths]
    for depth in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(of_path[-depth:]) for of_path in parts]
        if len(set(names)) == len(names):
            return names
    return list(paths)


def _object(path: Path, remedy: str = "remove it") -> dict[str, Any]:
    """Read a JSON object; raise ValueError for anything else."""
    try:
        found = loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: damaged ({error}); {remedy}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: damaged (not a JSON object); {remedy}")
    return found


def _json_lines(path: Path, unreadable: list[str]) -> list[dict[str, Any]]:
    """Read one JSON object a line, none if there is no file; add a sentence to `unreadable` if lines are skipped."""
    rows, bad = read_json_lines(path)
    _remark(path, bad, unreadable)
    return rows


def _remark(path: Path, bad: int, unreadable: list[str]) -> None:
    if bad:
        unreadable.append(f"{path}: {bad} unreadable line(s) left out, as left by a write in progress or a kill.")
