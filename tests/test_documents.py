"""Documents keep the paper's shares of caption order, draws depend on their origin alone, bad arrays have names."""

import hashlib
import math

import numpy as np
import pytest

from data.arrangement import OrderConfig, arrange
from data.documents import (
    CELL_BYTES,
    Document,
    ImageKind,
    ImageSegment,
    TextSegment,
    check_document,
    decode_document,
    document_sizes,
    encode_record,
    seed_from,
    uniforms,
)
from data.shards import BadRecord, Record
from tests.arrays import npy
from tests.sources import interleaved, pairs

MOMENTS = (np.arange(4 * 2 * 6, dtype=np.float16) / 4).reshape(4, 2, 6)
TOKENS = np.array([5, 6, 7])


def drawn_from(document: Document, config: OrderConfig, epoch: int, record: int = 0) -> Document:
    return arrange(document, config, seed=0, epoch=epoch, source=0, shard=0, record=record)


def layout(document: Document) -> str:
    return " ".join("text" if isinstance(segment, TextSegment) else "image" for segment in document.segments)


def reason(record: Record) -> str:
    with pytest.raises(BadRecord) as caught:
        decode_document(record, "a.tar#7")
    assert str(caught.value).startswith("a.tar#7: ")
    return caught.value.reason


def test_a_record_reads_back_as_its_document() -> None:
    document = decode_document(encode_record("key", [TOKENS, MOMENTS], b"{}"), "here")
    text, image = document.segments
    assert text.token_ids.dtype == np.int64 and text.token_ids.tolist() == [5, 6, 7]
    assert image.array.dtype == np.float16 and np.array_equal(image.array, MOMENTS) and not image.before_caption


@pytest.mark.parametrize(
    ("tokens", "moments", "expected", "sizes"),
    [
        (TOKENS, None, "text", (3, [])),
        (TOKENS, MOMENTS, "text image", (3, [(2, 6)])),
        (TOKENS[:0], MOMENTS, "image", (0, [(2, 6)])),
        (TOKENS, MOMENTS[:, :, ::2], "text image", (3, [(2, 3)])),  # not contiguous
        (TOKENS, np.asfortranarray(MOMENTS), "text image", (3, [(2, 6)])),
    ],
)
def test_layouts(tokens: np.ndarray, moments: np.ndarray | None, expected: str, sizes: tuple) -> None:
    record = encode_record("key", [tokens] if moments is None else [tokens, moments], b"{}")
    document = decode_document(record, "here")
    assert layout(document) == expected and document_sizes(record) == sizes
    assert document.has_image == (moments is not None)
    if moments is not None:
        assert np.array_equal(document.segments[-1].array, moments)


LATENTS, PIXELS = MOMENTS[:2] - np.float16(40), np.arange(3 * 2 * 6, dtype=np.uint8).reshape(3, 2, 6) * 7
IMAGES: dict[ImageKind, np.ndarray] = {"moments": MOMENTS, "latents": LATENTS, "pixels": PIXELS}


@pytest.mark.parametrize(("kind", "channels"), [("moments", 2), ("latents", 2), ("pixels", 3)])
def test_an_image_of_each_kind_reads_back_as_it_is(kind: ImageKind, channels: int) -> None:
    """Beside one caption, beside several, and interleaved; the member is named by the kind."""
    array = IMAGES[kind]
    pair = encode_record("key", [TOKENS, array], b"{}", kind=kind)
    several = encode_record("key", [array], b"{}", [TOKENS, TOKENS[:1]], kind)
    mixed = encode_record("key", [TOKENS, array, TOKENS, array[:, :, ::2]], b"{}", kind=kind)
    assert set(pair) == {"__key__", "json", "tokens.npy", f"{kind}.npy"} and f"1.{kind}.npy" in mixed
    for record, grids in ((pair, [(2, 6)]), (several, [(2, 6)]), (mixed, [(2, 6), (2, 3)])):
        document = decode_document(record, "here")
        images = [segment for segment in document.segments if isinstance(segment, ImageSegment)]
        assert [image.grid for image in images] == document_sizes(record)[1] == grids
        for image, given in zip(images, (array, array[:, :, ::2]), strict=False):
            assert (image.kind, image.channels, image.array.dtype) == (kind, channels, array.dtype)
            assert np.array_equal(image.array, given)
        check_document(document, 280, kind, channels, "here")
        with pytest.raises(BadRecord, match=rf"{kind} .* of {channels} channels, expected 5") as caught:
            check_document(document, 280, kind, 5, "here")
        assert caught.value.reason == "wrong array"
        for other in IMAGES.keys() - {kind}:
            with pytest.raises(BadRecord, match=f"{kind}, the manifest says {other}") as caught:
                check_document(document, 280, other, channels, "here")
            assert caught.value.reason == "another kind of image"


