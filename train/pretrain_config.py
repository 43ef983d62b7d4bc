"""The config of a training run, composed of every component's. Saved in the run folder and in each checkpoint.

It is apart from train/pretrain.py so that `sample`, `evaluate` and `report` can read a checkpoint's config.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from omegaconf import MISSING

from data.dataset import DataConfig
from data.storage import Location
from model.diffusion import DiffusionConfig
from model.latent_space import Pixels
from model.sampler_config import SamplerConfig
from model.schedule import Spacing
from model.transfusion import TransfusionConfig
from train.checkpoints.checkpoint import MOST_MINUTES, CheckpointConfig
from train.config import load_config
from train.distributed.parallelize import ParallelConfig
from train.distributed.ranks import Device
from train.heldout import KINDS, HeldoutConfig, metric_name
from train.metrics_log import LogConfig
from train.optim.guard import GuardConfig
from train.optim.optimizer import OptimConfig
from train.profile import ProfileConfig
from train.step import LossConfig


@dataclass(frozen=True, kw_only=True)
class PreviewConfig:
    interval_steps: int | None = None  # steps between sheets of sample pictures, >= 1; null: none
    prompts: list[str] = field(default_factory=list)  # captions to draw
    steps: int = 50  # sampler steps a picture
    guidance: float = 3.0  # classifier-free guidance scale, 1 is none

    def __post_init__(self) -> None:
        if self.interval_steps is not None and (self.interval_steps < 1 or not self.prompts):
            raise ValueError(
                f"preview.interval_steps={self.interval_steps}: expected at least 1, and preview.prompts to draw; "
                "null for none"
            )
        self.sampler(DiffusionConfig())  # raises for invalid settings

    def sampler(self, diffusion: DiffusionConfig) -> SamplerConfig:
        kind: Literal["euler", "ddim"] = "euler" if diffusion.schedule == "flow" else "ddim"
        spacing: Spacing = "trailing" if diffusion.zero_terminal_snr else "leading"
        return SamplerConfig(sampler=kind, steps=self.steps, spacing=spacing, guidance=self.guidance)


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    run_dir: Location = MISSING  # folder of this run: checkpoints, metrics.jsonl, previews
    # Where to start. auto: this run's newest checkpoint that verifies, or from scratch; none: from scratch, refused
    # if there are checkpoints; a step: this run's checkpoint of that step, later ones are put aside; a path: a
    # checkpoint of another run, until this run has its own.
    resume: Location = "auto"
    init_from: Location | None = None  # weights to start from instead of random ones: a checkpoint, a run or an export
    init_weights: str = "auto"  # which of its weights: model, ema, ema-N; auto: the first EMA, or the model without one
    # A pretrained language model to start the text side from: a folder with config.json and safetensors, of Llama,
    # Mistral, SmolLM2, Qwen2.5 or Qwen3. Fills model.transformer and model.tied_embeddings.
    init_from_llm: Location | None = None
    seed: int = 0  # of weights, data order, noise and all other random draws
    vae: Location | None = None  # the data's autoencoder, a folder or hub id, to decode previews; pixels need none
    device: Device = "auto"  # auto: CUDA if available
    micro_batch_size: int = 8  # sequences a rank runs at once; the global batch stays data.lanes sequences
    deterministic: bool = False  # bit-exact kernels on CUDA too, slower
    timeout_minutes: float = 10.0  # a collective that waits longer ends the run, > 0
    startup_timeout_minutes: float = 30.0  # the same until the first step is done, which may compile
    model: TransfusionConfig = field(default_factory=TransfusionConfig)
    data: DataConfig = field(default_factory=DataConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: HeldoutConfig = field(default_factory=HeldoutConfig)
    log: LogConfig = field(default_factory=LogConfig)
    preview: PreviewConfig = field(default_factory=PreviewConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)

    def __post_init__(self) -> None:
        if self.micro_batch_size < 1:
            raise ValueError(f"micro_batch_size={self.micro_batch_size}: expected at least 1")
        for name in ("timeout_minutes", "startup_timeout_minutes"):
            if not 0.01 <= getattr(self, name) <= MOST_MINUTES:
                raise ValueError(f"{name}={getattr(self, name)}: expected in [0.01, {MOST_MINUTES}]")
        steps, most = self.preview.steps, self.diffusion.num_timesteps
        if self.preview.interval_steps is not None and steps > most and self.diffusion.schedule != "flow":
            raise ValueError(f"preview.steps={steps}: expected at most diffusion.num_timesteps={most}")
        channels = self.model.latent_channels
        if self.vae == Pixels.hash and channels != Pixels.channels:
            raise ValueError(f"vae=pixels and model.latent_channels={channels}: expected {Pixels.channels} channels")
        # A run with frozen parameters reads them from there again, whatever it resumes from.
        freezes = self.model.lora.rank > 0 or any(group.frozen for group in self.optim.groups.values())
        if self.init_from is not None and self.resume not in ("auto", "none") and not freezes:
            raise ValueError(f"init_from={self.init_from} and resume={self.resume}: expected only one of the two")
        if self.init_from is not None and self.init_from_llm is not None:
            raise ValueError(
                f"init_from={self.init_from} and init_from_llm={self.init_from_llm}: expected only one of the two"
            )
        best = self.checkpoint.best_metric
        weights = self.evaluation.weights(bool(self.optim.ema_half_lives))
        names = [metric_name(name, kind, of) for of in weights for name in self.evaluation.heldout for kind in KINDS]
        if best is not None and (self.evaluation.interval_steps is None or best not in names):
            raise ValueError(
                f"checkpoint.best_metric={best}: expected one of {names or 'evaluation.heldout.NAME=FOLDER'}, measured "
                "every evaluation.interval_steps"
            )
        saves, measures = self.checkpoint.interval_steps, self.evaluation.interval_steps or 1
        if best is not None and max(saves, measures) % min(saves, measures):
            raise ValueError(
                f"checkpoint.interval_steps={saves} and evaluation.interval_steps={measures} with checkpoint."
                "best_metric: expected one to be a multiple of the other, so that checkpoints are of evaluated steps"
            )


def read_config(path: Path) -> PretrainConfig:
    """Return the config that a run wrote to `path`; raises ValueError if no run can have written it."""
    # A run writes resolved values; an interpolation would read this machine's environment (P11).
    if "${" in path.read_text(encoding="utf-8"):
        raise ValueError(f"{path} holds an interpolation (${{...}}), which no run writes")
    return load_config(PretrainConfig, [f"config={path}"], expand=False)
