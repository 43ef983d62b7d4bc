"""The largest batch is full, and no batch of the data needs more slots for its images."""

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from data.documents import Document, ImageKind, ImageSegment, Role, TextSegment
from data.largest_batch import largest_batches
from data.layout import Piece, lay_out
from data.packing import ImageDraws, PackedBatch, PackedSequence, capacity, collate, pack
from data.tokenizer import SpecialIds

SPECIAL = SpecialIds(bos=1, eos=2, boi=3, eoi=4, pad=0)
GRIDS = [(4, 4), (4, 8), (8, 6)]


def cells_of_slots(batch: PackedBatch) -> int:
    return sum(len(images.u) * grid[0] * grid[1] for grid, images in batch.images.items())


def random_documents(rng: np.random.Generator, grids: list[tuple[int, int]]) -> Iterator[Document]:
    """Yield captioned pictures, interleaved documents and edits, with few words each."""

    def image(role: Role = "target") -> ImageSegment:
        return ImageSegment(np.zeros((4, *grids[rng.integers(len(grids))]), dtype=np.float16), role=role)

    def text(role: Role = "target") -> TextSegment:
        return TextSegment(np.full(rng.integers(1, 4), 9, dtype=np.int64), role)

    while True:
        segments: list[list[TextSegment | ImageSegment]] = [[text(), image()], [image(), text()], [image()]]
        segments += [[image("context"), text("context"), image()]]
        segments += [[part for _ in range(rng.integers(2, 9)) for part in (image(), text())[: rng.integers(1, 3)]]]
        yield Document(tuple(segments[rng.integers(len(segments))]))


def random_rows(
    rng: np.random.Generator, count: int, length: int, grids: list[tuple[int, int]], copies: bool
) -> list[PackedSequence]:
    """Pack documents as lanes do, cut wherever they may be."""
    rows: list[PackedSequence] = []
    chosen: list[Piece] = []
    for document in random_documents(rng, grids):
        piece, left = lay_out(document, SPECIAL, 2, copies), length - sum(map(len, chosen))
        while piece.longest_uncut <= length and len(piece) > left:
            if cut := piece.cut_at(left):
                head, piece = piece.split(cut)
                chosen.append(head)
            rows.append(pack(chosen, length, SPECIAL.pad))
            chosen, left = [], length
            if len(rows) == count:
                return rows
        chosen += [piece] if len(piece) <= left else []
    raise AssertionError


def most_cells(rows: int, length: int, grids: list[tuple[int, int]], copies: bool) -> int:
    """Try all numbers of images that rows can hold, from BOI to EOI end to end; a copy needs neither."""

    def of_row(left: int, rest: list[tuple[int, int]]) -> Iterator[tuple[int, ...]]:
        for n in range(length + 1):
            patches = math.prod(rest[0]) // 4
            spent = n * (patches + 2) if not copies else n * patches + 2 * -(-n // 2)
            if spent > left:
                return
            for others in of_row(left - spent, rest[1:]) if rest[1:] else [()]:
                yield n, *others

    found, of_one = {(0,) * len(grids)}, set(of_row(length, grids))
    for _ in range(rows):
        found = {tuple(map(sum, zip(a, b, strict=True))) for a in found for b in of_one}
    return max(sum(capacity(n) * math.prod(g) for n, g in zip(of, grids, strict=True) if n) for of in found)


@pytest.mark.parametrize("copies", [False, True])
@pytest.mark.parametrize("grids", [GRIDS[2:], GRIDS])
@pytest.mark.parametrize(("rows", "length"), [(1, 64), (3, 70), (5, 257)])
def test_no_batch_of_the_data_needs_more_slots(
    rows: int, length: int, grids: list[tuple[int, int]], copies: bool
) -> None:
    """In all and of one grid, against random packings and, in few short rows, against all there are."""
    pictures, text = largest_batches(rows, length, grids, 2, 2, clean_copies=copies)
    assert not text.images and text.num_text_targets == rows * length  # a document that is cut has a label at each end
    largest = max(len(images.u) * math.prod(grid) for grid, images in pictures.images.items())
    rng = np.random.default_rng(0)
    for i in range(16):
        filled = random_rows(rng, rows, length, [grids, [grids[i % len(grids)]]][i % 2], copies)
        batch = collate(filled, [ImageDraws.zeros(row) for row in filled], 2)
        assert cells_of_slots(batch) <= cells_of_slots(pictures)
        assert all(len(images.u) * math.prod(grid) <= largest for grid, images in batch.images.items())
        assert len(batch.text_targets) <= len(text.text_targets)
    if length < 100:
        print(
            "ratio",
            rows,
            length,
            copies,
            len(grids),
            cells_of_slots(pictures) / most_cells(rows, length, grids, copies),
        )
        assert 1 <= cells_of_slots(pictures) / most_cells(rows, length, grids, copies) <= 1.05
    for batch in (pictures, text):
        assert batch.input_ids.shape == (rows, length) and batch.num_padding == 0
        slots = sum(len(images.u) * math.prod(grid) // 4 for grid, images in batch.images.items())
        assert len(batch.image_token_index) == slots and batch.num_images == int(batch.is_target.sum())
        assert batch.num_image_tokens(2) == int((batch.image_ids >= 0).sum())


@pytest.mark.parametrize(
    ("kind", "channels", "shape"),
    [("moments", 8, (16, torch.float16)), ("latents", 8, (8, torch.float16)), ("pixels", 3, (3, torch.uint8))],
)
def test_images_are_of_the_datas_kind(kind: ImageKind, channels: int, shape: tuple[int, torch.dtype]) -> None:
    pictures, _ = largest_batches(2, 64, [(16, 8)], channels, 4, kind)
    (images,) = pictures.images.values()
    assert (images.stored.shape[1], images.stored.dtype) == shape
    assert images.noise.shape[1] == channels and (images.posterior_noise is None) == (kind != "moments")


def test_a_text_data_set_has_one_candidate_and_so_has_one_whose_images_do_not_fit() -> None:
    assert len(largest_batches(2, 32, [], 2, 2)) == 1
    assert len(largest_batches(2, 32, [(16, 16)], 2, 2)) == 1
