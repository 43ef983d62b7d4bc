"""What a run needs and how long it takes, from its config alone: parameters, memory, communication, time.

Memory is that of a step rehearsed on fake tensors (rehearsal.py) with the largest batches that the data can produce.
Time is the FLOPs of average sequences (average_sequence.py) at a given MFU, and bytes at given bandwidths.
"""

from collections import Counter
from collections.abc import Sequence

from data.documents import ImageKind
from data.largest_batch import Grid, largest_batches
from data.packing import PackedBatch
from model.modalities import text_name
from model.transfusion import Transfusion
from train.planning.rehearsal import Collective
from train.pretrain_config import PretrainConfig

# Parts of the model, by the first word of their parameters' names.
PARTS = {"text_embedding": "embeddings", "transformer": "blocks", "patches": "patches", "text_head": "heads"}
GIB = 2**30
# GPU memory that tensors cannot use: CUDA's context, NCCL's and cuBLAS's buffers; the share lost to fragmentation.
CONTEXT_GIB, FRAGMENTED = 1.5, 0.05


def parameters(model: Transfusion, *, trained: bool = False) -> dict[str, int]:
    """Return the number of parameters: `total`, `embeddings`, `blocks` (final norm included), `patches`, `heads`.

    The noise head is the second half of `patches`; `heads` is the text head, unless it is the embedding. `trained`:
    only those that are trained.
    """
    counts = dict.fromkeys(("total", *PARTS.values()), 0)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or not trained:
            counts[PARTS[name.split(".")[0]]] += parameter.numel()
            counts["total"] += parameter.numel()
    return counts


def parameters_of_a_token(model: Transfusion) -> int:
    """Return how many parameters a token can use: all but the untied ones of the other modality."""
    names = model.named_parameters()
    return sum(parameter.numel() for name, parameter in names if text_name(name) == name)


def rows_per_rank(config: PretrainConfig, world_size: int) -> tuple[int, int]:
    """Return (sequences per micro-batch, micro-steps per step) of the rank with the most lanes, as the loader does."""
    lanes = -(-config.data.lanes // world_size)
    rows = min(config.micro_batch_size, lanes)
    return rows, -(-lanes // rows)


def largest_batches_of(
    config: PretrainConfig, world_size: int, grids: Sequence[Grid], kind: ImageKind = "moments"
) -> tuple[PackedBatch, ...]:
    """Return the largest micro-batches of a run with images of `kind` and of latent `grids`."""
    rows, length, model = rows_per_rank(config, world_size)[0], config.data.sequence_length, config.model
    sizes = (model.latent_channels, model.patch_size, kind, config.data.clean_copies)
    return largest_batches(rows, length, grids, *sizes)


def usable_bytes(memory_gib: float) -> float:
    """Return the memory that a GPU of `memory_gib` has for tensors."""
    return max(0.0, memory_gib * (1 - FRAGMENTED) - CONTEXT_GIB) * GIB


def communication_seconds(
    collective: Collective, num_bytes: float, gpus_per_node: int, link_gb_per_s: float, network_gb_per_s: float
) -> float:
    """Return the transfer time without latency: the slower of a machine's links and its network cards.

    Each network card of a machine carries a ring of its own, so the cards of all participating GPUs add up.
    """
    ranks = len(collective.ranks)
    nodes = Counter(rank // gpus_per_node for rank in collective.ranks)
    links = num_bytes * (ranks - 1) / ranks / (link_gb_per_s * 1e9) if max(nodes.values()) > 1 else 0.0
    cards = num_bytes * (len(nodes) - 1) / len(nodes) / (max(nodes.values()) * network_gb_per_s * 1e9)
    return collective.passes * max(links, cards)
