"""Say what a training config amounts to before anything runs: parameters, memory, communication, time, and whether
it fits.

Needs neither data nor a GPU: `python -m train.plan config=configs/paper/7b.yaml world_size=256 gpu=h200`.
"""

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch

from data.dataset import DataConfig, DataSet, open_data
from data.loader_memory import loader_bytes
from data.storage import Location
from data.tokenizer import Tokenizer
from train.config import load_config, run_program
from train.flops import Flops
from train.hardware import GPUS, REACHED, Gpu, find, memory_of
from train.planning.estimate import (
    GIB,
    PAPER_GRID,
    communication_seconds,
    documents_of,
    flops_per_token,
    host_bytes,
    parameters,
    peak_of,
    rows_per_rank,
    usable_bytes,
)
from train.planning.rehearsal import Rehearsal
from train.planning.suggestions import cheapest_fit
from train.pretrain_config import PretrainConfig

LLAMA_2 = 32_000 + 2  # its pieces, BOI and EOI
BAR = 40  # characters of all that is taken at the peak
SECONDS_A_DAY = 86_400
WORDS = {
    "parameters": "parameters (float32, this rank's shard)",
    "optimizer": "the optimizer's states",
    "ema": "averages of the parameters",
    "gradients": "gradients (float32, this rank's shard)",
    "gathered": "gathered parameters, gradients under way",
    "forward": "activations",
    "backward": "at work in backward",
    "update": "at work in the update",
    "batch": "the batch",
}


@dataclass(frozen=True, kw_only=True)
class PlanConfig(PretrainConfig):
    run_dir: Location = "runs/plan"  # of the planned run; not touched
    # Token ids; null: those of data.tokenizer, or of Llama-2's tokenizer with BOI and EOI if that file is not here.
    vocab_size: int | None = None
    data: DataConfig = field(default_factory=lambda: DataConfig(tokenizer="runs/tokenizer.model"))
    world_size: int = 8  # ranks, one a GPU, >= 1
    gpu: str = "h100"  # a name in train/hardware.py, or what torch calls the device; read unless device=cpu
    gpus_per_node: int = 8  # ranks of one machine, >= 1
    mfu: float = 0.4  # model FLOPs utilization to reckon with, in (0, 1]; bench/gpu.sh measures it
    link_gb_per_s: float | None = None  # to GPUs of its machine, one direction, GB/s; null: 4/5 of the data sheet's
    network_gb_per_s: float | None = None  # to other machines, one direction, GB/s a GPU; null: 4/5 of the data sheet's
    memory_gib: float | None = None  # memory of a device, GiB, > 0; null: the GPU's, or this machine's for device=cpu
    json: bool = False  # print one JSON object instead of text

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.vocab_size is not None and self.vocab_size < 1:
            raise ValueError(f"vocab_size={self.vocab_size}: expected 1 or more, or null")
        if self.world_size < 1 or self.gpus_per_node < 1:
            raise ValueError(
                f"world_size={self.world_size}, gpus_per_node={self.gpus_per_node}: expected 1 or more of both"
            )
        if self.world_size > self.data.lanes:
            raise ValueError(
                f"world_size={self.world_size} is more than data.lanes={self.data.lanes}: use at most one rank a lane, "
                "or more lanes"
            )
        if not 0 < self.mfu <= 1:
            raise ValueError(f"mfu={self.mfu}: expected a share in (0, 1]")
        for name in ("link_gb_per_s", "network_gb_per_s", "memory_gib"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)}: expected more than 0, or null")
        if self.device != "cpu" and find(self.gpu) is None:
            known = ", ".join(gpu.name for gpu in GPUS)
            raise ValueError(
                f"gpu={self.gpu}: expected one of {known}; another can be given by memory_gib and gpu=h100"
            )


CONFIG = PlanConfig


def main(argv: list[str]) -> None:
    config = load_config(CONFIG, argv)
    vocab_size, whence = _vocab_size(config)
    try:
        counts = parameters(config.model, vocab_size)
    except (RuntimeError, OverflowError) as error:  # torch's, of sizes past what it can count
        raise ValueError(f"model and vocab_size={vocab_size} are too large to count: {error}") from None
    data, assumed = _data(config)
    step_tokens = config.data.lanes * config.data.sequence_length
    plan = {
        "parameters": counts,
        "vocab_size": vocab_size,
        "vocab_size_from": whence,
        "data_from": assumed or "as in the manifests, of average length",
        "tokens_a_step": step_tokens,
        "steps": config.optim.steps,
        "tokens": step_tokens * config.optim.steps,
        **_memory(config, vocab_size, data),
        **_time(config, vocab_size, data),
    }
    rehearsal = plan.pop("rehearsal")
    gpu = None if config.device == "cpu" else find(config.gpu)
    plan |= _communication(config, rehearsal, gpu, plan)
    print(json.dumps(plan) if config.json else _text(config, plan))


