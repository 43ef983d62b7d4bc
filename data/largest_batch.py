"""The largest batches that a data set can make: what a plan counts and a run tries before its first step.

Image slots and text targets come in a few sizes (`packing.capacity`), and these make a batch large, not its tokens.
Images cost more than text, so one batch has the most image slots that any images of the data could need, and text in
the remaining room; the other is text alone. Laid out by the real packing. Pure.
"""

from collections.abc import Sequence

import numpy as np
import torch

from data.documents import PIXEL_CHANNELS, Document, ImageKind, ImageSegment, TextSegment
from data.layout import lay_out, patch_grid
from data.packing import ImageDraws, PackedBatch, capacity, collate, pack
from data.tokenizer import SpecialIds

Grid = tuple[int, int]
AROUND_IMAGE = AROUND_DOCUMENT = 2  # tokens: BOI and EOI, BOS and EOS


def largest_batches(
    rows: int,
    sequence_length: int,
    grids: Sequence[Grid],
    channels: int,
    patch_size: int,
    special: SpecialIds,
    kind: ImageKind = "moments",
    clean_copies: bool = False,
) -> tuple[PackedBatch, ...]:
    """Return micro-batches of `rows` full sequences: with the most image slots (if there are `grids`), and text alone.

    `grids` are the latent grids (h, w) that occur, of images of `kind`. Noise, images and timesteps are zero and every
    word is EOS, as only shapes matter. Rows full of images may hold more than the data's sequences, never less; with
    clean copies each image has one, and an image without, at the end of a row, is not reckoned with.
    """
    of_image = 1 + clean_copies  # slots
    room = sequence_length - AROUND_DOCUMENT - clean_copies  # a copy has something after it
    counts = _most_slots(rows, room, grids, patch_size, of_image)
    batches = [_place(counts, rows, room, patch_size, of_image)] if any(counts.values()) else []
    batches.append([[]] * rows)
    return tuple(
        _batch(placed, sequence_length, channels, patch_size, special, kind, clean_copies) for placed in batches
    )


def _tokens(grid: Grid, patch_size: int, of_image: int) -> int:
    height, width = patch_grid(grid, patch_size)
    return of_image * height * width + AROUND_IMAGE


def _most_slots(rows: int, room: int, grids: Sequence[Grid], patch_size: int, of_image: int) -> dict[Grid, int]:
    """Return how many images of each grid need the most latent cells of slots: a knapsack over tokens."""
    # The rows are treated as one; `_place` leaves out what does not fit at a row's end.
    budget = rows * room
    most, chosen = np.zeros(budget + 1), []  # latent cells of slots, by tokens spent
    for grid in grids:
        tokens = _tokens(grid, patch_size, of_image)
        better, choice = most.copy(), np.zeros(budget + 1, dtype=np.int64)
        for n in range(1, rows * (room // tokens) + 1):
            if n > 1 and capacity(of_image * n) == capacity(of_image * (n - 1)):
                continue  # these would fill slots that exist anyway
            value = most[: budget + 1 - n * tokens] + capacity(of_image * n) * grid[0] * grid[1]
            gained = value > better[n * tokens :]
            better[n * tokens :][gained] = value[gained]
            choice[n * tokens :][gained] = n
        most = better
        chosen.append(choice)
    left, found = int(most.argmax()), {}
    for grid, choice in zip(reversed(grids), reversed(chosen), strict=True):
        found[grid] = int(choice[left])
        left -= found[grid] * _tokens(grid, patch_size, of_image)
    return found


def _place(counts: dict[Grid, int], rows: int, room: int, patch_size: int, of_image: int) -> list[list[Grid]]:
    """Return each row's images, placed largest first; those that fit nowhere are left out."""
    placed: list[list[Grid]] = [[] for _ in range(rows)]
    left = [room] * rows
    for grid in sorted(counts, key=lambda grid: -_tokens(grid, patch_size, of_image)):
        for _ in range(counts[grid]):
            row = max(range(rows), key=left.__getitem__)
            if left[row] < _tokens(grid, patch_size, of_image):
                break
            placed[row].append(grid)
            left[row] -= _tokens(grid, patch_size, of_image)
    return placed


def _batch(
    placed: Sequence[Sequence[Grid]],
    sequence_length: int,
    channels: int,
    patch_size: int,
    special: SpecialIds,
    kind: ImageKind,
    clean_copies: bool,
) -> PackedBatch:
    """Return a batch whose rows are each one document: these images, then text to the end of the row."""
    rows, draws = [], []
    assert kind != "pixels" or channels == PIXEL_CHANNELS, channels
    stored = 2 * channels if kind == "moments" else channels
    dtype = np.uint8 if kind == "pixels" else np.float16
    for grids in placed:
        segments: list[TextSegment | ImageSegment] = [
            ImageSegment(np.zeros((stored, *grid), dtype), kind) for grid in grids
        ]
        words = sequence_length - AROUND_DOCUMENT - sum(_tokens(grid, patch_size, 1 + clean_copies) for grid in grids)
        if words > 0:
            segments.append(TextSegment(np.full(words, special.eos, dtype=np.int64)))
        piece = lay_out(Document(tuple(segments)), special, patch_size, clean_copies)
        rows.append(pack([piece], sequence_length, special.pad))
        zeros = [torch.zeros(channels, *image.grid) for image in rows[-1].images]
        posterior = zeros if kind == "moments" else [None] * len(zeros)
        draws.append(ImageDraws(torch.zeros(len(zeros)), zeros, posterior))
    return collate(rows, draws, patch_size)
