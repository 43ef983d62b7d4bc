"""Train a Transfusion model: `python -m train.pretrain config=FILE`, or under torchrun for several ranks.

The same command again resumes from the newest intact checkpoint, on the same or another number of ranks.
Exit status: 0 done, 75 saved after a stop signal (to be requeued), 130 saved after Ctrl-C, 2 refused, 1 failed.

Lanes: a global batch has one sequence from each of `data.lanes` lanes. A lane is a stream of packed sequences that
depends on seed and data alone. Ranks divide the lanes among themselves, which changes no batch (data/lanes.py).
Vote: before each step, one all-reduce sums the counts that the losses are divided by and tells all ranks of any rank's
stop signal, failed reader or failed save, so that all stop at the same step (train/next_batch.py). A run also stops
after its last step, at the end of its data, and after too many bad documents or bad updates (train/rollback.py).
Checkpoint: weights, optimizer, EMA weights, lane positions, counters, held-out losses, config, hashes of the data
(train/state.py); written in the background every `checkpoint.interval_steps` and whenever a run ends.
The losses, and how to add one: train/step.py.
"""

import os
import socket
import sys
from contextlib import closing
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from data.dataset import DataSet
from data.durable import write_durably
from data.lanes import lanes_of_rank
from data.loader import StepBatch
from model.transfusion import Transfusion
from train.checkpoints.checkpoint import CheckpointError
from train.checkpoints.resume import ResumePoint, find_resume_point, load_resume_point
from train.checkpoints.run_folder import RunFolder, RunTakenOver
from train.checkpoints.saver import Saver
from train.checkpoints.trained_records import TrainedRecords
from train.config import load_config, run_program
from train.console import Console, say
from train.distributed.launcher import place, report_to_torchrun
from train.distributed.parallelize import compute_dtype, initialize, parallelize
from train.distributed.ranks import DIED, Ranks, init_ranks, last_words, own_device
from train.distributed.signals import StopSignal
from train.distributed.vote import Vote
from train.flops import Flops
from train.heldout import Heldout
from train.inference.base import base_of
from train.initial_weights import read_initial_weights, read_llm
from train.llm_folder import with_llm
from train.metrics import Interval
from train.metrics_log import MetricsLog
from train.next_batch import CannotContinue, SkipBudget, next_batch
from train.optim.groups import freeze, frozen_parameters, resolve, table
from train.optim.optimizer import Optimizer
from train.optim.part_norms import part_sizes
from train.planning.dry_run import dry_run
from train.planning.fit import agree_on_memory, check_memory
from train.pretrain_config import PretrainConfig
from train.previews import Previews
from train.profile import Profiler
from train.rollback import GoBack, go_back, review_updates
from train.run import Run
from train.state import TrainState
from train.step import StepLoss, forward_backward, latent_stats
from train.training_data import facts_in_common, open_training_data

CONFIG = PretrainConfig
GROUP = True  # its ranks form one process group: one rank's refusal ends the others too (train/config.py)
fill, check = with_llm, open_training_data  # what `--resolve` and `--check` run (train/config.py)


def main(argv: list[str]) -> int:
    config = with_llm(load_config(CONFIG, argv))
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts

    # Data and memory are checked before the ranks meet: most mistakes can be found without communication, in seconds.
    data = open_training_data(config)
    vocab_size, device = data.tokenizer.vocab_size, own_device(config.device)
    first, world_size = place().rank == 0, place().world_size
    rehearsed = check_memory(config, vocab_size, world_size, data.grids, device, first=first, kind=data.kind)

    # The ranks exchange summaries of their settings and data, so that a difference is refused by name. Timeouts are
    # long until the first step has compiled; see `run_steps`.
    ranks = init_ranks(
        timeout_s=60 * max(config.startup_timeout_minutes, config.timeout_minutes),
        checkpoint_timeout_s=60 * config.checkpoint.timeout_minutes,
        device=config.device,
        flight_recorder=Path(config.run_dir) / "flight-recorder",
        facts=facts_in_common(config, data),
    )
    lanes_of_rank(ranks.rank, ranks.world_size, config.data.lanes)  # raises ValueError for more ranks than lanes
    config, remarks = agree_on_memory(config, rehearsed, ranks)
    torch.use_deterministic_algorithms(config.deterministic)

    # RunFolder locks the run before anyone looks for checkpoints: two starts would find the same one and both write the
    # next. Stop signals are collected from here on and obeyed at the first evaluation or vote.
    with StopSignal() as stop, RunFolder(config.run_dir, ranks) as folder:
        run = start(config, data, ranks, folder, stop)
        if ranks.is_first:
            say("\n".join(f"pretrain: {line}" for line in [*run.describe(), *remarks]))
        # Refusals are over: from here on an unexpected exception ends its rank's process at once, so that its peers
        # notice. The three below are raised on every rank alike, and end the run in order.
        with last_words(ranks, lambda: f"step {run.state.progress.step + 1}"):
            try:
                status = train(run)
            except (CannotContinue, CheckpointError, RunTakenOver) as error:
                status = DIED
                words = f"train.pretrain: stopped after step {run.state.progress.step}: {error}"
                report_to_torchrun(words)
                run.log.event("stop", run.state.progress.step, str(error), status=status)
                if ranks.is_first:
                    print(words, file=sys.stderr)
        run.log.close()
        ranks.close()
        stop.finish()
    return status


