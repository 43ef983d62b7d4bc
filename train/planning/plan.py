"""The plan of a training run, from its config alone: a dict of numbers with their units in the keys.

Needs neither data nor a GPU. planning/plan_text.py puts it into words.
"""

from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch

from data.dataset import DataConfig, DataSet, open_data
from data.json_tokenizer import APPENDED
from data.loader_memory import loader_bytes
from data.storage import Location
from data.tokenizer import Tokenizer
from model.transfusion import Transfusion
from train.flops import Counts, Flops
from train.hardware import GPUS, REACHED, Gpu, find, memory_of
from train.llm_folder import LLMFolder
from train.planning.average_sequence import assumed_images, average_sequence
from train.planning.estimate import (
    GIB,
    communication_seconds,
    largest_batches_of,
    parameters,
    parameters_of_a_token,
    rows_per_rank,
    usable_bytes,
)
from train.planning.fit import choose_level, rehearse_levels
from train.planning.kernels import Kernels
from train.planning.prediction import predict
from train.planning.rehearsal import Rehearsal, planned_model, rehearse
from train.planning.suggestions import cheapest_fit
from train.pretrain_config import PretrainConfig

LLAMA_2 = 32_000 + 2  # Llama-2's pieces, BOI and EOI


@dataclass(frozen=True, kw_only=True)
class PlanConfig(PretrainConfig):
    run_dir: Location = "runs/plan"  # of the planned run; not touched
    # Number of token ids; null: that of data.tokenizer; if the file does not exist, that of init_from_llm's model with
    # BOI, EOI and PAD, or of Llama-2's with BOI and EOI.
    vocab_size: int | None = None
    data: DataConfig = field(default_factory=lambda: DataConfig(tokenizer="runs/tokenizer.model"))
    world_size: int = 8  # ranks, one per GPU, >= 1
    gpu: str = "h100"  # a name in train/hardware.py, or torch's name of the device; not read with device=cpu
    gpus_per_node: int = 8  # ranks per machine, >= 1
    # Assumed model FLOPs utilization of a step that recomputes nothing, in (0, 1]; recomputation takes time on top. Not
    # read with kernels.
    mfu: float = 0.4
    # Record of bench/gpu.sh (bench/results/gpu-NAME.json): times are then predicted from what that GPU reached, also
    # for 8 ... 1,024 of them. null: from `mfu`.
    kernels: Location | None = None
    link_gb_per_s: float | None = None  # to GPUs of its machine, one direction, GB/s; null: 4/5 of the data sheet's
    network_gb_per_s: float | None = None  # per GPU to other machines, likewise; null: 4/5 of the data sheet's
    memory_gib: float | None = None  # memory of a device, GiB, > 0; null: the GPU's, or this machine's for device=cpu
    json: bool = False  # print one JSON object instead of text

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("vocab_size", "world_size", "gpus_per_node", "link_gb_per_s", "network_gb_per_s", "memory_gib"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)}: expected more than 0")
        if self.world_size > self.data.lanes:
            raise ValueError(f"world_size={self.world_size} is more than data.lanes={self.data.lanes}: use fewer ranks")
        if not 0 < self.mfu <= 1:
            raise ValueError(f"mfu={self.mfu}: expected a share in (0, 1]")
        if self.device != "cpu" and find(self.gpu) is None:
            known = ", ".join(gpu.name for gpu in GPUS)
            raise ValueError(
                f"gpu={self.gpu}: expected one of {known}; for another, set memory_gib and the most similar gpu"
            )

    @property
    def gpu_type(self) -> Gpu | None:
        """Return the GPU to plan for; None with device=cpu."""
        return None if self.device == "cpu" else find(self.gpu)


def make_plan(config: PlanConfig) -> dict[str, Any]:
    """Return what the run needs and how long it takes; raise ValueError for sizes that torch cannot represent."""
    kernels = _kernels(config)
    vocab_size, vocab_size_from = _vocab_size(config)
    try:
        model = planned_model(config, vocab_size)
    except (RuntimeError, OverflowError) as error:
        raise ValueError(f"model and vocab_size={vocab_size} are too large to count: {error}") from None
    data, data_from = _data(config)
    sequence = average_sequence(config, data)
    step = sequence.times(config.data.lanes)
    asked = config
    config, memory, rehearsal = _memory(config, vocab_size, data)
    compute = _compute(config, model, step)
    plan = {
        "parameters": parameters(model),
        "trained_parameters": parameters(model, trained=True),
        "parameters_of_a_token": parameters_of_a_token(model),
        "vocab_size": vocab_size,
        "vocab_size_from": vocab_size_from,
        "data_from": data_from,
        "tokens_a_step": step.tokens,
        "text_targets_a_step": step.text_targets,
        "images_a_step": step.images,
        "clean_images_a_step": step.clean_images,
        "steps": config.optim.steps,
        "tokens": step.tokens * config.optim.steps,
        **memory,
        **compute,
        **_communication(config, rehearsal, step.tokens, compute.get("compute_s_a_step")),
    }
    return plan if kernels is None else plan | _predicted(asked, (config, rehearsal), kernels, plan, data, sequence)


