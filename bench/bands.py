"""Make the demo's reference band: its curves' spread over seeds and machines: `python -m bench.bands`.

Each machine makes its own data by the demo's stages and trains the demo's model from its seeds; then come trainings
with a fault each, which the band must tell apart. The machines differ in what rounding depends on: a VAE rounded
otherwise is another VAE after 800 steps, and moves the image loss more than a seed does. By name:

  native                as `make demo` runs here: two ranks, in bfloat16 if the CPU has it
  avx2                  as on a CPU without AVX-512: float32, and the kernels of AVX2
  one-rank, four-ranks  another number of ranks, in the other stages too

Runs go one after the other. A finished one is not repeated and an interrupted one resumes, so the same command goes on.
`output` gets the band, all runs' curves, and how a band without a run judges it (train/pages/reference_band.py); the
last line is one JSON object. The defaults take an hour on two cores.
"""

import datetime
import importlib
import json
import math
import os
import platform
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import NormalDist, mean, median, variance
from typing import Any

import torch
from tqdm import tqdm

from bench import programs
from bench.programs import HERE
from data.durable import write_durably
from data.storage import Location
from train.config import load_config, read_yaml, run_program
from train.distributed.parallelize import ParallelConfig, compute_dtype
from train.optim.optimizer import learning_rate
from train.pages.reference_band import NAMES, Band, Curve, compare, rows_of, settings_of, smoothed
from train.pretrain_config import PretrainConfig

STEPS, FAULTY_STEPS = 800, 400  # of the demo; a fault shows in half of them
SMOOTHED_ROWS, POOLED_ROWS = 5, 3  # of a value; on either side of a row, whose variances are one row's
PLACES = ("folder=", "output=")
COUNTS = ("step", "tokens_seen", "images_seen")
CONTENT, CONFIDENCE = 0.95, 0.9  # of the tolerance interval


@dataclass(frozen=True)
class Machine:
    ranks: int = 2
    settings: tuple[str, ...] = ()  # of train.pretrain
    environment: Mapping[str, str] = field(default_factory=dict)


AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
MACHINES = {
    "native": Machine(),
    "avx2": Machine(2, ("parallel.dtype=float32",), AVX2),
    "four-ranks": Machine(4),
    "one-rank": Machine(1),
}
SEEDS = {"native": [0, 1, 4, 5], "avx2": [0, 1], "four-ranks": [2], "one-rank": [3]}
FAULTS = {  # what a bug would do to a training, as settings
    "rate-x10": ("optim.learning_rate=0.04",),
    "pictures-always-first": ("data.order.caption_first=0",),
    "no-image-loss": ("loss.image_weight=0",),
    "no-warm-up": ("optim.warmup_steps=0",),
    "causal-in-images": ("model.image_attention=causal",),
    "rate-x0.1": ("optim.learning_rate=0.0004",),
    "no-clipping": ("optim.clip_norm=1000000",),
}


@dataclass(frozen=True, kw_only=True)
class BandsConfig:
    folder: Location = "runs/bands"  # everything is made here, 300 MB
    seeds: dict[str, list[int]] = field(default_factory=lambda: SEEDS)  # of the runs by machine; NAME=[]: none of it
    faults: list[str] = field(default_factory=lambda: [*FAULTS])  # to train with, by name
    output: Location = "bench/results/bands/demo.json"  # the band

    def __post_init__(self) -> None:
        for name, known in (("seeds", MACHINES), ("faults", FAULTS)):
            if unknown := [key for key in getattr(self, name) if key not in known]:
                raise ValueError(f"{name}: {', '.join(unknown)}: expected some of {', '.join(known)}")
        if sum(map(len, self.seeds.values())) < 4:
            raise ValueError(f"seeds={self.seeds}: expected four runs at least: three tell how the fourth differs")


CONFIG = BandsConfig


@dataclass(frozen=True)
class Training:
    """One run of train.pretrain on one machine's data."""

    machine: str
    name: str
    seed: int
    fault: str = ""

    @property
    def steps(self) -> int:
        return FAULTY_STEPS if self.fault else STEPS

    def settings(self) -> list[str]:
        """Return what it changes of the demo's command; a faulty run's rates are those of the full length's half."""
        found = [f"seed={self.seed}", f"run_dir=runs/demo/{self.name}", "preview.interval_steps=null"]
        found += ["log.wandb=disabled", "checkpoint.keep_last=1", *MACHINES[self.machine].settings]
        if self.fault:
            found += FAULTS[self.fault]
            recipe = load_config(PretrainConfig, [f"config={HERE}/configs/demo/pretrain.yaml", *found])
            rate = learning_rate(FAULTY_STEPS, recipe.optim)
            found += [f"optim.steps={FAULTY_STEPS}", f"optim.min_learning_rate={rate!r}"]
        return found


