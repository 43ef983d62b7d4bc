"""Train a Transfusion model: `python -m train.pretrain config=FILE`, or under torchrun for several ranks.

The same command again goes on: from the newest checkpoint that verifies, on the same or another number of ranks.
Exit status: 0 done, 75 saved after a stop signal (requeue me), 130 saved after Ctrl-C, 2 refused, 1 failed.
"""

import os
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch

from data.dataset import DataSet, open_data
from data.lanes import lanes_of_rank
from data.loader import StepBatch
from data.manifest import Manifest
from data.packing import PackedBatch
from model.vae import LatentStats
from train.checkpoints.checkpoint import CheckpointError
from train.checkpoints.run_folder import RunFolder, RunTakenOver
from train.config import load_config, run_program
from train.console import Console, say
from train.distributed.agreement import facts_of
from train.distributed.launcher import leave_word, place
from train.distributed.local_shards import local
from train.distributed.parallelize import set_micro_step
from train.distributed.ranks import DIED, init_ranks, last_words, own_device
from train.distributed.signals import StopKind, StopSignal
from train.distributed.vote import Vote
from train.flops import Flops
from train.heldout import KINDS, metric_name
from train.metrics import Interval
from train.next_batch import CannotGoOn, SkipBudget, next_batch
from train.optim.guard import BadUpdate
from train.optim.optimizer import learning_rate
from train.planning.estimate import check_memory, fullest_of
from train.pretrain_config import PretrainConfig
from train.run import Run, start_or_resume
from train.state import TrainState
from train.step import StepLoss, latent_stats, micro_step

CONFIG = PretrainConfig
GROUP = True  # its ranks work together
# What each rank may have of its own: its device, the paths of its host, how it reads data. What they hold is compared.
OWN = (
    *("run_dir", "device", "vae", "data.tokenizer", "data.sources.*.path", "evaluation.heldout.*"),
    *("data.cache_*", "data.num_workers", "data.prefetch_steps", "data.read_*"),
)


class GoBack(Exception):
    """Too many updates in a row were bad: go on from an earlier checkpoint, without their batches (P8)."""

    def __init__(self, bad_updates: list[BadUpdate]) -> None:
        super().__init__(bad_updates)
        self.bad_updates = bad_updates


def main(argv: list[str]) -> int | None:
    config = load_config(CONFIG, argv)
    data = check(config)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    of_run = config, data.tokenizer.vocab_size, place().world_size, data.grids
    too_large = check_memory(*of_run, own_device(config.device), warn=place().rank == 0)
    startup_s = 60 * max(config.startup_timeout_minutes, config.timeout_minutes)
    recorder = Path(config.run_dir) / "flight-recorder"
    save_s = 60 * config.checkpoint.timeout_minutes
    ranks = init_ranks(
        timeout_s=startup_s,
        checkpoint_timeout_s=save_s,
        device=config.device,
        flight_recorder=recorder,
        facts=common_facts(config, data),
    )
    lanes_of_rank(ranks.rank, ranks.world_size, config.data.lanes)  # refuses more ranks than lanes
    torch.use_deterministic_algorithms(config.deterministic)
    with StopSignal() as stop, RunFolder(config.run_dir, ranks) as folder:
        run = start_or_resume(config, data, folder, ranks, stop)
        if ranks.is_first:
            say("\n".join(f"pretrain: {line}" for line in run.describe()))
            if data.too_long:
                say(
                    f"pretrain: warning: left out for good, {len(data.too_long)} in all: {'; '.join(data.too_long[:8])}"
                )
            if too_large:
                say(f"pretrain: warning: {too_large}")
        with last_words(ranks, lambda: f"step {run.state.progress.step + 1}"):
            try:
                dry_run(run)
                status = train(run)
            except (CannotGoOn, CheckpointError, RunTakenOver) as error:  # raised on every rank alike
                status = DIED
                words = f"train.pretrain: stopped after step {run.state.progress.step}: {error}"
                leave_word(words)
                if ranks.is_first:
                    print(words, file=sys.stderr)
        run.log.close()
        ranks.close()
        stop.finish()
    return status


def common_facts(config: PretrainConfig, data: DataSet) -> dict[str, str]:
    """Return what all ranks must have in common: settings, and the contents of what the paths name."""
    contents = {"data.tokenizer": data.tokenizer.hash}
    for name, source in zip(config.data.sources, data.sources, strict=True):
        contents[f"data.sources.{name}.path (number, contents)"] = f"{source.number}, {source.manifest.content_hash}"
    for name, path in config.evaluation.heldout.items() if config.evaluation.interval_steps is not None else ():
        contents[f"evaluation.heldout.{name} (contents)"] = Manifest.load(path).content_hash
    return {**facts_of(config, OWN), **contents}


