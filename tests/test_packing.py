"""Packing against a slow reference that lays one token after another by the rules of DESIGN.md and the paper.

`BOS segment ... EOS`, an image is `BOI patches EOI`, patches row by row. The label of a place is the token after it,
except: no loss where the input is BOI or a patch (so EOI and patches are no targets) and none at a document's end.
"""

import itertools
from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from data.documents import Document, ImageSegment, TextSegment
from data.layout import CAPTION_TOKENS, IGNORE, Piece, lay_out
from data.packing import NO_IMAGE, PADDING_DOCUMENT, ImageDraws, PackedBatch, PackedSequence, capacity, collate, pack
from data.tokenizer import SpecialIds

SPECIAL = SpecialIds(bos=1, eos=2, boi=90, eoi=91, pad=3)
PATCH = 2
LENGTH = 64


COLUMNS = ("input_ids", "labels", "document_ids", "image_ids", "position_ids", "grid_positions")
FIELDS = (*COLUMNS[:-1], "visible_until", "grid_positions")


def slow_tokens(document: Document, first_image: int = 0) -> list[tuple[int, int, tuple[int, int], bool]]:
    """Return (token, image, grid position, may be predicted) of each place of a document."""
    tokens = [(SPECIAL.bos, NO_IMAGE, (-1, -1), False)]
    for segment in document.segments:
        if isinstance(segment, TextSegment):
            tokens += [(int(token), NO_IMAGE, (-1, -1), True) for token in segment.token_ids]
            continue
        tokens.append((SPECIAL.boi, NO_IMAGE, (-1, -1), True))
        for row in range(segment.array.shape[1] // PATCH):
            for column in range(segment.array.shape[2] // PATCH):
                tokens.append((SPECIAL.pad, first_image, (row, column), False))
        tokens.append((SPECIAL.eoi, NO_IMAGE, (-1, -1), False))
        first_image += 1
    return [*tokens, (SPECIAL.eos, NO_IMAGE, (-1, -1), True)]


def slow_row(documents: list[Document], length: int) -> tuple[list[tuple], list[ImageSegment]]:
    """Return the COLUMNS of each place, and the images."""
    places, images = [], []
    for number, document in enumerate(documents, start=1):
        tokens = slow_tokens(document, len(images))
        for place, (token, image, position, _) in enumerate(tokens):
            after = tokens[place + 1] if place + 1 < len(tokens) else None
            label = after[0] if after is not None and after[3] else IGNORE
            places.append((token, label, number, image, place, position))
        images += [segment for segment in document.segments if isinstance(segment, ImageSegment)]
    padding = (SPECIAL.pad, IGNORE, PADDING_DOCUMENT, NO_IMAGE, 0, (-1, -1))
    return places + [padding] * (length - len(places)), images


def slow_pairs(row: PackedSequence) -> int:
    """Count the pairs of DESIGN.md's mask one by one, padding left out."""
    count = 0
    for q, k in itertools.product(range(len(row.input_ids)), repeat=2):
        same_image = row.image_ids[q] == row.image_ids[k] != NO_IMAGE
        seen = k <= q and q < row.visible_until[k]
        count += row.document_ids[q] == row.document_ids[k] != PADDING_DOCUMENT and (same_image or seen)
    return count


def text(*token_ids: int) -> TextSegment:
    return TextSegment(np.array(token_ids, dtype=np.int64))


def image(rows: int = 2, columns: int = 2, before_caption: bool = False, seed: int = 0) -> ImageSegment:
    moments = np.random.default_rng(seed).normal(size=(4, rows * PATCH, columns * PATCH)).astype(np.float16)
    return ImageSegment(moments, before_caption=before_caption)


DOCUMENTS = {
    "text": Document((text(10, 11, 12),)),
    "one token": Document((text(10),)),
    "caption, image": Document((text(10, 11), image())),
    "image, caption": Document((image(before_caption=True), text(10, 11))),
    "image": Document((image(1, 3),)),
    "one patch": Document((text(10), image(1, 1))),
    "interleaved": Document((text(10), image(2, 3), text(11, 12), image(3, 1), image(1, 2), text(13))),
}


def random_document(rng: np.random.Generator) -> Document:
    segments = [
        text(*rng.integers(10, 90, rng.integers(1, 6)))
        if rng.random() < 0.5
        else image(int(rng.integers(1, 4)), int(rng.integers(1, 4)), bool(rng.random() < 0.5), int(rng.integers(99)))
        for _ in range(rng.integers(1, 4))
    ]
    return Document(tuple(segments))


def random_rows(count: int, seed: int = 0) -> tuple[list[list[Document]], list[PackedSequence]]:
    """Rows filled with random documents; one has none."""
    rng = np.random.default_rng(seed)
    contents = []
    for _ in range(count):
        documents, space = [], LENGTH
        while len(slow_tokens(document := random_document(rng))) <= space:
            documents.append(document)
            space -= len(slow_tokens(document))
        contents.append(documents)
    contents[count // 2] = []
    return contents, [pack([lay_out(d, SPECIAL, PATCH) for d in ds], LENGTH, SPECIAL.pad) for ds in contents]


def draws_of(rows: list[PackedSequence], seed: int = 0) -> list[ImageDraws]:
    """Draws that name their image: u is 0.row-number-image-number."""
    generator = torch.Generator().manual_seed(seed)
    return [
        ImageDraws(
            u=torch.tensor([0.1 * r + 0.001 * i for i in range(len(row.images))]),
            noise=[torch.randn(2, *im.grid, generator=generator) for im in row.images],
            posterior_noise=[torch.randn(2, *im.grid, generator=generator) for im in row.images],
        )
        for r, row in enumerate(rows)
    ]


def assert_is_slow_row(row: PackedSequence, documents: list[Document]) -> None:
    places, images = slow_row(documents, LENGTH)
    for name, expected in zip(COLUMNS, zip(*places, strict=True), strict=True):
        array = getattr(row, name)
        assert array.dtype == (np.int64 if name in ("input_ids", "labels") else np.int32), name
        assert np.array_equal(array, expected), name
    assert row.visible_until.dtype == np.int32 and (row.visible_until == LENGTH).all()
    assert [id(im) for im in row.images] == [id(im) for im in images]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_document_is_laid_out_token_by_token(name: str) -> None:
    assert_is_slow_row(pack([lay_out(DOCUMENTS[name], SPECIAL, PATCH)], LENGTH, SPECIAL.pad), [DOCUMENTS[name]])


def test_the_layout_of_one_pair_is_this() -> None:
    """By hand: BOS a b BOI . . . . EOI EOS, and the labels of the paper's footnote 8."""
    piece = lay_out(DOCUMENTS["caption, image"], SPECIAL, PATCH)
    assert piece.input_ids.tolist() == [1, 10, 11, 90, 3, 3, 3, 3, 91, 2]
    assert piece.labels.tolist() == [10, 11, 90, -100, -100, -100, -100, -100, 2, -100]
    assert [(image.start, image.rows, image.columns) for image in piece.images] == [(4, 2, 2)]
    row = pack([piece], LENGTH, SPECIAL.pad)
    assert row.image_ids[:10].tolist() == [-1, -1, -1, -1, 0, 0, 0, 0, -1, -1]
    assert row.grid_positions.tolist()[4:8] == [[0, 0], [0, 1], [1, 0], [1, 1]]


def test_many_documents_in_a_row_are_as_each_by_itself() -> None:
    contents, rows = random_rows(12)
    for documents, row in zip(contents, rows, strict=True):
        assert_is_slow_row(row, documents)
        assert row.num_attention_pairs == slow_pairs(row)


def test_every_token_is_a_target_exactly_once() -> None:
    """P2: text, BOI and EOS once each; BOS, patches, EOI and padding never; nothing is predicted from BOI."""
    for documents, row in zip(*random_rows(12, seed=1), strict=True):
        targets = sorted(row.labels[row.labels != IGNORE].tolist())
        expected = [token for d in documents for token, _, _, predicted in slow_tokens(d) if predicted]
        assert targets == sorted(expected)
        assert SPECIAL.eoi not in targets and SPECIAL.bos not in targets
        assert (row.labels[row.input_ids == SPECIAL.boi] == IGNORE).all()
        assert (row.labels[row.image_ids != NO_IMAGE] == IGNORE).all()
        predicted = np.flatnonzero(row.labels != IGNORE)
        assert (row.labels[predicted] == row.input_ids[predicted + 1]).all()
        assert (row.document_ids[predicted] == row.document_ids[predicted + 1]).all()


def test_a_cut_text_loses_no_target() -> None:
    """The label at the end of the head is the first token of the rest: shifted before the cut."""
    piece = lay_out(Document((text(*range(10, 30)),)), SPECIAL, PATCH)
    for cut in range(1, len(piece)):
        head, rest = piece.split(cut)
        assert (len(head), len(rest)) == (cut, len(piece) - cut)
        assert head.cuts == (((1, cut - 1),) if cut > 1 else ())
        assert rest.cuts == (((1, len(rest) - 1),) if len(rest) > 1 else ())
        assert np.array_equal(np.concatenate([head.labels, rest.labels]), piece.labels)
        assert np.array_equal(np.concatenate([head.input_ids, rest.input_ids]), piece.input_ids)
    head, rest = piece.split(9)
    middle, end = rest.split(6)
    row = pack([end, middle], LENGTH, SPECIAL.pad)
    assert row.position_ids[:13].tolist() == [*range(7), *range(6)]
    assert row.labels[:13].tolist() == [*piece.labels[15:].tolist(), *piece.labels[9:15].tolist()]


def test_an_interleaved_document_is_cut_only_between_captioned_images() -> None:
    """Right after an image, or earlier in a text than what describes the image after it; nothing is lost (P2)."""
    long = text(*range(10, 90), *range(10, 90), *range(10, 90), *range(10, 90))  # 320 tokens
    document = Document((long, image(), text(10, 11), image(3, 1), image(1, 2), long, image(), text(12, 13)))
    piece = lay_out(document, SPECIAL, PATCH)
    first, after_first, third = 1 + 320 + 6, 1 + 320 + 6 + 2 + 5, 1 + 320 + 6 + 2 + 5 + 4
    last = third + 320 + 6
    spare = 320 - CAPTION_TOKENS
    between = ((first, first), (after_first, after_first), (third, third + spare))
    assert piece.cuts == ((2, 1 + spare), *between, (last, last + 2))
    assert piece.longest_uncut == CAPTION_TOKENS + 6 and len(piece) == last + 3
    assert [piece.cut_at(n) for n in (1, 2, 30, 300, first, first + 1, 9999)] == [0, 2, 30, 65, first, first, last + 2]
    allowed = {place for low, high in piece.cuts for place in range(low, high + 1)}
    for cut in sorted(allowed):
        head, rest = piece.split(cut)
        assert np.array_equal(np.concatenate([head.labels, rest.labels]), piece.labels)
        found = {p for low, high in head.cuts for p in range(low, high + 1)}
        found |= {p + cut for low, high in rest.cuts for p in range(low, high + 1)}
        assert found == allowed - {cut}
        images = [*head.images, *(replace(im, start=im.start + cut) for im in rest.images)]
        assert images == list(piece.images) and all(im.start + im.rows * im.columns < cut for im in head.images)
        long_enough = pack([rest, head], len(piece), SPECIAL.pad)
        assert [id(im) for im in long_enough.images] == [id(im.segment) for im in (*rest.images, *head.images)]
        assert long_enough.num_attention_pairs < piece.num_attention_pairs
    for cut in set(range(1, len(piece))) - allowed:
        with pytest.raises(AssertionError):
            piece.split(cut)


def test_a_cut_outside_a_piece_or_through_an_image_or_a_row_too_short_is_a_mistake() -> None:
    plain, interleaved = (
        lay_out(document, SPECIAL, PATCH) for document in (Document((text(*range(10, 30)),)), DOCUMENTS["interleaved"])
    )
    for piece, length in ((plain, 0), (plain, 22), (plain, 30), (interleaved, 3)):
        with pytest.raises(AssertionError):
            piece.split(length)
    piece = lay_out(DOCUMENTS["text"], SPECIAL, PATCH)
    assert pack([piece, piece], 10, SPECIAL.pad).document_ids.tolist() == [1] * 5 + [2] * 5
    with pytest.raises(AssertionError):
        pack([piece, piece], 9, SPECIAL.pad)


def test_a_grid_that_patches_do_not_tile_is_refused() -> None:
    with pytest.raises(ValueError, match="latent grid 3x4 is not a multiple of patch_size=2; choose another"):
        lay_out(Document((ImageSegment(np.zeros((4, 3, 4), np.float16)),)), SPECIAL, 2)


def test_a_batch_holds_its_rows_and_indexes_every_target_and_patch() -> None:
    """Several grids, rows without images, and an empty row, against loops over the rows."""
    _, rows = random_rows(9, seed=2)
    draws = draws_of(rows)
    batch = collate(rows, draws, PATCH)
    for name in FIELDS:
        assert np.array_equal(getattr(batch, name).numpy(), np.stack([getattr(row, name) for row in rows])), name

    places = [r * LENGTH + i for r, row in enumerate(rows) for i in range(LENGTH) if row.labels[i] != IGNORE]
    count = batch.num_text_targets
    assert count == len(places) and len(batch.text_target_index) == len(batch.text_targets) == capacity(count)
    assert batch.text_target_index.tolist() == places + [0] * (capacity(count) - count)
    labels = [rows[i // LENGTH].labels[i % LENGTH] for i in places]
    assert batch.text_targets.tolist() == labels + [IGNORE] * (capacity(count) - count)

    by_grid: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for r, row in enumerate(rows):
        for i, im in enumerate(row.images):
            by_grid.setdefault(im.grid, []).append((r, i))
    assert list(batch.images) == sorted(by_grid) and len(by_grid) > 4
    index = batch.image_token_index.tolist()
    for grid, members in sorted(by_grid.items()):
        images, slots = batch.images[grid], capacity(len(members))
        assert images.num_valid == len(members)
        for tensor in (images.stored, images.noise, images.posterior_noise, images.u, images.before_caption):
            assert len(tensor) == slots and not tensor[len(members) :].any()
        for slot, (r, i) in enumerate(members):
            segment = rows[r].images[i]
            assert np.array_equal(images.stored[slot].numpy(), segment.array)
            assert bool(images.before_caption[slot]) == segment.before_caption
            assert images.u[slot] == draws[r].u[i]
            assert torch.equal(images.noise[slot], draws[r].noise[i])
            assert torch.equal(images.posterior_noise[slot], draws[r].posterior_noise[i])
        for slot in range(slots):
            patches = [index.pop(0) for _ in range((grid[0] // PATCH) * (grid[1] // PATCH))]
            if slot >= len(members):
                assert not any(patches)
                continue
            r, i = members[slot]
            assert patches == [r * LENGTH + place for place in range(LENGTH) if rows[r].image_ids[place] == i]
    assert not index
    assert batch.num_images == sum(len(row.images) for row in rows)
    assert batch.num_padding == sum(int((row.document_ids == PADDING_DOCUMENT).sum()) for row in rows)
    assert batch.num_attention_pairs == sum(slow_pairs(row) for row in rows)


def test_the_border_of_a_batch_is_as_designed() -> None:
    """DESIGN.md, what flows, row 3: dtypes and shapes."""
    _, rows = random_rows(4, seed=3)
    batch = collate(rows, draws_of(rows), PATCH)
    assert [getattr(batch, name).dtype for name in FIELDS] == [torch.int64] * 2 + [torch.int32] * 5
    assert {tuple(getattr(batch, name).shape) for name in FIELDS[:-1]} == {(4, LENGTH)}
    assert batch.text_target_index.dtype == batch.text_targets.dtype == batch.image_token_index.dtype == torch.int64
    images = next(iter(batch.images.values()))
    assert images.stored.dtype == torch.float16 and images.before_caption.dtype == torch.bool
    assert images.u.dtype == images.noise.dtype == images.posterior_noise.dtype == torch.float32
    assert images.noise.shape == images.posterior_noise.shape == (len(images.u), 2, *images.stored.shape[2:])


def test_rows_without_anything_make_a_batch_without_targets() -> None:
    empty = pack([], LENGTH, SPECIAL.pad)
    batch = collate([empty, empty], draws_of([empty, empty]), PATCH)
    assert (batch.labels == IGNORE).all() and (batch.document_ids == PADDING_DOCUMENT).all()
    assert batch.num_text_targets == batch.num_images == batch.num_attention_pairs == 0 and not batch.images
    assert batch.num_padding == 2 * LENGTH
    assert batch.text_target_index.tolist() == [0] and batch.text_targets.tolist() == [IGNORE]
    assert batch.image_token_index.shape == (0,) and batch.image_token_index.dtype == torch.int64


def test_capacities_are_few_and_waste_at_most_a_third() -> None:
    sizes = [capacity(count) for count in range(1, 5000)]
    assert all(count <= size < 1.5 * count + 1 for count, size in enumerate(sizes, start=1))
    assert sizes == sorted(sizes) and len(set(sizes)) < 2 * 13
    assert capacity(0) == 1 and [capacity(n) for n in (1, 2, 3, 4, 5, 7, 9, 13)] == [1, 2, 3, 4, 6, 8, 12, 16]


def test_a_batch_moves_whole() -> None:
    """`to` moves every tensor, those of the images too, and keeps the counts. The meta device stands for any other."""
    _, rows = random_rows(3, seed=4)
    batch = collate(rows, draws_of(rows), PATCH)
    moved = batch.to(torch.device("meta"))
    assert isinstance(moved, PackedBatch) and batch.input_ids.device.type == "cpu"
    for part, whole in [(moved, batch), *((moved.images[g], batch.images[g]) for g in batch.images)]:
        for each in fields(part):
            value, original = getattr(part, each.name), getattr(whole, each.name)
            if isinstance(original, torch.Tensor):
                assert value.device.type == "meta" and value.shape == original.shape and value.dtype == original.dtype
            elif isinstance(original, int):
                assert value == original
    same = batch.to(torch.device("cpu"))
    assert torch.equal(same.labels, batch.labels) and list(same.images) == list(batch.images)


def test_a_piece_counts_its_attention_pairs() -> None:
    for document in DOCUMENTS.values():
        piece: Piece = lay_out(document, SPECIAL, PATCH)
        assert piece.num_attention_pairs == slow_pairs(pack([piece], len(piece), SPECIAL.pad))
