"""What a run needs and how long it takes, from its config alone: parameters, memory, communication, time.

Memory is that of a step rehearsed on fake tensors (rehearsal.py) with the largest batches that the data can produce.
Time is FLOPs at a given MFU and bytes at given bandwidths.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from data.dataset import DataSet
from data.documents import ImageKind
from data.largest_batch import Grid, largest_batches
from data.packing import PackedBatch
from data.tokenizer import SpecialIds
from model.latent_space import Pixels
from model.modalities import text_name
from model.transfusion import Transfusion
from train.flops import Flops
from train.planning.rehearsal import Collective
from train.pretrain_config import PretrainConfig

# Parts of the model, by the first word of their parameters' names.
PARTS = {"text_embedding": "embeddings", "transformer": "blocks", "patches": "patches", "text_head": "heads"}
GIB = 2**30
# GPU memory that tensors cannot use: CUDA's context, NCCL's and cuBLAS's buffers; the share lost to fragmentation.
CONTEXT_GIB, FRAGMENTED = 1.5, 0.05
PAPER_GRID: Grid = (32, 32)  # latents of the paper's pictures
PAPER_PIXELS: Grid = (256, 256)
CAPTION_TOKENS = 64  # assumed when the data is not available


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
    any_ids = SpecialIds(bos=0, eos=0, boi=0, eoi=0, pad=0)  # sizes do not depend on them
    sizes = (model.latent_channels, model.patch_size, any_ids, kind, config.data.clean_copies)
    return largest_batches(rows, length, grids, *sizes)


def assumed_images(config: PretrainConfig) -> tuple[Grid, ImageKind]:
    """Return the grid and the kind of the paper's pictures, for when the data is not available."""
    return (PAPER_PIXELS, "pixels") if config.vae == Pixels.hash else (PAPER_GRID, "moments")


def usable_bytes(memory_gib: float) -> float:
    """Return the memory that a GPU of `memory_gib` has for tensors."""
    return max(0.0, memory_gib * (1 - FRAGMENTED) - CONTEXT_GIB) * GIB


@dataclass(frozen=True, kw_only=True)
class Documents:
    """A kind of document, by the averages of one."""

    share: float  # of all tokens
    tokens: float  # including BOS, BOI, EOI, EOS
    images: float = 0.0
    image_patches: float = 0.0  # summed over its images, like the following
    image_cells: float = 0.0
    image_pairs: float = 0.0  # pairs of patches of one image, each pair once


def documents_of(config: PretrainConfig, data: DataSet | None) -> list[Documents]:
    """Return the documents that make up a step: by the manifests, or the paper's mix if the data is not available."""
    size = config.model.patch_size
    if data is None:
        image_share = config.data.image_share or 0.5
        cells = math.prod(assumed_images(config)[0])
        patches = cells // size**2
        tokens = patches + CAPTION_TOKENS + 4
        share = min(1.0, image_share * tokens / patches)
        pictures = {"images": 1, "image_patches": patches, "image_cells": cells, "image_pairs": math.comb(patches, 2)}
        return [
            Documents(share=share, tokens=tokens, **pictures),
            Documents(share=1 - share, tokens=config.data.sequence_length),
        ]
    kinds, weights = [], sum(source.config.weight_at(1) for source in data.sources)
    for source in data.sources:
        shards, records = source.manifest.shards, source.manifest.records
        images: Counter[int] = Counter()  # by latent cells
        for shard in shards:
            for grid, count in shard.grids.items():
                images[math.prod(map(int, grid.split("x")))] += count
        kinds.append(
            Documents(
                share=source.config.weight_at(1) / weights,
                tokens=sum(shard.tokens(size) for shard in shards) / records,
                images=images.total() / records,
                image_patches=sum(cells // size**2 * count for cells, count in images.items()) / records,
                image_cells=sum(cells * count for cells, count in images.items()) / records,
                image_pairs=sum(math.comb(cells // size**2, 2) * count for cells, count in images.items()) / records,
            )
        )
    return kinds


def flops_per_token(flops: Flops, documents: Sequence[Documents], sequence_length: int) -> float:
    """Return the training FLOPs per token under the mask of documents of average length, cut at S."""
    total = 0.0
    for kind in documents:
        length = min(kind.tokens, sequence_length)
        pairs = (length + 1) / 2 + (0 if flops.causal_images else kind.image_pairs / kind.tokens)
        targets = 1 - (kind.image_patches + 1 + kind.images) / kind.tokens  # no label is BOS, EOI or a patch
        cells = kind.image_cells / kind.tokens
        total += kind.share * (
            flops.per_token
            + flops.more_per_patch * kind.image_patches / kind.tokens
            + flops.per_pair * pairs
            + flops.per_text_target * targets
            + flops.per_latent_cell * cells
        )
    return total


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
