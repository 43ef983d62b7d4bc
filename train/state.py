"""Everything a training run carries from step to step, and how it is stored in a checkpoint and loaded again.

tensors        weights, optimizer state, averages (EMAs), by parameter name: any number of ranks can load them
lanes.json     the position of every lane
meta.json      counters, fingerprint, held-out metrics, learning rate, latent spec
config.yaml    the resolved config
trained.keys   which records the run trains on
"""

import logging
from collections.abc import Callable, Set
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from data.dataset import DataSet
from data.lane_state import LaneState
from data.loader import StepBatch
from data.manifest import LatentSpec
from data.strict_json import dumps, loads
from model.attention import RopeScaling
from model.lora import LoraConfig
from model.transfusion import Transfusion
from train.checkpoints import checkpoint
from train.checkpoints.saver import Snapshot
from train.checkpoints.trained_records import TRAINED_FILE, TrainedRecords
from train.config import to_yaml
from train.distributed.parallelize import plain_name
from train.distributed.ranks import Ranks
from train.inference.base import read_base
from train.inference.saved_model import stored_records
from train.optim.ema import is_label
from train.optim.groups import frozen_parameters, frozen_set, table
from train.optim.optimizer import Optimizer, learning_rate
from train.pretrain_config import PretrainConfig

log = logging.getLogger(__name__)


@dataclass
class Progress:
    """Counters of a run. `step` is that of the last batch that is done, whether it made an update or not."""

    step: int = 0
    tokens_seen: int = 0  # text, special and image tokens of all ranks, without padding
    images_seen: int = 0
    rollbacks: int = 0
    excluded: list[tuple[int, int]] = field(default_factory=list)  # (first, last) steps whose batches train nothing

    def excludes(self, step: int) -> bool:
        return any(first <= step <= last for first, last in self.excluded)


@dataclass
class TrainState:
    """`lane_states` holds this rank's lanes while training, and all lanes right after a load."""

    model: Transfusion
    optimizer: Optimizer
    fingerprint: Callable[[int], dict[str, str]]  # by step: what a resume after it must find unchanged
    config: PretrainConfig
    data_facts: dict  # for readers: `latent_spec`, `grids`; of grouped or frozen parameters also `groups`, `vocab_size`
    base: str | None = None  # identifies the source of the frozen parameters (train/inference/base.py); None: none are
    progress: Progress = field(default_factory=Progress)
    lane_states: dict[int, LaneState] = field(default_factory=dict)
    back_to: int | None = None  # the step that `resume=STEP` went back to
    metrics: dict[str, float] = field(default_factory=dict)  # held-out losses at the current step
    trained: TrainedRecords | None = None  # what the run trains on

    @classmethod
    def begin(cls, model: Transfusion, optimizer: Optimizer, config: PretrainConfig, data: DataSet) -> "TrainState":
        """Return the state before the first step."""
        facts: dict[str, Any] = {"latent_spec": data.latent_spec and data.latent_spec.fields(), "grids": data.grids}
        if rows := table(model, config.optim.groups, config.model.lora.rank > 0):
            facts["groups"] = rows
        frozen = frozen_parameters(model).keys()
        if frozen:
            facts["vocab_size"] = model.vocab_size  # which a reader must know to make them again
        return cls(model, optimizer, partial(fingerprint, config, data, frozen=frozen), config, facts)

    def mark_done(self, batch: StepBatch) -> None:
        """Count a batch as done, whether or not it made an update."""
        self.lane_states, self.metrics = batch.lane_states, {}
        self.progress.step = batch.step

    def snapshot(self, ranks: Ranks) -> Snapshot:
        """Return what a checkpoint of the current step holds; its tensors are the live ones. Collective."""
        lanes = {lane: state.to_json() for part in ranks.gather(self.lane_states) for lane, state in part.items()}
        meta = {
            "progress": vars(self.progress),
            "guard": self.optimizer.guard.counts.tolist(),
            "back_to": self.back_to,
            "fingerprint": self.fingerprint(self.progress.step),
            "metrics": self.metrics,
            "learning_rate": learning_rate(self.progress.step, self.optimizer.config),
            **self.data_facts,
            **({"base": self.base} if self.base is not None else {}),
        }
        extra = {
            "lanes.json": dumps(lanes).encode(),
            checkpoint.META: dumps(meta).encode(),
            "config.yaml": self.config_yaml,
            **({TRAINED_FILE: self.trained.to_bytes()} if self.trained is not None else {}),
        }
        return Snapshot(self.progress.step, self._tensors(), extra)

    @cached_property
    def config_yaml(self) -> bytes:
        """The resolved config as it lies in the run folder and in each checkpoint; takes ten milliseconds."""
        return to_yaml(self.config).encode()

    def load(self, path: Path, ranks: Ranks) -> TrainedRecords | None:
        """Continue from a verified checkpoint, on any world size; return which records it was trained on. Collective.

        An EMA that the checkpoint lacks starts from its weights; one that is no longer configured is dropped.
        Raises ValueError unless data, tokenizer, latent space, seed, lanes and model are those it was trained with.
        """
        meta, lanes = (
            loads(ranks.on_first(partial(checkpoint.read_extra, path, name)))
            for name in (checkpoint.META, "lanes.json")
        )
        if missing := {"fingerprint", "progress", "guard", "back_to", "metrics", "learning_rate"} - meta.keys():
            raise ValueError(
                f"{path} was written by another version of the trainer: {checkpoint.META} lacks {sorted(missing)}; "
                f"resume with that version, or start another run with its weights: init_from={path}"
            )
        step = meta["progress"]["step"]
        then = meta["fingerprint"] | _statistics(meta["latent_spec"])
        if changed := differences(then, self.fingerprint(step) | _statistics(self.data_facts["latent_spec"])):
            raise ValueError(
                f"{path} was trained with different settings: {'; '.join(changed.values())}. "
                f"{_remedy(set(changed), path)} (Learning rate, steps, ranks, workers and intervals may change; a "
                f"source may be appended with weight=0 and weight_from={{{step + 1}: …}})"
            )
        before, rate = meta["learning_rate"], learning_rate(step + 1, self.optimizer.config)
        if ranks.is_first and rate > 2 * before:
            log.warning("the learning rate was %.2g when %s was saved and resumes at %.2g", before, path, rate)
        saved, emas = ranks.on_first(lambda: checkpoint.entries(path)), self.optimizer.emas
        added, dropped = emas.keys() - saved, {name for name in saved if is_label(name)} - emas.keys()
        checkpoint.load(path, {name: part for name, part in self._tensors().items() if name not in added}, ranks)
        for name in added:
            emas[name].restart(self.optimizer.parameters)
        if ranks.is_first and (added or dropped):
            log.warning("EMAs that start from the weights of %s: %s; dropped: %s", path, sorted(added), sorted(dropped))
        frozen = frozen_parameters(self.model)
        if frozen and self.base != meta["base"]:  # not after a rollback: they have not changed
            read_base(self.config, frozen, self.model.vocab_size, meta["base"], ranks)
            self.base = meta["base"]
        self.optimizer.guard.counts.copy_(torch.tensor(meta["guard"]))
        self.progress, self.back_to, self.metrics = Progress(**meta["progress"]), meta["back_to"], meta["metrics"]
        self.lane_states = {int(lane): LaneState.from_json(state) for lane, state in lanes.items()}
        return stored_records(path)

    def _tensors(self) -> checkpoint.State:
        state = checkpoint.training_state(self.model, self.optimizer.parts)
        for name, ema in self.optimizer.emas.items():
            state[name] = {plain_name(parameter): tensor for parameter, tensor in ema.weights.items()}
        return state


