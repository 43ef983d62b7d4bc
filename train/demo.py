"""Run the whole demo: draw scenes, train tokenizer and VAE, encode, pretrain, sample, evaluate, report.

Each stage is a program of its own, run here with the command that a person would type; finished stages are reused
while their commands and configs stay the same.
"""

import hashlib
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from data.durable import atomic_write
from data.storage import Location
from train.config import load_config, run_program

HERE = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    root: Location = "."  # folder in which runs/demo is made
    smoke: bool = False  # a minute of every stage at toy length: shows that it runs, not what it learns
    ranks: int = 2  # processes of the stages that run distributed, >= 1


CONFIG = DemoConfig


@dataclass(frozen=True)
class Stage:
    name: str
    work: float  # its share of the demo, in seconds of some machine: how they compare is all that counts
    output: str  # what it makes, removed before a finished stage is made anew
    command: tuple[str, ...]


def stages(config: DemoConfig) -> list[Stage]:
    """Return the stages in order; `smoke` only shortens them."""

    def run(name: str, work: float, program: str, output: str, *more: str, distributed: bool = False) -> Stage:
        launcher = ("torchrun", "--nproc-per-node", str(config.ranks)) if distributed else ("python",)
        short = SMOKE.get(program, ()) if config.smoke else ()
        settings = f"config=configs/demo/{program}.yaml"
        work = 1.0 if config.smoke else work  # at toy length most of a stage is its start
        return Stage(name, work, f"{DEMO}/{output}", (*launcher, "-m", f"train.{program}", settings, *more, *short))

    def encode(what: str, *more: str, distributed: bool = False) -> Stage:
        output = f"latents/{what}"
        folders = (f"inputs=[{DEMO}/scenes/{what}]", f"output={DEMO}/{output}")
        work = 15 if distributed else 3
        return run(f"encode {what}", work, "encode", output, *folders, *more, distributed=distributed)

    return [
        run("scenes", 7, "scenes", "scenes"),
        run("tokenizer", 1, "tokenizer", "tokenizer.model"),
        run("vae", 40, "vae", "vae", distributed=True),
        encode("train", distributed=True),
        encode("heldout", f"stats_from={DEMO}/latents/train"),
        encode("text"),
        encode("text_heldout"),
        run("pretrain", 155, "pretrain", "pretrain", distributed=True),
        run("sample", 6, "sample", "samples"),
        run("evaluate", 19, "evaluate", "evaluation", distributed=True),
        run("report", 7, "report", "report.html"),
    ]


DEMO = "runs/demo"
SMOKE = {
    "scenes": ("num_train=400", "shard_size=100", "num_text=200", "num_text_heldout=40", "num_heldout_two_shapes=8"),
    "vae": ("optim.steps=8", "optim.warmup_steps=2"),
    "pretrain": (
        "optim.steps=12",
        "optim.warmup_steps=2",
        "checkpoint.interval_steps=6",
        "preview.interval_steps=6",
        "log.interval_steps=2",
    ),
    "evaluate": ("max_prompts=8", "steps=4"),
    "sample": ("steps=4",),
}


def main(argv: list[str]) -> int:
    config = load_config(CONFIG, argv)
    root = Path(config.root)
    folder = root / DEMO
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "stages").mkdir(exist_ok=True)
    todo = stages(config)
    seconds: dict[str, float] = {}
    fingerprint = ""
    for number, stage in enumerate(todo, start=1):
        mark = folder / "stages" / f"{stage.name.replace(' ', '-')}.json"
        before = json.loads(mark.read_text(encoding="utf-8")) if mark.is_file() else {}
        fingerprint = _fingerprint(stage, fingerprint)
        head = f"[{number}/{len(todo)}] {stage.name}"
        if before.get("fingerprint") == fingerprint and "seconds" in before:
            print(f"{head}: done before in {before['seconds']:.0f} s", flush=True)
            seconds[stage.name] = before["seconds"]
            continue
        if before.get("fingerprint", fingerprint) != fingerprint:  # of another config, or from other inputs
            _remove(root / stage.output)
        _write(mark, {"fingerprint": fingerprint})
        print(f"\n{head}{_time_left(todo[: number - 1], todo[number - 1 :], seconds)}", flush=True)
        print(f"$ {shlex.join(stage.command)}", flush=True)
        start = time.monotonic()
        status = _run(_executable(stage.command), root)
        if status:
            print(f"demo: {stage.name} ended with status {status}; `make demo` goes on from here", file=sys.stderr)
            return status
        seconds[stage.name] = time.monotonic() - start
        _write(mark, {"fingerprint": fingerprint, "seconds": seconds[stage.name]})
    scores = json.loads((folder / "evaluation" / "evaluation.json").read_text(encoding="utf-8"))
    summary = {key: scores[key] for key in ("text_to_image", "image_to_text", "heldout")}
    summary["seconds"] = {**seconds, "total": sum(seconds.values())}
    _write(folder / "demo.json", summary)
    print(json.dumps(summary, indent=1))
    print(f"report: {folder / 'report.html'}")
    return 0


def _time_left(done: list[Stage], todo: list[Stage], seconds: dict[str, float]) -> str:
    """Say how long `todo` takes at the pace at which this machine ran `done`; nothing before there is a pace."""
    if not done:
        return ""
    pace = sum(seconds[stage.name] for stage in done) / sum(stage.work for stage in done)
    return f", about {math.ceil(pace * sum(stage.work for stage in todo) / 60)} min to the end at this machine's pace"


def _run(command: list[str], root: Path) -> int:
    """Run a stage and return its exit status. Ctrl-C reaches it too: it saves and ends, and only then does this.

    subprocess.run would kill it after a quarter of a second, and of torchrun's ranks nobody would know any more.
    """
    process = subprocess.Popen(command, cwd=root, env=_environment())
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            print("demo: waiting for the stage to stop", file=sys.stderr, flush=True)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _write(path: Path, contents: dict) -> None:
    with atomic_write(path) as file:
        file.write(json.dumps(contents, indent=1).encode())


def _fingerprint(stage: Stage, previous: str) -> str:
    """Hash the command, the config file it names and the fingerprint of the stage before, whose output it may read."""
    digest = hashlib.sha256(f"{previous} {shlex.join(stage.command)}".encode())
    for argument in stage.command:
        if argument.startswith("config="):
            digest.update((HERE / argument.removeprefix("config=")).read_bytes())
    return digest.hexdigest()[:16]


def _executable(command: tuple[str, ...]) -> list[str]:
    """Return the command with this environment's programs and absolute config paths, to run in any folder."""
    absolute = [f"config={HERE / a.removeprefix('config=')}" if a.startswith("config=") else a for a in command[1:]]
    torchrun = ["-m", "torch.distributed.run"] if command[0] == "torchrun" else []
    return [sys.executable, *torchrun, *absolute]


def _environment() -> dict[str, str]:
    paths = [str(HERE), os.environ.get("PYTHONPATH", "")]
    return {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


if __name__ == "__main__":
    run_program(main)