def test_latents_take_half_the_bytes_of_moments() -> None:
    sizes = {kind: len(encode_record("key", [IMAGES[kind]], b"{}", kind=kind)[f"{kind}.npy"]) - 128 for kind in IMAGES}
    assert sizes == {"moments": 2 * 4 * 12, "latents": 2 * 2 * 12, "pixels": 3 * 12}
    assert all(sizes[kind] == CELL_BYTES[kind] * ImageSegment(IMAGES[kind], kind).channels * 12 for kind in IMAGES)


def test_latents_and_pixels_that_cannot_be_trained_on_are_refused_by_reason() -> None:
    good = {"__key__": b"a", "tokens.npy": npy(np.array([1, 2], np.int32))}
    for value in (np.nan, -np.nan, np.inf, -np.inf):
        broken = LATENTS.copy()
        broken[0, 1, 3] = value
        assert reason({**good, "latents.npy": npy(broken)}) == "non-finite latents"
        assert reason(encode_record("key", [TOKENS, broken, TOKENS], b"{}", kind="latents")) == "non-finite latents"
    extremes = np.array([65504, -65504, 0, -0.0], np.float16).reshape(1, 2, 2)  # what no log variance may be
    assert np.array_equal(decode_document({**good, "latents.npy": npy(extremes)}, "").segments[1].array, extremes)
    wrong: dict[str, list[np.ndarray]] = {
        "latents.npy": [LATENTS[0], LATENTS[:0], LATENTS[:, :0], LATENTS.astype(np.float32), PIXELS],
        "pixels.npy": [PIXELS[0], PIXELS[:2], np.concatenate([PIXELS, PIXELS[:1]]), PIXELS[:, :0], LATENTS],
    }
    wrong["pixels.npy"] += [PIXELS.astype(np.int8), PIXELS.astype(np.float32)]
    for name, arrays in wrong.items():
        for array in arrays:
            assert reason({**good, name: npy(array)}) == "wrong array", (name, array.dtype, array.shape)
    both = encode_record("key", [TOKENS, PIXELS], b"{}", kind="pixels") | {"moments.npy": npy(MOMENTS)}
    assert reason(both) == "several kinds of one image"


def test_records_of_moments_are_the_same_bytes_as_ever() -> None:
    """Their hash is of the records before there were other kinds."""
    digest = hashlib.sha256()
    for i, content in enumerate(pairs(5, grids=[(4, 4), (4, 8)]) + interleaved(3)):
        record = encode_record(f"{i}", [part for part in content if part is not None], b"{}")
        for name, member in record.items():
            digest.update(name.encode() + member)
    assert digest.hexdigest()[:16] == "a538abbc336610fd"


def test_what_cannot_be_trained_on_is_refused_by_reason() -> None:
    good = {"__key__": b"a", "tokens.npy": npy(np.array([1, 2], np.int32)), "moments.npy": npy(MOMENTS)}
    decode_document(good, "here")
    assert reason({"__key__": b"a", "json": b"{}"}) == "no tokens and no image"
    assert reason({"__key__": b"a", "tokens.npy": npy(np.zeros(0, np.int32))}) == "empty document"
    for value in (np.nan, np.inf, -np.inf):
        broken = MOMENTS.copy()
        broken[1, 1, 3] = value
        assert reason({**good, "moments.npy": npy(broken)}) == "non-finite latents"
    for logvar in (-31, 21):  # finite, and yet exp of it would overflow a step
        assert reason({**good, "moments.npy": npy(np.where(MOMENTS < 6, MOMENTS, np.float16(logvar)))}) == (
            "latent variance out of range"
        )
    wrong = {
        "tokens.npy": [np.zeros(3), np.zeros(3, np.int64), np.zeros(3, ">i4"), np.zeros((3, 1), np.int32)],
        # MOMENTS[:3] holds no pairs of mean and log variance
        "moments.npy": [MOMENTS[0], MOMENTS[None], MOMENTS[:3], MOMENTS[:0], MOMENTS[:, :0]],
    }
    wrong["moments.npy"] += [MOMENTS.astype(kind) for kind in (np.float32, ">f2")]
    for name, arrays in wrong.items():
        for array in arrays:
            assert reason({**good, name: npy(array)}) == "wrong array", (name, array.dtype, array.shape)
    for name in wrong:
        whole = good[name]
        torn = [b"", whole[:5], whole[:60], whole[:-1], whole + b"\0", b"PK\x03\x04" + whole]
        headers = [b"(" * 5000, b"__import__('os')", b"{'descr': '<i4', 'fortran_order': False, 'shape': (1 2,), }\n"]
        hostile = [b"\x93NUMPY\x01\x00" + len(h).to_bytes(2, "little") + h for h in headers]
        for content in (*torn, *hostile):
            assert reason({**good, name: content}) in ("undecodable array", "wrong array"), content[:80]


