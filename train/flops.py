"""Model FLOPs of a batch, forward and backward, from what the mask allows (P9); recomputation is counted separately.

They are read off the model's own parameters. Per weight and position of a matrix product: two forward, two for the
gradient of its input where one passes, two for its own where it is trained; so six, or four if it is frozen. Per layer,
channel and (query, key) pair: four and eight. Norms, biases, rotary positions and timestep embeddings (under a
thousandth) are left out.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from data.packing import PackedBatch
from model.transformer import TransformerConfig
from model.transfusion import Transfusion, TransfusionConfig
from train.distributed.parallelize import is_cheap, plain_name

# The products of a block in their order, and the norms between each and the one before.
PRODUCTS = {
    "attention.qkv": ("attention_norm.",),
    "attention.out": ("attention.q_norm.", "attention.k_norm."),
    "ffn.gate_up": ("ffn_norm.",),
    "ffn.down": (),
}


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What FLOPs depend on in a batch, or in an average sequence; padding and unused slots count nothing."""

    tokens: float
    pairs: float  # (query, key) pairs that the mask allows where images are bidirectional
    earlier_patches: float = 0.0  # of these pairs the ones that a causal mask of images lacks
    text_targets: float
    images: float = 0.0  # that are targets
    clean_images: float = 0.0
    patches: float = 0.0
    noised_cells: float = 0.0  # latent cells of images that are targets
    clean_cells: float = 0.0  # of the others

    @classmethod
    def of(cls, batch: PackedBatch, patch_cells: int) -> "Counts":
        """Count a batch's; `patch_cells` are the latent cells of a patch."""
        of_grid = [(h * w, images.num_valid, int(images.is_target.sum())) for (h, w), images in batch.images.items()]
        return cls(
            tokens=batch.input_ids.numel() - batch.num_padding,
            pairs=batch.num_attention_pairs,
            earlier_patches=sum(math.comb(cells // patch_cells, 2) * images for cells, images, _ in of_grid),
            text_targets=batch.num_text_targets,
            images=sum(noised for *_, noised in of_grid),
            clean_images=sum(images - noised for _, images, noised in of_grid),
            patches=sum(cells // patch_cells * images for cells, images, _ in of_grid),
            noised_cells=sum(cells * noised for cells, _, noised in of_grid),
            clean_cells=sum(cells * (images - noised) for cells, images, noised in of_grid),
        )

    def times(self, factor: float) -> "Counts":
        return Counts(**{name: factor * count for name, count in vars(self).items()})

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(**{name: count + getattr(other, name) for name, count in vars(self).items()})


@dataclass(frozen=True)
class Flops:
    per_token: float  # in the blocks' matrices
    per_pair: float  # per (query, key) pair that the mask allows, over all layers
    per_text_target: float  # in the text head
    per_latent_cell: float  # in the patchers, both halves
    per_encoded_cell: float = 0.0  # in the first half alone, which is all that an image needs that is given clean
    patch_cells: int = 4  # latent cells per patch
    causal_images: bool = False  # a patch sees only the patches before it
    more_per_patch: float = 0.0  # than per_token; not 0 where weights of its own are trained and text's are not
    # What activation checkpointing computes a second time: hardware FLOPs, not model FLOPs.
    again_per_token: float = 0.0
    again_per_pair: float = 0.0
    again_per_latent_cell: float = 0.0
    again_more_per_patch: float = 0.0
    bagel_per_token: float = 0.0
    bagel_per_square: float = 0.0  # per square of a document's length

    @classmethod
    def of(
        cls, config: TransfusionConfig, vocab_size: int, activation_checkpointing: str = "none", compiled: bool = False
    ) -> "Flops":
        """Return the FLOPs of a model of which all parameters are trained; see `of_model`."""
        with torch.device("meta"):
            model = Transfusion(config, vocab_size)
        return cls.of_model(model, activation_checkpointing, compiled)

    @classmethod
    def of_model(cls, model: Transfusion, activation_checkpointing: str = "none", compiled: bool = False) -> "Flops":
        """Return a model's FLOPs; the last two are `activation_checkpointing` and `compile` of ParallelConfig.

        Frozen are its parameters that require no gradient. It may be sharded, or lie on the meta device. Selective
        recomputation repeats cheap products; in blocks that are not compiled it cannot see flex attention either.
        """
        config, trunk = model.config, model.config.transformer
        parameters = {plain_name(name): parameter for name, parameter in model.named_parameters()}
        counts: Counter[str] = Counter()
        passes = trains_patches = _trains(parameters, "patches.")
        passes |= _trains(parameters, "text_embedding.")
        for layer in range(trunk.layers):
            prefix = f"transformer.blocks.{layer}."
            block = {name.removeprefix(prefix): p for name, p in parameters.items() if name.startswith(prefix)}
            passes = _count_block(counts, block, trunk.heads * trunk.head_width, activation_checkpointing, passes)
        if activation_checkpointing == "selective" and compiled:
            counts["again_pair"] = 0
        passes |= _trains(parameters, "transformer.norm.", "transformer.image_norm.")
        encoded, decoded = _patcher_weights_per_cell(config)
        head = model.head_weight
        again_cell = _recomputed_weights_per_cell(config, compiled) if activation_checkpointing == "full" else 0.0
        return cls(
            per_token=counts["token"],
            per_pair=counts["pair"],
            per_text_target=2 * trunk.width * model.vocab_size * (1 + passes + head.requires_grad),
            per_latent_cell=6 * (encoded + decoded) if trains_patches else 2 * encoded + 2 * decoded * (1 + passes),
            per_encoded_cell=6 * encoded if trains_patches else 2 * encoded,
            patch_cells=config.patch_size**2,
            causal_images=config.image_attention == "causal",
            more_per_patch=counts["patch"] - counts["token"],
            again_per_token=counts["again_token"],
            again_per_pair=counts["again_pair"],
            again_per_latent_cell=2 * again_cell * trains_patches,
            again_more_per_patch=counts["again_patch"] - counts["again_token"],
            bagel_per_token=6 * (trunk.layers * _weights_of_block(trunk) + 2 * trunk.width * model.vocab_size),
            bagel_per_square=12 * trunk.layers * trunk.heads * trunk.head_width,
        )

    def of_counts(self, counts: Counts) -> tuple[float, float]:
        """Return the model FLOPs and the recomputed FLOPs of what `counts` holds."""
        pairs = counts.pairs - (counts.earlier_patches if self.causal_images else 0)
        model = self.per_token * counts.tokens + self.per_pair * pairs + self.per_text_target * counts.text_targets
        model += self.per_latent_cell * counts.noised_cells + self.per_encoded_cell * counts.clean_cells
        again = self.again_per_token * counts.tokens + self.again_per_pair * pairs
        again += self.again_per_latent_cell * (counts.noised_cells + counts.clean_cells)
        return model + self.more_per_patch * counts.patches, again + self.again_more_per_patch * counts.patches

    def of_batch(self, batch: PackedBatch) -> tuple[float, float]:
        """Return a micro-batch's model FLOPs and recomputed FLOPs."""
        return self.of_counts(Counts.of(batch, self.patch_cells))

    def of_batch_by_bagel(self, batch: PackedBatch) -> float:
        """Return a micro-batch's FLOPs as BAGEL's trainer counts them, for comparison with its figures.

        Every token passes embedding and head as products, attention is over whole documents without a mask, and
        patchers and frozen weights do not count (qwen2_flop_coefficients of its train_utils).
        """
        tokens = batch.input_ids.numel() - batch.num_padding
        squares = sum(int(torch.bincount(row)[1:].square().sum()) for row in batch.document_ids)
        return self.bagel_per_token * tokens + self.bagel_per_square * squares


def _weights_of_block(trunk: TransformerConfig) -> int:
    """Return the weights of a block's matrices."""
    attention = trunk.head_width * (2 * trunk.heads + 2 * trunk.num_kv_heads)
    return trunk.width * (attention + 3 * trunk.hidden)


def _trains(parameters: Mapping[str, Tensor], *prefixes: str) -> bool:
    """Return whether a parameter is trained whose name starts with one of `prefixes`."""
    return any(parameter.requires_grad for name, parameter in parameters.items() if name.startswith(prefixes))


def _count_block(
    counts: Counter[str], block: Mapping[str, Tensor], heads: int, activation_checkpointing: str, passes: bool
) -> bool:
    """Add a block's FLOPs to `counts`; `heads` are the dimensions of all query heads.

    `passes`: whether the gradient of the block's input is needed; returned is whether that of its output is.
    """
    again: Counter[str] = Counter()
    for product, norms in PRODUCTS.items():
        passes = passes or _trains(block, *norms, *(f"image.{norm}" for norm in norms))
        if product == "attention.out":
            counts["pair"] += 4 * heads * (1 + 2 * passes)
            again["again_pair"] += 4 * heads
        of_text, of_image = (
            {name: weight for name, weight in block.items() if name.startswith(prefix) and weight.ndim == 2}
            for prefix in (f"{product}.", f"image.{product}.")
        )
        for tokens, weights in (("token", of_text), ("patch", of_image or of_text)):
            for name, weight in weights.items():
                arrives = passes or (name.endswith("lora_b") and weights[name[:-1] + "a"].requires_grad)
                counts[tokens] += 2 * weight.numel() * (1 + arrives + weight.requires_grad)
                is_last = product == "ffn.down" and not name.endswith("lora_a")  # its output is only added
                outputs, inputs = weight.shape
                if not is_last and (activation_checkpointing == "full" or is_cheap(inputs, outputs)):
                    again[f"again_{tokens}"] += 2 * weight.numel()
        passes = passes or _trains(of_text | of_image, "")
    if passes and activation_checkpointing in ("selective", "full"):
        counts.update(again)
    return passes


def _patcher_weights_per_cell(config: TransfusionConfig) -> tuple[float, float]:
    """Return by how many weights a latent cell is multiplied before and after the trunk.

    A cell of level n covers 4^n latent cells.
    """
    width, latent = config.transformer.width, config.latent_channels
    if config.patches == "linear":
        return latent * width, latent * width
    channels, blocks = config.unet.levels(config.patch_size), config.unet.blocks
    encoded = 9 * latent * channels[0] + width * channels[-1] / 4 ** (len(channels) - 1)
    decoded = encoded
    for level, c in enumerate(channels):
        encoded += blocks * 18 * c**2 / 4**level
        decoded += blocks * (27 + 2) * c**2 / 4**level  # its input is twice as wide
        if level:  # downsampling at this level's cells, upsampling at the finer level's
            encoded += 9 * channels[level - 1] * c / 4**level
            decoded += 9 * channels[level - 1] * c / 4 ** (level - 1)
    return encoded, decoded


def _recomputed_weights_per_cell(config: TransfusionConfig, compiled: bool) -> float:
    """Return the part of them in what full recomputation repeats of residual blocks: all but their last convolution.

    A compiler also leaves out the shortcut, whose output only a sum reads.
    """
    if config.patches == "linear":
        return 0.0
    channels, blocks = config.unet.levels(config.patch_size), config.unet.blocks
    return sum(blocks * (9 + 18 + (0 if compiled else 2)) * c**2 / 4**level for level, c in enumerate(channels))
