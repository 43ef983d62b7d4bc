"""The largest batches that a data set can make: what a plan counts and a run tries before its first step.

Image slots and text targets come in a few sizes (`packing.capacity`), and these make a batch large, not its tokens.
Images cost more than text, so one batch has the most latent cells in slots, in all and of one grid, and text in the
remaining room; the other is text alone. Whatever the lanes pack has no more of either: slots are counted by bounds on
what rows can hold, and not by packing, which mixed grids make hard. Those that no image is laid out for stay unused, as
some of every batch do. Pure.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from data.documents import PIXEL_CHANNELS, Document, ImageKind, ImageSegment, TextSegment
from data.layout import Piece, lay_out, patch_grid
from data.packing import ImageBatch, ImageDraws, PackedBatch, capacity, collate, pack
from data.tokenizer import SpecialIds

Grid = tuple[int, int]
AROUND_IMAGE = 2  # tokens: BOI and EOI
ANY_IDS = SpecialIds(bos=0, eos=0, boi=0, eoi=0, pad=0)  # where only sizes matter


def largest_batches(
    rows: int,
    sequence_length: int,
    grids: Sequence[Grid],
    channels: int,
    patch_size: int,
    kind: ImageKind = "moments",
    clean_copies: bool = False,
) -> tuple[PackedBatch, ...]:
    """Return micro-batches of `rows` full sequences: with the most image slots (if there are `grids`), and text alone.

    `grids` are the latent grids (h, w) that occur, of images of `kind`. Noise, images, timesteps and words are zero, as
    only shapes matter. The batches may hold more than the data's sequences, never less.
    """
    assert kind != "pixels" or channels == PIXEL_CHANNELS, channels
    stored, dtype = 2 * channels if kind == "moments" else channels, np.uint8 if kind == "pixels" else np.float16
    images = {grid: ImageSegment(np.zeros((stored, *grid), dtype), kind) for grid in grids}
    patches = {grid: math.prod(patch_grid(grid, patch_size)) for grid in grids}
    slots = _most_slots(rows, sequence_length, patches, clean_copies)
    text = _batch([()] * rows, sequence_length, patch_size, clean_copies)
    if not slots:
        return (text,)
    fullest = next(iter(slots))
    *_, fewest = _fewest_of_each_capacity(slots[fullest])  # so that most room is left for text
    fitting = (sequence_length - 1) // ((1 + clean_copies) * patches[fullest] + AROUND_IMAGE)
    of_rows = [min((fewest + row) // rows // (1 + clean_copies), fitting) for row in range(rows)]
    pictures = _batch([(images[fullest],) * count for count in of_rows], sequence_length, patch_size, clean_copies)
    return _with_slots(pictures, slots, images, patches), text


def _most_slots(rows: int, length: int, patches: Mapping[Grid, int], clean_copies: bool) -> dict[Grid, int]:
    """Return slots by grid, first the grid of most latent cells: no batch has more cells in all or of one grid."""
    tokens = {grid: count + AROUND_IMAGE - clean_copies for grid, count in patches.items()}  # of a slot
    most = {grid: rows * (length // tokens[grid]) for grid in patches if tokens[grid] <= length}  # images
    if not most:
        return {}
    cells = {grid: grid[0] * grid[1] for grid in most}
    fullest = max(most, key=lambda grid: capacity(most[grid]) * cells[grid])
    found = {fullest: capacity(most[fullest])}
    # Two bounds for all grids together: rows end to end have so many tokens, and each row so many patches.
    doubled = ((grid, 1 << n) for grid in most for n in range((length // tokens[grid]).bit_length()))
    of_row = _most_value(length, ([(n * tokens[grid], n * patches[grid])] for grid, n in doubled))
    choices = {
        grid: [(n, capacity(n) * cells[grid]) for n in _fewest_of_each_capacity(count)] for grid, count in most.items()
    }
    together = min(
        _most_value(budget, ([(n * cost[grid], value) for n, value in of_grid] for grid, of_grid in choices.items()))
        for budget, cost in ((rows * length, tokens), (rows * of_row, patches))
    )
    missing = together - found[fullest] * cells[fullest]
    if missing > 0:
        others = {grid: capacity(-(-missing // cells[grid])) for grid in most if grid != fullest}
        second = min(others, key=lambda grid: others[grid] * cells[grid])
        found[second] = others[second]
    return found


def _fewest_of_each_capacity(most: int) -> Iterator[int]:
    """Yield the fewest images that need each capacity, up to that of `most`: others would fill slots that exist."""
    count = 1
    while count <= most:
        yield count
        count = capacity(count) + 1


def _most_value(budget: int, items: Iterable[Sequence[tuple[int, int]]]) -> int:
    """Return the most value that `budget` buys with at most one (price, value) of each item: a knapsack."""
    most = np.zeros(budget + 1, dtype=np.int64)
    for choices in items:
        better = most.copy()
        for price, value in choices:
            if price <= budget:
                np.maximum(better[price:], most[: budget + 1 - price] + value, out=better[price:])
        most = better
    return int(most[-1])


def _batch(
    of_rows: Sequence[Sequence[ImageSegment]], sequence_length: int, patch_size: int, clean_copies: bool
) -> PackedBatch:
    """Return a batch whose rows are each the beginning of one document: these images, then text beyond the row's end.

    So each of its tokens has a label that is no image's.
    """
    words = TextSegment(np.zeros(sequence_length, dtype=np.int64))
    rows = []
    for images in of_rows:
        piece = lay_out(Document((*images, words)), ANY_IDS, patch_size, clean_copies)
        row = Piece(piece.input_ids[:sequence_length], piece.labels[:sequence_length], piece.images, ())
        rows.append(pack([row], sequence_length, ANY_IDS.pad))
    return collate(rows, [ImageDraws.zeros(row) for row in rows], patch_size)


def _with_slots(
    batch: PackedBatch, slots: Mapping[Grid, int], images: Mapping[Grid, ImageSegment], patches: Mapping[Grid, int]
) -> PackedBatch:
    """Return the batch with so many slots by grid for images like these; those beyond its images are unused."""
    batches, index, none = {}, [], torch.zeros(0, dtype=torch.bool)
    for grid, count in sorted(slots.items()):
        of, image = batch.images.get(grid), images[grid]
        used, targets = (of.num_valid, of.is_target) if of is not None else (0, none)
        noise = torch.zeros(count, image.channels, *grid)
        batches[grid] = ImageBatch(
            stored=torch.from_numpy(np.zeros((count, *image.array.shape), image.array.dtype)),
            is_target=_lengthened(targets[:used], count),
            noise=noise,
            posterior_noise=torch.zeros_like(noise) if image.kind == "moments" else None,
            u=torch.zeros(count),
            before_caption=torch.zeros(count, dtype=torch.bool),
            num_valid=used,
        )
        index.append(_lengthened(batch.image_token_index[: used * patches[grid]], count * patches[grid]))
    return replace(batch, images=batches, image_token_index=torch.cat(index))


def _lengthened(values: torch.Tensor, length: int) -> torch.Tensor:
    """Return values [n] and zeros up to `length`."""
    return torch.cat([values, values.new_zeros(length - len(values))])
