"""The largest batches that a data set can make: what a plan counts and a run tries before its first step.

Image slots and text targets come in a few sizes (`packing.capacity`), and these make a batch large, not its tokens.
Images cost more than text, so one batch has the most image slots that any images of the data could need, and text in
the remaining room; the other is text alone. Laid out by the real packing. Pure.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

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
    clean copies too, whose images have none where they end a document.
    """
    room = sequence_length - AROUND_DOCUMENT - clean_copies  # a copy has something after it
    tokens = {
        grid: math.prod(patch_grid(grid, patch_size)) + AROUND_IMAGE - clean_copies for grid in grids
    }  # of a slot
    counts = _most_slots(rows, room, tokens)
    batches = [_place(counts, rows, room, tokens, clean_copies)] if any(counts.values()) else []
    batches.append([[]] * rows)
    return tuple(
        _batch(placed, sequence_length, channels, patch_size, special, kind, clean_copies) for placed in batches
    )


def _most_slots(rows: int, room: int, tokens: dict[Grid, int]) -> dict[Grid, int]:
    """Return how many slots of each grid hold the most latent cells: a knapsack over tokens."""
    # The rows are treated as one; `_place` leaves out what does not fit at a row's end.
    budget = rows * room
    most, chosen = np.zeros(budget + 1), []  # latent cells of slots, by tokens spent
    for grid, of_slot in tokens.items():
        better, choice = most.copy(), np.zeros(budget + 1, dtype=np.int64)
        for n in range(1, rows * (room // of_slot) + 1):
            if n > 1 and capacity(n) == capacity(n - 1):
                continue  # these would fill slots that exist anyway
            value = most[: budget + 1 - n * of_slot] + capacity(n) * grid[0] * grid[1]
            gained = value > better[n * of_slot :]
            better[n * of_slot :][gained] = value[gained]
            choice[n * of_slot :][gained] = n
        most = better
        chosen.append(choice)
    left, found = int(most.argmax()), {}
    for grid, choice in zip(reversed(tokens), reversed(chosen), strict=True):
        found[grid] = int(choice[left])
        left -= found[grid] * tokens[grid]
    return found


def _place(
    counts: dict[Grid, int], rows: int, room: int, tokens: dict[Grid, int], clean_copies: bool
) -> list[list[Grid]]:
    """Return each row's slots, placed largest first; those that fit nowhere are left out.

    Images with their copies come first, then images without, of which a row's first has room: it may end the row.
    """
    placed: list[list[Grid]] = [[] for _ in range(rows)]
    left = [room] * rows
    for slots in (2, 1) if clean_copies else (1,):
        extra = int(clean_copies and slots == 1)
        left = [tokens_left + extra for tokens_left in left]
        for grid in sorted(counts, key=lambda grid: -tokens[grid]):
            while counts[grid] >= slots and max(left) >= slots * tokens[grid] + extra:
                row = max(range(rows), key=left.__getitem__)
                placed[row] += [grid] * slots
                left[row] -= slots * tokens[grid] + extra
                counts[grid] -= slots
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
        images = {grid: ImageSegment(np.zeros((stored, *grid), dtype), kind) for grid in grids}
        slots = [(images[grid], *divmod(count, 1 + clean_copies)) for grid, count in Counter(grids).items()]
        segments: list[TextSegment | ImageSegment] = [image for image, count, _ in slots for _ in range(count)]
        segments += [replace(image, role="context") for image, _, is_odd in slots if is_odd]  # which has no copy
        words = TextSegment(np.full(sequence_length, special.eos, dtype=np.int64))
        spare = 2 * sequence_length - len(lay_out(Document((*segments, words)), special, patch_size, clean_copies))
        if spare > 0:
            segments.append(TextSegment(words.token_ids[:spare]))
        piece = lay_out(Document(tuple(segments)), special, patch_size, clean_copies)
        rows.append(pack([piece], sequence_length, special.pad))
        zeros = [torch.zeros(channels, *image.grid) for image in rows[-1].images]
        posterior = zeros if kind == "moments" else [None] * len(zeros)
        draws.append(ImageDraws(torch.zeros(len(zeros)), zeros, posterior))
    return collate(rows, draws, patch_size)
