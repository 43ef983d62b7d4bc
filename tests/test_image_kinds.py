"""What records keep of an image - a posterior's moments, latents, pixels - on its way to the model and into a view."""

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from data.documents import (
    KINDS,
    Document,
    ImageKind,
    ImageSegment,
    TextSegment,
    decode_document,
    encode_record,
    seed_from,
)
from data.layout import lay_out
from data.loader import draw_images
from data.packing import ImageDraws, collate, pack
from data.tokenizer import SpecialIds, Tokenizer
from model.latent_space import LatentStats, to_raw
from tests.one_by_one import SPECIAL, batch_of, drawn_pictures, items_of, plain_model, reference, step_on
from tests.sources import data_config, interleaved, make_source, pairs, texts
from tests.test_loader import PATCH, make_loader, next_batch, run
from tests.test_view import Seen


@pytest.mark.parametrize(("kind", "dtype"), [("latents", torch.float16), ("pixels", torch.uint8)])
def test_other_kinds_of_image_draw_noise_alone_the_same_for_any_ranks(
    tmp_path: Path, tokenizer: Tokenizer, kind: ImageKind, dtype: torch.dtype
) -> None:
    """P3 with texts beside them: the stored bytes travel as they are, u and noise by the rule, no posterior noise."""
    contents = pairs(30, grids=[(4, 4), (4, 8)], kind=kind)
    folder = make_source(tmp_path / "images", tokenizer, contents, shard_sizes=[11, 19], kind=kind)
    words = make_source(tmp_path / "words", tokenizer, texts(30))
    config = data_config(tokenizer, {"images": folder, "words": words}, lanes=5)
    whole = run(config, 3, micro=5)
    assert run(replace(config, num_workers=1), 3, 3, 1) == whole == run(config, 3, 1, 2)
    stored = {image.tobytes() for _, image in contents}
    for step, rows in enumerate(whole[0], start=1):
        for lane, row in rows.items():
            generator = torch.Generator().manual_seed(seed_from("images", 3, step, lane))
            u = torch.rand(len(row[-1]), generator=generator)
            for i, (_, image, noise, posterior_noise, drawn_u, *_) in enumerate(row[-1]):
                assert image in stored and posterior_noise == b""
                expected = torch.randn(len(noise) // 4, generator=generator)
                assert np.array_equal(np.frombuffer(noise, np.float32), expected.numpy())
                assert np.frombuffer(drawn_u, np.float32) == u[i].numpy()
    loader = make_loader(config)
    images = [images for micro in next_batch(loader).micro_batches for images in micro.images.values()]
    loader.close()
    channels = 3 if kind == "pixels" else 2
    assert images and {(image.stored.dtype, image.posterior_noise, image.noise.shape[1]) for image in images} == {
        (dtype, None, channels)
    }


def test_the_draws_of_moments_are_the_same_as_ever() -> None:
    """Their hash is of the draws before there were other kinds; of noise, rounded, as CPUs differ in its last bit."""
    contents = pairs(5, grids=[(4, 4), (4, 8)]) + interleaved(3)
    records = [encode_record("key", [part for part in content if part is not None], b"{}") for content in contents]
    special = SpecialIds(bos=0, eos=1, boi=2, eoi=3, pad=4)
    pieces = [lay_out(decode_document(record, "here"), special, PATCH) for record in records]
    rows = [pack(pieces[:5], 400, 0), pack(pieces[5:], 400, 0)]
    batch = collate(rows, [draw_images(3, 7, lane, row) for lane, row in enumerate(rows)], PATCH)
    digest = hashlib.sha256()
    for images in batch.images.values():
        digest.update(images.stored.numpy().tobytes() + images.u.numpy().tobytes())
        for noise in (images.noise, images.posterior_noise):
            digest.update((noise.double() * 100).round().to(torch.int32).numpy().tobytes())
    assert digest.hexdigest()[:16] == "525c30e70b1e249e"


@pytest.mark.parametrize("patch_size", [4, 8, 16])
def test_patches_of_pixels_are_laid_out_as_those_of_latents(patch_size: int) -> None:
    """The grid is the picture's own; a batch holds the bytes as they are and no posterior noise, nor do its copies."""
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 48), dtype=np.uint8)
    piece = lay_out(Document((TextSegment(np.array([10])), ImageSegment(pixels, "pixels"))), SPECIAL, patch_size)
    (placed,) = piece.images
    assert (placed.rows, placed.columns) == (32 // patch_size, 48 // patch_size)
    with pytest.raises(
        ValueError, match=f"latent grid 32x{48 - patch_size // 2} is not a multiple of patch_size={patch_size}"
    ):
        lay_out(Document((ImageSegment(pixels[:, :, : 48 - patch_size // 2], "pixels"),)), SPECIAL, patch_size)
    noise = torch.ones(3, 32, 48)
    row = pack([piece] * 3, 3 * len(piece), SPECIAL.pad)
    batch = collate([row], [ImageDraws(torch.zeros(3), [noise] * 3, [None] * 3)], patch_size)
    (images,) = batch.map(torch.clone).images.values()
    assert images.stored.dtype == torch.uint8 and images.posterior_noise is None and images.num_valid == 3
    assert np.array_equal(images.stored[2].numpy(), pixels) and torch.equal(images.noise[2], noise)


def test_deterministic_latents_are_trained_on_as_they_are() -> None:
    """Against the reference, as a posterior without variance."""
    latents = np.random.default_rng(1).normal(size=(2, 4, 6)).astype(np.float16)
    given = Document((TextSegment(np.arange(5, 9)), ImageSegment(latents, "latents")))
    (picture,) = drawn_pictures(given, torch.Generator().manual_seed(0), u=0.4)
    batch = batch_of([given], [[replace(picture, posterior_noise=None)]], [[0]], 32)
    assert batch.images[4, 6].posterior_noise is None
    known = torch.cat([picture.moments, torch.zeros(2, 4, 6)])
    certain = replace(picture, moments=known, posterior_noise=torch.zeros(2, 4, 6))
    _, image, *_ = reference(plain_model(), [(items_of(given, [certain]), None)], 500)
    assert step_on(plain_model(), batch).image_error.item() == pytest.approx(image.item(), rel=1e-5)


def test_pixels_become_numbers_from_minus_one_to_one_on_the_device() -> None:
    """Each of the 256 values, bit for bit what numpy makes of it; a step on them is one on those numbers."""
    pixels = np.arange(3 * 16 * 16, dtype=np.int64).astype(np.uint8).reshape(3, 16, 16)
    given = Document((ImageSegment(pixels, "pixels"), TextSegment(np.arange(5, 9))))
    row = pack([lay_out(given, SPECIAL, 4)], 32, SPECIAL.pad)
    batch = collate([row], [ImageDraws(torch.tensor([0.3]), [torch.ones(3, 16, 16)], [None])], 4)
    (images,) = batch.images.values()
    numbers = pixels.astype(np.float32) / np.float32(127.5) - 1
    raw = to_raw(images.stored, images.posterior_noise)
    assert raw.dtype == torch.float32 and np.array_equal(raw[0].numpy(), numbers)
    assert (raw.min(), raw.max(), len(raw.unique())) == (-1, 1, 256)
    as_numbers = replace(batch, images={(16, 16): replace(images, stored=torch.tensor(numbers)[None])})
    settings = {"stats": LatentStats(torch.full((3,), -0.2), torch.full((3,), 0.6))}
    model = plain_model(patch_size=4, latent_channels=3)
    found = [step_on(model, each, **settings).total for each in (batch, as_numbers)]
    assert found[0].isfinite() and torch.equal(*found)


def test_a_view_says_what_the_images_are(tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture) -> None:
    """In words; the statistics beside the manifest's are of what the model will see, pixels from -1 to 1."""
    expected = {
        "moments": f"latents of VAE {'a' * 16} (2 channels, stride 8, 32 pixels a side)",
        "latents": f"latents of the deterministic autoencoder {'a' * 16} (2 channels, stride 8, 32 pixels a side)",
        "pixels": "pixels (3 channels, stride 1, 32 pixels a side)",
    }
    for kind in KINDS:
        contents = pairs(9, kind=kind)
        seen = Seen(capsys, make_source(tmp_path / kind, tokenizer, contents, kind=kind), tmp_path, n=9)
        assert seen.facts["images are"] == expected[kind] and len(seen.documents) == 9 and not seen.bad
        title = next(title for title in seen.tables if title.startswith("latents"))
        cells = np.concatenate([image.reshape(len(image), -1) for _, image in contents], axis=1).astype(np.float64)
        mean = (cells / 127.5 - 1 if kind == "pixels" else cells).mean(1)
        assert [row["mean, shown"] for row in seen.tables[title]] == pytest.approx(mean[: len(seen.tables[title])])