def test_an_interleaved_document_keeps_its_order() -> None:
    """Any number of texts and images; only a caption before its image is an image-caption document."""
    first, second = MOMENTS, MOMENTS[:, :, ::2] + np.float16(1)
    cases = [
        ([TOKENS, first, TOKENS[1:], second, TOKENS[:1]], "text image text image text", (6, [(2, 6), (2, 3)])),
        ([first, TOKENS], "image text", (3, [(2, 6)])),
        ([first, second], "image image", (0, [(2, 6), (2, 3)])),
        ([first, TOKENS[:0], TOKENS, second], "image text image", (3, [(2, 6), (2, 3)])),
        ([TOKENS, TOKENS[:2]], "text text", (5, [])),
    ]
    for segments, expected, sizes in cases:
        record = encode_record("key", segments, b"{}")
        document = decode_document(record, "here")
        assert layout(document) == expected and document_sizes(record) == sizes
        for segment, given in zip(document.segments, [s for s in segments if s.size], strict=True):
            found = segment.array if isinstance(segment, ImageSegment) else segment.token_ids
            assert np.array_equal(found, given)
        arranged = drawn_from(document, OrderConfig(caption_first=0, caption_dropout=1), 0)
        assert layout(arranged) == expected, "nothing is dropped"
        capped = [s.before_caption for s in arranged.segments if isinstance(s, ImageSegment)]
        assert any(capped) == (expected == "image text"), "an image whose text follows it is before its caption"


def test_an_interleaved_record_that_contradicts_itself_is_refused() -> None:
    good = encode_record("key", [TOKENS, MOMENTS, TOKENS, MOMENTS, TOKENS], b"{}")
    decode_document(good, "here")
    for lengths in ([3, -1, 3, -1, 4], [3, -1, 3, -1], [9, -2], [0, 9], [3, -1, -1, 3], [2**31 - 1, -(2**31)], [9] * 9):
        assert reason({**good, "segments.npy": npy(np.array(lengths, np.int32))}) == "wrong segments", lengths
    assert reason({**good, "segments.npy": npy(np.zeros(0, np.int32))}) == "empty document"
    assert reason({**good, "segments.npy": npy(np.array([9, -1, -1, -1], np.int32))}) == "missing image"
    assert reason({k: v for k, v in good.items() if k != "1.moments.npy"}) == "missing image"
    assert reason({k: v for k, v in good.items() if k != "tokens.npy"}) == "undecodable array"
    assert reason({**good, "0.moments.npy": npy(np.full_like(MOMENTS, np.nan))}) == "non-finite latents"


def test_one_of_several_captions_is_drawn_each_time_and_the_longest_counts() -> None:
    captions = [TOKENS, TOKENS[:1], TOKENS[:2] + 1]
    record = encode_record("key", [MOMENTS], b"{}", captions)
    document = decode_document(record, "here")
    assert layout(document) == "text image" and document_sizes(record) == (3, [(2, 6)])
    drawn = [drawn_from(document, OrderConfig(), epoch) for epoch in range(2000)]
    alone = decode_document(encode_record("key", [TOKENS, MOMENTS], b"{}"), "here")
    assert [layout(d) for d in drawn] == [layout(drawn_from(alone, OrderConfig(), epoch)) for epoch in range(2000)]
    texts = [tuple(s.token_ids.tolist()) for d in drawn for s in d.segments if isinstance(s, TextSegment)]
    for caption in captions:
        assert abs(texts.count(tuple(caption.tolist())) - len(texts) / 3) < 4 * math.sqrt(len(texts) * 2 / 9)
    for lengths in ([], [3], [3, 1, 3], [3, 0, 3], [7, -1]):
        assert reason({**record, "captions.npy": npy(np.array(lengths, np.int32))}) == "wrong captions"
    assert reason({name: member for name, member in record.items() if name != "moments.npy"}) == "wrong captions"
    with pytest.raises(BadRecord, match="token id out of range"):
        check_document(document, 7, "moments", 2, "here")


