"""Documents -> PackedSequence -> PackedBatch: the only place that knows the layout. Pure; no files, no randomness.

A document is `BOS segment ... EOS`, an image inside it `BOI patches EOI`. Text targets are every text token, BOI and
EOS: each exactly once, as the label of the token before it. No loss where the input is BOI or a patch (the paper,
footnote 8), so EOI is no target either: the decoder appends it. Labels are shifted before a document is cut.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from data.documents import Document, ImageSegment, TextSegment
from data.tokenizer import SpecialIds

IGNORE = -100
NO_IMAGE = -1  # image_ids of text
PADDING_DOCUMENT = 0  # document_ids of padding; documents count from 1


@dataclass(frozen=True)
class Piece:
    """One document laid out as tokens, or what is left of a cut one. Arrays are [len]."""

    input_ids: np.ndarray  # int64
    labels: np.ndarray  # int64, IGNORE where there is no text target
    image_ids: np.ndarray  # int32, index into `images`, NO_IMAGE for text
    grid_positions: np.ndarray  # int32 [len, 2], (row, column) of a patch, (-1, -1) for text
    images: tuple[ImageSegment, ...]

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def cuttable(self) -> bool:
        """Only text may be cut: a caption and its image are one piece."""
        return not self.images

    @property
    def num_attention_pairs(self) -> int:
        """Pairs the mask allows: the causal triangle, and the upper one inside each image."""
        patches = np.bincount(self.image_ids[self.image_ids != NO_IMAGE]).tolist() if self.images else []
        return len(self) * (len(self) + 1) // 2 + sum(count * (count - 1) // 2 for count in patches)

    def split(self, length: int) -> tuple["Piece", "Piece"]:
        assert self.cuttable and 0 < length < len(self), (length, len(self))
        arrays = (self.input_ids, self.labels, self.image_ids, self.grid_positions)
        return Piece(*(a[:length] for a in arrays), ()), Piece(*(a[length:] for a in arrays), ())


@dataclass(frozen=True)
class PackedSequence:
    """One row of S tokens. All arrays [S]; images in the order of their tokens."""

    input_ids: np.ndarray  # int64
    labels: np.ndarray  # int64
    document_ids: np.ndarray  # int32
    image_ids: np.ndarray  # int32
    position_ids: np.ndarray  # int32, from 0 in each document
    visible_until: np.ndarray  # int32, a key is seen by later queries up to here
    grid_positions: np.ndarray  # int32 [S, 2], (-1, -1) for text
    images: tuple[ImageSegment, ...]
    num_documents: int
    num_attention_pairs: int  # (query, key) pairs that the mask allows


@dataclass(frozen=True)
class ImageDraws:
    """The random numbers of one row's images, in order. Tensors float32; latents-shaped [C, h, w] a picture."""

    u: torch.Tensor  # [n] in [0, 1), becomes a timestep
    noise: list[torch.Tensor]
    posterior_noise: list[torch.Tensor]


