"""One training run: what it consists of, how it starts from what its folder holds, and how it goes back.

train/pretrain.py is the loop over it.
"""

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
from torch import nn

from data.dataset import DataSet
from data.durable import write_durably
from data.loader import Loader
from data.loader_memory import loader_bytes
from model.transfusion import Transfusion
from train.checkpoints.checkpoint import step_of, verify
from train.checkpoints.lookup import read_while_there
from train.checkpoints.resume import ResumePoint, find_resume_point, go_back_before
from train.checkpoints.run_folder import TOKENIZER_FILE, RunFolder
from train.checkpoints.saver import Saver
from train.checkpoints.trained_records import TrainedRecords
from train.config import to_yaml
from train.console import say
from train.distributed.parallelize import initialize, parallelize, plain_name
from train.distributed.ranks import Ranks
from train.distributed.signals import StopSignal, shield_worker
from train.heldout import Heldout
from train.inference.saved_model import SavedModel, stored_records
from train.metrics import MetricsLog
from train.next_batch import CannotGoOn
from train.optim.guard import BadUpdate
from train.optim.optimizer import Optimizer
from train.pretrain_config import PretrainConfig
from train.previews import Previews
from train.profile import Profiler
from train.state import TrainState, differences, fingerprint, meaning

log = logging.getLogger(__name__)


@dataclass
class Run:
    """What one training run consists of."""

    config: PretrainConfig
    data: DataSet
    ranks: Ranks
    folder: RunFolder
    stop: StopSignal
    state: TrainState
    saver: Saver
    log: MetricsLog
    previews: Previews
    profiler: Profiler
    heldout: Heldout | None
    origin: ResumePoint
    begun: str  # where it started, in words

    def save(self, final: bool = False) -> float:
        """Begin to save the present step, wait for it if it is the last; return the seconds that took. Collective."""
        start = time.monotonic()
        self.saver.settle()
        if self.saver.saved_step != self.state.progress.step:  # nothing is owed before the first update
            self.saver.start(self.state.snapshot(self.ranks))
            if final:
                self.saver.settle(tolerate=False)
        return time.monotonic() - start

    @contextmanager
    def loader(self) -> Iterator[Loader]:
        """Read from where the state stands; the reader's processes end with the context."""
        loader = Loader(
            self.data,
            self.config.data,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
            micro_batch_size=self.config.micro_batch_size,
            first_step=self.state.progress.step + 1,
            states=self.state.lane_states,
            pin_memory=self.ranks.device.type == "cuda",
            worker_init_fn=partial(shield_worker, parent_pid=os.getpid()),
        )
        try:
            yield loader
        finally:
            loader.close()

    def go_back(self, bad_updates: list[BadUpdate]) -> None:
        """Load a checkpoint before the bad updates, and leave out their batches and those that led to them. Collective.

        Raises CannotGoOn, with the state as it was, where there is no such checkpoint.
        """
        last = bad_updates[-1].step
        bad = last - bad_updates[-1].in_a_row + 1  # the first of them; an earlier start may have met it
        self.saver.settle()
        first = max(1, bad - self.config.guard.exclude_before)
        path = go_back_before(first, self.folder, self.ranks) or go_back_before(bad, self.folder, self.ranks)
        begun = self.origin.checkpoint  # perhaps another run's
        if path is None and begun is not None and step_of(begun) < bad and not verify(begun, self.ranks):
            path = begun
        if path is None:
            raise CannotGoOn(f"the updates of steps {bad} to {last} were bad, and no checkpoint lies before them")
        first = max(first, step_of(path) + 1)
        before, back_to = self.state.progress, self.state.back_to
        self.state.load(path, self.ranks)
        self.state.progress.rollbacks, self.state.back_to = before.rollbacks + 1, back_to
        self.state.progress.excluded = [*before.excluded, (first, last)]
        self.saver.saved_step = self.state.progress.step if path.parent == self.folder.checkpoints else 0
        step, evaluated = self.state.progress.step, bool(self.state.metrics)
        self.ranks.on_first(lambda: self.folder.cut_metrics(step, evaluated=evaluated))
        if self.ranks.is_first:
            say(
                f"pretrain: back to {path}, and on without the batches of steps {first} to {last}: they count as steps "
                f"and train nothing (guard.exclude_before={self.config.guard.exclude_before})"
            )

    def describe(self) -> Iterator[str]:
        """Yield the lines that say what is about to be trained, on what, and in how much host memory."""
        config, data, ranks = self.config, self.data, self.ranks
        for name, source in zip(config.data.sources, data.sources, strict=True):
            tokens = sum(shard.tokens(config.model.patch_size) for shard in source.manifest.shards)
            later = "".join(f", {w:.3g} from step {step}" for step, w in source.config.weight_from.items())
            weight = f"weight {source.config.weight:.3g}{later}"
            yield f"source {name}: {source.manifest.records:,} documents, {tokens:,} tokens, {weight}"
        memory = loader_bytes(data, config.data, ranks.world_size)
        parts = ", ".join(f"{name} {size / 2**20:,.1f}" for name, size in memory.items() if size >= 2**16)
        yield f"data takes at most {sum(memory.values()) / 2**20:,.1f} MiB of host memory a rank: {parts or 'tables'}"
        num_parameters = sum(parameter.numel() for parameter in self.state.model.parameters())
        yield (
            f"{num_parameters / 1e6:.2f}M parameters, {ranks.world_size} ranks on {ranks.device.type}, "
            f"{config.data.lanes} x {config.data.sequence_length} tokens a step, {config.optim.steps} steps, "
            f"{self.begun}; config in {self.folder.path / 'config.yaml'}"
        )


