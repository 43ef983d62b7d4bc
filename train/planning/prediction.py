"""How fast a run would be on 8 ... 1,024 GPUs, from speeds measured on one and from bandwidths.

Compute is the work of the rank with the most lanes at the measured speeds. FSDP's collectives run beside it; what
prefetching cannot hide is exposed: a block's share of them at either end of a micro-step, and what is longer than the
compute of its phase. Latency is left out: with small shards on many machines a step takes longer than predicted.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from model.transfusion import Transfusion
from train.distributed.parallelize import mesh_shape
from train.flops import Counts, Flops
from train.planning.estimate import communication_seconds, parameters, rows_per_rank
from train.planning.kernels import Speeds
from train.planning.rehearsal import Collective, Rehearsal
from train.pretrain_config import PretrainConfig

GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
# Bytes that FSDP copies on the device per parameter and micro-step: gathered bfloat16 parameters are read and written
# for forward and for backward, gradients (of trained ones) are read in bfloat16 and written in float32.
GATHERED_BYTES, GRADIENT_BYTES = 2 * (2 + 2), 2 + 4
FORWARD = 1 / 3  # share of the compute


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """A step on some number of GPUs."""

    gpus: int
    rows: int  # sequences a micro-step
    micro_steps: int
    activation_checkpointing: str
    compute_s: float
    exposed_communication_s: float
    step_s: float
    tokens_per_s: float
    mfu: float
    efficiency: float  # speed of a GPU, relative to the fewest GPUs
    days: float
    fits: bool


def compute_seconds(
    config: PretrainConfig, model: Transfusion, world_size: int, sequence: Counts, speeds: Speeds
) -> float:
    """Return the seconds in which the rank with the most lanes computes a step of such sequences."""
    length, trunk = config.data.sequence_length, config.model.transformer
    flops = Flops.of_model(model, config.parallel.activation_checkpointing, config.parallel.compile)
    # Padding takes as long as other tokens, and what is decoded of clean images as of others, though neither counts.
    cells = sequence.noised_cells + sequence.clean_cells
    sequence = replace(sequence, tokens=length, noised_cells=cells, clean_cells=0.0)

    def of(**parts: float) -> float:
        """Return the FLOPs of these parts alone."""
        none = {"per_token": 0.0, "per_pair": 0.0, "per_text_target": 0.0, "per_latent_cell": 0.0}
        only = Flops(**{**none, **parts}, patch_cells=flops.patch_cells, causal_images=flops.causal_images)
        return only.of_counts(sequence)[0]

    products = of(
        per_token=flops.per_token + flops.again_per_token,
        more_per_patch=flops.more_per_patch + flops.again_more_per_patch,
        per_latent_cell=flops.per_latent_cell if config.model.patches == "linear" else 0.0,
    )
    a_sequence = (
        products * speeds.product
        + of(per_pair=flops.per_pair + flops.again_per_pair) * speeds.attention
        + of(per_text_target=flops.per_text_target) * speeds.text_head
        + cells * speeds.convolution
        + length * trunk.layers * trunk.width * speeds.element
    )
    sequences = -(-config.data.lanes // world_size)
    _, micro_steps = rows_per_rank(config, world_size)
    total, trained = parameters(model)["total"], parameters(model, trained=True)["total"]
    shard = trained * config.parallel.dp_replicate / world_size
    copied = (GATHERED_BYTES * total + GRADIENT_BYTES * trained) * micro_steps if world_size > 1 else 0
    busy = sequences * a_sequence + shard * speeds.optimizer + copied * speeds.copied_byte
    return busy / (1 - min(speeds.idle, 0.99))


def exposed_seconds(
    collectives: Mapping[Collective, float],
    compute_s: float,
    units: int,
    gpus_per_node: int,
    links: float,
    network: float,
) -> float:
    """Return how long a step's `units` FSDP units wait for communication, at GB/s of links and network."""
    of_phase: dict[str, float] = defaultdict(float)
    for what, size in collectives.items():
        of_phase[what.phase] += communication_seconds(what, size, gpus_per_node, links, network)
    exposed = of_phase.pop("update", 0.0)
    for phase, seconds in of_phase.items():
        beside = compute_s * (FORWARD if phase == "forward" else 1 - FORWARD)
        exposed += max(seconds / units, seconds - beside)
    return exposed


def predict(
    config: PretrainConfig,
    model: Transfusion,
    sequence: Counts,
    speeds: Speeds,
    rehearsed: Callable[[int], tuple[PretrainConfig, Rehearsal]],
    *,
    also: int,  # another number of GPUs
    usable: float,  # bytes of a GPU
    peak_tflops: float,
    bandwidths: tuple[int, float, float],  # GPUs a machine, GB/s within it and to others
) -> list[Prediction]:
    """Return a prediction for each number of GPUs that lanes and mesh allow, of steps of such sequences.

    `rehearsed` returns the config and the rehearsal of a step on so many GPUs.
    """
    step_tokens = config.data.lanes * sequence.tokens
    model_flops = config.data.lanes * Flops.of_model(model).of_counts(sequence)[0]
    found: list[Prediction] = []
    for gpus in sorted({*GPUS, also}):
        if gpus > config.data.lanes or not _has_mesh(config, gpus):
            continue
        decided, rehearsal = rehearsed(gpus)
        compute = compute_seconds(decided, model, gpus, sequence, speeds)
        units = config.model.transformer.layers + 1 if config.parallel.shard_blocks else 1
        exposed = exposed_seconds(rehearsal.collectives, compute, units, *bandwidths)
        step_s = compute + exposed
        rows, micro_steps = rows_per_rank(config, gpus)
        a_gpu = step_tokens / step_s / gpus
        best = found[0].tokens_per_s / found[0].gpus if found else a_gpu
        found.append(
            Prediction(
                gpus=gpus,
                rows=rows,
                micro_steps=micro_steps,
                activation_checkpointing=decided.parallel.activation_checkpointing,
                compute_s=compute,
                exposed_communication_s=exposed,
                step_s=step_s,
                tokens_per_s=step_tokens / step_s,
                mfu=model_flops / step_s / gpus / (peak_tflops * 1e12),
                efficiency=a_gpu / best,
                days=step_s * config.optim.steps / 86_400,
                fits=sum(rehearsal.peak.values()) <= usable,
            )
        )
    return found


def _has_mesh(config: PretrainConfig, gpus: int) -> bool:
    try:
        mesh_shape(config.parallel, gpus)
    except ValueError:
        return False
    return True