def start(config: PretrainConfig, data: DataSet, ranks: Ranks, folder: RunFolder, stop: StopSignal) -> Run:
    """Put the run together. Collective; raises ValueError where config, data and checkpoint contradict (P10)."""
    # The model gets memory only after it is sharded, so that no rank ever holds all of it.
    with torch.device("meta"):
        model = Transfusion(config.model, data.tokenizer.vocab_size)
    adapts = config.model.lora.rank > 0
    resolve((name for name, _ in model.named_parameters()), config.optim.groups, adapts)
    rows = table(model, config.optim.groups, adapts)
    freeze(model, config.optim.groups, compute_dtype(config.parallel, ranks.device), adapts)
    parallelize(model, config.parallel, ranks)

    # What is frozen is pinned by a hash of where it comes from, and all ranks must begin with the same language model.
    origin, frozen, base = find_resume_point(config.resume, folder, ranks), frozen_parameters(model), None
    if origin.checkpoint is None and (frozen or config.init_from_llm is not None):
        base = base_of(config, ranks)
    started_from, trained_before = fill_weights(model, config, data, origin, ranks)

    # The optimizer comes after the weights, because EMAs copy them, and before the load, which fills its tensors.
    state = TrainState.begin(model, Optimizer(model, config.optim, config.guard), config, data)
    state.base = base if frozen else None

    # No held-out record may have been trained on. This run's own data is checked before the load, which can take
    # minutes; the records that these weights saw in earlier runs are known only after it.
    state.trained = TrainedRecords.read([source.manifest for source in data.sources], config.evaluation.measured, ranks)
    heldout = Heldout.of_run(config, data, ranks)
    if origin.checkpoint is not None:
        origin, trained_before = load_resume_point(origin, state.load, config.resume, folder, ranks)
        if origin.back_to is not None:
            state.back_to = origin.back_to
    if trained_before is not None:
        trained_before.check(config.evaluation.measured, ranks)
        state.trained |= trained_before

    # Files are written after the load, which may refuse. Rows that a killed attempt logged after its last checkpoint
    # are cut: their steps will be run and logged again. (`evaluated`: the checkpoint has its step's held-out losses.)
    ranks.on_first(lambda: folder.metrics.cut(state.progress.step, evaluated=bool(state.metrics)))
    ranks.on_first(lambda: write_durably(folder.path / "config.yaml", state.config_yaml))
    ranks.on_first(lambda: write_durably(folder.path / data.tokenizer.file_name, data.tokenizer.content))

    log = MetricsLog(config.log, folder, ranks, asdict(config), state.progress.step, origin.back_to)
    saver = Saver(folder, config.checkpoint, ranks, partial(log.event, "save_failed"))
    # A checkpoint of this folder need not be saved again; one of another run is saved here by the first save.
    if origin.checkpoint is not None and origin.checkpoint.parent == folder.checkpoints:
        saver.saved_step = state.progress.step
    hosts = sorted(set(ranks.gather(socket.gethostname())))
    where = {"ranks": ranks.world_size, "hosts": hosts, "device": ranks.device.type}
    log.event("start", state.progress.step, started_from or str(origin), **where)
    return Run(
        config=config,
        data=data,
        stats=latent_stats(data.latent_spec, config.model.latent_channels, ranks.device),
        ranks=ranks,
        folder=folder,
        stop=stop,
        state=state,
        heldout=heldout,
        saver=saver,
        log=log,
        previews=Previews(config, data, ranks, folder, log),
        profiler=Profiler(config.profile, folder.path, ranks),
        origin=origin,
        started_from=started_from or str(origin),
        groups=rows,
    )


def fill_weights(
    model: Transfusion, config: PretrainConfig, data: DataSet, origin: ResumePoint, ranks: Ranks
) -> tuple[str | None, TrainedRecords | None]:
    """Give the model memory, and the weights to start with unless a checkpoint has them. Collective.

    Returns where they came from, None for random ones, and which records they were trained on, if that is known.
    """
    if origin.checkpoint is None and config.init_from is None and config.init_from_llm is None:
        initialize(model, config.seed, ranks.device)
        return None, None
    model.to_empty(device=ranks.device)
    if origin.checkpoint is not None:
        return None, None  # it is loaded with the optimizer
    if config.init_from is not None:
        return read_initial_weights(model, config, data, ranks)
    return read_llm(model, config, data, ranks), None


