"""The model: one transformer over text embeddings and image patches, with a text head and a noise head.

`forward` takes index arrays of a few capacities instead of lists of spans; unused slots point at index 0 and add zero.
So only a few shapes ever occur, the host never waits for the device, and `self.patches` always runs: even in a batch
without images every rank takes part in the same all-gathers and every parameter has a gradient.
Shapes: B rows, S tokens a row, D width, V vocabulary, N images, P patches an image, latents [C, h, w].
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from model.cache import NextTokens
from model.linear import Linear, linear
from model.lora import LoraConfig, add_adapters
from model.losses import linear_cross_entropy
from model.modalities import Modalities, Modality, Untied
from model.patches import LinearPatches, Skips
from model.transformer import Mask, Transformer, TransformerConfig
from model.unet import UNetConfig, UNetPatches

Grid = tuple[int, int]  # (h, w) of an image's latents
INIT_CHUNK = 1 << 20  # elements of a parameter drawn at once; changing it changes the initial weights


@dataclass(frozen=True, kw_only=True)
class TransfusionConfig:
    transformer: TransformerConfig = field(default_factory=TransformerConfig)
    patches: Literal["linear", "unet"] = "linear"  # latents <-> tokens: one linear layer, or the paper's U-Net blocks
    unet: UNetConfig = field(default_factory=UNetConfig)  # used with patches=unet only
    patch_size: int = 2  # side of an image token in latent cells, >= 1; the paper: 1, 2, 4 or 8; of pixels 4, 8 or 16
    latent_channels: int = 8  # channels of the data's latents, >= 1; 3 for pixels
    # ours: add the timestep embedding after the patches' linear layer instead of before it as in the paper
    timestep_after_patches: bool = False
    # what a patch attends to in its image: all patches, or itself and those before it (the paper's ablation, table 5)
    image_attention: Literal["bidirectional", "causal"] = "bidirectional"
    # Rows of the text embedding and head are padded to a multiple of this, >= 1, with zeros that no logit, loss or draw
    # sees; they stay zero. 64 makes the head's products fast on GPUs for any vocabulary.
    vocab_multiple_of: int = 1
    tied_embeddings: bool = False  # the text head is the text embedding (small language models); off in the paper
    # Which weights images have to themselves. none: none; ffn: the blocks' feed-forward layers and their norms; all:
    # all of the trunk, which text and images then share in attention only (Mixture-of-Transformers).
    untied: Untied = "none"
    lora: LoraConfig = field(default_factory=LoraConfig)
    text_loss_chunk: int = 4096  # text targets whose logits are in memory at once, >= 1; does not change the result

    def __post_init__(self) -> None:
        for name in ("patch_size", "latent_channels", "vocab_multiple_of", "text_loss_chunk"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected a positive number")
        if self.patches == "unet":
            self.unet.levels(self.patch_size)  # refuses a patch size that does not match the U-Net's levels
            if self.timestep_after_patches:
                raise ValueError(
                    "model.timestep_after_patches=true with model.patches=unet: expected false; U-Net blocks add it"
                )


class TransfusionOutput(NamedTuple):
    """A NamedTuple: FSDP2 hooks its backward to the tensors that pytree finds, and pytree skips dataclasses."""

    text_nll_sum: Tensor  # f32 scalar
    text_count: Tensor  # int64 scalar
    noise_pred: dict[Grid, Tensor]  # [N_cap, C, h, w] each; noise, or what `diffusion.prediction` says
    text_nll: Tensor  # f32 [T_cap], the terms of the sum, without gradient


class Timesteps:
    """Timesteps [N] of the images by grid, int64 or f32.

    A plain class on purpose, like RotaryTables: in a dict FSDP2's mixed precision would round f32 to bf16, where a
    flow's timesteps near pure noise are whole multiples of 4.
    """

    __slots__ = ("_by_grid",)

    def __init__(self, by_grid: dict[Grid, Tensor]) -> None:
        self._by_grid = by_grid

    def __getitem__(self, grid: Grid) -> Tensor:
        return self._by_grid[grid]


class Transfusion(nn.Module):
    def __init__(self, config: TransfusionConfig, vocab_size: int) -> None:
        super().__init__()
        width, channels = config.transformer.width, config.latent_channels
        self.config, self.vocab_size = config, vocab_size
        rows = -(-vocab_size // config.vocab_multiple_of) * config.vocab_multiple_of
        self.text_embedding = nn.Embedding(rows, width)
        self.patches: UNetPatches | LinearPatches
        if config.patches == "unet":
            self.patches = UNetPatches(width, channels, config.patch_size, config.unet)
        else:
            self.patches = LinearPatches(width, channels, config.patch_size, config.timestep_after_patches)
        self.transformer = Transformer(config.transformer, config.untied)
        add_adapters(self.transformer, config.lora)
        self.text_head = None if config.tied_embeddings else Linear(width, rows)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        grid_positions: Tensor,
        is_image: Tensor,
        mask: Mask,
        text_target_index: Tensor,
        text_targets: Tensor,
        noisy: dict[Grid, Tensor],
        timesteps: Timesteps,
        image_valid: dict[Grid, Tensor],
        image_token_index: Tensor,
        num_text: int | None = None,
    ) -> TransfusionOutput:
        """Return the summed text loss and the predictions for every image slot.

        `input_ids` int64, `position_ids` int32, `is_image` bool [B, S]; `grid_positions` int32 [B, S, 2];
        `text_target_index` int64 [T_cap] into the flattened B*S positions, `text_targets` int64 [T_cap], -100 in unused
        slots. By image grid: `noisy` f32 [N_cap, C, h, w], `timesteps` [N_cap], `image_valid` bool [N_cap], N_cap >= 1;
        `image_token_index` int64 [sum of N_cap * P] into B*S, in the order of `noisy`, 0 in unused slots. `num_text` is
        the number of tokens that are not images', padding included; with untied weights and None it is counted.
        """
        encoded = {grid: self.embed_images(noisy[grid], timesteps[grid]) for grid in noisy}
        valid_tokens = [tokens * image_valid[grid][:, None, None] for grid, (tokens, _) in encoded.items()]
        flat_tokens = torch.cat([tokens.flatten(0, 1) for tokens in valid_tokens])

        h = self.embed_text(input_ids.flatten()).masked_fill_(is_image.flatten()[:, None], 0.0)  # [B*S, D]
        h = h.index_add_(0, image_token_index, flat_tokens.to(h.dtype)).unflatten(0, input_ids.shape)
        modalities = None if self.config.untied == "none" else Modalities(is_image, num_text)
        hidden = self.trunk(h, position_ids, grid_positions, mask, None, modalities).flatten(0, 1)  # [B*S, D]

        # index_select, not indexing: its backward is one index_add instead of a sort.
        at_targets, chunk = hidden.index_select(0, text_target_index), self.config.text_loss_chunk
        nll_sum, count, nll = linear_cross_entropy(at_targets, self.head_weight, text_targets, chunk, self.vocab_size)
        image_hidden = hidden.index_select(0, image_token_index).split([t[..., 0].numel() for t in valid_tokens])
        noise_pred = {}
        for (grid, (tokens, skips)), part in zip(encoded.items(), image_hidden, strict=True):
            noise_pred[grid] = self.predict_noise(part.view(tokens.shape), skips, timesteps[grid], *grid)
        return TransfusionOutput(nll_sum, count, noise_pred, nll)

    @property
    def head_weight(self) -> Tensor:
        """Return the weight [V or more, D] of the text head, which may be the embedding's."""
        return self.text_embedding.weight if self.text_head is None else self.text_head.weight

    def embed_text(self, input_ids: Tensor) -> Tensor:
        """Return [..., D] of token ids int64 [...]."""
        return self.text_embedding(input_ids)

    def embed_images(self, latents: Tensor, timesteps: Tensor) -> tuple[Tensor, Skips]:
        """Return (tokens [N, P, D], skips for `predict_noise`) of latents [N, C, h, w] at timesteps [N]."""
        return self.patches.encode(latents, timesteps)

    def trunk(
        self,
        h: Tensor,
        position_ids: Tensor,
        grid_positions: Tensor,
        mask: Mask,
        next_tokens: NextTokens | None = None,
        modalities: Modalities | Modality | None = None,
    ) -> Tensor:
        """Return the hidden states [B, S, D] of embeddings [B, S, D]; see `Transformer.forward`."""
        return self.transformer(h, position_ids, grid_positions, mask, next_tokens, modalities)

    def text_logits(self, hidden: Tensor) -> Tensor:
        """Return [..., V] of hidden states [..., D]."""
        return linear(hidden, self.head_weight)[..., : self.vocab_size]

    def predict_noise(self, hidden: Tensor, skips: Skips, timesteps: Tensor, h: int, w: int) -> Tensor:
        """Return the prediction [N, C, h, w] of the hidden states of images [N, P, D]."""
        return self.patches.decode(hidden, skips, timesteps, h, w)


