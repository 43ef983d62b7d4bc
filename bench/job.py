"""A training run as its user meets it: a command, a run folder, and what the folder shows from outside.

Everything known of a run is read from its folder alone, as a person would read it. The ranks are bench/ranks.py's.
"""

import importlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from bench.ranks import Main, ProgramRanks
from data.strict_json import loads
from train.checkpoints import checkpoint
from train.checkpoints.storage import read_index
from train.distributed.ranks import alone

# A model of two layers and five lanes of 64 tokens; data, steps and intervals are the run's own.
SMALL_RUN: Mapping[str, Any] = {
    "device": "cpu",
    "micro_batch_size": 2,
    "model.latent_channels": 2,
    "model.transformer.width": 32,
    "model.transformer.layers": 2,
    "model.transformer.heads": 2,
    "model.transformer.ffn_multiple_of": 16,
    "data.lanes": 5,
    "data.sequence_length": 64,
    "data.shuffle_block": 8,
    "data.look_ahead": 4,
    "optim.learning_rate": 1e-3,
    "optim.warmup_steps": 2,
    "optim.ema_half_lives": [7],
    "parallel.dtype": "float32",
    "log.interval_steps": 1,
}
# What a run must reproduce of each row; times and speeds are left out.
NUMBERS = ("text_loss", "image_loss", "grad_norm", "tokens_seen", "images_seen", "skipped_documents", "learning_rate")


@dataclass
class Job:
    """A run folder and the command that trains in it."""

    run_dir: Path
    settings: dict[str, Any]  # of the command, by key
    logs: Path  # folder for what the ranks print
    attempts: int = 0
    _claim: str = ""  # attempt.json before the newest start

    def start(
        self, world_size: int, changes: dict[str, Any] | None = None, environment: dict[str, str] | None = None
    ) -> ProgramRanks:
        """Run the command; `changes` replace some of its settings."""
        self.attempts += 1
        self._claim = self._attempt_json()
        self.logs.mkdir(parents=True, exist_ok=True)
        log = self.logs / f"{self.attempts:03d}.log"
        return ProgramRanks(pretrain_main(), self.argv(changes), world_size, log, environment)

    def argv(self, changes: dict[str, Any] | None = None) -> list[str]:
        given = {"run_dir": self.run_dir, **self.settings, **(changes or {})}
        return [f"{key}={value}" for key, value in given.items()]

    def claimed(self) -> bool:
        """Return whether an attempt has locked the run folder since the newest start."""
        return self._attempt_json() != self._claim

    def _attempt_json(self) -> str:
        path = self.run_dir / "attempt.json"
        return path.read_text(encoding="utf-8") if path.exists() else ""

    @property
    def metrics(self) -> Path:
        return self.run_dir / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.run_dir / "checkpoints"

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows of training steps in metrics.jsonl."""
        return [row for row in rows(self.run_dir) if "text_loss" in row]

    def evaluations(self) -> list[dict[str, Any]]:
        """Return the rows of evaluations in metrics.jsonl."""
        return [row for row in rows(self.run_dir) if "text_loss" not in row]

    def last_step(self) -> int:
        """Return the step of the last whole row, 0 without any; cheap enough for a thousand calls a second."""
        try:
            with self.metrics.open("rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - 8192))
                lines = [line for line in file.read().splitlines(keepends=True) if line.endswith(b"\n")]
            return loads(lines[-1])["step"] if lines else 0
        except (FileNotFoundError, ValueError):  # not there yet; or one row of more than 8 KiB
            return 0

    def inode(self) -> int | None:
        """Return what distinguishes this metrics.jsonl from the one that a resume replaces it with."""
        return self.metrics.stat().st_ino if self.metrics.exists() else None

    def saved(self) -> list[int]:
        """Return the steps whose checkpoints have their final names."""
        return [checkpoint.step_of(folder) for folder in checkpoint.saved(self.checkpoints)]

    def problems(self) -> dict[int, list[str]]:
        """Return what is wrong with each checkpoint that has its final name; an empty list means intact."""
        folders = checkpoint.saved(self.checkpoints)
        return {checkpoint.step_of(folder): checkpoint.verify(folder, alone()) for folder in folders}

    def newest_intact(self) -> int:
        """Return the step that the next start must resume from, 0 for none."""
        return max((step for step, problems in self.problems().items() if not problems), default=0)

    def folder_of(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:08d}"

    def being_written(self) -> dict[int, Path]:
        """Return the half-written checkpoints by step."""
        return {int(path.name.split("-")[2]): path for path in self.checkpoints.glob(".tmp-step-*")}


def pretrain_main() -> Main:
    """Return the training program; programs are not imported at the top of a module."""
    return importlib.import_module("train.pretrain").main


def rows(run_dir: Path) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl; one that is still being written does not count."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return [loads(line) for line in lines if line.endswith(b"\n")]


def read_checkpoint(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any], dict[str, Any]]:
    """Return a checkpoint's tensors by name, its lanes and its other facts."""
    state: dict[str, dict[str, torch.Tensor]] = {}
    for name, record in read_index(folder).state_dict_metadata.items():
        assert isinstance(record, TensorStorageMetadata), name
        entry, _, rest = name.partition(".")
        state.setdefault(entry, {})[rest] = torch.full(record.size, torch.nan, dtype=record.properties.dtype)
    checkpoint.load(folder, state, alone())
    tensors = {f"{entry}.{rest}": tensor for entry, part in state.items() for rest, tensor in part.items()}
    lanes, meta = (json.loads(checkpoint.read_extra(folder, name)) for name in ("lanes.json", "meta.json"))
    return tensors, lanes, meta
