"""The largest batch is full, and no batch of the data needs more slots for its images."""

import numpy as np
import pytest
import torch

from data.documents import Document, ImageKind, ImageSegment, TextSegment
from data.largest_batch import largest_batches
from data.layout import lay_out
from data.packing import PADDING_DOCUMENT, ImageDraws, PackedBatch, PackedSequence, collate, pack
from data.tokenizer import SpecialIds

SPECIAL = SpecialIds(bos=1, eos=2, boi=3, eoi=4, pad=0)
GRIDS = [(4, 4), (4, 8), (8, 6)]


def cells_of_slots(batch: PackedBatch) -> int:
    return sum(len(images.u) * grid[0] * grid[1] for grid, images in batch.images.items())


def random_row(
    rng: np.random.Generator, length: int, grids: list[tuple[int, int]], copies: bool, caption_first: float
) -> PackedSequence:
    """Pack captioned images until one does not fit, a share of them with the caption first, so without copies."""
    pieces, left = [], length
    while True:
        grid = grids[rng.integers(len(grids))]
        words = np.full(rng.integers(1, 4), 9, dtype=np.int64)
        moments = np.zeros((4, *grid), dtype=np.float16)
        caption, image = TextSegment(words), ImageSegment(moments)
        piece = lay_out(
            Document((caption, image) if rng.random() < caption_first else (image, caption)), SPECIAL, 2, copies
        )
        if len(piece) > left:
            return pack(pieces, length, SPECIAL.pad)
        pieces.append(piece)
        left -= len(piece)


@pytest.mark.parametrize("copies", [False, True])
@pytest.mark.parametrize("grids", [GRIDS[2:], GRIDS])
@pytest.mark.parametrize(("rows", "length"), [(1, 64), (3, 50), (3, 96), (5, 257)])
def test_no_batch_of_the_data_needs_more_latent_cells(
    rows: int, length: int, grids: list[tuple[int, int]], copies: bool
) -> None:
    pictures, text = largest_batches(rows, length, grids, 2, 2, SPECIAL, clean_copies=copies)
    rng = np.random.default_rng(0)
    for i in range(60):
        filled = [random_row(rng, length, grids, copies, (0.0, 0.5, 1.0)[i % 3]) for _ in range(rows)]
        draws = []
        for row in filled:
            zeros = [torch.zeros(2, *image.grid) for image in row.images]
            draws.append(ImageDraws(torch.zeros(len(zeros)), zeros, zeros))
        batch = collate(filled, draws, 2)
        assert cells_of_slots(batch) <= cells_of_slots(pictures)
        assert len(batch.text_targets) <= len(text.text_targets)
    for largest in (pictures, text):
        assert largest.input_ids.shape == (rows, length)
        assert not (largest.document_ids == PADDING_DOCUMENT).any() and largest.num_padding == 0
    assert text.num_text_targets == rows * (length - 1)  # all but the row's last token have a label
    assert not text.images


@pytest.mark.parametrize(
    ("kind", "channels", "shape"),
    [("moments", 8, (16, torch.float16)), ("latents", 8, (8, torch.float16)), ("pixels", 3, (3, torch.uint8))],
)
def test_images_are_of_the_datas_kind(kind: ImageKind, channels: int, shape: tuple[int, torch.dtype]) -> None:
    pictures, _ = largest_batches(2, 64, [(16, 8)], channels, 4, SPECIAL, kind)
    (images,) = pictures.images.values()
    assert (images.stored.shape[1], images.stored.dtype) == shape
    assert images.noise.shape[1] == channels and (images.posterior_noise is None) == (kind != "moments")


def test_a_text_data_set_has_one_candidate_and_so_has_one_whose_images_do_not_fit() -> None:
    assert len(largest_batches(2, 32, [], 2, 2, SPECIAL)) == 1
    assert len(largest_batches(2, 32, [(16, 16)], 2, 2, SPECIAL)) == 1