def _kernels(config: PlanConfig) -> Kernels | None:
    """Return what the config's record of measured kernels holds; raise ValueError for another GPU's."""
    if config.kernels is None:
        return None
    found = Kernels.read(config.kernels)
    if config.gpu_type is None or find(found.device) is not config.gpu_type:
        planned = "device=cpu" if config.gpu_type is None else f"gpu={config.gpu}"
        raise ValueError(
            f"kernels={config.kernels} was measured on {found.device}, but {planned} is planned; give "
            f"gpu={found.device!r}, or the record of that GPU"
        )
    found.at(config.model.patches, config.model.transformer.width)  # raises for a patcher that was not measured
    return found


def _vocab_size(config: PlanConfig) -> tuple[int, str]:
    if config.vocab_size is not None:
        return config.vocab_size, "as given"
    with suppress(FileNotFoundError):
        return Tokenizer(config.data.tokenizer).vocab_size, f"of {config.data.tokenizer}"
    if config.init_from_llm is not None:
        its = LLMFolder(config.init_from_llm).model.vocab_size
        return its + len(APPENDED), f"{its:,} of {config.init_from_llm}, BOI, EOI and PAD: no tokenizer is here"
    return LLAMA_2, f"Llama-2's, BOI and EOI: {config.data.tokenizer} is not here"


def _data(config: PlanConfig) -> tuple[DataSet | None, str]:
    """Return the data set, None if it is not available, and in words what is known of it or assumed instead."""
    (height, width), kind = assumed_images(config)
    cells = "pixels" if kind == "pixels" else "latents"
    assumed = f"the paper's mix of text and pictures of {height}x{width} {cells} is assumed"
    if not config.data.sources:
        return None, f"no data.sources are named: {assumed}"
    uncached = replace(config.data, cache_dir=None)  # a plan reads little, and fills no cache
    try:
        return open_data(uncached, config.seed, config.model.patch_size), "as in the first sequences of the data"
    except OSError as error:  # not on this machine, or not reachable from it
        return None, f"the data is not here ({error}): {assumed}"


def _memory(config: PlanConfig, vocab_size: int, data: DataSet | None) -> tuple[PlanConfig, dict[str, Any], Rehearsal]:
    """Return the config with its activation checkpointing decided, what a rank holds, and the rehearsal of that."""
    gpu, world_size = config.gpu_type, config.world_size
    if gpu is not None:
        memory_gib = config.memory_gib or gpu.memory_gib
        usable = usable_bytes(memory_gib)
    else:
        free_gib = memory_of(torch.device("cpu")) / GIB
        memory_gib = config.memory_gib or free_gib / min(world_size, config.gpus_per_node)
        usable = memory_gib * GIB

    rehearsed = partial(_rehearsed, vocab_size, data, gpu is not None)
    config, why, rehearsal = _decided(config, usable, lambda config: rehearsed(config, world_size))
    total = sum(rehearsal.peak.values())
    loader = loader_bytes(data, config.data, world_size) if data is not None else {}
    plan: dict[str, Any] = {
        "fits": total <= usable,
        "peak_memory_gib": total / GIB,
        "peak_in": rehearsal.peak_phase,
        "activation_checkpointing": config.parallel.activation_checkpointing,
        "activation_checkpointing_because": why,
        "usable_memory_gib": usable / GIB,
        "device_memory_gib": memory_gib,
        "memory_at_peak_gib": {kind: size / GIB for kind, size in rehearsal.peak.items()},
        "states_gib": {kind: size / GIB for kind, size in rehearsal.states.items()},
        "host_memory_gib": {  # of a rank, at most
            "process": 3.0,  # assumed: Python, torch and CUDA's libraries
            "loader": sum(loader.values()) / GIB,
            "staged checkpoint": rehearsal.staged / GIB,  # one page-locked block, written in the background
            "largest parameter": rehearsal.largest_parameter / GIB,  # initialised on the CPU, one at a time
            "preview": rehearsal.peaks["preview"]["preview"] / GIB if "preview" in rehearsal.peaks else 0.0,  # rank 0
        },
        "checkpoint_gib": rehearsal.checkpoint / GIB,
    }
    if not plan["fits"]:
        plan["would_fit_with"] = cheapest_fit(
            config, world_size, lambda config, ranks: sum(rehearsed(config, ranks).peak.values()) <= usable
        )
    return config, plan, rehearsal


