"""Train a VAE (diffusers' AutoencoderKL) on the pictures of raw image-text shards.

Writes `output` in diffusers' layout (config.json, safetensors weights) with metrics.jsonl and, last, vae.json:
settings, reconstruction error, seconds. All pictures are decoded once and kept in memory. Under torchrun each rank
takes its share of every batch. Killed or interrupted, the same command goes on from the last saved state and ends with
the same weights; a finished output is reused.
"""

import json
import math
import sys
import time
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

from data.durable import atomic_write
from data.pictures import decode_picture, to_unit
from data.raw import TAR, picture_of
from data.shards import BadRecord, BadRecords, read_shard
from data.storage import Location, expand
from model.perceptual import Lpips, load_lpips
from model.vae import VaeConfig, VaeLossConfig, build_vae, decode, kl_nats, moments, sample_latents, vae_hash
from train.config import load_config, run_program
from train.distributed.agreement import facts_of
from train.distributed.launcher import leave_word
from train.distributed.ranks import DIED, Device, Ranks, init_ranks, last_words
from train.distributed.shared_folder import require_shared
from train.distributed.signals import StopKind, StopSignal
from train.optim.guard import GuardConfig
from train.optim.optimizer import OptimConfig, Optimizer, learning_rate
from train.output_folder import OutputFolder
from train.vae_loss import VaeLoss

DEFAULT_OPTIM = OptimConfig(
    learning_rate=1e-4, min_learning_rate=1e-6, warmup_steps=1000, steps=100_000, weight_decay=0.01
)


@dataclass(frozen=True, kw_only=True)
class VaeTrainConfig:
    inputs: list[Location] = field(default_factory=list)  # .tar shards with pictures, or folders of them
    heldout: list[Location] = field(default_factory=list)  # the same, for the error in vae.json; none: training's
    output: Location = "runs/vae"  # folder to write; must be absent, empty or made by this program
    resolution: int = 256  # pixels a side of the square pictures; a multiple of the model's stride
    max_pictures: int = 50_000  # pictures kept in memory, the first ones of `inputs`; at 256 pixels 0.2 MB each
    max_bad_fraction: float = 0.01  # share of records, and of the shards' bytes, that may be skipped, in [0, 1]
    max_failed_files: int = 0  # shards that may hold nothing readable, >= 0
    model: VaeConfig = field(default_factory=VaeConfig)
    loss: VaeLossConfig = field(default_factory=VaeLossConfig)
    optim: OptimConfig = field(default_factory=lambda: DEFAULT_OPTIM)
    batch_size: int = 32  # pictures a step; 1 or more
    seed: int = 0  # of weights, batches and noise; 0 or more
    log_interval_steps: int = 50  # steps between rows of metrics.jsonl; 1 or more
    state_interval_steps: int = 200  # steps between saved states, from which an interrupted run goes on; 1 or more
    device: Device = "auto"  # auto: CUDA if there is any
    timeout_minutes: float = 10.0  # how long a rank waits for the others, more than 0

    def __post_init__(self) -> None:
        """Reject what cannot be trained."""
        for name in ("max_pictures", "batch_size", "log_interval_steps", "state_interval_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected 1 or more")
        if self.resolution < 1 or self.resolution % self.model.stride:
            raise ValueError(
                f"resolution={self.resolution}: expected a multiple of the stride {self.model.stride} "
                f"of model.block_channels={self.model.block_channels}"
            )
        if self.resolution < self.loss.smallest_picture:
            raise ValueError(
                f"resolution={self.resolution}: the loss needs {self.loss.smallest_picture} pixels or more; raise it, "
                "or set loss.gan_weight=0 and loss.lpips_weight=0"
            )
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"max_bad_fraction={self.max_bad_fraction}: expected a share in [0, 1]")
        if self.max_failed_files < 0:
            raise ValueError(f"max_failed_files={self.max_failed_files}: expected 0 or more")
        if self.seed < 0 or self.timeout_minutes <= 0:
            raise ValueError(f"seed={self.seed}, timeout_minutes={self.timeout_minutes}: expected >= 0 and > 0")
        if self.optim.ema_half_lives or self.optim.optimizer != "adamw":
            raise ValueError(
                f"optim.ema_half_lives={self.optim.ema_half_lives}, optimizer={self.optim.optimizer}: expected none "
                "and adamw; a VAE keeps no average and has no blocks for Muon"
            )
        if self.device not in ("auto", "cpu", "cuda"):
            raise ValueError(f"device={self.device}: expected auto, cpu or cuda")


