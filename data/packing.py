"""Pieces -> PackedSequence -> PackedBatch: rows of several documents, and batches of rows. Pure.

data/layout.py says how a document is laid out, and what in it is a target.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from data.documents import ImageSegment
from data.layout import IGNORE, Piece, patch_grid

NO_IMAGE = -1  # image_ids of text
PADDING_DOCUMENT = 0  # document_ids of padding; documents count from 1


@dataclass(frozen=True)
class PackedSequence:
    """One row of S tokens. All arrays [S]; images in the order of their tokens."""

    input_ids: np.ndarray  # int64
    labels: np.ndarray  # int64
    document_ids: np.ndarray  # int32
    image_ids: np.ndarray  # int32
    position_ids: np.ndarray  # int32, from 0 in each document; a clean copy has the noised image's
    visible_until: np.ndarray  # int32, later queries up to here see the key
    grid_positions: np.ndarray  # int32 [S, 2], (-1, -1) for text
    images: tuple[ImageSegment, ...]
    num_attention_pairs: int  # (query, key) pairs that the mask allows


@dataclass(frozen=True)
class ImageDraws:
    """The random numbers of one row's images, in order. Tensors float32; latents-shaped [C, h, w] an image."""

    u: torch.Tensor  # [n] in [0, 1), becomes a timestep
    noise: list[torch.Tensor]
    posterior_noise: Sequence[torch.Tensor | None]  # None of an image that is no posterior

    @classmethod
    def zeros(cls, row: PackedSequence) -> "ImageDraws":
        """Return draws of zeros for a row's images, for batches of which only sizes matter."""
        noise = [torch.zeros(image.channels, *image.grid) for image in row.images]
        posterior_noise = [x if image.kind == "moments" else None for x, image in zip(noise, row.images, strict=True)]
        return cls(torch.zeros(len(noise)), noise, posterior_noise)


@dataclass
class ImageBatch:
    """All images of one latent grid in a batch, padded to a capacity N from a small set of sizes."""

    stored: torch.Tensor  # moments f16 [N, 2C, h, w], latents f16 [N, C, h, w] or pixels uint8 [N, 3, h, w]
    is_target: torch.Tensor  # bool [N]; others are given clean, or are unused slots
    noise: torch.Tensor  # f32 [N, C, h, w]
    posterior_noise: torch.Tensor | None  # f32 [N, C, h, w], of moments alone
    u: torch.Tensor  # f32 [N] in [0, 1)
    before_caption: torch.Tensor  # bool [N]
    num_valid: int  # slots used, the first ones


@dataclass
class PackedBatch:
    """B rows of S tokens and their images. Index arrays point into the flattened [B * S]."""

    input_ids: torch.Tensor  # int64 [B, S]
    labels: torch.Tensor  # int64 [B, S]
    document_ids: torch.Tensor  # int32 [B, S]
    image_ids: torch.Tensor  # int32 [B, S]
    position_ids: torch.Tensor  # int32 [B, S]
    visible_until: torch.Tensor  # int32 [B, S]
    grid_positions: torch.Tensor  # int32 [B, S, 2]
    text_target_index: torch.Tensor  # int64 [T], padding slots repeat index 0
    text_targets: torch.Tensor  # int64 [T], IGNORE in padding slots
    image_token_index: torch.Tensor  # int64 [sum of N * P over `images`, in its order], padding slots 0
    group_ids: torch.Tensor  # int64 [B, S], what losses are also summed by, in 0...num_groups - 1; padding 0
    num_groups: int  # the sources in training, documents in an evaluation
    images: dict[tuple[int, int], ImageBatch]
    num_text_targets: int
    num_images: int  # that are targets
    num_padding: int
    num_attention_pairs: int  # (query, key) pairs that the mask allows, padding left out: what FLOPs count

    def num_image_tokens(self, patch_size: int) -> int:
        """Return how many tokens are images' patches of `patch_size` latent cells a side."""
        return sum(batch.num_valid * math.prod(patch_grid(grid, patch_size)) for grid, batch in self.images.items())

    @property
    def num_clean_images(self) -> int:
        """Return how many images are given clean: context, and copies of targets."""
        return sum(batch.num_valid for batch in self.images.values()) - self.num_images

    @property
    def is_target(self) -> torch.Tensor:
        """Return which image slots hold targets, bool [sum of N over `images`]."""
        return torch.cat([torch.zeros(0, dtype=torch.bool), *(batch.is_target for batch in self.images.values())])

    def first_image_tokens(self, patch_size: int) -> torch.Tensor:
        """Return where the image in each slot begins, int64 [sum of N over `images`] into the flattened [B * S]."""
        patches = {grid: math.prod(patch_grid(grid, patch_size)) for grid in self.images}
        parts = self.image_token_index.split([len(self.images[grid].u) * count for grid, count in patches.items()])
        return torch.cat([part[::count] for part, count in zip(parts, patches.values(), strict=True)])

    def to(self, device: torch.device) -> "PackedBatch":
        """Copy to `device`; from pinned memory the copies do not block."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "PackedBatch":
        return self.map(torch.Tensor.pin_memory)

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "PackedBatch":
        """Return a batch of `change`'s result for each tensor."""
        images = {grid: ImageBatch(**_map_tensors(batch, change)) for grid, batch in self.images.items()}
        return PackedBatch(**{**_map_tensors(self, change), "images": images})


def _map_tensors(batch: PackedBatch | ImageBatch, change: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, Any]:
    return {name: change(v) if isinstance(v, torch.Tensor) else v for name, v in vars(batch).items()}