def check(config: PretrainConfig) -> DataSet:
    """Open the data; raises ValueError or OSError for what this run cannot train on."""
    data = open_data(config.data, config.seed, config.model.patch_size)
    if data.latent_spec is not None and data.latent_spec.channels != config.model.latent_channels:
        raise ValueError(
            f"model.latent_channels={config.model.latent_channels}, but the data's latents have "
            f"{data.latent_spec.channels} channels; set model.latent_channels={data.latent_spec.channels}"
        )
    too_long, most = data.too_long, config.data.max_bad_documents
    if len(too_long) > most:
        raise ValueError(
            f"{len(too_long)} documents are longer than data.sequence_length={config.data.sequence_length}, more than "
            f"data.max_bad_documents={most} (and only texts may be cut): {'; '.join(too_long[:4])}; use longer "
            "sequences, shorten their captions, or allow more"
        )
    return data


def dry_run(run: Run) -> None:
    """Take the fullest batches that the data can make through forward and backward, and keep nothing of it. Collective.

    What does not fit fails here, not at the first such batch after days; and what is compiled, is compiled.
    """
    config, state, device = run.config, run.state, run.ranks.device
    if state.progress.step >= config.optim.steps:
        return
    start = time.monotonic()
    stats = latent_stats(run.data.latent_spec, config.model.latent_channels, device)
    moments = 8 * sum(local(p).numel() for p in state.optimizer.parameters.values())  # not there before an update
    reserved = moments if device.type == "cuda" and not state.progress.step else 0
    try:
        reserve = torch.empty(reserved, dtype=torch.uint8, device=device)
        for batch in fullest_of(config, run.ranks.world_size, run.data.grids):
            forward_backward(config, state, batch.to(device), stats, text_targets=1, images=1, is_last=True)
    except torch.OutOfMemoryError as error:
        raise MemoryError(
            f"the fullest batch does not fit: {config.micro_batch_size} x {config.data.sequence_length} "
            "tokens (micro_batch_size x data.sequence_length); python -m train.plan says what would fit"
        ) from error
    del reserve
    state.model.zero_grad(set_to_none=True)
    if run.ranks.is_first:
        peak = f", peak {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB" if device.type == "cuda" else ""
        say(f"pretrain: dry run of the fullest batch: {time.monotonic() - start:.1f} s{peak}")


def train(run: Run) -> int:
    """Run steps to the end, going back where updates went bad; save; return the exit status."""
    while True:
        try:
            try:
                why, status = run_steps(run)
            except GoBack as reason:
                run.go_back(reason.bad_updates)
                continue
            run.save(final=True)
        except CannotGoOn as error:
            try:
                run.save(final=True)
            except CheckpointError as failure:
                raise CannotGoOn(f"{error}; and {failure}") from None
            raise
        step = run.state.progress.step
        words = f"pretrain: {why} after step {step}" + ("; saved" if step else "")
        if run.ranks.is_first:
            say(words)
        if status:
            leave_word(words)
        return status


def run_steps(run: Run) -> tuple[str, int]:
    """Run steps until the last, a stop signal or the end of the data; return why it ended, and the exit status."""
    config, ranks, progress, last = run.config, run.ranks, run.state.progress, run.config.optim.steps
    stats = latent_stats(run.data.latent_spec, config.model.latent_channels, ranks.device)
    flops = Flops.of(config.model, run.data.tokenizer.vocab_size, config.parallel.activation_checkpointing)
    interval = Interval(flops, ranks, list(config.data.sources))
    console = Console(last, progress.step, ranks)
    budget = SkipBudget(config.data.max_bad_documents, len(run.data.too_long))
    why, status = "done", 0
    with run.loader() as loader:
        stopped = evaluate(run, stats, interval)  # if a stop kept the last step's from being made
        if run.state.metrics and not run.saver.saved_step:
            interval.checkpoint_s += run.save()
        while progress.step < last and not stopped:
            run.profiler.before(progress.step + 1)
            fed = next_batch(loader, ranks, run.stop, run.saver.failed)
            if fed.vote.ranks_write_failed:
                run.saver.settle()
            if stopped := fed.vote.stop:
                break
            if fed.vote.ranks_ended == ranks.world_size:
                why = "the data ended"
                break
            budget.check(fed.vote, fed.batch, ranks)
            if progress.excludes(fed.batch.step):
                pass_over(run.state, fed.batch)
            else:
                losses, grad_norm = run_step(config, run.state, fed.batch, fed.vote, stats, ranks.device)
                interval.add(fed, losses, grad_norm)
            run.profiler.after(progress.step)
            if progress.step == console.first_step + 1:
                ranks.set_timeout(60 * config.timeout_minutes)
            if progress.step % config.log.interval_steps == 0:
                write_row(run, interval, console)
            stopped = evaluate(run, stats, interval)
            if not stopped and run.previews.due(progress.step):
                draw_previews(run, interval)
            if progress.step % config.checkpoint.interval_steps == 0:
                interval.checkpoint_s += run.save()
        if stopped:
            why, status = f"stopped by {run.stop.name or 'a peer'}", stopped.exit_code
        run.profiler.close()
        write_row(run, interval, console)
    return why, status