def train(run: Run) -> int:
    """Run steps to the end, going back after bad updates; save; return the exit status."""
    config, state = run.config, run.state
    # The dry run makes the gradients of the largest batch and drops them: out-of-memory errors surface now rather than
    # days in, and compilation happens here. It comes before the loader, so that nothing reads data meanwhile. It takes
    # two steps' time, and tells a resumed run on a CPU nothing new.
    is_resumed = state.progress.step > 0
    known = is_resumed and run.ranks.device.type == "cpu" and not config.parallel.compile
    if state.progress.step < config.optim.steps and not known:
        grids, kind = run.data.grids, run.data.kind
        dry_run(state.model, state.optimizer, config, grids, run.stats, run.ranks, is_resumed=is_resumed, kind=kind)
    try:
        ended: tuple[str, int] | None = None
        while ended is None:
            try:
                ended = run_steps(run)
            except GoBack as reason:  # the loader is closed by now, and starts again from the restored state
                go_back(run, reason.bad_updates)
        run.save(final=True)
    except CannotContinue as error:  # the weights are good (bad updates were skipped): save what was trained
        try:
            run.save(final=True)
        except CheckpointError as failure:
            raise CannotContinue(f"{error}; and {failure}") from None
        raise
    why, status = ended
    words = f"pretrain: {why} after step {state.progress.step}" + ("; saved" if state.progress.step else "")
    run.log.event("stop", state.progress.step, why, status=status)
    if run.ranks.is_first:
        say(words)
    if status:
        report_to_torchrun(words)
    return status


def run_steps(run: Run) -> tuple[str, int]:
    """Run steps until the last, a stop signal or the end of the data; return why it ended, and the exit status."""
    config, ranks, progress = run.config, run.ranks, run.state.progress
    recomputed, compiled = config.parallel.activation_checkpointing, config.parallel.compile
    flops = Flops.of_model(run.state.model, recomputed, compiled)
    interval = Interval(flops, ranks, list(config.data.sources), part_sizes(run.state.optimizer.parameters))
    console = Console(config.optim.steps, progress.step, ranks)
    budget = SkipBudget(config.data.max_bad_documents, len(run.data.too_long))
    why, status = "done", 0
    with console, closing(run.loader()) as loader:
        # If a stop cut short the evaluation of the step that we resume from, do it now, and save that step with it.
        stopped = run.evaluate(interval)
        if run.state.metrics and not run.saver.saved_step:
            interval.checkpoint_s += run.save()
        while progress.step < config.optim.steps and not stopped:
            run.profiler.before(progress.step + 1)

            # The vote comes before the step: the losses are divided by its counts, and no rank may enter the step's
            # collectives while another stops.
            agreed = next_batch(loader, ranks, run.stop, run.saver.failed)
            if agreed.vote.ranks_write_failed:
                run.saver.settle()  # counts the failure on every rank; raises CheckpointError after several in a row
            if stopped := agreed.vote.stop:
                break
            if agreed.vote.ranks_ended == ranks.world_size:
                why = "the data ended"
                break
            batch = agreed.batch
            assert batch is not None  # only a stop leaves a rank without one; at the end of its data its rows are empty
            budget.check(agreed.vote, batch, ranks)

            if progress.excludes(batch.step):  # by an earlier rollback: counted, not trained on
                run.state.mark_done(batch)
            else:
                losses, grad_norm = run_step(run, batch, agreed.vote)
                interval.add(agreed, losses, grad_norm, run.state.optimizer.part_sums)
            run.profiler.after(progress.step)
            if progress.step == console.first_step + 1:
                ranks.set_timeout(60 * config.timeout_minutes)  # compiled and warm: from here on collectives are fast

            # The log row comes before evaluation and save, which should not follow updates known to be bad.
            if progress.step % config.log.interval_steps == 0:
                run.log_row(interval, console)
                review_updates(run)
            # Evaluation comes before the save: retention depends on the held-out losses that a checkpoint holds.
            stopped = run.evaluate(interval)
            if not stopped:
                run.draw_previews(interval)
            if progress.step % config.checkpoint.interval_steps == 0:
                interval.checkpoint_s += run.save()
        if stopped:
            why, status = f"stopped by {run.stop.name or 'a peer'}", stopped.exit_code
        run.profiler.close()
        run.log_row(interval, console)
        review_updates(run)
    return why, status


def run_step(run: Run, batch: StepBatch, vote: Vote) -> tuple[list[StepLoss], torch.Tensor]:
    """Run the micro-batches of one step, update, advance the counters; return losses and gradient norm. Collective."""
    state, losses = run.state, []
    for number, micro_batch in enumerate(batch.micro_batches, start=1):
        loss = forward_backward(
            state.model,
            micro_batch.to(run.ranks.device),
            stats=run.stats,
            diffusion=run.config.diffusion,
            image_weight=run.config.loss.image_weight,
            parallel=run.config.parallel,
            global_text_targets=vote.text_targets,
            global_images=vote.images,
            is_last=number == len(batch.micro_batches),
        )
        losses.append(loss)
    # Skipped on the device if the norm is not finite (P8).
    grad_norm = state.optimizer.update(batch.step, measure=batch.step % run.config.log.interval_steps == 0)
    state.optimizer.guard.note(batch, losses, grad_norm)
    state.mark_done(batch)
    state.progress.images_seen += vote.images
    state.progress.tokens_seen += vote.tokens
    return losses, grad_norm


if __name__ == "__main__":
    run_program(main, lasting=True)