def test_numbers_of_another_tokenizer_or_vae_are_refused() -> None:
    """The manifest's hashes say what a record should hold; this is what holds it to that."""
    document = decode_document(encode_record("key", [np.array([0, 279]), MOMENTS], b"{}"), "here")
    check_document(document, 280, "moments", 2, "here")
    with pytest.raises(BadRecord, match=r"here: token id out of range \(expected 0...278\)"):
        check_document(document, 279, "moments", 2, "here")
    with pytest.raises(BadRecord, match="token id out of range"):
        check_document(
            decode_document(encode_record("key", [np.array([-1])], b"{}"), "here"), 280, "moments", 2, "here"
        )
    with pytest.raises(BadRecord, match=r"wrong array \(moments \(4, 2, 6\) of 2 channels, expected 4"):
        check_document(document, 280, "moments", 4, "here")


def test_caption_order_and_dropout_have_the_papers_shares() -> None:
    """80 % captions first among those kept, 10 % dropped: within four standard deviations over 20,000 draws."""
    document = Document((TextSegment(TOKENS), ImageSegment(MOMENTS)))
    draws = 20_000
    drawn = [drawn_from(document, OrderConfig(), i // 100, i % 100) for i in range(draws)]
    layouts = [layout(d) for d in drawn]
    kept = draws - layouts.count("image")
    for count, total, share in ((layouts.count("image"), draws, 0.1), (layouts.count("text image"), kept, 0.8)):
        assert abs(count - share * total) < 4 * math.sqrt(total * share * (1 - share))
    for d, name in zip(drawn, layouts, strict=True):
        image = d.segments[0 if name != "text image" else 1]
        assert image.before_caption == (name == "image text")  # a dropped caption leaves the noise uncapped


def test_shares_of_zero_and_one_are_exact() -> None:
    document = Document((TextSegment(TOKENS), ImageSegment(MOMENTS)))
    for first, dropout, expected in ((1, 0, "text image"), (0, 0, "image text"), (1, 1, "image")):
        config = OrderConfig(caption_first=first, caption_dropout=dropout)
        assert {layout(drawn_from(document, config, i)) for i in range(500)} == {expected}


def test_other_documents_are_left_as_they_are() -> None:
    always = OrderConfig(caption_first=0, caption_dropout=1)
    text, image = TextSegment(TOKENS), ImageSegment(MOMENTS)
    for segments in ((text,), (image,), (text, image, text), (image, text, image), (text, image, image)):
        assert drawn_from(Document(segments), always, 1) == Document(segments)


def test_draws_depend_on_every_part_of_their_origin_and_on_nothing_else() -> None:
    """The same numbers on any machine: pinned. One part changed by one: other numbers."""
    origin = (7, 1, 0, 12, 345)
    assert seed_from("caption", *origin) == 7788534006671718050
    assert uniforms("caption", *origin, count=2) == [0.8444345490510706, 0.8851112925424708]
    changed = [(*origin[:i], origin[i] + 1, *origin[i + 1 :]) for i in range(5)]
    seeds = {seed_from("caption", *parts) for parts in [origin, *changed, origin[:4]]} | {seed_from("mix", *origin)}
    assert len(seeds) == 8
    assert seed_from("caption", *(np.int64(part) for part in origin)) == seed_from("caption", *origin)


def test_draws_are_uniform_and_below_one() -> None:
    """Any number of them: a lane draws one for each of its sources."""
    values = np.array([uniforms("mix", 0, lane, count=20) for lane in range(2000)])
    assert values.shape == (2000, 20) and values.min() >= 0 and values.max() < 1
    assert np.abs(values.mean(0) - 0.5).max() < 4 / math.sqrt(12 * 2000)
    assert np.abs(np.corrcoef(values.T) - np.eye(20)).max() < 5 / math.sqrt(2000)


@pytest.mark.parametrize("name", ["caption_first", "caption_dropout"])
@pytest.mark.parametrize("value", [-0.1, 1.1])
def test_a_share_outside_its_range_is_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"{name}={value}: expected a share in \[0, 1\]"):
        OrderConfig(**{name: value})