def drawn_shape(name: str, parameter: Tensor, vocab_size: int) -> tuple[int, ...]:
    """Return the shape of the first rows of parameter `name` that `initial_value` draws; the others are zero."""
    return (vocab_size if name.startswith("text_") else parameter.shape[0], *parameter.shape[1:])


def initial_value(
    name: str, shape: tuple[int, ...], config: TransfusionConfig, generator: torch.Generator | None = None
) -> Tensor:
    """Return the initial parameter `name` (as in `named_parameters`) without padding, f32 on CPU, from `generator`.

    ours (the paper does not say): normal with std fan_in^-1/2; projections into the residual stream divided by
    sqrt(2 layers), so that its variance does not grow with depth; a small noise head, so that the first predictions are
    near zero, the mean of the noise; ones for norms, zeros for biases and for what U-Net blocks and adapters add.
    """
    return torch.cat(list(initial_pieces(name, shape, config, generator))).view(shape)


def initial_pieces(
    name: str, shape: tuple[int, ...], config: TransfusionConfig, generator: torch.Generator | None = None
) -> Iterator[Tensor]:
    """Yield `initial_value`, flattened, INIT_CHUNK elements at a time: a rank that keeps a slice never holds it all."""
    mean = 1.0 if name.endswith("norm.weight") else 0.0
    std = math.prod(shape[1:]) ** -0.5
    if name.endswith(("norm.weight", ".bias", ".conv_out.weight", ".lora_b")):
        std = 0.0
    elif name.endswith(("attention.out.weight", "ffn.down.weight")):
        std /= (2 * config.transformer.layers) ** 0.5
    elif name.endswith(("patches.to_patch.weight", "patches.to_latents.weight")):
        std *= 0.1
    size = math.prod(shape)
    for start in range(0, size, INIT_CHUNK):
        piece = torch.full((min(INIT_CHUNK, size - start),), mean)
        yield piece.normal_(std=std, generator=generator) if std else piece


def parameter_generator(seed: int, name: str) -> torch.Generator:
    """Return a CPU generator that depends on (seed, name) alone: every rank and world size draws the same weights."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


@torch.no_grad()
def init_weights(model: Transfusion, seed: int) -> None:
    """Fill a plain, unsharded model with `initial_value`s."""
    for name, parameter in model.named_parameters():
        drawn = drawn_shape(name, parameter, model.vocab_size)
        value = initial_value(name, drawn, model.config, parameter_generator(seed, name))
        parameter.zero_()[: len(value)] = value
