"""Model FLOPs of a batch, forward and backward, from what the mask allows (P9); recomputation is counted separately.

Six per weight and position in a matrix product, twelve per layer, channel and (query, key) pair. Norms, rotary
positions and timestep embeddings (under a thousandth) are left out.
"""

from dataclasses import dataclass, replace

from data.packing import PackedBatch
from model.transfusion import TransfusionConfig


@dataclass(frozen=True)
class Flops:
    per_token: float  # in the blocks' matrices
    per_pair: float  # per (query, key) pair that the mask allows, over all layers
    per_text_target: float  # in the text head
    per_latent_cell: float  # in the patchers, both halves
    patch_cells: int = 4  # latent cells per patch
    causal_images: bool = False  # a patch sees only the patches before it
    # What activation checkpointing computes a second time: hardware FLOPs, not model FLOPs.
    again_per_token: float = 0.0
    again_per_pair: float = 0.0
    again_per_latent_cell: float = 0.0

    @classmethod
    def of(
        cls, config: TransfusionConfig, vocab_size: int, activation_checkpointing: str = "none", compiled: bool = False
    ) -> "Flops":
        """Return a model's FLOPs; the last two are `activation_checkpointing` and `compile` of ParallelConfig.

        Selective recomputation repeats no product; but in blocks that are not compiled it cannot see flex attention.
        """
        trunk = config.transformer
        heads = trunk.heads * trunk.head_width  # dimensions of all query heads
        projections = 2 * heads + 2 * trunk.num_kv_heads * trunk.head_width
        matrices = trunk.layers * trunk.width * (projections + 3 * trunk.hidden)
        cell = _patcher_weights_per_cell(config)
        again: dict[str, float] = {}
        if activation_checkpointing == "full":  # all of a block's forward but its last product, which nothing reads
            again["again_per_token"] = 2 * (matrices - trunk.layers * trunk.width * trunk.hidden)
            again["again_per_latent_cell"] = 2 * _recomputed_weights_per_cell(config, compiled)
        if activation_checkpointing == "full" or (activation_checkpointing == "selective" and not compiled):
            again["again_per_pair"] = 4 * trunk.layers * heads
        return cls(
            **again,
            per_token=6 * matrices,
            per_pair=12 * trunk.layers * heads,
            per_text_target=6 * trunk.width * vocab_size,
            per_latent_cell=6 * cell,
            patch_cells=config.patch_size**2,
            causal_images=config.image_attention == "causal",
        )

    @property
    def again(self) -> "Flops":
        """Return what is computed a second time, counted as `self` counts what is computed once."""
        return replace(
            self,
            per_token=self.again_per_token,
            per_pair=self.again_per_pair,
            per_text_target=0.0,
            per_latent_cell=self.again_per_latent_cell,
        )

    def of_batch(self, batch: PackedBatch) -> tuple[float, float]:
        """Return a micro-batch's model FLOPs and recomputed FLOPs; padding and unused slots count nothing."""
        cells = {grid: grid[0] * grid[1] for grid in batch.images}
        pairs = batch.num_attention_pairs
        if self.causal_images:  # the batch counts bidirectional images
            patches = {grid: count // self.patch_cells for grid, count in cells.items()}
            pairs -= sum(batch.images[g].num_valid * p * (p - 1) // 2 for g, p in patches.items())
        tokens = batch.input_ids.numel() - batch.num_padding
        image_cells = sum(batch.images[grid].num_valid * count for grid, count in cells.items())
        model = self.per_token * tokens + self.per_pair * pairs + self.per_latent_cell * image_cells
        again = self.again_per_token * tokens + self.again_per_pair * pairs + self.again_per_latent_cell * image_cells
        return model + self.per_text_target * batch.num_text_targets, again


def _patcher_weights_per_cell(config: TransfusionConfig) -> float:
    """Return by how many weights a latent cell is multiplied; a cell of level n covers 4^n latent cells."""
    width, latent = config.transformer.width, config.latent_channels
    if config.patches == "linear":
        return 2 * latent * width
    channels, blocks = config.unet.levels(config.patch_size), config.unet.blocks
    weights = 2 * 9 * latent * channels[0] + 2 * width * channels[-1] / 4 ** (len(channels) - 1)
    for level, c in enumerate(channels):
        weights += blocks * (18 + 27 + 2) * c**2 / 4**level  # down; up, whose input is twice as wide
        if level:  # downsampling at this level's cells, upsampling at the finer level's
            weights += 9 * channels[level - 1] * c * (1 / 4**level + 1 / 4 ** (level - 1))
    return weights


def _recomputed_weights_per_cell(config: TransfusionConfig, compiled: bool) -> float:
    """Return the part of them in what full recomputation repeats of residual blocks: all but their last convolution.

    A compiler also leaves out the shortcut, whose output only a sum reads.
    """
    if config.patches == "linear":
        return 0.0
    channels, blocks = config.unet.levels(config.patch_size), config.unet.blocks
    return sum(blocks * (9 + 18 + (0 if compiled else 2)) * c**2 / 4**level for level, c in enumerate(channels))
