"""Model FLOPs of a batch, forward and backward, from what the mask allows (P9): recomputation is not among them.

Six for every weight and position that meet in a product, twelve a layer, width and (query, key) pair. Norms, rotary
positions and timestep embeddings (under a thousandth) are left out.
"""

from dataclasses import dataclass

from data.packing import PackedBatch
from model.transfusion import TransfusionConfig


@dataclass(frozen=True)
class Flops:
    per_token: float  # in the blocks' matrices
    per_pair: float  # (query, key) pair that the mask allows, over all layers
    per_text_target: float  # in the text head
    per_latent_cell: float  # in the patchers, both halves
    patch_cells: int = 4  # latent cells a patch
    causal_images: bool = False  # a patch sees the patches before it only

    @classmethod
    def of(cls, config: TransfusionConfig, vocab_size: int) -> "Flops":
        trunk = config.transformer
        kv_share = trunk.num_kv_heads / trunk.heads
        matrices = trunk.layers * (trunk.width**2 * (2 + 2 * kv_share) + 3 * trunk.width * trunk.hidden)
        return cls(
            per_token=6 * matrices,
            per_pair=12 * trunk.layers * trunk.width,
            per_text_target=6 * trunk.width * vocab_size,
            per_latent_cell=6 * _patcher_weights_per_cell(config),
            patch_cells=config.patch_size**2,
            causal_images=config.image_attention == "causal",
        )

    def of_batch(self, batch: PackedBatch) -> float:
        """Return the FLOPs of a micro-batch; padding and unused image slots count nothing."""
        cells = {grid: grid[0] * grid[1] for grid in batch.images}
        pairs = batch.num_attention_pairs
        if self.causal_images:  # the batch counts whole images
            patches = {grid: count // self.patch_cells for grid, count in cells.items()}
            pairs -= sum(batch.images[g].num_valid * p * (p - 1) // 2 for g, p in patches.items())
        return (
            self.per_token * (batch.input_ids.numel() - batch.num_padding)
            + self.per_pair * pairs
            + self.per_text_target * batch.num_text_targets
            + self.per_latent_cell * sum(batch.images[grid].num_valid * count for grid, count in cells.items())
        )


def _patcher_weights_per_cell(config: TransfusionConfig) -> float:
    """Return how many weights a latent cell meets; one of a level has 4^level cells."""
    width, latent = config.transformer.width, config.latent_channels
    if config.patches == "linear":
        return 2 * latent * width
    channels, blocks = config.unet.levels(config.patch_size), config.unet.blocks
    weights = 2 * 9 * latent * channels[0] + 2 * width * channels[-1] / 4 ** (len(channels) - 1)
    for level, c in enumerate(channels):
        weights += blocks * (18 + 27 + 2) * c**2 / 4**level  # down; up, whose input is twice as wide
        if level:  # shrink, at its own cells; grow, at the finer ones
            weights += 9 * channels[level - 1] * c * (1 / 4**level + 1 / 4 ** (level - 1))
    return weights