CONFIG = VaeTrainConfig
GROUP = True  # its ranks work together
OWN = ("inputs", "heldout", "output", "device", "loss.lpips_weights")  # of each rank: what they hold is compared
# Settings that do not decide what comes out, only how it is made.
HOW = ("output", "log_interval_steps", "state_interval_steps", "device", "timeout_minutes")


class Diverged(RuntimeError):
    """Too many updates in a row had non-finite gradients; raised on every rank alike."""


def main(argv: list[str]) -> int | None:
    """Train, or go on, or say that it is done."""
    config = load_config(CONFIG, argv)
    files = [Path(path) for path in expand(config.inputs, (TAR,))]
    heldout_files = [Path(path) for path in expand(config.heldout, (TAR,))] if config.heldout else []
    lpips = load_lpips(config.loss.lpips_weights) if config.loss.lpips_weight > 0 else None
    contents = {"data": f"{_crc32(files):08x}-{_crc32(heldout_files):08x}"}
    if lpips is not None:
        contents["lpips"] = f"{_crc32([Path(config.loss.lpips_weights)]):08x}"
    facts = {**facts_of(config, OWN), **contents}
    ranks = init_ranks(timeout_s=60 * config.timeout_minutes, device=config.device, facts=facts)
    if config.batch_size < ranks.world_size:
        raise ValueError(
            f"batch_size={config.batch_size}: expected at least one picture for each of {ranks.world_size} ranks"
        )
    settings = {name: value for name, value in asdict(config).items() if name not in HOW} | contents
    settings = ranks.on_first(lambda: settings)  # the paths of its inputs are each rank's own
    if lpips is not None:
        heads = "with its linear heads" if lpips.has_heads else "without heads: every channel weighs 1"
        _say(ranks, f"LPIPS from {config.loss.lpips_weights}, {heads}")
    output = OutputFolder(config.output, "train.vae", "vae.json", settings)
    if ranks.on_first(output.is_complete):
        _say(ranks, f"{output.path} is complete for these settings; reusing it")
        ranks.close()
        return None

    pictures = load_pictures(files, config, ranks)
    heldout = load_pictures(heldout_files, config, ranks) if heldout_files else None
    training = Training(config, output, ranks, lpips)
    status = None
    with StopSignal() as stop, last_words(ranks, lambda: f"step {training.step}"):
        try:
            stopped = training.run(pictures, stop)
            if stopped == StopKind.NONE:
                ranks.on_first(lambda: finish(training, pictures, heldout))
            else:
                words = f"stopped and saved at step {training.step}; the same command goes on from here"
                leave_word(f"train.vae: {words}")
                _say(ranks, words)
                status = stopped.exit_code
        except Diverged as error:
            leave_word(f"train.vae: {error}")
            _say(ranks, str(error))
            status = DIED
    ranks.close()
    return status


def finish(training: "Training", pictures: np.ndarray, heldout: np.ndarray | None) -> None:
    """Measure the codec, save it beside and rename it into place; rank 0 only."""
    config, output = training.config, training.output
    measured = pictures[:512] if heldout is None else heldout
    summary = {
        "hash": vae_hash(training.vae),
        "steps": training.step,
        "seconds": round(training.seconds, 1),
        "pictures": len(pictures),
        "measured_on": f"{len(measured)} {'training' if heldout is None else 'held-out'} pictures",
        **measure(training.vae, measured, config, training.ranks.device),
    }
    training.vae.save_pretrained(output.partial, safe_serialization=True)
    (output.partial / "state.pt").unlink(missing_ok=True)
    output.commit(summary)
    print(f"train.vae: wrote {output.path}: " + ", ".join(f"{name} {value}" for name, value in summary.items()))