def _vocab_size(config: PlanConfig) -> tuple[int, str]:
    if config.vocab_size is not None:
        return config.vocab_size, "as given"
    if Path(str(config.data.tokenizer)).is_file():
        return Tokenizer(config.data.tokenizer).vocab_size, f"of {config.data.tokenizer}"
    return LLAMA_2, f"Llama-2's, BOI and EOI: {config.data.tokenizer} is not here"


def _data(config: PlanConfig) -> tuple[DataSet | None, str | None]:
    """Return the data set, or None and what is assumed in its place."""
    assumed = f"the paper's mix of text and pictures of {PAPER_GRID[0]}x{PAPER_GRID[1]} latents is assumed"
    if not config.data.sources:
        return None, f"no data.sources are named: {assumed}"
    try:
        return open_data(config.data, config.seed, config.model.patch_size), None
    except OSError as error:  # not on this machine, or not to be reached from it
        return None, f"the data is not here ({error}): {assumed}"


def _memory(config: PlanConfig, vocab_size: int, data: DataSet | None) -> dict:
    cuda, world_size = config.device != "cpu", config.world_size
    grids = data.grids if data is not None else [PAPER_GRID]
    if cuda:
        memory_gib = config.memory_gib or find(config.gpu).memory_gib
        usable = usable_bytes(memory_gib)
    else:
        free_gib = memory_of(torch.device("cpu")) / GIB
        memory_gib = config.memory_gib or free_gib / min(world_size, config.gpus_per_node)
        usable = memory_gib * GIB

    def peak(config: PretrainConfig, world_size: int) -> Rehearsal:
        return peak_of(config, vocab_size, world_size, grids, cuda=cuda)

    rehearsal = peak(config, world_size)
    total = sum(rehearsal.peak.values())
    host = host_bytes(rehearsal, loader_bytes(data, config.data, world_size) if data is not None else {})
    plan = {
        "rehearsal": rehearsal,
        "fits": total <= usable,
        "peak_memory_gib": total / GIB,
        "peak_in": rehearsal.peak_phase,
        "usable_memory_gib": usable / GIB,
        "device_memory_gib": memory_gib,
        "memory_at_peak_gib": {kind: size / GIB for kind, size in rehearsal.peak.items()},
        "states_gib": {kind: size / GIB for kind, size in rehearsal.states.items()},
        "host_memory_gib": {name: size / GIB for name, size in host.items()},
        "checkpoint_gib": rehearsal.checkpoint / GIB,
    }
    if not plan["fits"]:
        plan["would_fit_with"] = cheapest_fit(
            config, world_size, lambda c, ranks: sum(peak(c, ranks).peak.values()) <= usable
        )
    return plan


