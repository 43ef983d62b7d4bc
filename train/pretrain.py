"""Train a Transfusion model: `python -m train.pretrain config=FILE`, or under torchrun for several ranks.

The same command again resumes: from the newest checkpoint that verifies, on the same or another number of ranks.
Exit status: 0 done, 75 saved after a stop signal (requeue me), 130 saved after Ctrl-C, 2 refused, 1 failed.
"""

import os
import sys
import time
import traceback
from dataclasses import asdict, replace
from functools import partial

import torch

from data.dataset import DataSet, open_data
from data.footprint import loader_bytes
from data.lanes import lanes_of_rank
from data.loader import Loader, StepBatch
from model.transfusion import Transfusion
from model.vae import LatentStats
from train import checkpoint
from train.checkpoint import CheckpointError
from train.config import load_config, run_program, to_yaml
from train.distributed import DIED, Ballot, PendingVote, Ranks, Vote, init_ranks, last_words
from train.flops import Flops
from train.metrics import Console, Interval, MetricsLog
from train.optim import Optimizer, learning_rate
from train.parallelize import initialize, parallelize, set_micro_step
from train.previews import Previews
from train.profile import Profiler
from train.recipe import PretrainConfig
from train.run_folder import RunFolder, RunTakenOver, write_durably
from train.signals import StopKind, StopSignal, shield_worker
from train.state import TrainState, fingerprint
from train.step import StepLoss, latent_stats, micro_step

CONFIG = PretrainConfig
POLL_SECONDS = 5.0  # a rank without a batch votes this often, so that stops and errors still reach everybody


class CannotGoOn(RuntimeError):
    """Why training ends early, known to every rank: all raise it with the same message at the same step."""


def main(argv: list[str]) -> int | None:
    config = load_config(CONFIG, argv)
    data = open_data(config.data, config.seed, config.model.patch_size)
    if data.latent_spec is not None and data.latent_spec.channels != config.model.latent_channels:
        raise ValueError(
            f"model.latent_channels={config.model.latent_channels}, but the data's latents have "
            f"{data.latent_spec.channels} channels; set model.latent_channels={data.latent_spec.channels}"
        )
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    ranks = init_ranks(timeout_s=60 * config.timeout_minutes, device=config.device)
    lanes_of_rank(ranks.rank, ranks.world_size, config.data.lanes)  # refuses more ranks than lanes
    torch.use_deterministic_algorithms(config.deterministic)
    with StopSignal() as stop, RunFolder(config.run_dir, ranks) as folder:
        state, origin = start_or_resume(config, data, folder, ranks)
        log = MetricsLog(config.log, folder, ranks, asdict(config))
        previews = Previews(config, data, ranks, folder, log)
        profiler = Profiler(config.profile, folder.path, ranks)
        loader = Loader(
            data,
            config.data,
            rank=ranks.rank,
            world_size=ranks.world_size,
            micro_batch_size=config.micro_batch_size,
            first_step=state.progress.step + 1,
            states=state.lane_states,
            pin_memory=ranks.device.type == "cuda",
            worker_init_fn=partial(shield_worker, parent_pid=os.getpid()),
        )
        if ranks.is_first:
            memory = loader_bytes(data, config.data, ranks.world_size)
            parts = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in memory.items() if size >= 2**20)
            print(f"pretrain: data takes at most {sum(memory.values()) / 2**30:.2f} GiB of host memory a rank: {parts}")
            print(
                f"pretrain: {sum(p.numel() for p in state.model.parameters()) / 1e6:.2f}M parameters, "
                f"{ranks.world_size} ranks on {ranks.device.type}, {config.data.lanes} x {config.data.sequence_length} "
                f"tokens a step, {config.optim.steps} steps, {origin}; config in {folder.path / 'config.yaml'}",
                flush=True,
            )
        with last_words(ranks, lambda: f"step {state.progress.step + 1}"):
            try:
                status = train(config, state, loader, ranks, folder, log, previews, profiler, stop)
            except (CannotGoOn, CheckpointError, RunTakenOver) as error:  # raised on every rank alike
                status = DIED
                if ranks.is_first:
                    print(f"train.pretrain: stopped after step {state.progress.step}: {error}", file=sys.stderr)
        loader.close()
        log.close()
    ranks.close()
    return status


