"""Run the whole demo: draw scenes, train tokenizer and VAE, encode, pretrain, sample, evaluate, report.

Each stage is a program, run with the command that a person would type. A finished stage is skipped until its command,
its config file or an earlier stage changes; then its program decides what to reuse, resume, redo or refuse.
"""

import json
import math
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from data.durable import write_durably
from data.storage import Location
from data.strict_json import dumps, loads
from train.config import load_config, run_program
from train.evaluation.scores import Score, lines_of
from train.pages.reference_band import compare_folder, load_band

HERE = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    root: Location = "."  # folder in which runs/demo is created
    smoke: bool = False  # every stage at toy length, a minute in all: shows that it runs, not what it learns
    ranks: int = 2  # processes of the distributed stages, >= 1


CONFIG = DemoConfig


@dataclass(frozen=True)
class Stage:
    name: str  # its program, and the folder of scenes that it encodes
    work: float  # expected time: only the ratios between stages count
    distributed: bool = False
    settings: str = ""
    smoke: str = ""  # settings for smoke=true

    @property
    def config_file(self) -> Path:
        return HERE / f"configs/demo/{self.name.partition(' ')[0]}.yaml"

    def command(self, config: DemoConfig) -> list[str]:
        """Return the command that a person types in `root`."""
        program, _, part = self.name.partition(" ")
        launcher = f"torchrun --nproc-per-node {config.ranks}" if self.distributed else "python"
        file = os.path.relpath(self.config_file, Path(config.root).resolve())
        folders = f"inputs=[runs/demo/scenes/{part}] output=runs/demo/latents/{part}" if part else ""
        settings = f"{folders} {self.settings} {self.smoke if config.smoke else ''}"
        return [*launcher.split(), "-m", f"train.{program}", f"config={file}", *settings.split()]


SMOKE_SCENES = "num_train=400 shard_size=100 num_text=200 num_text_heldout=40 num_heldout_two_shapes=8"
SMOKE_STEPS = "optim.steps=12 checkpoint.interval_steps=6 preview.interval_steps=6 log.interval_steps=2"
STAGES = [
    Stage("scenes", 7, smoke=SMOKE_SCENES),
    Stage("tokenizer", 1),
    Stage("vae", 40, distributed=True, smoke="optim.steps=8 optim.warmup_steps=2"),
    Stage("encode train", 15, distributed=True),
    Stage("encode heldout", 3, settings="stats_from=runs/demo/latents/train"),
    Stage("encode text", 3),
    Stage("encode text_heldout", 3),
    Stage("pretrain", 155, distributed=True, smoke=f"{SMOKE_STEPS} optim.warmup_steps=2"),
    Stage("sample", 6, smoke="steps=4"),
    Stage("evaluate", 19, distributed=True, smoke="max_prompts=8 steps=4"),
    Stage("report", 7),
]


def main(argv: list[str]) -> int:
    config = load_config(CONFIG, argv)
    folder = Path(config.root, "runs/demo")
    (folder / "stages").mkdir(parents=True, exist_ok=True)
    marks = [folder / "stages" / f"{stage.name.replace(' ', '-')}.json" for stage in STAGES]
    seconds: dict[str, float] = {}
    for i, stage in enumerate(STAGES):
        command, head = stage.command(config), f"[{i + 1}/{len(STAGES)}] {stage.name}"
        made_by = {"command": shlex.join(command), "config": stage.config_file.read_text(encoding="utf-8")}
        finished = json.loads(marks[i].read_text(encoding="utf-8")) if marks[i].is_file() else {}
        if finished.items() >= made_by.items():
            seconds[stage.name] = finished["seconds"]
            print(f"{head}: done before in {finished['seconds']:.0f} s", flush=True)
            continue
        for mark in marks[i:]:  # later stages may read what this one writes
            mark.unlink(missing_ok=True)
        print(f"\n{head}{_time_left(seconds, config.smoke)}\n$ {shlex.join(command)}", flush=True)
        start = time.monotonic()
        if status := _run(command, Path(config.root)):
            remedy = f"the same command resumes; to start over, remove {folder} first"
            print(f"demo: {stage.name} ended with status {status}; {remedy}", file=sys.stderr)
            return status
        seconds[stage.name] = time.monotonic() - start
        write_durably(marks[i], dumps({**made_by, "seconds": seconds[stage.name]}, indent=1).encode())
    scores = loads((folder / "evaluation/evaluation.json").read_text(encoding="utf-8"))
    summary = {key: scores[key] for key in ("scores", "heldout")}
    summary["seconds"] = {**seconds, "total": sum(seconds.values())}
    write_durably(folder / "demo.json", dumps(summary, indent=1).encode())
    lines = lines_of({name: Score(**score) for name, score in scores["scores"].items()})
    print("\n".join(["", *lines, f"{sum(seconds.values()):.0f} s in all", f"report: {folder / 'report.html'}"]))
    if not config.smoke:  # too short to compare
        verdict = compare_folder(folder / "pretrain", load_band("demo"))
        print(f"losses: {verdict.words}{'' if verdict.within else ' (what to do: docs/training.md)'}")
    return 0


def _time_left(seconds: dict[str, float], smoke: bool) -> str:
    """Say how long the other stages take at the pace of those in `seconds`; nothing before there is a pace."""
    work = {stage.name: 1.0 if smoke else stage.work for stage in STAGES}  # a smoke is mostly startup
    done = sum(work[name] for name in seconds)
    if not done:
        return ""
    left = sum(seconds.values()) / done * (sum(work.values()) - done)
    return f", about {math.ceil(left / 60)} min to the end at this machine's pace"


def _run(command: list[str], root: Path) -> int:
    """Run a stage with this Python and return its exit status. Ctrl-C reaches the stage, which saves and exits first.

    subprocess.run would kill it after a quarter of a second, and leave torchrun's ranks behind.
    """
    program = [sys.executable, "-m", "torch.distributed.run"] if command[0] == "torchrun" else [sys.executable]
    paths = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": paths}
    process = subprocess.Popen([*program, *command[1:]], cwd=root, env=environment)
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            print("demo: waiting for the stage to stop", file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_program(main)
