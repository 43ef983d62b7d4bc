"""A packed, sharded step equals a slow reference: document by document, masks by a double loop, plain sums (P2, P3)."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench.step import sharded_model
from data.arrangement import OrderConfig
from data.dataset import DataSet, open_data
from data.documents import Document, ImageSegment, TextSegment
from data.layout import IGNORE
from data.loader import LaneRows, Loader, draw_images
from data.packing import NO_IMAGE
from data.tokenizer import Tokenizer
from model.diffusion import DiffusionConfig
from model.unet import UNetConfig
from tests.one_by_one import (
    MODEL,
    SEED,
    VOCAB,
    Items,
    Picture,
    assert_close,
    batch_of,
    drawn_pictures,
    gradients,
    handmade,
    items_of,
    plain_model,
    reference,
    reference_step,
    step_on,
)
from tests.ranks import run_ranks
from tests.sources import data_config
from train.distributed.parallelize import gather_weights
from train.distributed.ranks import Ranks
from train.distributed.vote import Ballot, PendingVote

LANES = 7
UNET = {"patches": "unet", "unet": UNetConfig(channels=(8, 12), blocks=1, timestep_width=16)}
UNTIED = {"untied": "all", "transformer": replace(MODEL.transformer, qk_norm=True, qkv_bias=True)}


@pytest.mark.parametrize(
    "changes",
    [{}, {"image_attention": "causal"}, UNET, {"untied": "ffn"}, UNTIED],
    ids=["paper", "causal", "unet", "ffn", "all"],
)
@pytest.mark.parametrize("rows", [[[0, 1, 2], [3, 4, 5]], [[5, 4, 3, 2, 1, 0]], [[0], [1], [2], [3], [4], [5]]])
def test_a_packed_batch_equals_its_documents_one_by_one(rows: list[list[int]], changes: dict) -> None:
    """The mask, the BOI rule, positions, whitening, noise, timesteps, labels and both losses, in every packing."""
    documents, pictures = handmade()
    expected = reference_step([(items_of(d, p), None) for d, p in zip(documents, pictures, strict=True)], **changes)
    text, image, targets, images, grads = expected
    batch = batch_of(documents, pictures, rows, length=96)
    assert (batch.num_text_targets, batch.num_images) == (targets, images)
    model = plain_model(**changes)
    loss = step_on(model, batch)
    loss.total.backward()
    assert loss.text_nll.item() / targets == pytest.approx(text, rel=1e-5)
    assert loss.image_error.item() / images == pytest.approx(image, rel=1e-5)
    assert loss.total.item() == pytest.approx(text + 5 * image, rel=1e-5)
    # Weights before a U-Net block's last convolution, which is zero at the start, have no gradient yet.
    trained = {name: grad for name, grad in grads.items() if grad.any()}
    assert changes == UNET or len(trained) == len(grads)
    found = gradients(model)
    assert_close({name: found[name] for name in trained}, trained)


def test_lambda_weighs_the_image_loss_alone() -> None:
    """Equation 4: total = text + lambda image; the paper's lambda is 5."""
    documents, pictures = handmade()
    batch, model = batch_of(documents, pictures, [[0, 1, 2, 3, 4, 5]], 128), plain_model()
    totals = [step_on(model, batch, image_weight=weight).total.item() for weight in (0.0, 1.0, 5.0)]
    assert totals[2] - totals[0] == pytest.approx(5 * (totals[1] - totals[0]), rel=1e-4)
    assert totals[0] == pytest.approx(step_on(model, batch).text_nll.item() / batch.num_text_targets, rel=1e-6)


def test_an_image_before_its_caption_is_noised_to_500_at_most_and_others_to_999() -> None:
    """Section 4.1, at the largest u there is; without the cap both reach 999."""
    for before_caption, cap, steps in [(True, 500, 501), (False, 500, 1000), (True, 999, 1000), (True, 0, 1)]:
        segment = ImageSegment(np.zeros((4, 4, 4), np.float16), before_caption=before_caption)
        given = Document((segment, TextSegment(np.arange(5, 14))))
        (picture,) = drawn_pictures(given, torch.Generator().manual_seed(0), u=1 - 2**-24)
        diffusion = DiffusionConfig(before_caption_max_timestep=cap)
        loss = step_on(plain_model(), batch_of([given], [[picture]], [[0]], 32), diffusion)
        at_cap = replace(picture, u=(steps - 0.5) / 1000, before_caption=False)
        _, image, *_ = reference(plain_model(), [(items_of(given, [at_cap]), None)], cap)
        assert loss.image_error.item() == pytest.approx(image.item(), rel=1e-5), (before_caption, cap)


def test_a_batch_without_images_or_without_text_trains_the_rest_and_nothing_is_nan() -> None:
    """Every parameter has a finite gradient, as FSDP's collectives need; what has no target has a zero one."""
    documents, pictures = handmade()
    for rows, idle in [([[0, 5]], "patches"), ([[]], "")]:
        model, batch = plain_model(), batch_of(documents, pictures, rows, 32)
        loss = step_on(model, batch)
        loss.total.backward()
        assert loss.image_error == 0 and loss.total.isfinite()
        for name, grad in gradients(model).items():
            assert grad.isfinite().all(), name
            assert grad.any() != name.startswith(idle), name


# ---- the same over ranks, through lanes and loader ----


def _vote_and_step(
    ranks: Ranks, config: Any, micro_batch_sizes: list[int], steps: int, changes: dict
) -> dict[int, list[tuple]]:
    """Return, by micro-batch size, each step's (text loss, image loss, targets, images, own images, gradients)."""
    model = sharded_model(replace(MODEL, **changes), VOCAB, ranks, seed=SEED)
    data = open_data(config, SEED, MODEL.patch_size)
    found: dict[int, list[tuple]] = {}
    for size in micro_batch_sizes:
        loader = Loader(data, config, rank=ranks.rank, world_size=ranks.world_size, micro_batch_size=size)
        for _ in range(steps):
            batch = loader.next(30)
            vote = PendingVote(Ballot(text_targets=batch.num_text_targets, images=batch.num_images), ranks).wait()
            losses = []
            for micro_batch in batch.micro_batches:
                counts = {"global_text_targets": vote.text_targets, "global_images": vote.images}
                losses.append(step_on(model, micro_batch, **counts))
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


@pytest.mark.parametrize(("changes", "world_sizes"), [({}, (1, 2, 3, 4)), (UNTIED, (1, 3))], ids=["paper", "untied"])
def test_every_number_of_ranks_and_micro_batches_gives_the_loss_and_gradients_of_the_documents_one_by_one(
    changes: dict,
    world_sizes: tuple[int, ...],
    tmp_path: Path,
    tokenizer: Tokenizer,
    pairs_folder: Path,
    texts_folder: Path,
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
        expected.append(reference_step(documents, **changes))
    without_images = set()
    for world_size in world_sizes:
        for rank, found in enumerate(run_ranks(_vote_and_step, world_size, config, sizes, steps, changes)):
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