def pack(pieces: Sequence[Piece], length: int, pad_id: int) -> PackedSequence:
    """Lay pieces end to end in one row of `length` tokens and pad the rest."""
    assert sum(map(len, pieces)) <= length, ([len(piece) for piece in pieces], length)
    input_ids = np.full(length, pad_id, dtype=np.int64)
    labels = np.full(length, IGNORE, dtype=np.int64)
    document_ids = np.full(length, PADDING_DOCUMENT, dtype=np.int32)
    image_ids = np.full(length, NO_IMAGE, dtype=np.int32)
    position_ids = np.zeros(length, dtype=np.int32)
    visible_until = np.full(length, length, dtype=np.int32)
    grid_positions = np.full((length, 2), NO_IMAGE, dtype=np.int32)
    images: list[ImageSegment] = []
    start = 0
    for number, piece in enumerate(pieces, start=1):
        place = slice(start, start + len(piece))
        input_ids[place] = piece.input_ids
        labels[place] = piece.labels
        document_ids[place] = number
        position_ids[place] = np.arange(len(piece))
        for image in piece.images:
            first, count = start + image.start, image.rows * image.columns
            patches = slice(first, first + count)
            if image.segment.role == "copy":
                visible_until[first - count : first] = first
                position_ids[first : place.stop] -= count
            image_ids[patches] = len(images)
            grid_positions[patches] = np.indices((image.rows, image.columns)).reshape(2, -1).T
            images.append(image.segment)
        start = place.stop
    return PackedSequence(
        input_ids=input_ids,
        labels=labels,
        document_ids=document_ids,
        image_ids=image_ids,
        position_ids=position_ids,
        visible_until=visible_until,
        grid_positions=grid_positions,
        images=tuple(images),
        num_attention_pairs=sum(piece.num_attention_pairs for piece in pieces),
    )


def capacity(count: int) -> int:
    """Round up to a power of two or three quarters of one: few shapes to compile, at most a third unused."""
    size = 1
    while size < count:
        size *= 2
    return size * 3 // 4 if size >= 4 and count <= size * 3 // 4 else size


def collate(
    rows: Sequence[PackedSequence],
    draws: Sequence[ImageDraws],
    patch_size: int,
    sources: Sequence[Sequence[int]] | None = None,  # of each row's documents; None: one source
    num_sources: int = 1,
) -> PackedBatch:
    """Stack rows into a batch; images are grouped by latent grid, each group padded to its capacity."""
    names = ("input_ids", "labels", "document_ids", "image_ids", "position_ids", "visible_until", "grid_positions")
    stack = {name: torch.from_numpy(np.stack([getattr(row, name) for row in rows])) for name in names}
    flat_labels = stack["labels"].flatten()
    targets = torch.nonzero(flat_labels != IGNORE).flatten()
    slots = capacity(len(targets))
    text_target_index, text_targets = torch.zeros(slots, dtype=torch.int64), torch.full((slots,), IGNORE)
    text_target_index[: len(targets)], text_targets[: len(targets)] = targets, flat_labels[targets]

    groups: dict[tuple[int, int], list[tuple]] = {}
    length = stack["input_ids"].shape[1]
    for row_number, (row, drawn) in enumerate(zip(rows, draws, strict=True)):
        firsts = row_number * length + np.flatnonzero((row.grid_positions == 0).all(axis=1))
        draws_of_images = zip(drawn.noise, drawn.posterior_noise, drawn.u, strict=True)
        for image, numbers, first in zip(row.images, draws_of_images, firsts.tolist(), strict=True):
            group = groups.setdefault(image.grid, [])
            group.append((image.array, *numbers, image.before_caption, image.role == "target", first))
    images, token_index = {}, []
    for grid, group in sorted(groups.items()):
        stored, noise, posterior_noise, *others = zip(*group, strict=True)
        posterior = None if posterior_noise[0] is None else _padded(posterior_noise)
        u, before_caption, is_target, first_tokens = map(_padded, others)
        images[grid] = ImageBatch(
            _padded(stored), is_target, _padded(noise), posterior, u, before_caption, num_valid=len(group)
        )
        valid = torch.arange(len(first_tokens)) < len(group)
        patches = torch.arange(math.prod(patch_grid(grid, patch_size)))
        token_index.append(((first_tokens[:, None] + patches) * valid[:, None]).flatten())
    return PackedBatch(
        **stack,
        text_target_index=text_target_index,
        text_targets=text_targets,
        image_token_index=torch.cat(token_index) if token_index else torch.zeros(0, dtype=torch.int64),
        images=images,
        group_ids=_by_token(stack["document_ids"], sources),
        num_groups=num_sources,
        num_text_targets=len(targets),
        num_images=sum(image.role == "target" for row in rows for image in row.images),
        num_padding=int((stack["document_ids"] == PADDING_DOCUMENT).sum()),
        num_attention_pairs=sum(row.num_attention_pairs for row in rows),
    )


def _by_token(document_ids: torch.Tensor, sources: Sequence[Sequence[int]] | None) -> torch.Tensor:
    """Return int64 [B, S]: the source of each token's document; 0 of padding, or without `sources`."""
    if sources is None:
        return torch.zeros_like(document_ids, dtype=torch.int64)
    rows = [np.array([0, *of_row])[ids] for of_row, ids in zip(sources, document_ids.numpy(), strict=True)]
    return torch.from_numpy(np.stack(rows))


def _padded(values: Sequence) -> torch.Tensor:
    """Stack equal tensors, arrays or numbers, each copied once, and zeros up to their capacity."""
    first = torch.as_tensor(np.array(values[0]))
    stacked = first.new_empty((capacity(len(values)), *first.shape))
    stacked[len(values) :] = 0
    if isinstance(values[0], torch.Tensor):
        torch.stack(tuple(values), out=stacked[: len(values)])
    else:
        np.stack(values, out=stacked.numpy()[: len(values)])
    return stacked
