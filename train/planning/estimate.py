"""What a run needs and how long it takes, from its config alone: parameters, memory, communication, time.

Memory is that of a step rehearsed on fake tensors (rehearsal.py) with the fullest batches that the data can
make; time is FLOPs by a given MFU, and bytes by given bandwidths.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from data.dataset import DataSet
from data.largest_batch import Grid, fullest_batches
from data.packing import PackedBatch
from data.tokenizer import SpecialIds
from model.transfusion import Transfusion, TransfusionConfig
from train.flops import Flops
from train.hardware import memory_of
from train.planning.rehearsal import Collective, Rehearsal, rehearse, state_bytes
from train.pretrain_config import PretrainConfig

# Which parameters count as what, by the start of their names.
PARTS = {"text_embedding": "embeddings", "transformer": "blocks", "patches": "patches", "text_head": "heads"}
GIB = 2**30
# Of a GPU's memory, not for tensors: CUDA's context, NCCL's and cuBLAS's buffers; what blocks of uneven sizes waste.
CONTEXT_GIB, FRAGMENTED = 1.5, 0.05
PROCESS_GIB = 3.0  # of host memory: Python, torch and CUDA's libraries
PAPER_GRID: Grid = (32, 32)  # latents of the paper's 256-pixel pictures
CAPTION_TOKENS = 64  # assumed where there is no data to ask
ROUGH_STATES, ROUGH_ACTIVATIONS = 32, 128  # bytes a parameter, bytes a token, channel and layer
ANY_IDS = SpecialIds(bos=0, eos=0, boi=0, eoi=0, pad=0)  # which ids they are changes no size


def parameters(config: TransfusionConfig, vocab_size: int) -> dict[str, int]:
    """Return the number of parameters: `total`, `embeddings`, `blocks` (final norm included), `patches`, `heads`.

    The noise head is the second half of `patches`; `heads` is the text head.
    """
    with torch.device("meta"):
        model = Transfusion(config, vocab_size)
    counts = dict.fromkeys(("total", *PARTS.values()), 0)
    for name, parameter in model.named_parameters():
        counts[PARTS[name.split(".")[0]]] += parameter.numel()
        counts["total"] += parameter.numel()
    return counts


def rows_per_rank(config: PretrainConfig, world_size: int) -> tuple[int, int]:
    """Return (sequences of a micro-batch, micro-steps of a step) of the rank with most lanes, as the loader does."""
    lanes = -(-config.data.lanes // world_size)
    rows = min(config.micro_batch_size, lanes)
    return rows, -(-lanes // rows)


def fullest_of(config: PretrainConfig, world_size: int, grids: Sequence[Grid]) -> tuple[PackedBatch, ...]:
    """Return the fullest micro-batches of a run over images of latent `grids`, for its dry run too."""
    rows, _ = rows_per_rank(config, world_size)
    model = config.model
    return fullest_batches(rows, config.data.sequence_length, grids, model.latent_channels, model.patch_size, ANY_IDS)


def peak_of(
    config: PretrainConfig, vocab_size: int, world_size: int, grids: Sequence[Grid], *, cuda: bool
) -> Rehearsal:
    """Return the memory and traffic of a step with the fullest batches."""
    return rehearse(config, vocab_size, world_size, fullest_of(config, world_size, grids), cuda=cuda)


def usable_bytes(memory_gib: float) -> float:
    """Return what a GPU of that memory has for tensors."""
    return max(0.0, memory_gib * (1 - FRAGMENTED) - CONTEXT_GIB) * GIB


def refuse_unless_states_fit(config: PretrainConfig, vocab_size: int, world_size: int, memory_bytes: int) -> None:
    """Raise ValueError when what a rank holds between steps exceeds its device's memory (P10). Takes about a second."""
    states = state_bytes(config, vocab_size, world_size)
    total = sum(states.values())
    if total > memory_bytes:
        parts = ", ".join(f"{kind} {size / GIB:.2f}" for kind, size in states.items() if size)
        raise ValueError(
            f"a rank's states take {total / GIB:.2f} GiB ({parts}), more than the {memory_bytes / GIB:.2f} GiB of its "
            f"device, before a single activation; use more ranks than {world_size}, parallel.dp_replicate=1, fewer "
            "averages or a smaller model (python -m train.plan says what would fit)"
        )


def warning_unless_peak_fits(
    config: PretrainConfig, vocab_size: int, world_size: int, grids: Sequence[Grid], memory_bytes: int, *, cuda: bool
) -> str | None:
    """Return a warning when the peak of a step with the fullest batch is likely beyond the device's memory.

    Takes some seconds. The same on every rank, and without communication between them.
    """
    rehearsal = peak_of(config, vocab_size, world_size, grids, cuda=cuda)
    usable = usable_bytes(memory_bytes / GIB) if cuda else memory_bytes
    total = sum(rehearsal.peak.values())
    if total <= usable:
        return None
    parts = ", ".join(f"{kind} {size / GIB:.2f}" for kind, size in rehearsal.peak.items() if size >= 0.01 * total)
    return (
        f"the fullest step is estimated at {total / GIB:.2f} GiB in {rehearsal.peak_phase} ({parts}), of "
        f"{usable / GIB:.2f} GiB that the device has for it; python -m train.plan says what would fit"
    )


