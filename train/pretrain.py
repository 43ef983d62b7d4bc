"""Train a Transfusion model: `python -m train.pretrain config=FILE`, or under torchrun for several ranks.

The same command again resumes: from the newest checkpoint that verifies, on the same or another number of ranks.
Exit status: 0 done, 75 saved after a stop signal (requeue me), 130 saved after Ctrl-C, 2 refused, 1 failed.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, replace

import torch

from data.loader import Loader, StepBatch, epochs, open_data
from model.transfusion import Transfusion
from train import checkpoint
from train.config import load_config, run_program, to_yaml
from train.distributed import Ballot, PendingVote, Ranks, Vote, init_ranks, last_words
from train.metrics import Console, Flops, Interval, MetricsLog
from train.optim import Optimizer, learning_rate
from train.parallelize import initialize, parallelize
from train.previews import Previews
from train.recipe import PretrainConfig
from train.run_folder import RunFolder
from train.signals import StopKind, StopSignal
from train.state import TrainState
from train.step import latent_stats, micro_step

CONFIG = PretrainConfig
POLL_SECONDS = 5.0  # a rank without a batch votes this often, so that stops and errors still reach everybody


def main(argv: list[str]) -> int | None:
    config = load_config(CONFIG, argv)
    data = open_data(config.data, config.seed, config.model.patch_size)
    if data.latent_spec is not None and data.latent_spec.channels != config.model.latent_channels:
        raise ValueError(
            f"model.latent_channels={config.model.latent_channels}, but the data's latents have "
            f"{data.latent_spec.channels} channels; set model.latent_channels={data.latent_spec.channels}"
        )
    ranks = init_ranks(timeout_s=60 * config.timeout_minutes, cpu=config.device == "cpu")
    if config.device == "cuda" and ranks.device.type != "cuda":
        raise ValueError("device=cuda, but torch finds no CUDA device; use device=auto or device=cpu")
    torch.use_deterministic_algorithms(config.deterministic)
    with StopSignal() as stop, RunFolder(config.run_dir, ranks) as folder:
        ranks.gather(None)  # nobody goes on before the folder is ours
        with torch.device("meta"):
            model = Transfusion(config.model, data.tokenizer.vocab_size)
        parallelize(model, config.parallel, ranks)
        initialize(model, config.seed, ranks.device)
        vae = data.latent_spec.vae_hash if data.latent_spec is not None else "none"
        state = TrainState(
            model=model,
            optimizer=Optimizer(model, config.optim),
            fingerprint={**data.fingerprint, "vae": vae},
            recipe=to_yaml(config),
            data={"latent_spec": data.latent_spec and asdict(data.latent_spec), "grids": data.grids},
        )
        checkpoint.clean(folder.checkpoints, ranks)
        if (path := checkpoint.latest(folder.checkpoints, ranks)) is not None:
            state.load(path, ranks)
            folder.cut_metrics(state.progress.step)
        loader = Loader(
            data,
            config.data,
            rank=ranks.rank,
            world_size=ranks.world_size,
            micro_batch_size=config.micro_batch_size,
            first_step=state.progress.step + 1,
            states=state.lane_states,
            pin_memory=ranks.device.type == "cuda",
        )
        state.lane_states = {lane: state.lane_states[lane] for lane in loader.lanes if lane in state.lane_states}
        if ranks.is_first:
            (folder.path / "config.yaml").write_text(state.recipe)
            origin = f"from {path}" if path else "from scratch"
            print(
                f"pretrain: {sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters, "
                f"{ranks.world_size} ranks on {ranks.device.type}, {config.data.lanes} x {config.data.sequence_length} "
                f"tokens a step, {config.optim.steps} steps, {origin}",
                flush=True,
            )
        log = MetricsLog(config.log, folder, ranks, asdict(config), run_id=folder.path.name)
        previews = Previews(config, data, ranks, folder, log)
        with last_words(ranks, lambda: f"step {state.progress.step + 1}"):
            status = train(config, state, loader, ranks, folder, log, previews, stop)
        loader.close()
        log.close()
    ranks.close()
    return status


def train(
    config: PretrainConfig,
    state: TrainState,
    loader: Loader,
    ranks: Ranks,
    folder: RunFolder,
    log: MetricsLog,
    previews: Previews,
    stop: StopSignal,
) -> int:
    """Run steps until the last, a stop signal or the end of the data; save; return the exit status."""
    progress, model, optimizer = state.progress, state.model, state.optimizer
    stats = latent_stats(loader.data.latent_spec, config.model.latent_channels, ranks.device)
    flops = Flops.of(config.model, loader.data.tokenizer.vocab_size)
    interval, console = Interval(ranks), Console(config.optim.steps, progress.step, ranks)
    saved_step = progress.step

    def save() -> None:
        nonlocal saved_step
        if progress.step in (0, saved_step):  # nothing is owed before the first update
            return
        start = time.monotonic()
        state.save(folder, config.checkpoint, ranks)
        saved_step = progress.step
        interval.checkpoint_s += time.monotonic() - start

    while progress.step < config.optim.steps:
        batch, vote, data_wait_s = next_batch(loader, ranks, stop, save)
        if vote.stop != StopKind.NONE or vote.ranks_ended == ranks.world_size:
            save()
            if ranks.is_first:
                reason = "the data ended" if vote.stop == StopKind.NONE else f"stopped by {stop.name or 'a peer'}"
                print(f"pretrain: {reason} after step {progress.step}; saved", flush=True)
            return vote.stop.exit_code
        check_skipped(config, vote, batch, ranks)
        losses = []
        for micro_batch in batch.micro_batches:
            loss = micro_step(
                model,
                micro_batch.to(ranks.device),
                stats=stats,
                diffusion=config.diffusion,
                image_weight=config.loss.image_weight,
                global_text_targets=vote.text_targets,
                global_images=vote.images,
            )
            loss.total.backward()
            losses.append(loss)
        grad_norm = optimizer.update(batch.step)
        progress.step, state.lane_states = batch.step, batch.lane_states
        progress.images_seen += vote.images
        progress.tokens_seen += vote.tokens
        interval.add(batch, losses, vote, data_wait_s)
        if progress.step % config.log.interval_steps == 0 or progress.step == config.optim.steps:
            row = {**vars(progress), **interval.row(flops), "learning_rate": learning_rate(batch.step, config.optim)}
            row["skipped_updates"], in_a_row = (int(count) for count in optimizer.nonfinite.tolist())
            row.update(grad_norm=grad_norm.item(), skipped_documents=vote.documents_skipped)
            row["epoch_mean"] = float(epochs(state.lane_states).mean())
            log.write(row)
            console.show(row)
            if in_a_row >= config.optim.max_nonfinite_in_a_row:
                raise ValueError(f"{in_a_row} updates in a row had non-finite gradients, up to step {progress.step}")
        if previews.due(progress.step):
            previews.make(optimizer, progress.step)
        if progress.step % config.checkpoint.interval_steps == 0:
            save()
    save()
    return 0


def next_batch(
    loader: Loader, ranks: Ranks, stop: StopSignal, save: Callable[[], None]
) -> tuple[StepBatch | None, Vote, float]:
    """Return this rank's batch, what all ranks agreed on, and the seconds waited for data.

    Every rank votes, the one without a batch too, until all have one or all must stop. When any rank's reader
    failed, all save, and each raises: the failed one its own error.
    """
    start, batch, failure = time.monotonic(), None, None
    while True:
        try:
            batch = batch or loader.next(POLL_SECONDS)
        except Exception as error:  # whatever it is, the peers must hear of it before this rank leaves
            failure = error
        data_wait_s = time.monotonic() - start
        mine = (
            Ballot(has_batch=False)
            if batch is None
            else Ballot(
                text_targets=batch.num_text_targets,
                images=batch.num_images,
                tokens=batch.num_tokens,
                documents_skipped=batch.num_skipped,
                ended=batch.ended,
            )
        )
        vote = PendingVote(replace(mine, stop=stop.kind, data_failed=failure is not None), ranks).wait()
        if vote.ranks_data_failed:
            save()
            raise failure or RuntimeError(f"the data reader of {vote.ranks_data_failed} other ranks failed")
        if vote.stop != StopKind.NONE or vote.ranks_with_batch == ranks.world_size:
            return batch, vote, data_wait_s


def check_skipped(config: PretrainConfig, vote: Vote, batch: StepBatch, ranks: Ranks) -> None:
    """Raise on every rank when the budget of bad documents is spent, naming the last of them (P7)."""
    if vote.documents_skipped <= config.data.max_bad_documents:
        return
    names = [name for states in ranks.gather(batch.lane_states) for s in states.values() for name in s["skipped_names"]]
    raise ValueError(
        f"{vote.documents_skipped} documents were skipped, more than data.max_bad_documents="
        f"{config.data.max_bad_documents}; the last: {'; '.join(names[:8])}"
    )


if __name__ == "__main__":
    run_program(main)