@dataclass
class ImageBatch:
    """All images of one latent grid in a batch, padded to a capacity N from a small set of sizes."""

    moments: torch.Tensor  # f16 [N, 2C, h, w]
    noise: torch.Tensor  # f32 [N, C, h, w]
    posterior_noise: torch.Tensor  # f32 [N, C, h, w]
    u: torch.Tensor  # f32 [N] in [0, 1)
    before_caption: torch.Tensor  # bool [N]
    num_valid: int


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
    images: dict[tuple[int, int], ImageBatch] = field(default_factory=dict)
    num_text_targets: int = 0
    num_images: int = 0
    num_padding: int = 0
    num_attention_pairs: int = 0  # (query, key) pairs that the mask allows, padding left out: what FLOPs count

    def to(self, device: torch.device) -> "PackedBatch":
        """Copy to `device`; from pinned memory the copies do not block."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "PackedBatch":
        return self._map(torch.Tensor.pin_memory)

    def _map(self, change) -> "PackedBatch":
        images = {grid: ImageBatch(**_map_tensors(batch, change)) for grid, batch in self.images.items()}
        return PackedBatch(**{**_map_tensors(self, change), "images": images})


def _map_tensors(batch: PackedBatch | ImageBatch, change) -> dict:
    return {name: change(v) if isinstance(v, torch.Tensor) else v for name, v in vars(batch).items()}


def lay_out(document: Document, special: SpecialIds, patch_size: int) -> Piece:
    """Return the document's tokens; raise ValueError for a latent grid that patches do not tile."""
    no_grid = np.full((1, 2), NO_IMAGE)
    ids, image_ids, grids, is_target = [np.array([special.bos])], [np.array([NO_IMAGE])], [no_grid], [[False]]
    images: list[ImageSegment] = []
    for segment in document.segments:
        if isinstance(segment, TextSegment):
            length = len(segment.token_ids)
            ids.append(segment.token_ids)
            image_ids.append(np.full(length, NO_IMAGE))
            grids.append(np.full((length, 2), NO_IMAGE))
            is_target.append([True] * length)
            continue
        rows, columns = patch_grid(segment.moments.shape[1:], patch_size)
        patches = rows * columns
        ids.append(np.array([special.boi] + [special.pad] * patches + [special.eoi]))
        image_ids.append(np.array([NO_IMAGE] + [len(images)] * patches + [NO_IMAGE]))
        inside = np.indices((rows, columns)).reshape(2, patches).T
        grids.append(np.concatenate([no_grid, inside, no_grid]))
        is_target.append([True] + [False] * (patches + 1))
        images.append(segment)
    input_ids = np.concatenate([*ids, [special.eos]]).astype(np.int64)
    target = np.concatenate([*is_target, [True]]).astype(bool)
    labels = np.full(len(input_ids), IGNORE, dtype=np.int64)
    labels[:-1] = np.where(target[1:], input_ids[1:], IGNORE)
    return Piece(
        input_ids=input_ids,
        labels=labels,
        image_ids=np.concatenate([*image_ids, [NO_IMAGE]]).astype(np.int32),
        grid_positions=np.concatenate([*grids, no_grid]).astype(np.int32),
        images=tuple(images),
    )


def patch_grid(grid: Sequence[int], patch_size: int) -> tuple[int, int]:
    """Return (rows, columns) of patches of a latent grid (h, w)."""
    h, w = grid
    if h % patch_size or w % patch_size:
        raise ValueError(f"latent grid {h}x{w} is not a multiple of patch_size={patch_size}; choose another patch size")
    return h // patch_size, w // patch_size


def pack(pieces: Sequence[Piece], length: int, pad_id: int) -> PackedSequence:
    """Lay pieces end to end in one row of `length` tokens and pad the rest."""
    sizes = [len(piece) for piece in pieces]
    padding = length - sum(sizes)
    assert padding >= 0, (sizes, length)

    def join(arrays: list[np.ndarray], fill: int, dtype: type) -> np.ndarray:
        tail = np.full((padding, *arrays[0].shape[1:]) if arrays else (padding,), fill)
        return np.concatenate([*arrays, tail]).astype(dtype)

    image_ids, images = [], []
    for piece in pieces:
        image_ids.append(np.where(piece.image_ids >= 0, piece.image_ids + len(images), NO_IMAGE))
        images.extend(piece.images)
    grid_positions = np.full((length, 2), NO_IMAGE, dtype=np.int32)
    if pieces:
        grid_positions[: length - padding] = np.concatenate([piece.grid_positions for piece in pieces])
    return PackedSequence(
        input_ids=join([piece.input_ids for piece in pieces], pad_id, np.int64),
        labels=join([piece.labels for piece in pieces], IGNORE, np.int64),
        document_ids=join([np.full(size, i + 1) for i, size in enumerate(sizes)], PADDING_DOCUMENT, np.int32),
        image_ids=join(image_ids, NO_IMAGE, np.int32),
        position_ids=join([np.arange(size) for size in sizes], 0, np.int32),
        visible_until=np.full(length, length, dtype=np.int32),
        grid_positions=grid_positions,
        images=tuple(images),
        num_documents=len(pieces),
        num_attention_pairs=sum(piece.num_attention_pairs for piece in pieces),
    )