def _decided(
    config: PlanConfig, usable: float, rehearsed: Callable[[PlanConfig], Rehearsal]
) -> tuple[PlanConfig, str, Rehearsal]:
    """Return the config with its activation checkpointing decided, why, and the rehearsal of that."""
    found = rehearse_levels(config, usable, rehearsed)
    config, why = choose_level(config, found, usable)
    return config, why, found[config.parallel.activation_checkpointing]


def _rehearsed(vocab_size: int, data: DataSet | None, cuda: bool, config: PretrainConfig, world_size: int) -> Rehearsal:
    assumed, kind = assumed_images(config)
    grids, kind = (data.grids, data.kind) if data is not None else ([assumed], kind)
    batches = largest_batches_of(config, world_size, grids, kind)
    return rehearse(config, vocab_size, world_size, batches, cuda=cuda)


def _compute(config: PlanConfig, model: Transfusion, step: Counts) -> dict[str, Any]:
    """Return the work of a step and, for a GPU, the time it takes."""
    flops = Flops.of_model(model, config.parallel.activation_checkpointing, config.parallel.compile)
    step_flops, again = flops.of_counts(step)
    rows, micro_steps = rows_per_rank(config, config.world_size)
    work = {
        "sequences_a_micro_step": rows,
        "micro_steps": micro_steps,
        "step_tflop": step_flops / 1e12,
        "recomputed_tflop": again / 1e12,
    }
    if config.gpu_type is None:
        return work
    # All wait for the rank with the most lanes.
    share = -(-config.data.lanes // config.world_size) / config.data.lanes
    return work | {"compute_s_a_step": (step_flops + again) * share / (config.gpu_type.peak_tflops * 1e12 * config.mfu)}


def _communication(
    config: PlanConfig, rehearsal: Rehearsal, step_tokens: float, compute_s: float | None
) -> dict[str, Any]:
    """Return what a step sends and, for a GPU, how long that, a step and the run take."""
    gpu, seconds = config.gpu_type, 0.0
    sent: dict[str, float] = defaultdict(float)
    for what, size in rehearsal.collectives.items():
        ranks = len(what.ranks)
        sent[f"{what.name}_{what.phase}"] += what.passes * size * (ranks - 1) / ranks / 1e9
        if gpu is not None:
            seconds += communication_seconds(what, size, *_bandwidths(config, gpu))
    found: dict[str, Any] = {"sent_gb_a_step_and_rank": dict(sent)}
    if compute_s is None:
        return found
    step_s = max(compute_s, seconds)
    run_s = step_s * config.optim.steps
    return found | {
        "communication_s_a_step": seconds,
        "communication_share_of_compute": seconds / compute_s,
        "step_s": step_s,
        "tokens_per_s": step_tokens / step_s,
        "days": run_s / 86_400,
        "gpu_hours": run_s / 3600 * config.world_size,
    }


def _bandwidths(config: PlanConfig, gpu: Gpu) -> tuple[int, float, float]:
    """Return the GPUs of a machine, and a GPU's GB/s to those and to others."""
    links = config.link_gb_per_s or REACHED * gpu.link_gb_per_s
    return config.gpus_per_node, links, config.network_gb_per_s or REACHED * gpu.network_gb_per_s


def _predicted(
    config: PlanConfig,
    mine: tuple[PlanConfig, Rehearsal],  # as decided for config.world_size
    kernels: Kernels,
    plan: dict[str, Any],
    data: DataSet | None,
    sequence: Counts,
) -> dict[str, Any]:
    """Return what a plan says of time, predicted from measured kernels, for its ranks and for other numbers of them."""
    gpu = config.gpu_type
    assert gpu is not None
    vocab_size, usable = plan["vocab_size"], plan["usable_memory_gib"] * GIB

    def decided(gpus: int) -> tuple[PlanConfig, Rehearsal]:
        if gpus == config.world_size:
            return mine
        of_gpus, _, rehearsal = _decided(config, usable, lambda c: _rehearsed(vocab_size, data, True, c, gpus))
        return of_gpus, rehearsal

    rows = predict(
        config,
        planned_model(config, vocab_size),
        sequence,
        kernels.at(config.model.patches, config.model.transformer.width),
        decided,
        also=config.world_size,
        usable=usable,
        peak_tflops=gpu.peak_tflops,
        bandwidths=_bandwidths(config, gpu),
    )
    of_plan = next(row for row in rows if row.gpus == config.world_size)
    return {
        "kernels_of": kernels.device,
        "compute_s_a_step": of_plan.compute_s,
        "communication_share_of_compute": plan["communication_s_a_step"] / of_plan.compute_s,
        "step_s": of_plan.step_s,
        "mfu": of_plan.mfu,
        "tokens_per_s": of_plan.tokens_per_s,
        "days": of_plan.days,
        "gpu_hours": of_plan.days * 24 * of_plan.gpus,
        "predicted": [asdict(row) for row in rows],
    }