# What weights older than a setting were trained with; a checkpoint states it only where it differs.
BEFORE = {
    "model.vocab_multiple_of": "1",
    "model.tied_embeddings": "False",
    "model.untied": "none",
    "model.lora": str(asdict(LoraConfig())),
    "clean_copies": "False",
    "optim.frozen": "none",
    "model.transformer.head_dim": "None",
    "model.transformer.qkv_bias": "False",
    "model.transformer.rope_scaling": str(asdict(RopeScaling())),
    "diffusion.schedule": "cosine",
    "diffusion.zero_terminal_snr": "False",
    "diffusion.shift": "1.0",
    "diffusion.shift_by_size": "False",
}


def fingerprint(config: PretrainConfig, data: DataSet, step: int, frozen: Set[str] = frozenset()) -> dict[str, str]:
    """Return what a resume after `step` must find unchanged: what decides the batches, and what the weights mean."""
    spec = data.latent_spec
    of_data = {name: value for name, value in data.fingerprint(step).items() if BEFORE.get(name) != value}
    return {
        **of_data,
        "vae": spec.vae_hash if spec is not None else "none",
        **meaning(config),
        **{f"optim.{name}": getattr(config.optim, name) for name in ("optimizer", "state_dtype")},
        **({"optim.frozen": frozen_set(frozen)} if frozen else {}),
    }


def meaning(config: PretrainConfig) -> dict[str, str]:
    """Return the settings that decide what a run's weights compute."""
    model = asdict(config.model)
    del model["text_loss_chunk"]  # bounds memory, not the result
    schedule = ("num_timesteps", "prediction", "schedule", "zero_terminal_snr", "shift", "shift_by_size")
    found = {
        **{f"model.transformer.{name}": str(value) for name, value in model.pop("transformer").items()},
        **{f"model.{name}": str(value) for name, value in model.items()},
        **{f"diffusion.{name}": str(getattr(config.diffusion, name)) for name in schedule},
    }
    return {name: value for name, value in found.items() if BEFORE.get(name) != value}


def differences(then: dict[str, str], now: dict[str, str]) -> dict[str, str]:
    """Return a phrase for each name whose values differ."""
    names = {**then, **now}
    pairs = {name: tuple(facts.get(name, BEFORE.get(name, "absent")) for facts in (then, now)) for name in names}
    return {name: f"{name} was {was}, is {found}" for name, (was, found) in pairs.items() if was != found}


def _statistics(spec: dict | None) -> dict[str, str]:
    return LatentSpec.parse(spec).statistics if spec is not None else {}


def _remedy(changed: set[str], path: Path) -> str:
    """Return what to do about these changes; never to start from weights that mean something else."""
    if {"latent mean", "latent std"} & changed and "vae" not in changed:
        return (
            "Give the data the statistics of these weights: run its train.encode command again with "
            f"stats_from={path}, which rewrites the manifest alone."
        )
    if changed == {"optim.frozen"}:
        return f"Restore optim.groups, or start another run with these weights: init_from={path}."
    if any(name in ("tokenizer", "vae", "special") or name.startswith(("model.", "diffusion.")) for name in changed):
        return "Restore what it was, or start another run: another run_dir."
    return f"Restore what it was, or start another run with these weights: init_from={path}."
