"""Training runs small enough for a test (bench.job.SMALL_RUN): started, watched and compared."""

import json
import signal
import time
from collections.abc import Callable, Sequence, Set
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.job import NUMBERS, SMALL_RUN, read_checkpoint, rows
from bench.ranks import ProgramRanks
from data.tokenizer import Tokenizer
from model.autoencoders import load_latent_space
from tests.sources import make_source, pairs
from train import pretrain
from train.checkpoints import checkpoint
from train.distributed.ranks import alone

Arguments = Callable[..., list[str]]  # the fixture `arguments`
STEPS = 24
SAVE_EVERY = 5


def settings(run_dir: Path, tokenizer: Tokenizer, sources: dict[str, Path], **changes: Any) -> list[str]:
    """Return the arguments of a small run; `changes` by key, two underscores for a dot."""
    given = {
        **SMALL_RUN,
        "run_dir": run_dir,
        "data.tokenizer": tokenizer.path,
        "optim.steps": STEPS,
        "checkpoint.interval_steps": SAVE_EVERY,
        "timeout_minutes": 0.5,
        **{f"data.sources.{name}.path": path for name, path in sources.items()},
        **{name.replace("__", "."): value for name, value in changes.items()},
    }
    return [f"{key}={value}" for key, value in given.items()]


def launch(argv: Sequence[str], world_size: int | None) -> ProgramRanks:
    """Start `pretrain` on ranks, or directly (None); what it prints goes next to the tokenizer."""
    tokenizer = next(Path(a.split("=")[1]) for a in argv if a.startswith("data.tokenizer="))
    return ProgramRanks(pretrain.main, argv, world_size, tokenizer.parent / f"{time.monotonic_ns()}.log")


def finish(argv: Sequence[str], world_size: int | None, status: int = 0) -> str:
    """Run until every rank has ended with `status`; return what was printed."""
    with launch(argv, world_size) as run:
        return expect(run, status)


def expect(run: ProgramRanks, status: int) -> str:
    """Wait until every rank has ended with `status`, of an orderly end without a traceback; return what was printed."""
    statuses = run.wait()
    assert set(statuses) == {status} and "Traceback" not in run.output, f"{statuses}\n{run.output}"
    return run.output


def stop(
    argv: Sequence[str], world_size: int | None, step: int, number: int, rank: int | None = None, status: int = 75
) -> str:
    """Run until `step` is logged and send a signal to one rank or all: they save and end with `status`.

    Returns what was printed.
    """
    run_dir = [Path(argument.split("=")[1]) for argument in argv if argument.startswith("run_dir=")][-1]
    with launch(argv, world_size) as run:
        wait_for(reached(run_dir, step), run)
        run.signal(number, rank)
        output = expect(run, status)
    saved = saved_steps(run_dir)[-1]
    assert f"stopped by {signal.Signals(number).name} after step {saved}; saved" in output, output
    assert rows(run_dir)[-1]["step"] == saved
    return output


def numbers(run_dir: Path) -> list[tuple]:
    """Return (step, what a run must reproduce) of each row of training, all but times and speeds."""
    return [(row["step"], *(row[name] for name in NUMBERS)) for row in rows(run_dir) if "text_loss" in row]


def wait_for(condition: Callable[[], object], run: ProgramRanks, timeout_s: float = 60.0) -> None:
    """Wait until `condition()` holds; fails when the run ends before."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert run.running, f"ended before:\n{run.output}"
        assert time.monotonic() < deadline, f"not within {timeout_s} s:\n{run.output}"
        time.sleep(0.002)


def reached(run_dir: Path, step: int) -> Callable[[], bool]:
    """Return the condition that the run has logged `step`."""
    return lambda: any(row["step"] >= step for row in rows(run_dir)[-1:])


def saved_steps(run_dir: Path) -> list[int]:
    """Return the steps of the checkpoints, each of which must verify."""
    folders = checkpoint.saved(run_dir / "checkpoints")
    assert [problem for folder in folders for problem in checkpoint.verify(folder, alone())] == []
    return [checkpoint.step_of(folder) for folder in folders]


def saved_state(run_dir: Path) -> tuple[dict[str, torch.Tensor], dict, dict]:
    """Return the last checkpoint's tensors, its lanes and its other facts."""
    return read_checkpoint(checkpoint.saved(run_dir / "checkpoints")[-1])


def assert_same_end(run_dir: Path, expected: Path, emas: Set[str] = frozenset({"ema-7"})) -> None:
    """The last checkpoints hold the same bits of weights, moments and averages, the same lanes and counters."""
    (tensors, lanes, meta), (other_tensors, other_lanes, other_meta) = saved_state(run_dir), saved_state(expected)
    assert tensors.keys() == other_tensors.keys()
    assert {name.split(".")[0] for name in tensors} == {"model", "optimizer", *emas}
    assert [name for name, tensor in tensors.items() if not torch.equal(tensor, other_tensors[name])] == []
    assert lanes == other_lanes and meta == other_meta


def assert_refused(*starts: tuple[list[str], list[str]], world_size: int | None = None) -> None:
    """Each start (arguments, words), all side by side, exits 2 with its words in one message and no traceback."""
    with ExitStack() as stack:
        runs = [stack.enter_context(launch(argv, world_size)) for argv, _ in starts]
        statuses = [run.wait() for run in runs]
        for run, status, (_, words) in zip(runs, statuses, starts, strict=True):
            for log in run.logs:
                message = [line for line in log.read_text().splitlines() if "Warning" not in line]
                assert len(message) == 1 and "train.pretrain: " in message[0], (words, message)
                assert [word for word in words if word not in message[0]] == [], message
            assert set(status) == {2}, (words, status, run.output)


@dataclass(frozen=True)
class DrawingRun:
    """A finished run that drew previews, with what it was trained on."""

    argv: list[str]
    run_dir: Path
    vae: Path
    data: Path
    tokenizer: Tokenizer
    output: str  # what it printed


PROMPTS = ["a large red circle", "3 small blue squares"]


def drawing_run(folder: Path, tokenizer: Tokenizer, vae: Path) -> DrawingRun:
    """Train six steps on random latents that claim to be of `vae`; previews and offline wandb are on."""
    documents = pairs(40, grids=[(8, 8)])
    hashed = load_latent_space(vae).hash
    data = make_source(folder / "data", tokenizer, documents, shard_sizes=[20, 20], vae_hash=hashed)
    argv = settings(
        folder / "run",
        tokenizer,
        {"pairs": data},
        vae=vae,
        optim__steps=6,
        checkpoint__interval_steps=3,
        preview__interval_steps=3,
        preview__prompts=json.dumps(PROMPTS),
        preview__steps=3,
        log__wandb="offline",
        parallel__activation_checkpointing="full",
    )
    return DrawingRun(argv, folder / "run", vae, data, tokenizer, finish(argv, 2))
