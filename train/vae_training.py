"""The training of a VAE: its settings, and the loop with the state that an interrupted run resumes from.

The state is `state.pt` in the output's partial folder, replaced whole; `metrics.jsonl` next to it is appended. Every
rank holds the VAE whole and takes its share of each batch; gradients are summed in one all-reduce a step.
"""

import json
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from data.durable import atomic_write
from data.pictures import to_unit
from data.storage import Location
from data.strict_json import dumps
from model.latent_space import to_raw
from model.perceptual import Lpips
from model.vae import VaeConfig, VaeLossConfig, build_vae, decode, moments
from train.checkpoints.metrics_file import MetricsFile
from train.console import say
from train.distributed.ranks import Device, Ranks
from train.distributed.shared_folder import require_shared
from train.distributed.signals import StopKind, StopSignal
from train.distributed.vote import Ballot, PendingVote
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
    heldout: list[Location] = field(default_factory=list)  # likewise, to measure the error in vae.json; none: `inputs`
    output: Location = "runs/vae"  # folder to write; must be absent, empty or written by this program
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
    state_interval_steps: int = 200  # steps between saved states, from which an interrupted run resumes; 1 or more
    device: Device = "auto"  # auto: CUDA if there is any
    timeout_minutes: float = 10.0  # how long a rank waits for the others, more than 0

    def __post_init__(self) -> None:
        least = {"max_pictures": 1, "batch_size": 1, "log_interval_steps": 1, "state_interval_steps": 1}
        for name, low in {**least, "max_failed_files": 0, "seed": 0}.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name}={getattr(self, name)}: expected {low} or more")
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
        if self.timeout_minutes <= 0:
            raise ValueError(f"timeout_minutes={self.timeout_minutes}: expected more than 0")
        if self.optim.ema_half_lives or self.optim.optimizer != "adamw":
            raise ValueError(
                f"optim.ema_half_lives={self.optim.ema_half_lives}, optimizer={self.optim.optimizer}: expected none "
                "and adamw; a VAE keeps no average and has no blocks for Muon"
            )


class Diverged(RuntimeError):
    """Too many updates in a row had non-finite gradients; raised on every rank."""


class VaeTraining:
    """A VAE with its optimizer, its loss's networks, its step and the seconds spent."""

    def __init__(self, config: VaeTrainConfig, output: OutputFolder, ranks: Ranks, lpips: Lpips | None) -> None:
        """Build the VAE, or resume from the state that an interrupted run with the same settings left. Collective."""
        self.config, self.output, self.ranks = config, output, ranks
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            self.vae = build_vae(config.model).to(ranks.device)  # type: ignore[arg-type]  # a decorator hides `self`
            self.loss = VaeLoss(config.loss, config.optim, lpips, ranks.device)
        self.optimizer = Optimizer(self.vae, config.optim, GuardConfig())
        self.metrics = MetricsFile(output.partial)
        self.step, self.seconds = 0, 0.0
        ranks.on_first(lambda: output.open_partial(keep=True))
        require_shared(output.partial, "output", ranks)
        state = self._read_state()
        ranks.on_first(lambda: output.open_partial(keep=state is not None))
        if state is not None:
            self.vae.load_state_dict(state["vae"])
            self.optimizer.adamw.load_state_dict(state["adamw"])
            self.loss.load_state_dict(state["loss"])
            self.step, self.seconds = state["step"], state["seconds"]
            ranks.on_first(lambda: self.metrics.cut(self.step))
            say_once(ranks, f"resuming from step {self.step} of {config.optim.steps}")

    def run(self, pictures: np.ndarray, stop: StopSignal) -> StopKind:
        """Train up to the last step (NONE), or until some rank is asked to stop: save, and return what was asked.

        `pictures`: uint8 [N, H, W, 3]. Raises Diverged.
        """
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
                is_last = self.step == config.optim.steps
                bar.update()
                if is_last or self.step % config.log_interval_steps == 0:
                    row = self._log(measured)
                    bar.set_postfix(error=f"{row['pixel_error']:.4f}", kl=f"{row['kl']:.3f}")
                stopped = PendingVote(Ballot(stop=stop.kind), self.ranks).wait().stop
                if not is_last and (stopped or self.step % config.state_interval_steps == 0):
                    self.ranks.on_first(self._save_state)
                    if stopped:
                        return stopped
        return StopKind.NONE

    def _update(self, pictures: np.ndarray) -> dict[str, Tensor]:
        """Make update `step`; return the loss's parts and the gradient norms, of the whole batch.

        Batch and noise are a function of (seed, step), so a resume needs no random state, and any number of ranks
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
        reconstruction = decode(self.vae, to_raw(encoded, noise[mine].to(self.ranks.device)))
        parts = self.loss.backward(pixels, reconstruction, encoded, self.step, len(pixels) / len(rows))
        parts = self._sum_over_ranks(parts, [*self.vae.parameters(), *self.loss.parameters(self.step)])
        return {**parts, "grad_norm": self.optimizer.update(self.step), **self.loss.update(self.step)}

    def _sum_over_ranks(self, parts: dict[str, Tensor], parameters: list[nn.Parameter]) -> dict[str, Tensor]:
        """Sum the gradients in place; return the parts summed likewise. Collective, once a step."""
        if self.ranks.world_size == 1:
            return parts
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flat = torch.cat([torch.stack(list(parts.values())), *(gradient.flatten() for gradient in gradients)])
        dist.all_reduce(flat)
        values, *summed = flat.split([len(parts), *(gradient.numel() for gradient in gradients)])
        for gradient, total in zip(gradients, summed, strict=True):
            gradient.copy_(total.view_as(gradient))
        return dict(zip(parts, values, strict=True))

    def _log(self, measured: dict[str, Tensor]) -> dict[str, float]:
        """Write and return a row of metrics; raises Diverged."""
        row = {"step": self.step, **{name: value.item() for name, value in measured.items()}}
        row |= {"learning_rate": learning_rate(self.step, self.config.optim), "seconds": round(self.seconds, 2)}
        if self.ranks.is_first:
            self.metrics.append(row)
        skipped = max(self.optimizer.guard.in_a_row, self.loss.skipped_in_a_row)
        if skipped >= self.optimizer.guard.config.max_bad_in_a_row:
            raise Diverged(
                f"{skipped} updates in a row up to step {self.step} had non-finite gradients and were skipped; "
                f"lower optim.learning_rate={self.config.optim.learning_rate}"
            )
        return row

    def _save_state(self) -> None:
        state = {
            "settings": dumps(self.output.settings),
            "step": self.step,
            "seconds": self.seconds,
            "vae": self.vae.state_dict(),
            "adamw": self.optimizer.adamw.state_dict(),
            "loss": self.loss.state_dict(),
        }
        with atomic_write(self.output.partial / "state.pt", exclusive=True) as file:
            torch.save(state, file)

    def _read_state(self) -> dict[str, Any] | None:
        path = self.output.partial / "state.pt"
        if not path.is_file():
            return None
        state = torch.load(path, map_location=self.ranks.device, weights_only=True)
        if json.loads(state["settings"]) == self.output.settings:
            return state
        say_once(self.ranks, f"the state in {path.parent} was saved with other settings; starting from scratch")
        return None


def say_once(ranks: Ranks, words: str) -> None:
    if ranks.is_first:
        say(f"train.vae: {words}")