def start_or_resume(config: PretrainConfig, data: DataSet, folder: RunFolder, ranks: Ranks, stop: StopSignal) -> Run:
    """Return the run, ready to train on. Collective; raises ValueError for what does not fit (P10)."""
    with torch.device("meta"):
        model = Transfusion(config.model, data.tokenizer.vocab_size)
    parallelize(model, config.parallel, ranks)
    origin = find_resume_point(config.resume, folder, ranks)
    begun, before = str(origin), None  # records that the weights were trained on before
    if origin.checkpoint is not None:
        if config.init_from is not None:
            begun += " (init_from is for a run without checkpoints)"
        model.to_empty(device=ranks.device)  # the checkpoint fills all of it
    elif config.init_from is not None:
        model.to_empty(device=ranks.device)
        begun, before = read_weights(model, config, data, ranks)
    else:
        initialize(model, config.seed, ranks.device)
    state = TrainState(
        model=model,
        optimizer=Optimizer(model, config.optim, config.guard),
        fingerprint=partial(fingerprint, config, data),
        recipe=to_yaml(config),
        data={"latent_spec": data.latent_spec and asdict(data.latent_spec), "grids": data.grids},
    )
    held = config.evaluation.heldout if config.evaluation.interval_steps is not None else {}
    state.trained = TrainedRecords.read([source.manifest for source in data.sources], held, ranks)
    heldout = open_heldout(config, data, ranks) if held else None
    if origin.checkpoint is not None:
        path, before = read_while_there(  # another run may be training
            lambda: find_resume_point(config.resume, folder, ranks).checkpoint,
            lambda path: (state.load(path, ranks) or path, stored_records(path)),
            ranks,
            origin.checkpoint,
        )
        origin, begun = replace(origin, checkpoint=path), begun.replace(str(origin.checkpoint), str(path))
    if before is not None:
        before.check(held, ranks)
        state.trained |= before
    if origin.back_to is not None:
        state.back_to = origin.back_to

    def settle() -> None:
        # Rows that a killed attempt wrote after its last checkpoint.
        folder.cut_metrics(state.progress.step, evaluated=bool(state.metrics))
        write_durably(folder.path / "config.yaml", state.recipe.encode())
        write_durably(folder.path / TOKENIZER_FILE, data.tokenizer.path.read_bytes())

    ranks.on_first(settle)
    saver = Saver(folder, config.checkpoint, ranks)
    if origin.checkpoint is not None and origin.checkpoint.parent == folder.checkpoints:
        saver.saved_step = state.progress.step
    log = MetricsLog(config.log, folder, ranks, asdict(config))
    previews = Previews(config, data, ranks, folder, log)
    profiler = Profiler(config.profile, folder.path, ranks)
    return Run(config, data, ranks, folder, stop, state, saver, log, previews, profiler, heldout, origin, begun)


def open_heldout(config: PretrainConfig, data: DataSet, ranks: Ranks) -> Heldout:
    """Open what the run measures itself on; raises ValueError for a `best_metric` that it cannot give."""
    spec = data.latent_spec
    of_model = config.data, config.seed, config.model.patch_size, config.diffusion, spec and spec.vae_hash
    heldout = Heldout(config.evaluation, *of_model, ranks)
    best = config.checkpoint.best_metric
    if best is not None and best not in heldout.metrics:
        raise ValueError(f"checkpoint.best_metric={best}: expected one of {heldout.metrics}, which the data can give")
    return heldout


def read_weights(
    model: nn.Module, config: PretrainConfig, data: DataSet, ranks: Ranks
) -> tuple[str, TrainedRecords | None]:
    """Fill a model with the weights that `init_from` names; say which, and what they were trained on. Collective.

    Data, schedule and counters are the new run's; pictures may be of another size. Raises ValueError for weights of
    other sizes, or that were trained on other token ids, other latents or latents whitened otherwise (P10).
    """
    return SavedModel.use(config.init_from, ranks, partial(_fill, model, config, data, ranks), "init_from")


def _fill(
    model: nn.Module, config: PretrainConfig, data: DataSet, ranks: Ranks, stored: SavedModel
) -> tuple[str, TrainedRecords | None]:
    ranks.require_alike({"init_from (contents)": stored.identity})
    made_with = {"tokenizer": (stored.meta["fingerprint"]["tokenizer"], data.tokenizer.hash)}
    if stored.latent_spec is not None and data.latent_spec is not None:
        made_with["VAE"] = (stored.latent_spec.vae_hash, data.latent_spec.vae_hash)
    for what, (then, now) in made_with.items():
        if then != now:
            raise ValueError(
                f"init_from={config.init_from} was trained with {what} {then}, the data was encoded with {now}; encode "
                f"the data with the {what} of {stored.folder}"
            )
    if "VAE" in made_with and (changed := differences(stored.latent_spec.statistics, data.latent_spec.statistics)):
        raise ValueError(
            f"init_from={config.init_from} was trained on latents whitened otherwise: "
            f"{'; '.join(changed.values())}; run the data's train.encode command again with "
            f"stats_from={stored.folder}, which rewrites the manifest alone"
        )
    parameters = {plain_name(name): parameter for name, parameter in model.named_parameters()}
    with torch.no_grad():
        chosen = stored.read(config.init_weights, parameters, ranks)
    if ranks.is_first and (changed := differences(meaning(stored.recipe), meaning(config))):
        log.warning("the weights of %s were trained otherwise: %s", stored.folder, "; ".join(changed.values()))
    return f"from the weights ({chosen}) of {stored.folder}, step {stored.step}", stored.trained
