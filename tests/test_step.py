"""A packed, sharded step equals a slow reference: document by document, masks by a double loop, plain sums (P2, P3)."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bench.step import sharded_model
from data.dataset import DataSet, open_data
from data.documents import Document, ImageSegment, OrderConfig, TextSegment
from data.loader import LaneRows, Loader, draw_images
from data.packing import IGNORE, NO_IMAGE, ImageDraws, collate, lay_out, pack
from data.tokenizer import SpecialIds, Tokenizer
from model.diffusion import DiffusionConfig
from model.latent_space import LatentStats, to_raw
from model.transformer import TransformerConfig
from model.transfusion import Transfusion, TransfusionConfig, init_weights
from model.unet import UNetConfig
from tests.ranks import run_ranks
from tests.sources import data_config
from train.distributed.parallelize import gather_weights
from train.distributed.ranks import Ranks
from train.distributed.vote import Ballot, PendingVote
from train.step import micro_step

SPECIAL = SpecialIds(bos=1, eos=2, boi=3, eoi=4, pad=0)
VOCAB, SEED, LANES = 300, 5, 7
MODEL = TransfusionConfig(
    transformer=TransformerConfig(width=32, layers=2, heads=2, ffn_multiple_of=16, rope_2d=True),
    patch_size=2,
    latent_channels=2,
    text_loss_chunk=5,
)
STATS = LatentStats(torch.tensor([0.3, -0.2]), torch.tensor([1.5, 0.5]))
IMAGE_WEIGHT = 5.0


@dataclass
class Picture:
    """An image of a document, with its random numbers."""

    moments: torch.Tensor  # [2C, h, w]
    u: float
    noise: torch.Tensor  # [C, h, w]
    posterior_noise: torch.Tensor | None
    before_caption: bool


# A document of the reference is a list of token ids, pictures standing where they are, and what follows its last
# token if that is a target although the document was cut there.
Items = list[int | Picture]


def reference(
    model: Transfusion, documents: list[tuple[Items, int | None]], cap: int
) -> tuple[torch.Tensor, torch.Tensor, int, int]:
    """Return (text nll sum, image error sum, text targets, images), one document at a time and nothing packed."""
    text_sum, image_sum, targets, images = torch.zeros(()), torch.zeros(()), 0, 0
    whole_images = model.config.image_attention == "bidirectional"
    for items, cut_before in documents:
        embedded, owner, grid, tokens, noised = [], [], [], [], []
        for item in items:
            if not isinstance(item, Picture):
                embedded.append(model.embed_text(torch.tensor([item])))
                owner.append(None)
                grid.append((-1, -1))
                tokens.append(item)
                continue
            mean, logvar = item.moments.float().chunk(2)
            latents = mean + torch.exp(logvar / 2) * item.posterior_noise
            latents = (latents - STATS.mean[:, None, None]) / STATS.std[:, None, None]
            t = math.floor(item.u * (cap + 1 if item.before_caption else 1000))
            alpha = _alpha_bar(t)
            x_t = math.sqrt(alpha) * latents + math.sqrt(1 - alpha) * item.noise
            (encoded,), skips = model.embed_images(x_t[None], torch.tensor([t]))
            noised.append((item, t, len(tokens), len(encoded), skips))
            embedded.append(encoded)
            owner += [len(noised)] * len(encoded)
            grid += [(i // (x_t.shape[2] // 2), i % (x_t.shape[2] // 2)) for i in range(len(encoded))]
            tokens += [None] * len(encoded)
        length = len(tokens)
        mask = torch.zeros(1, 1, length, length, dtype=torch.bool)
        for q in range(length):
            for k in range(length):
                mask[0, 0, q, k] = k <= q or (whole_images and owner[q] is not None and owner[q] == owner[k])
        positions = torch.arange(length)[None]
        hidden = model.trunk(torch.cat(embedded)[None], positions, torch.tensor(grid)[None], mask)[0]
        for i, token in enumerate(tokens):
            following = tokens[i + 1] if i + 1 < length else cut_before
            if token is None or following is None:
                continue  # a patch, so EOI is no target; BOI and patches, before patches (footnote 8); the end
            text_sum = text_sum - F.log_softmax(model.text_logits(hidden[i]), dim=-1)[following]
            targets += 1
        for picture, t, first, count, skips in noised:
            h, w = picture.noise.shape[1:]
            pred = model.predict_noise(hidden[None, first : first + count], skips, torch.tensor([t]), h, w)[0]
            image_sum = image_sum + ((pred - picture.noise) ** 2).mean()
            images += 1
    return text_sum, image_sum, targets, images


def _alpha_bar(t: int) -> float:
    """Nichol & Dhariwal's cosine schedule as a product of clipped steps, the slow way."""

    def f(s: float) -> float:
        return math.cos((s / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2

    return math.prod(1 - min(1 - f(s + 1) / f(s), 0.999) for s in range(t + 1))


def plain_model(**changes: Any) -> Transfusion:
    model = Transfusion(replace(MODEL, **changes), VOCAB)
    init_weights(model, SEED)
    return model


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Every tensor within 1e-5 of the norm of its expectation."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensor.norm() > 0, f"{name} is not trained at all: the comparison would be empty"
        error = (found[name] - tensor).norm() / tensor.norm()
        assert error <= 1e-5, f"{name}: {error:.2e}"


def reference_step(
    documents: list[tuple[Items, int | None]], **changes: Any
) -> tuple[float, float, int, int, dict[str, torch.Tensor]]:
    """Return the two mean losses, their counts and the gradients of LM + 5 DDPM."""
    model = plain_model(**changes)
    text, image, targets, images = reference(model, documents, cap=500)
    text, image = text / targets, image / images
    (text + IMAGE_WEIGHT * image).backward()
    return text.item(), image.item(), targets, images, gradients(model)


def _handmade() -> tuple[list[Document], list[list[Picture]]]:
    """Documents and their pictures: text, caption first, image first, image alone, two images of two grids between
    texts, almost nothing."""
    rng = np.random.default_rng(3)

    def text(length: int) -> TextSegment:
        return TextSegment(rng.integers(5, VOCAB, length))

    def image(h: int, w: int, before: bool = False) -> ImageSegment:
        return ImageSegment(rng.normal(size=(4, h, w)).astype(np.float16), before_caption=before)

    documents = [
        Document((text(9),)),
        Document((text(5), image(4, 4))),
        Document((image(4, 8, before=True), text(3))),
        Document((image(2, 2),)),
        Document((text(2), image(4, 4), text(4), image(2, 6), image(4, 4), text(1))),
        Document((text(1),)),
    ]
    generator = torch.Generator().manual_seed(1)
    return documents, [_drawn(document, generator) for document in documents]


def _drawn(document: Document, generator: torch.Generator, u: float | None = None) -> list[Picture]:
    pictures = []
    for segment in document.segments:
        if isinstance(segment, ImageSegment):
            shape = (2, *segment.grid)
            noise, posterior = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
            drawn = torch.rand((), generator=generator).item() if u is None else u
            pictures.append(Picture(torch.tensor(segment.array), drawn, noise, posterior, segment.before_caption))
    return pictures


def _items(document: Document, pictures: list[Picture]) -> Items:
    remaining, items = iter(pictures), [SPECIAL.bos]
    for segment in document.segments:
        text = isinstance(segment, TextSegment)
        items += segment.token_ids.tolist() if text else [SPECIAL.boi, next(remaining), SPECIAL.eoi]
    return [*items, SPECIAL.eos]


def _batch_of(documents: list[Document], pictures: list[list[Picture]], rows: list[list[int]], length: int) -> Any:
    """Pack the documents with these numbers into rows."""
    packed = [pack([lay_out(documents[i], SPECIAL, 2) for i in row], length, SPECIAL.pad) for row in rows]
    draws = []
    for row in rows:
        flat = [picture for i in row for picture in pictures[i]]
        u = torch.tensor([picture.u for picture in flat])
        draws.append(ImageDraws(u, [p.noise for p in flat], [p.posterior_noise for p in flat]))
    return collate(packed, draws, 2)


def _step(model: Transfusion, batch: Any, diffusion: DiffusionConfig | None = None, **changes: Any) -> Any:
    settings = {
        "stats": STATS,
        "diffusion": diffusion or DiffusionConfig(),
        "image_weight": IMAGE_WEIGHT,
        "global_text_targets": batch.num_text_targets,
        "global_images": batch.num_images,
    }
    return micro_step(model, batch, **{**settings, **changes})


UNET = {"patches": "unet", "unet": UNetConfig(channels=(8, 12), blocks=1, timestep_width=16)}


@pytest.mark.parametrize("changes", [{}, {"image_attention": "causal"}, UNET], ids=["paper", "causal", "unet"])
@pytest.mark.parametrize("rows", [[[0, 1, 2], [3, 4, 5]], [[5, 4, 3, 2, 1, 0]], [[0], [1], [2], [3], [4], [5]]])
def test_a_packed_batch_equals_its_documents_one_by_one(rows: list[list[int]], changes: dict) -> None:
    """The mask, the BOI rule, positions, whitening, noise, timesteps, labels and both losses, in every packing."""
    documents, pictures = _handmade()
    expected = reference_step([(_items(d, p), None) for d, p in zip(documents, pictures, strict=True)], **changes)
    text, image, targets, images, grads = expected
    batch = _batch_of(documents, pictures, rows, length=96)
    assert (batch.num_text_targets, batch.num_images) == (targets, images)
    model = plain_model(**changes)
    loss = _step(model, batch)
    loss.total.backward()
    assert loss.text_nll.item() / targets == pytest.approx(text, rel=1e-5)
    assert loss.image_error.item() / images == pytest.approx(image, rel=1e-5)
    assert loss.total.item() == pytest.approx(text + 5 * image, rel=1e-5)
    # Weights before a U-Net block's last convolution, which is zero at the start, have no gradient yet.
    trained = {name: grad for name, grad in grads.items() if grad.any()}
    assert changes == UNET or len(trained) == len(grads)
    found = gradients(model)
    assert_close({name: found[name] for name in trained}, trained)


def test_deterministic_latents_are_trained_on_as_they_are() -> None:
    """Against the reference, as a posterior without variance."""
    latents = np.random.default_rng(1).normal(size=(2, 4, 6)).astype(np.float16)
    given = Document((TextSegment(np.arange(5, 9)), ImageSegment(latents, "latents")))
    (picture,) = _drawn(given, torch.Generator().manual_seed(0), u=0.4)
    batch = _batch_of([given], [[replace(picture, posterior_noise=None)]], [[0]], 32)
    assert batch.images[4, 6].posterior_noise is None
    known = torch.cat([picture.moments, torch.zeros(2, 4, 6)])
    certain = replace(picture, moments=known, posterior_noise=torch.zeros(2, 4, 6))
    _, image, *_ = reference(plain_model(), [(_items(given, [certain]), None)], 500)
    assert _step(plain_model(), batch).image_error.item() == pytest.approx(image.item(), rel=1e-5)


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
    found = [_step(model, each, **settings).total for each in (batch, as_numbers)]
    assert found[0].isfinite() and torch.equal(*found)


def test_lambda_weighs_the_image_loss_alone() -> None:
    """Equation 4: total = text + lambda image; the paper's lambda is 5."""
    documents, pictures = _handmade()
    batch, model = _batch_of(documents, pictures, [[0, 1, 2, 3, 4, 5]], 128), plain_model()
    totals = [_step(model, batch, image_weight=weight).total.item() for weight in (0.0, 1.0, 5.0)]
    assert totals[2] - totals[0] == pytest.approx(5 * (totals[1] - totals[0]), rel=1e-4)
    assert totals[0] == pytest.approx(_step(model, batch).text_nll.item() / batch.num_text_targets, rel=1e-6)


def test_an_image_before_its_caption_is_noised_to_500_at_most_and_others_to_999() -> None:
    """Section 4.1, at the largest u there is; without the cap both reach 999."""
    for before_caption, cap, steps in [(True, 500, 501), (False, 500, 1000), (True, 999, 1000), (True, 0, 1)]:
        segment = ImageSegment(np.zeros((4, 4, 4), np.float16), before_caption=before_caption)
        given = Document((segment, TextSegment(np.arange(5, 14))))
        (picture,) = _drawn(given, torch.Generator().manual_seed(0), u=1 - 2**-24)
        diffusion = DiffusionConfig(before_caption_max_timestep=cap)
        loss = _step(plain_model(), _batch_of([given], [[picture]], [[0]], 32), diffusion)
        at_cap = replace(picture, u=(steps - 0.5) / 1000, before_caption=False)
        _, image, *_ = reference(plain_model(), [(_items(given, [at_cap]), None)], cap)
        assert loss.image_error.item() == pytest.approx(image.item(), rel=1e-5), (before_caption, cap)


def test_a_batch_without_images_or_without_text_trains_the_rest_and_nothing_is_nan() -> None:
    """Every parameter has a finite gradient, as FSDP's collectives need; what has no target has a zero one."""
    documents, pictures = _handmade()
    for rows, idle in [([[0, 5]], "patches"), ([[]], "")]:
        model, batch = plain_model(), _batch_of(documents, pictures, rows, 32)
        loss = _step(model, batch)
        loss.total.backward()
        assert loss.image_error == 0 and loss.total.isfinite()
        for name, grad in gradients(model).items():
            assert grad.isfinite().all(), name
            assert grad.any() != name.startswith(idle), name


# ---- the same over ranks, through lanes and loader ----


def _vote_and_step(ranks: Ranks, config: Any, micro_batch_sizes: list[int], steps: int) -> dict[int, list[tuple]]:
    """Return, by micro-batch size, each step's (text loss, image loss, targets, images, own images, gradients)."""
    model, data = sharded_model(MODEL, VOCAB, ranks, seed=SEED), open_data(config, SEED, MODEL.patch_size)
    found: dict[int, list[tuple]] = {}
    for size in micro_batch_sizes:
        loader = Loader(data, config, rank=ranks.rank, world_size=ranks.world_size, micro_batch_size=size)
        for _ in range(steps):
            batch = loader.next(30)
            vote = PendingVote(Ballot(text_targets=batch.num_text_targets, images=batch.num_images), ranks).wait()
            losses = []
            for micro_batch in batch.micro_batches:
                counts = {"global_text_targets": vote.text_targets, "global_images": vote.images}
                losses.append(_step(model, micro_batch, **counts))
                losses[-1].total.backward()
            sums = torch.tensor([[loss.text_nll, loss.image_error] for loss in losses], dtype=torch.float64).sum(0)
            torch.distributed.all_reduce(sums, group=ranks.vote_group)
            grads = gather_weights({name: p.grad for name, p in model.named_parameters()})
            model.zero_grad()
            text, image = sums.tolist()
            mine = (batch.num_text_targets, batch.num_images, [b.num_images for b in batch.micro_batches])
            found.setdefault(size, []).append(
                (text / vote.text_targets, image / vote.images, vote.text_targets, vote.images, grads, mine)
            )
        loader.close()
    return found


def _unpacked(data: DataSet, step: int, row: Any, lane: int) -> list[tuple[Items, int | None]]:
    """Return a row's documents as the reference takes them."""
    special, draws = data.settings.special, draw_images(SEED, step, lane, row)
    documents = []
    for number in range(1, row.document_ids.max() + 1):
        items, last_label = [], None
        for i in np.flatnonzero(row.document_ids == number):
            image = int(row.image_ids[i])
            if image == NO_IMAGE:
                items.append(int(row.input_ids[i]))
            elif row.image_ids[i - 1] != image:
                segment = row.images[image]
                moments, u = torch.tensor(segment.array), draws.u[image].item()
                noise, posterior = draws.noise[image], draws.posterior_noise[image]
                items.append(Picture(moments, u, noise, posterior, segment.before_caption))
            last_label = int(row.labels[i])
        # Of labels only this one is read: what follows the end of a cut text is in another row.
        documents.append((items, None if items[-1] == special.eos or last_label == IGNORE else last_label))
    return documents


def test_every_number_of_ranks_and_micro_batches_gives_the_loss_and_gradients_of_the_documents_one_by_one(
    tmp_path: Path, tokenizer: Tokenizer, pairs_folder: Path, texts_folder: Path
) -> None:
    """P2, P3: 7 lanes on 1, 2, 3 and 4 ranks, uneven counts of text and images, rows and ranks without any image."""
    steps, sizes = 2, [1, 3]
    sources = {"texts": texts_folder, "pairs": pairs_folder}
    order = OrderConfig(caption_first=0.5, caption_dropout=0.2)
    config = data_config(tokenizer, sources, lanes=LANES, sequence_length=48, order=order)
    assert tokenizer.vocab_size == VOCAB
    data = open_data(config, SEED, MODEL.patch_size)
    rows = iter(LaneRows(data, range(LANES), {}))
    expected = []
    for step in range(1, steps + 1):
        documents = [d for lane in next(rows) for d in _unpacked(data, step, lane.row, lane.lane)]
        expected.append(reference_step(documents))
    without_images = set()
    for world_size in (1, 2, 3, 4):
        for rank, found in enumerate(run_ranks(_vote_and_step, world_size, config, sizes, steps)):
            for size in sizes:
                for step, (text, image, targets, images, grads, mine) in enumerate(found[size]):
                    expected_text, expected_image, *expected_counts, expected_grads = expected[step]
                    assert [targets, images] == expected_counts
                    assert text == pytest.approx(expected_text, rel=1e-5)
                    assert image == pytest.approx(expected_image, rel=1e-5)
                    assert_close(grads, expected_grads)
                    if mine[1] == 0:
                        without_images.add((world_size, rank))
                    if 0 in mine[2]:
                        without_images.add("a micro-batch")
    assert "a micro-batch" in without_images and len(without_images) > 1, "choose data with ranks without any image"