def start_or_resume(config: PretrainConfig, data: DataSet, folder: RunFolder, ranks: Ranks) -> tuple[TrainState, str]:
    """Return the state to train on from, and where it came from. Collective; refuses what does not fit (P10)."""
    with torch.device("meta"):
        model = Transfusion(config.model, data.tokenizer.vocab_size)
    parallelize(model, config.parallel, ranks)
    initialize(model, config.seed, ranks.device)
    state = TrainState(
        model=model,
        optimizer=Optimizer(model, config.optim),
        fingerprint=partial(fingerprint, config, data),
        recipe=to_yaml(config),
        data={"latent_spec": data.latent_spec and asdict(data.latent_spec), "grids": data.grids},
    )
    checkpoint.clean(folder.checkpoints, ranks)
    path = checkpoint.latest(folder.checkpoints, ranks)
    if path is not None:
        state.load(path, ranks)
    elif damaged := ranks.on_first(lambda: checkpoint.saved(folder.checkpoints)):
        raise ValueError(
            f"all {len(damaged)} checkpoints in {folder.checkpoints} are damaged; restore one, or remove them to start "
            "from scratch"
        )

    def settle() -> None:
        folder.cut_metrics(state.progress.step)  # rows that a killed attempt wrote after its last checkpoint
        write_durably(folder.path / "config.yaml", state.recipe.encode())

    ranks.on_first(settle)
    return state, f"from {path}" if path else "from scratch"


def train(
    config: PretrainConfig,
    state: TrainState,
    loader: Loader,
    ranks: Ranks,
    folder: RunFolder,
    log: MetricsLog,
    previews: Previews,
    profiler: Profiler,
    stop: StopSignal,
) -> int:
    """Run steps until the last, a stop signal or the end of the data; save; return the exit status."""
    progress, last = state.progress, config.optim.steps
    stats = latent_stats(loader.data.latent_spec, config.model.latent_channels, ranks.device)
    interval = Interval(Flops.of(config.model, loader.data.tokenizer.vocab_size), ranks)
    console = Console(last, progress.step, ranks)
    saved_step, why, status = progress.step, "done", 0

    def save() -> None:
        nonlocal saved_step
        if progress.step == saved_step:  # nothing is owed, as before the first update
            return
        start = time.monotonic()
        state.save(folder, config.checkpoint, ranks)
        saved_step = progress.step
        interval.checkpoint_s += time.monotonic() - start

    try:
        while progress.step < last:
            profiler.before(progress.step + 1)
            batch, vote, data_wait_s = next_batch(loader, ranks, stop)
            if vote.stop != StopKind.NONE:
                why, status = f"stopped by {stop.name or 'a peer'}", vote.stop.exit_code
                break
            if vote.ranks_ended == ranks.world_size:
                why = "the data ended"
                break
            check_skipped(config, vote, batch, ranks)
            losses, grad_norm = run_step(config, state, batch, vote, stats, ranks.device)
            profiler.after(progress.step)
            interval.add(batch, losses, vote, data_wait_s, grad_norm)
            if progress.step % config.log.interval_steps == 0:
                write_row(config, state, interval, log, console)
            if previews.due(progress.step):
                previews.make(state.optimizer, progress.step)
            if progress.step % config.checkpoint.interval_steps == 0:
                save()
        profiler.close()
        if interval.num_steps:
            write_row(config, state, interval, log, console)
    except CannotGoOn:
        save()
        raise
    save()
    if ranks.is_first:
        print(f"pretrain: {why} after step {progress.step}" + ("; saved" if progress.step else ""), flush=True)
    return status