def main(argv: list[str]) -> int:
    config = load_config(CONFIG, argv)
    folder = Path(config.folder).resolve()
    wanted = trainings(config)
    for machine in dict.fromkeys(training.machine for training in wanted):
        prepare(folder / machine, MACHINES[machine])
    train(wanted, folder)
    record = record_of(wanted, folder, argv)
    write_durably(Path(config.output), _json(record).encode())
    found = {key: record[key] for key in ("bench", "command", "made_from", "left_out", "faults_found")}
    print(json.dumps({**found, "output": str(config.output)}))
    return 0


def trainings(config: BandsConfig) -> list[Training]:
    """Return the runs, machine by machine, then the faults, whose seeds no other run has."""
    found = [Training(m, f"pretrain-{seed}", seed) for m, seeds in config.seeds.items() for seed in seeds]
    faults = [name for name in FAULTS if name in config.faults]
    return found + [Training("native", f"fault-{name}", 100 + [*FAULTS].index(name), name) for name in faults]


def prepare(root: Path, machine: Machine) -> None:
    """Make a machine's data by the demo's stages before pretraining, each once."""
    demo = importlib.import_module("train.demo")
    config, names = demo.DemoConfig(root=str(root), ranks=machine.ranks), [stage.name for stage in demo.STAGES]
    stages = demo.STAGES[: names.index("pretrain")]
    commands = {stage.name: _here(stage.command(config)) for stage in stages}
    programs.run_once(commands, root / "logs", cwd=root, environment=machine.environment)


def train(wanted: Sequence[Training], folder: Path) -> None:
    """Do the runs that are not finished; the bar counts steps."""
    demo = importlib.import_module("train.demo")
    (stage,) = (stage for stage in demo.STAGES if stage.name == "pretrain")
    with tqdm(total=sum(training.steps for training in wanted), unit="step") as bar:
        for training in wanted:
            root, before = folder / training.machine, bar.n
            machine, run_dir = MACHINES[training.machine], root / "runs" / "demo" / training.name
            bar.set_postfix_str(f"{training.machine} {training.name}")
            if last_step(run_dir) < training.steps:
                command = stage.command(demo.DemoConfig(root=str(root), ranks=machine.ranks)) + training.settings()
                log = root / "logs" / f"{training.name}.log"
                with programs.start(_here(command), log, root, machine.environment) as process:
                    while process.poll() is None:
                        time.sleep(1)
                        bar.update(before + last_step(run_dir) - bar.n)
                    programs.expect_success(process.returncode, log)
            else:
                bar.initial += training.steps  # not work of this call: the rate is that of what is left
            bar.update(before + training.steps - bar.n)


def record_of(wanted: Sequence[Training], folder: Path, argv: list[str]) -> dict[str, Any]:
    """Return the band, the curves that it is made of, and its judgement of each run by the others."""
    rows = {training: steps_of(folder / training.machine / "runs" / "demo" / training.name) for training in wanted}
    good = {f"{t.machine}-{t.seed}": found for t, found in rows.items() if not t.fault}
    faulty = {t.fault: found for t, found in rows.items() if t.fault}
    first = next(t for t in wanted if not t.fault)
    settings = settings_of(read_yaml(str(folder / first.machine / "runs" / "demo" / first.name / "config.yaml")))
    seeds = len({t.seed for t in wanted if not t.fault})
    machines = {t.machine: asdict(MACHINES[t.machine]) for t in wanted if not t.fault}
    made_from = f"{len(good)} runs: {seeds} seeds, {len(machines)} machines"
    band = band_of("demo", good, settings, made_from)
    left_out = {
        name: compare(of_run, band_of("demo", {n: r for n, r in good.items() if n != name}, settings, made_from))
        for name, of_run in good.items()
    }
    found = {name: compare(of_run, band) for name, of_run in faulty.items()}
    native = str(compute_dtype(ParallelConfig(), torch.device("cpu"))).removeprefix("torch.")
    return {
        "bench": "bands",
        **asdict(band),
        "how": how(len(good)),
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, native dtype {native}",
        "machines": machines,
        "versions": {"python": platform.python_version(), **{n: version(n) for n in ("torch", "diffusers", "numpy")}},
        "command": shlex.join(["python", "-m", "bench.bands", *(a for a in argv if not a.startswith(PLACES))]),
        "left_out": {name: verdict.words for name, verdict in left_out.items()},
        "faults_found": {name: verdict.words for name, verdict in found.items()},
        "runs": {name: columns(of_run) for name, of_run in good.items()},
        "faults": {name: {"settings": FAULTS[name], **columns(of_run)} for name, of_run in faulty.items()},
    }