def capacity(count: int) -> int:
    """Round up to a power of two or three quarters of one: few shapes to compile, at most a third wasted."""
    size = 1
    while size < count:
        size *= 2
    return size * 3 // 4 if size >= 4 and count <= size * 3 // 4 else size


def collate(rows: Sequence[PackedSequence], draws: Sequence[ImageDraws], patch_size: int) -> PackedBatch:
    """Stack rows into a batch; images are grouped by latent grid, each group padded to its capacity."""
    stack = {
        name: torch.from_numpy(np.stack([getattr(row, name) for row in rows]))
        for name in ("input_ids", "labels", "document_ids", "image_ids", "position_ids", "visible_until")
    }
    flat_labels = stack["labels"].flatten()
    targets = torch.nonzero(flat_labels != IGNORE).flatten()
    slots = capacity(len(targets))
    text_target_index, text_targets = torch.zeros(slots, dtype=torch.int64), torch.full((slots,), IGNORE)
    text_target_index[: len(targets)], text_targets[: len(targets)] = targets, flat_labels[targets]

    groups: dict[tuple[int, int], list[tuple]] = {}
    length = stack["input_ids"].shape[1]
    for row_number, (row, drawn) in enumerate(zip(rows, draws, strict=True)):
        for i, image in enumerate(row.images):
            first = row_number * length + int(np.argmax(row.image_ids == i))
            group = groups.setdefault(tuple(image.moments.shape[1:]), [])
            group.append((image, drawn.u[i], drawn.noise[i], drawn.posterior_noise[i], first))
    images, token_index = {}, []
    for grid in sorted(groups):
        rows_, columns = patch_grid(grid, patch_size)
        images[grid], firsts = _image_batch(groups[grid])
        valid = torch.arange(len(firsts)) < len(groups[grid])
        patches = torch.arange(rows_ * columns)
        token_index.append(((firsts[:, None] + patches) * valid[:, None]).flatten())
    return PackedBatch(
        **stack,
        grid_positions=torch.from_numpy(np.stack([row.grid_positions for row in rows])),
        text_target_index=text_target_index,
        text_targets=text_targets,
        image_token_index=torch.cat(token_index) if token_index else torch.zeros(0, dtype=torch.int64),
        images=images,
        num_text_targets=len(targets),
        num_images=sum(len(group) for group in groups.values()),
        num_padding=int((stack["document_ids"] == PADDING_DOCUMENT).sum()),
        num_attention_pairs=sum(row.num_attention_pairs for row in rows),
    )


def _image_batch(group: list[tuple]) -> tuple[ImageBatch, torch.Tensor]:
    """Return the padded batch and int64 [N]: each image's first token in the flattened batch."""
    segments, u, noise, posterior_noise, firsts = zip(*group, strict=True)
    padding = capacity(len(group)) - len(group)

    def padded(tensors: list[torch.Tensor]) -> torch.Tensor:
        stacked = torch.stack(tensors)
        return torch.cat([stacked, stacked.new_zeros((padding, *stacked.shape[1:]))]) if padding else stacked

    batch = ImageBatch(
        moments=padded([torch.from_numpy(segment.moments) for segment in segments]),
        noise=padded(list(noise)),
        posterior_noise=padded(list(posterior_noise)),
        u=padded(list(u)),
        before_caption=padded([torch.tensor(segment.before_caption) for segment in segments]),
        num_valid=len(group),
    )
    return batch, padded([torch.tensor(first) for first in firsts])