def next_batch(loader: Loader, ranks: Ranks, stop: StopSignal) -> tuple[StepBatch | None, Vote, float]:
    """Return this rank's batch, what all ranks agreed on, and the seconds waited for data. Collective.

    Every rank votes, the one without a batch too, until all have one or all must stop. Raises CannotGoOn when any
    rank's reader failed.
    """
    start, batch, failure = time.monotonic(), None, None
    while True:
        try:
            batch = batch or loader.next(POLL_SECONDS)
        except Exception as error:  # whatever it is, the peers must hear of it before this rank leaves
            failure = f"rank {ranks.rank} cannot read its data: {type(error).__name__}: {error}"
            if not isinstance(error, (ValueError, OSError)):
                traceback.print_exc()  # nobody's expected mistake
        data_wait_s = time.monotonic() - start
        ballot = Ballot(has_batch=False) if batch is None else _ballot(batch)
        vote = PendingVote(replace(ballot, stop=stop.kind, data_failed=failure is not None), ranks).wait()
        if vote.ranks_data_failed:
            raise CannotGoOn("; ".join(words for words in ranks.gather(failure) if words))
        if vote.stop != StopKind.NONE or vote.ranks_with_batch == ranks.world_size:
            return batch, vote, data_wait_s


def check_skipped(config: PretrainConfig, vote: Vote, batch: StepBatch, ranks: Ranks) -> None:
    """Raise CannotGoOn when the budget of bad documents is spent, naming the last of them (P7)."""
    if vote.documents_skipped <= config.data.max_bad_documents:
        return
    names = [name for states in ranks.gather(batch.lane_states) for s in states.values() for name in s["skipped_names"]]
    raise CannotGoOn(
        f"{vote.documents_skipped} documents were skipped, more than data.max_bad_documents="
        f"{config.data.max_bad_documents}; among the last: {'; '.join(names[:8])}. Repair the data set, or allow more"
    )


def run_step(
    config: PretrainConfig, state: TrainState, batch: StepBatch, vote: Vote, stats: LatentStats, device: torch.device
) -> tuple[list[StepLoss], torch.Tensor]:
    """Make the update of one step and count it; return the micro-batches' losses and the gradient norm. Collective."""
    losses = []
    for number, micro_batch in enumerate(batch.micro_batches, start=1):
        set_micro_step(state.model, config.parallel, is_last=number == len(batch.micro_batches))
        loss = micro_step(
            state.model,
            micro_batch.to(device),
            stats=stats,
            diffusion=config.diffusion,
            image_weight=config.loss.image_weight,
            global_text_targets=vote.text_targets,
            global_images=vote.images,
        )
        loss.total.backward()
        losses.append(loss)
    grad_norm = state.optimizer.update(batch.step)
    state.lane_states = batch.lane_states
    state.progress.step = batch.step
    state.progress.images_seen += vote.images
    state.progress.tokens_seen += vote.tokens
    return losses, grad_norm


def write_row(config: PretrainConfig, state: TrainState, interval: Interval, log: MetricsLog, console: Console) -> None:
    """Log the steps since the last row. Collective. Raises CannotGoOn after too many bad gradients in a row (P8)."""
    row = {**vars(state.progress), **interval.row(state.lane_states)}
    row["learning_rate"] = learning_rate(state.progress.step, config.optim)
    row["skipped_updates"], in_a_row = (int(count) for count in state.optimizer.nonfinite.tolist())
    log.write(row)
    console.show(row)
    if in_a_row >= config.optim.max_nonfinite_in_a_row:
        raise CannotGoOn(
            f"the last {in_a_row} updates had non-finite gradients and were skipped "
            f"(optim.max_nonfinite_in_a_row={config.optim.max_nonfinite_in_a_row}); lower optim.learning_rate"
        )


def _ballot(batch: StepBatch) -> Ballot:
    return Ballot(
        text_targets=batch.num_text_targets,
        images=batch.num_images,
        tokens=batch.num_tokens,
        documents_skipped=batch.num_skipped,
        ended=batch.ended,
    )


if __name__ == "__main__":
    run_program(main)