class Training:
    """A VAE with its optimizer, its loss's networks and step, as `state.pt` in the partial folder keeps them. Every
    rank holds it whole.
    """

    def __init__(self, config: VaeTrainConfig, output: OutputFolder, ranks: Ranks, lpips: Lpips | None) -> None:
        """Build the VAE; take over the state that an interrupted run with the same settings left. Collective."""
        self.config, self.output, self.ranks = config, output, ranks
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            self.vae = build_vae(config.model).to(ranks.device)
            self.loss = VaeLoss(config.loss, config.optim, lpips, ranks.device)
        self.optimizer = Optimizer(self.vae, config.optim, GuardConfig())
        self.step, self.seconds = 0, 0.0
        self.rows: list[dict[str, float]] = []  # of metrics.jsonl
        ranks.on_first(lambda: output.open_partial(keep=True))
        require_shared(output.partial, "output", ranks)
        state = self._read_state()
        ranks.on_first(lambda: output.open_partial(keep=state is not None))
        if state is not None:
            self.vae.load_state_dict(state["vae"])
            self.optimizer.adamw.load_state_dict(state["adamw"])
            self.loss.load_state_dict(state["loss"])
            self.step, self.seconds, self.rows = state["step"], state["seconds"], state["rows"]
            _say(ranks, f"going on from step {self.step} of {config.optim.steps}")

    def run(self, pictures: np.ndarray, stop: StopSignal) -> StopKind:
        """Train up to the last step (NONE), or until some rank is asked to stop: save, and return what was asked."""
        config, start, before = self.config, time.monotonic(), self.seconds
        interval = 1 if sys.stdout.isatty() else 5  # seconds
        bar = tqdm(desc="vae", unit="step", total=config.optim.steps, initial=self.step, mininterval=interval,
                   file=sys.stdout, disable=not self.ranks.is_first)  # fmt: skip
        self.vae.train()
        with bar:
            while self.step < config.optim.steps:
                self.step += 1
                measured = self._update(pictures)
                self.seconds = before + time.monotonic() - start
                bar.update()
                if self.step % config.log_interval_steps == 0 or self.step == config.optim.steps:
                    self._log(measured)
                    bar.set_postfix(error=f"{self.rows[-1]['pixel_error']:.4f}", kl=f"{self.rows[-1]['kl']:.3f}")
                stopped = self._agree(stop.kind)
                last = self.step == config.optim.steps
                if not last and (stopped or self.step % config.state_interval_steps == 0):
                    self.ranks.on_first(self._save_state)
                    if stopped:
                        return stopped
        return StopKind.NONE

    def _update(self, pictures: np.ndarray) -> dict[str, torch.Tensor]:
        """Make update `step`; return the loss's parts and the gradient norms, of the whole batch.

        Batch and noise are a function of (seed, step), so a resume needs no random state and any number of ranks
        makes the same update up to the order of additions.
        """
        rng = np.random.default_rng((self.config.seed, self.step))
        rows = rng.choice(len(pictures), size=self.config.batch_size)
        cells = self.config.resolution // self.config.model.stride
        shape = (len(rows), self.config.model.latent_channels, cells, cells)
        noise = torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))
        rank, world_size = self.ranks.rank, self.ranks.world_size
        mine = slice(rank * len(rows) // world_size, (rank + 1) * len(rows) // world_size)

        pixels = torch.from_numpy(to_unit(pictures[rows[mine]])).to(self.ranks.device)
        encoded = moments(self.vae, pixels)
        reconstruction = decode(self.vae, sample_latents(encoded, noise[mine].to(self.ranks.device)))
        parts = self.loss.backward(pixels, reconstruction, encoded, self.step, len(pixels) / len(rows))
        parts = self._sum_over_ranks(parts, [*self.vae.parameters(), *self.loss.parameters(self.step)])
        return {**parts, "grad_norm": self.optimizer.update(self.step), **self.loss.update(self.step)}

    def _sum_over_ranks(
        self, parts: dict[str, torch.Tensor], parameters: list[nn.Parameter]
    ) -> dict[str, torch.Tensor]:
        """Sum the gradients in place; return the parts summed likewise. Collective, once a step."""
        if self.ranks.world_size == 1:
            return parts
        gradients = [parameter.grad for parameter in parameters]
        flat = torch.cat([torch.stack(list(parts.values())), *(gradient.flatten() for gradient in gradients)])
        dist.all_reduce(flat)
        values, *summed = flat.split([len(parts), *(gradient.numel() for gradient in gradients)])
        for gradient, total in zip(gradients, summed, strict=True):
            gradient.copy_(total.view_as(gradient))
        return dict(zip(parts, values, strict=True))

    def _agree(self, kind: StopKind) -> StopKind:
        """Return the gravest stop that any rank was asked for. Collective."""
        gravest = torch.tensor(int(kind))
        dist.all_reduce(gravest, op=dist.ReduceOp.MAX, group=self.ranks.vote_group)
        return StopKind(gravest.item())

    def _log(self, measured: dict[str, torch.Tensor]) -> None:
        row = {"step": self.step, **{name: value.item() for name, value in measured.items()}}
        row |= {"learning_rate": learning_rate(self.step, self.config.optim), "seconds": round(self.seconds, 2)}
        self.rows.append(row)
        if self.ranks.is_first:
            lines = "".join(json.dumps(row) + "\n" for row in self.rows)
            (self.output.partial / "metrics.jsonl").write_text(lines, encoding="utf-8")
        skipped = max(self.optimizer.guard.in_a_row, self.loss.skipped_in_a_row)
        if skipped >= self.optimizer.guard.config.max_bad_in_a_row:
            raise Diverged(
                f"{skipped} updates in a row up to step {self.step} had non-finite gradients and were skipped; "
                f"lower optim.learning_rate={self.config.optim.learning_rate}"
            )

    def _save_state(self) -> None:
        path = self.output.partial / "state.pt"
        state = {"settings": json.dumps(self.output.settings), "step": self.step, "seconds": self.seconds}
        state |= {"rows": self.rows, "vae": self.vae.state_dict(), "adamw": self.optimizer.adamw.state_dict()}
        state["loss"] = self.loss.state_dict()
        with atomic_write(path, exclusive=True) as file:
            torch.save(state, file)

    def _read_state(self) -> dict[str, Any] | None:
        path = self.output.partial / "state.pt"
        if not path.is_file():
            return None
        state = torch.load(path, map_location=self.ranks.device, weights_only=True)
        if json.loads(state["settings"]) == self.output.settings:
            return state
        _say(self.ranks, f"the state in {path.parent} belongs to other settings; starting anew")
        return None


def _say(ranks: Ranks, message: str) -> None:
    if ranks.is_first:
        print(f"train.vae: {message}", flush=True)


def load_pictures(files: list[Path], config: VaeTrainConfig, ranks: Ranks) -> np.ndarray:
    """Decode the first `max_pictures` pictures of the shards, uint8 [N, H, W, 3]; skip and name what is bad."""
    bad, pictures = BadRecords(config.max_bad_fraction, max_failed_files=config.max_failed_files), []
    full = False
    for path in files:
        for record in read_shard(path, bad):
            if full := len(pictures) == config.max_pictures:
                break
            try:
                where = f"{path}/{record['__key__'].decode(errors='replace')}"
                pictures.append(decode_picture(picture_of(record, where), [(config.resolution,) * 2], where))
            except BadRecord as error:
                bad.add(error)
                bad.check()
        if full:
            break
    for remark in [*(f"skipped {name}" for name in bad.names), *bad.remarks()]:
        _say(ranks, remark)
    bad.check(final=True)
    if not pictures:
        raise ValueError(f"no pictures in {', '.join(map(str, files))}: expected records with .jpg, .png or .webp")
    limit = f" (max_pictures={config.max_pictures}: the rest is not read)" if full else ""
    _say(ranks, f"{len(pictures)} pictures at {config.resolution} pixels from {len(files)} shards{limit}")
    return np.stack(pictures)


@torch.no_grad()
def measure(vae: nn.Module, pictures: np.ndarray, config: VaeTrainConfig, device: torch.device) -> dict[str, Any]:
    """Return what the codec costs: errors of pixels in [-1, 1] through the mean and through a sampled latent, the
    KL in nats a picture, and the latents' deviation with the share of their variance that is posterior noise.
    """
    vae.eval()
    rng = np.random.default_rng(config.seed)
    errors, kl, first, second, noise_variance = np.zeros(3), 0.0, 0.0, 0.0, 0.0
    for start in range(0, len(pictures), config.batch_size):
        pixels = torch.from_numpy(to_unit(pictures[start : start + config.batch_size])).to(device)
        encoded = moments(vae, pixels)
        mean, logvar = encoded.chunk(2, dim=1)
        noise = torch.from_numpy(rng.standard_normal(tuple(mean.shape), dtype=np.float32)).to(device)
        through_mean = decode(vae, mean).clamp(-1, 1) - pixels
        through_sample = decode(vae, sample_latents(encoded, noise)).clamp(-1, 1) - pixels
        parts = through_mean.abs(), through_mean.square(), through_sample.square()
        errors += np.array([part.mean(dim=(1, 2, 3)).sum().item() for part in parts])
        kl += kl_nats(encoded).item()
        first += mean.mean(dim=(2, 3)).sum(0)
        second += (mean.square() + logvar.exp()).mean(dim=(2, 3)).sum(0)
        noise_variance += logvar.exp().mean(dim=(2, 3)).sum(0)
    count = len(pictures)
    absolute, squared, squared_sampled = errors / count
    variance = second / count - (first / count).square()
    return {
        "absolute_error": round(absolute, 5),
        "psnr_db": round(10 * math.log10(4 / squared), 2),
        "psnr_sampled_db": round(10 * math.log10(4 / squared_sampled), 2),
        "kl_nats": round(kl / count, 1),
        "latent_std": [round(value, 3) for value in variance.sqrt().tolist()],
        "noise_share": [round(value, 3) for value in (noise_variance / count / variance).tolist()],
    }


def _crc32(files: list[Path]) -> int:
    """Identify the pictures, so that redrawn shards are not taken for the old ones."""
    value = 0
    for path in files:
        with open(path, "rb") as file:
            while block := file.read(1 << 24):
                value = zlib.crc32(block, value)
    return value


if __name__ == "__main__":
    run_program(main, lasting=True)