def band_of(name: str, runs: Mapping[str, list[dict]], settings: dict[str, Any], made_from: str) -> Band:
    """Return the band of these runs' rows, which are of the same steps."""
    some = next(iter(runs.values()))
    steps = [row["step"] for row in some]
    curves = {
        metric: curve_of([smoothed([row[metric] for row in rows], SMOOTHED_ROWS) for rows in runs.values()])
        for metric in NAMES
    }
    per_step = {key: mean(rows[-1][key] for rows in runs.values()) / steps[-1] for key in COUNTS[1:]}
    return Band(name, steps, curves, SMOOTHED_ROWS, settings, per_step, made_from)


def curve_of(runs: Sequence[Sequence[float | None]]) -> Curve:
    """Return, row by row, the median of the runs' values, and exp of their mean log -+ factor x standard deviation.

    The deviation is pooled over neighbouring rows: of a few runs a single row's is often far too small.
    """
    logs = [[math.log(value) for value in row if value] for row in zip(*runs, strict=True)]
    means, variances = [mean(row) for row in logs], [variance(row) for row in logs]
    k = tolerance_factor(len(runs))
    curve = Curve([], [], [])
    for i, middle in enumerate(means):
        spread = k * math.sqrt(mean(variances[max(0, i - POOLED_ROWS) : i + POOLED_ROWS + 1]))
        places = ((curve.median, median(logs[i])), (curve.low, middle - spread), (curve.high, middle + spread))
        for values, place in places:
            values.append(float(f"{math.exp(place):.5g}"))
    return curve


def tolerance_factor(runs: int) -> float:
    """Return k of the normal tolerance interval mean -+ k s: with CONFIDENCE it holds CONTENT of all runs.

    Howe 1969 (https://doi.org/10.2307/2283644), with Wilson and Hilferty's quantile of chi squared.
    """
    degrees, normal = runs - 1, NormalDist()
    z = normal.inv_cdf((1 + CONTENT) / 2)
    ninth = 2 / (9 * degrees)
    quantile = degrees * (1 - ninth + normal.inv_cdf(1 - CONFIDENCE) * math.sqrt(ninth)) ** 3
    return z * math.sqrt(degrees * (1 + 1 / runs) / quantile)


def how(runs: int) -> str:
    """Say how low and high are made."""
    return (
        f"A value is the median of a run's last {SMOOTHED_ROWS} rows. low and high are exp(m -+ "
        f"{tolerance_factor(runs):.2f} s) of the mean m and standard deviation s of the logs of {runs} runs, s pooled "
        f"over {POOLED_ROWS} rows on either side: Howe's tolerance interval, which with {CONFIDENCE:.0%} confidence "
        f"holds {CONTENT:.0%} of all runs. left_out: how the band of the other runs judges a run. faults_found: how "
        f"the band judges runs with a fault, stopped at step {FAULTY_STEPS}"
    )


def steps_of(run_dir: Path) -> list[dict[str, Any]]:
    """Return a run's whole rows of training steps; none if there is no file."""
    return [row for row in rows_of(run_dir) if "text_loss" in row]


def last_step(run_dir: Path) -> int:
    """Return the step of the last row, 0 without any."""
    return max((row["step"] for row in steps_of(run_dir)), default=0)


def columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[float | None]]:
    """Return a run's values by name, losses and norms in five digits."""
    found: dict[str, list[float | None]] = {name: [row[name] for row in rows] for name in COUNTS}
    return found | {name: [row[name] and float(f"{row[name]:.5g}") for row in rows] for name in NAMES}


def _here(command: list[str]) -> tuple[str, ...]:
    """Return a command of the demo, of python or torchrun, as one of this Python."""
    return (sys.executable, *(("-m", "torch.distributed.run") if command[0] == "torchrun" else ()), *command[1:])


def _json(record: Mapping[str, Any], depth: int = 2) -> str:
    """Return JSON with a line for each entry of each mapping down to `depth`."""
    if not isinstance(record, dict) or not depth or not record:
        return json.dumps(record)
    space = " " * (3 - depth)
    inside = ",\n".join(f"{space}{json.dumps(key)}: {_json(value, depth - 1)}" for key, value in record.items())
    return "{\n" + inside + "\n" + space[1:] + "}"


if __name__ == "__main__":
    run_program(main)