def _time(config: PlanConfig, vocab_size: int, data: DataSet | None) -> dict:
    length = config.data.sequence_length
    per_token = flops_per_token(Flops.of(config.model, vocab_size), documents_of(config, data), length)
    step_flops = per_token * config.data.lanes * length
    rows, micro_steps = rows_per_rank(config, config.world_size)
    time = {"sequences_a_micro_step": rows, "micro_steps": micro_steps, "step_tflop": step_flops / 1e12}
    if config.device == "cpu":
        return time
    # All wait for the rank with most lanes.
    share = -(-config.data.lanes // config.world_size) / config.data.lanes
    return time | {"compute_s_a_step": step_flops * share / (find(config.gpu).peak_tflops * 1e12 * config.mfu)}


def _communication(config: PlanConfig, rehearsal: Rehearsal, gpu: Gpu | None, plan: dict) -> dict:
    """Return what a step sends, how long that takes, and what follows for the run."""
    sent, seconds = Counter(), 0.0
    for what, size in rehearsal.collectives.items():
        ranks, ways = len(what.ranks), 2 if what.name == "all_reduce" else 1
        sent[f"{what.name}_{what.phase}"] += ways * size * (ranks - 1) / ranks / 1e9
        if gpu is not None:
            links = config.link_gb_per_s or REACHED * gpu.link_gb_per_s
            network = config.network_gb_per_s or REACHED * gpu.network_gb_per_s
            seconds += communication_seconds(what, size, config.gpus_per_node, links, network)
    found = {"sent_gb_a_step_and_rank": dict(sent)}
    if gpu is None:
        return found
    step_s = max(plan["compute_s_a_step"], seconds)
    run_s = step_s * config.optim.steps
    return found | {
        "communication_s_a_step": seconds,
        "communication_share_of_compute": seconds / plan["compute_s_a_step"],
        "step_s": step_s,
        "tokens_per_s": config.data.lanes * config.data.sequence_length / step_s,
        "days": run_s / SECONDS_A_DAY,
        "gpu_hours": run_s / 3600 * config.world_size,
    }


def _text(config: PlanConfig, plan: dict) -> str:
    parts = _text_of_parameters(config, plan), _text_of_memory(config, plan), _text_of_time(config, plan)
    return "\n\n".join("\n".join(lines) for lines in parts)


def _text_of_parameters(config: PlanConfig, plan: dict) -> list[str]:
    trunk, counts = config.model.transformer, plan["parameters"]
    notes = {
        "total": "",
        "embeddings": f"{plan['vocab_size']:,} token ids ({plan['vocab_size_from']})",
        "blocks": f"{trunk.layers} layers of width {trunk.width}, {trunk.heads} heads",
        "patches": f"{config.model.patches}, {config.model.patch_size}x{config.model.patch_size} latent pixels a token",
        "heads": "the text head; the noise head is among the patches",
    }
    return ["parameters"] + [
        f"  {name:<11}{count / 1e6:>12,.2f}M {100 * count / counts['total']:6.2f} %  {notes[name]}".rstrip()
        for name, count in counts.items()
    ]


def _text_of_memory(config: PlanConfig, plan: dict) -> list[str]:
    device = "CPU rank" if config.device == "cpu" else find(config.gpu).name
    usable, peak = plan["usable_memory_gib"], plan["peak_memory_gib"]
    lines = [
        f"memory of each {device} at the peak, in {plan['peak_in']}: {plan['sequences_a_micro_step']} x "
        f"{config.data.sequence_length} tokens at once"
    ]
    for kind, words in WORDS.items():
        size = plan["memory_at_peak_gib"].get(kind, 0.0)
        if size >= 0.005:
            lines.append(f"  {words:<42}{size:>9.2f} GiB  {_bar(size / peak)}")
    verdict = "fits" if plan["fits"] else "does not fit"
    of = f"of {usable:.2f}, which {plan['device_memory_gib']:.1f} leave for tensors"
    lines.append(f"  {'in all: ' + verdict:<42}{peak:>9.2f} GiB  {of}")
    if not plan["fits"]:
        remedy = plan["would_fit_with"]
        lines.append(
            f"  would fit with {' '.join(remedy)}" if remedy else "  would fit with none of the switches tried"
        )
    host = ", ".join(f"{name} {size:.2f}" for name, size in plan["host_memory_gib"].items() if size >= 0.005)
    lines.append(
        f"  host memory of a rank, at most            {sum(plan['host_memory_gib'].values()):>10.2f} GiB  {host}"
    )
    lines.append(f"  a checkpoint on disk                      {plan['checkpoint_gib']:>10.2f} GiB")
    return lines


def _bar(share: float) -> str:
    eighths = round(share * BAR * 8)
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


def _text_of_time(config: PlanConfig, plan: dict) -> list[str]:
    machines = -(-config.world_size // config.gpus_per_node)
    sent = plan["sent_gb_a_step_and_rank"]
    parts = ", ".join(f"{name.replace('_', ' ')} {size:.1f}" for name, size in sent.items() if size >= 0.05)
    tokens, tflop = plan["tokens_a_step"], plan["step_tflop"]
    lines = [
        f"a step of {config.world_size} ranks on {machines} machine{'s' if machines > 1 else ''}",
        f"  batch          {tokens:,} tokens: {config.data.lanes} sequences of {config.data.sequence_length}; "
        f"micro-steps a rank: {plan['micro_steps']}",
        f"  work           {tflop:,.0f} TFLOP, {tflop * 1e12 / tokens:.3g} FLOP a token",
        f"  sent           {sum(sent.values()):.1f} GB a rank" + (f": {parts}" if parts else ""),
    ]
    total = f"{plan['steps']:,} steps, {plan['tokens'] / 1e9:,.1f}B tokens in all"
    if "step_s" in plan:
        share, speed = plan["communication_share_of_compute"], plan["tokens_per_s"]
        bound = "hidden behind it where prefetching works" if share < 1 else "which it cannot hide: the limit"
        lines += [
            f"  compute        {plan['compute_s_a_step']:.2f} s at an MFU of {config.mfu:.0%}",
            f"  communication  {plan['communication_s_a_step']:.2f} s, {share:.0%} of the compute, {bound}",
            f"  speed          {speed:,.0f} tokens/s, {speed / config.world_size:,.0f} a GPU",
        ]
        total += f": {plan['days']:,.1f} days, {plan['gpu_hours']:,.0f} GPU-hours"
    return [*lines, f"  documents      {plan['data_from']}", total]


if __name__ == "__main__":
    run_program(main)