def check_memory(
    config: PretrainConfig,
    vocab_size: int,
    world_size: int,
    grids: Sequence[Grid],
    device: torch.device,
    *,
    warn: bool,
) -> str | None:
    """Return a warning when a step is likely too large for this rank's device, None when not; before the groups are up.

    Raises ValueError when the states alone are (see `refuse_unless_states_fit`). Small runs on a CPU, far from the
    limit by a rough count, are not rehearsed; nor is a step where nobody would `warn`.
    """
    cuda, memory = device.type == "cuda", memory_of(device)
    trunk, (rows, _) = config.model.transformer, rows_per_rank(config, world_size)
    states = ROUGH_STATES * parameters(config.model, vocab_size)["total"] * config.parallel.dp_replicate / world_size
    activations = ROUGH_ACTIVATIONS * rows * config.data.sequence_length * trunk.width * trunk.layers
    if not cuda and states + activations < memory / 4:
        return None
    refuse_unless_states_fit(config, vocab_size, world_size, memory)
    return warning_unless_peak_fits(config, vocab_size, world_size, grids, memory, cuda=cuda) if warn else None


def host_bytes(rehearsal: Rehearsal, loader: dict[str, int]) -> dict[str, float]:
    """Return the host memory of a rank by what it is for, at its most."""
    return {
        "process": PROCESS_GIB * GIB,
        "loader": sum(loader.values()),
        "staged checkpoint": rehearsal.staged,  # pinned copies that a background write reads from
        "largest parameter": rehearsal.largest_parameter,  # drawn whole on the CPU, one at a time
    }


@dataclass(frozen=True, kw_only=True)
class Documents:
    """A kind of document by its averages, which stand for each."""

    share: float  # of all tokens
    tokens: float  # BOS, BOI, EOI, EOS included
    images: float = 0.0
    image_patches: float = 0.0  # of all its images
    image_cells: float = 0.0
    image_pairs: float = 0.0  # pairs of patches of one image of which the first comes earlier


def documents_of(config: PretrainConfig, data: DataSet | None) -> list[Documents]:
    """Return what the tokens of a step belong to: by the manifests, or the paper's mix where there is no data."""
    size = config.model.patch_size
    if data is None:
        image_share = config.data.image_share or 0.5
        patches = PAPER_GRID[0] * PAPER_GRID[1] // size**2
        pair = patches + CAPTION_TOKENS + 4
        share = min(1.0, image_share * pair / patches)
        cells, pairs = PAPER_GRID[0] * PAPER_GRID[1], patches * (patches - 1) / 2
        return [
            Documents(share=share, tokens=pair, images=1, image_patches=patches, image_cells=cells, image_pairs=pairs),
            Documents(share=1 - share, tokens=config.data.sequence_length),
        ]
    kinds, weights = [], sum(source.config.weight_at(1) for source in data.sources)
    for source in data.sources:
        shards, grids = source.manifest.shards, Counter()
        for shard in shards:
            grids.update({tuple(map(int, name.split("x"))): count for name, count in shard.grids.items()})
        records = source.manifest.records
        patches = {grid: grid[0] * grid[1] // size**2 for grid in grids}
        kinds.append(
            Documents(
                share=source.config.weight_at(1) / weights,
                tokens=sum(shard.tokens(size) for shard in shards) / records,
                images=grids.total() / records,
                image_patches=sum(patches[grid] * count for grid, count in grids.items()) / records,
                image_cells=sum(grid[0] * grid[1] * count for grid, count in grids.items()) / records,
                image_pairs=sum(patches[g] * (patches[g] - 1) / 2 * count for g, count in grids.items()) / records,
            )
        )
    return kinds


def flops_per_token(flops: Flops, documents: Sequence[Documents], sequence_length: int) -> float:
    """Return the training FLOPs of an average token under the mask of documents of average length, cut at S."""
    total = 0.0
    for kind in documents:
        length = min(kind.tokens, sequence_length)
        pairs = (length + 1) / 2 + (0 if flops.causal_images else kind.image_pairs / kind.tokens)
        targets = 1 - (kind.image_patches + 1 + kind.images) / kind.tokens  # no label is BOS, EOI or a patch
        cells = kind.image_cells / kind.tokens
        total += kind.share * (
            flops.per_token + flops.per_pair * pairs + flops.per_text_target * targets + flops.per_latent_cell * cells
        )
    return total


def communication_seconds(
    collective: Collective, num_bytes: float, gpus_per_node: int, link_gb_per_s: float, network_gb_per_s: float
) -> float:
    """Return how long bytes travel, latency left out: the slower of a machine's links and its network cards.

    A ring enters and leaves each machine once a network card, so the cards of the GPUs that take part work together.
    """
    ranks = len(collective.ranks)
    nodes = Counter(rank // gpus_per_node for rank in collective.ranks)
    ways = 2 if collective.name == "all_reduce" else 1
    links = num_bytes * (ranks - 1) / ranks / (link_gb_per_s * 1e9) if max(nodes.values()) > 1 else 0.0
    cards = num_bytes * (len(nodes) - 1) / len(nodes) / (max(nodes.values()) * network_gb_per_s * 1e9)
    return ways * max(links, cards)