def run_step(
    config: PretrainConfig, state: TrainState, batch: StepBatch, vote: Vote, stats: LatentStats, device: torch.device
) -> tuple[list[StepLoss], torch.Tensor]:
    """Make the update of one step and count it; return the micro-batches' losses and the gradient norm. Collective."""
    losses = []
    for number, micro_batch in enumerate(batch.micro_batches, start=1):
        is_last = number == len(batch.micro_batches)
        counts = {"text_targets": vote.text_targets, "images": vote.images}
        losses.append(forward_backward(config, state, micro_batch.to(device), stats, **counts, is_last=is_last))
    grad_norm = state.optimizer.update(batch.step)
    state.optimizer.guard.note(batch, losses, grad_norm)
    pass_over(state, batch)
    state.progress.images_seen += vote.images
    state.progress.tokens_seen += vote.tokens
    return losses, grad_norm


def forward_backward(
    config: PretrainConfig,
    state: TrainState,
    micro_batch: PackedBatch,
    stats: LatentStats,
    *,
    text_targets: int,
    images: int,
    is_last: bool,
) -> StepLoss:
    """Add a micro-batch's gradients; counts are global, and after the step's last the gradients are too. Collective."""
    set_micro_step(state.model, config.parallel, is_last=is_last)
    loss = micro_step(
        state.model,
        micro_batch,
        stats=stats,
        diffusion=config.diffusion,
        image_weight=config.loss.image_weight,
        global_text_targets=text_targets,
        global_images=images,
    )
    loss.total.backward()
    return replace(loss, total=loss.total.detach())  # what is kept until the next log row must not keep the graph


def pass_over(state: TrainState, batch: StepBatch) -> None:
    """Count a batch as done, whether or not it made an update."""
    state.lane_states, state.metrics = batch.lane_states, {}
    state.progress.step = batch.step


def evaluate(run: Run, stats: LatentStats, interval: Interval) -> StopKind:
    """Measure held-out losses if this step is one for it; return what stopped that, if anything did. Collective."""
    start, step = time.monotonic(), run.state.progress.step
    if not step or run.heldout is None or not run.config.evaluation.due(step) or run.state.metrics:
        return StopKind.NONE
    measured = run.heldout.losses(run.state.model, stats, run.stop)
    interval.evaluation_s += time.monotonic() - start
    if isinstance(measured, StopKind):
        return measured
    losses = {metric_name(name, kind): found[kind] for name, found in measured.items() for kind in KINDS}
    run.state.metrics = {name: loss for name, loss in losses.items() if loss is not None}
    if run.saver.saved_step == step:
        run.saver.saved_step = 0  # saved, but without these
    run.log.write({"step": step, **run.state.metrics})
    if run.ranks.is_first:
        say("  ".join([f"step {step}", *(f"{name} {loss:.4f}" for name, loss in run.state.metrics.items())]))
    return StopKind.NONE


def draw_previews(run: Run, interval: Interval) -> None:
    """Draw previews of the weights as they are. Collective."""
    start = time.monotonic()
    run.previews.make(run.state.optimizer, run.state.progress.step, run.stop)
    interval.evaluation_s += time.monotonic() - start


def write_row(run: Run, interval: Interval, console: Console) -> None:
    """Log the steps since the last row, if any, and act on bad updates among them. Collective."""
    if not interval.num_steps:
        return
    progress, optimizer = run.state.progress, run.state.optimizer
    row = {name: getattr(progress, name) for name in ("step", "tokens_seen", "images_seen", "rollbacks")}
    row |= interval.row(run.state.lane_states)
    row["loss"] = (row["text_loss"] or 0) + run.config.loss.image_weight * (row["image_loss"] or 0)
    row["learning_rate"] = learning_rate(progress.step, run.config.optim)
    row["skipped_updates"] = int(optimizer.guard.counts[0])
    # How long a stop takes at most: the step it falls into, the save under way, the last one; null: not known yet.
    row["stop_s"] = None if run.saver.seconds is None else row["step_s"] + 2 * run.saver.seconds
    run.log.write(row)
    console.show(row)
    bad_updates, too_many = optimizer.guard.review(run.data.name_of, run.ranks)
    run.folder.append("bad_updates.jsonl", map(asdict, bad_updates))
    if run.ranks.is_first:
        for update in bad_updates:
            say(f"pretrain: skipped the update of {update}")
    if not too_many:
        return
    guard = run.config.guard
    if progress.rollbacks < guard.max_rollbacks:
        raise GoBack(too_many)
    raise CannotGoOn(
        f"the updates of steps {too_many[0].step} to {too_many[-1].step} were skipped for their gradients "
        f"(guard.max_bad_in_a_row={guard.max_bad_in_a_row}): {'; '.join(map(str, too_many[-3:]))}; all of them in "
        f"{run.folder.path / 'bad_updates.jsonl'}. Look at these documents, lower optim.learning_rate, or set "
        "guard.max_rollbacks to go on without these batches"
    )


if __name__ == "__main__":
    run_program(main, lasting=True)
