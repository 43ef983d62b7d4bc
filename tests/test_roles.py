"""Roles: context is given clean and bears no loss, targets are targets once (P2), and what follows an image that has a
clean copy sees what it sees at sampling (P12): against forwards over one document at a time, without any packing.
"""

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data.arrangement import OrderConfig, arrange
from data.documents import Document, ImageSegment, Role, TextSegment, decode_document, encode_record
from data.layout import IGNORE, lay_out
from data.loader import draw_images
from data.packing import PackedBatch, PackedSequence, collate, pack
from data.shards import BadRecord
from model.attention import block_mask, dense_mask
from model.diffusion import DiffusionConfig, add_noise
from model.document_attention import document_mask
from model.latent_space import to_raw
from model.schedule import NoiseSchedule
from model.transfusion import Transfusion
from model.unet import UNetConfig
from tests.one_by_one import SPECIAL, STATS, VOCAB, plain_model, step_on
from tests.test_packing import slow_pairs
from tests.test_sampler import Slow
from train.flops import Flops

FLOW = DiffusionConfig(schedule="flow", prediction="v", min_snr_gamma=None)
UNET = {"patches": "unet", "unet": UNetConfig(channels=(8, 12), blocks=1, timestep_width=16)}


def text(rng: np.random.Generator, length: int, role: Role = "target") -> TextSegment:
    return TextSegment(rng.integers(5, VOCAB, length), role)


def image(rng: np.random.Generator, h: int, w: int, role: Role = "target", before: bool = False) -> ImageSegment:
    return ImageSegment(rng.normal(size=(4, h, w)).astype(np.float16), before_caption=before, role=role)


def documents() -> list[Document]:
    """An edit, a question with its answer, a conversation that draws, images before and between texts, no context."""
    rng = np.random.default_rng(7)
    a, b = (lambda *args, **more: text(rng, *args, **more)), (lambda *args, **more: image(rng, *args, **more))
    return [
        Document((b(4, 4, "context"), a(3, "context"), b(4, 4))),
        Document((b(4, 8, "context"), a(4, "context"), a(2))),
        Document((a(2, "context"), b(4, 4, "context"), a(3), b(2, 4), a(2, "context"), a(2), b(4, 4), a(1, "context"))),
        Document((b(4, 4, before=True), a(3))),
        Document((b(4, 4), b(2, 2), a(2), b(4, 4))),
        Document((a(5), b(4, 4))),
    ]


def rows_of(chosen: list[Document], copies: bool, per_row: int = 2, length: int = 128) -> list[PackedSequence]:
    pieces = [lay_out(document, SPECIAL, 2, copies) for document in chosen]
    return [pack(pieces[i : i + per_row], length, SPECIAL.pad) for i in range(0, len(pieces), per_row)]


def batch_of(rows: list[PackedSequence]) -> PackedBatch:
    return collate(rows, [draw_images(3, 1, lane, row) for lane, row in enumerate(rows)], 2)


def slow_losses(model: Transfusion, rows: list[PackedSequence], per_row: list[list[Document]], copies: bool, of: Any):
    """Return (text nll, image error, text targets, images) by what the sampler would run for each document.

    With copies all that follows an image sees it clean, and each target is denoised after clean images.
    """
    slow, sums = Slow(model), [torch.zeros(()), torch.zeros(()), 0, 0]
    for lane, (row, chosen) in enumerate(zip(rows, per_row, strict=True)):
        draws, number = draw_images(3, 1, lane, row), 0
        for document in chosen:
            places: list[Any] = [SPECIAL.bos]
            targets: list[bool] = [False]
            for i, segment in enumerate(document.segments):
                is_target = segment.role == "target"
                if isinstance(segment, TextSegment):
                    places += segment.token_ids.tolist()
                    targets += [is_target] * len(segment.token_ids)
                    continue
                raw = to_raw(torch.tensor(segment.array)[None], draws.posterior_noise[number][None])
                clean = STATS.whiten(raw)[0]
                u, before = draws.u[number][None], torch.tensor([segment.before_caption])
                t = NoiseSchedule.of(of, 1).timesteps(u, before)
                level = NoiseSchedule.of(of, 1).levels(t)
                x_t = add_noise(clean[None], draws.noise[number][None], level)[0]
                places.append(SPECIAL.boi)
                targets.append(is_target)
                if is_target:
                    pred = slow.predict(places, x_t, t.item())
                    aim = draws.noise[number] - clean if of.schedule == "flow" else draws.noise[number]
                    sums[1] = sums[1] + (pred - aim).square().mean()
                    sums[3] += 1
                copied = copies and is_target and i + 1 < len(document.segments)
                places.append((clean, 0) if copied or not is_target else (x_t, t.item()))
                targets.append(False)
                places.append(SPECIAL.eoi)
                targets.append(False)
                number += 1 + copied
            places.append(SPECIAL.eos)
            targets.append(document.segments[-1].role == "target")
            hidden, _ = slow.hidden(places)
            at = -1
            for place, is_target, following in zip(places[:-1], targets[1:], places[1:], strict=True):
                at += 1 if isinstance(place, int) else place[0][0].numel() // 4
                if is_target and isinstance(following, int):
                    sums[0] = sums[0] + F.cross_entropy(model.text_logits(hidden[at])[None], torch.tensor([following]))
                    sums[2] += 1
    return sums


@pytest.mark.parametrize(
    ("copies", "of", "changes"),
    [
        (False, DiffusionConfig(), {}),
        (True, DiffusionConfig(), {}),
        (True, FLOW, {"untied": "all"}),
        (True, DiffusionConfig(), UNET),
        (True, DiffusionConfig(), {"image_attention": "causal"}),
    ],
    ids=["context", "copies", "flow, untied", "unet", "causal"],
)
def test_training_sees_context_and_copies_as_the_sampler_does(copies: bool, of: DiffusionConfig, changes: dict) -> None:
    """P2, P12: both losses and their counts, in packed rows with others, and nothing is NaN where nothing is noised."""
    chosen = documents()
    model = plain_model(**changes)
    with torch.no_grad():
        for name, parameter in model.patches.named_parameters():
            if name.endswith("conv_out.weight"):  # zero at the start
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    rows = rows_of(chosen, copies)
    batch = batch_of(rows)
    text_nll, error, targets, images = slow_losses(
        model, rows, [chosen[i : i + 2] for i in range(0, len(chosen), 2)], copies, of
    )
    assert (batch.num_text_targets, batch.num_images) == (targets, images)
    assert batch.num_clean_images == 3 + 5 * copies
    loss = step_on(model, batch, of)
    assert loss.text_nll.item() == pytest.approx(text_nll.item(), rel=2e-5)
    assert loss.image_error.item() == pytest.approx(error.item(), rel=2e-5)
    loss.total.backward()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters())


def test_every_target_is_one_label_and_context_is_none() -> None:
    """P2: of a document's target texts, the BOIs of its target images, and EOS after a target; with copies the same."""
    for document in documents():
        wanted = Counter[int]()
        for segment in document.segments:
            if segment.role == "target":
                wanted.update(segment.token_ids.tolist() if isinstance(segment, TextSegment) else [SPECIAL.boi])
        wanted.update([SPECIAL.eos] * (document.segments[-1].role == "target"))
        for copies in (False, True):
            labels = lay_out(document, SPECIAL, 2, copies).labels
            assert Counter(labels[labels != IGNORE].tolist()) == wanted


def test_a_copy_lies_where_its_image_does_and_hides_it_from_what_follows() -> None:
    """By hand: BOS BOI n n EOI word EOS with one patch, and its copy."""
    rng = np.random.default_rng(0)
    row = pack([lay_out(Document((image(rng, 2, 4), text(rng, 1))), SPECIAL, 2, True)], 12, SPECIAL.pad)
    assert row.input_ids[[0, 1, 6, 8]].tolist() == [SPECIAL.bos, SPECIAL.boi, SPECIAL.eoi, SPECIAL.eos]
    assert row.position_ids[:9].tolist() == [0, 1, 2, 3, 2, 3, 4, 5, 6]
    assert row.image_ids[:9].tolist() == [-1, -1, 0, 0, 1, 1, -1, -1, -1]
    assert row.visible_until[:9].tolist() == [12, 12, 4, 4, *[12] * 5]
    assert [segment.role for segment in row.images] == ["target", "copy"]


@pytest.mark.parametrize("copies", [False, True])
def test_the_masks_and_the_pairs_that_are_counted_are_those_of_the_rule(copies: bool) -> None:
    """P9: all forms of the mask agree over documents with copies, and FLOPs count their pairs."""
    rows = rows_of(documents(), copies)
    batch = batch_of(rows)
    ids = batch.document_ids, batch.image_ids, batch.visible_until
    assert [row.num_attention_pairs for row in rows] == [slow_pairs(row) for row in rows]
    dense = dense_mask(*ids)[:, 0]
    real = batch.document_ids > 0
    assert batch.num_attention_pairs == int((dense & real[:, :, None]).sum())
    flex = block_mask(*ids, block=32)
    q, k = torch.arange(128)[:, None], torch.arange(128)[None]
    for b in range(len(rows)):
        blocks = flex.to_dense()[b, 0].bool().repeat_interleave(32, 0).repeat_interleave(32, 1)
        assert torch.equal(flex.mask_mod(torch.tensor(b), torch.tensor(0), q, k), dense[b])
        assert not (dense[b] & ~blocks).any()
    seen = torch.zeros_like(dense)
    for group in document_mask(*ids).groups:
        for tokens, filled in zip(group.tokens, group.filled, strict=True):
            where = tokens[filled]
            b, inside = int(where[0]) // 128, where % 128
            for chunk in group.chunks:
                of_document = list(group.tokens[:, 0]).index(tokens[0])
                allowed = torch.zeros(chunk.last - chunk.first, group.tokens.shape[1], dtype=torch.bool)
                allowed[:, : chunk.free] = True
                allowed[:, chunk.free : chunk.keys] = chunk.bias[of_document, 0] == 0
                queries = inside[chunk.first : chunk.last]
                seen[b, queries[:, None], inside[None]] = allowed[: len(queries), : len(inside)]
    assert torch.equal(seen, dense & real[:, :, None])


def test_a_copy_has_the_draws_of_its_original_and_changes_no_others() -> None:
    plain, copied = (rows_of(documents(), copies, per_row=6, length=256)[0] for copies in (False, True))
    before, after = draw_images(0, 1, 2, plain), draw_images(0, 1, 2, copied)
    number = -1
    for i, segment in enumerate(copied.images):
        number += segment.role != "copy"
        assert torch.equal(after.noise[i], before.noise[number]) and after.u[i] == before.u[number]
        assert torch.equal(after.posterior_noise[i], before.posterior_noise[number])
    assert number == len(plain.images) - 1


def test_a_record_keeps_the_roles_and_old_records_are_all_targets() -> None:
    edit = documents()[0]
    arrays = [s.token_ids if isinstance(s, TextSegment) else s.array for s in edit.segments]
    roles = [s.role for s in edit.segments]
    record = encode_record("key", arrays, b"{}", roles=roles)
    read = decode_document(record, "here")
    assert [s.role for s in read.segments] == roles
    assert encode_record("key", arrays, b"{}", roles=["target"] * 3).keys() == record.keys() - {"roles.npy"}
    assert encode_record("key", arrays[1:], b"{}") == encode_record("key", arrays[1:], b"{}", roles=["target"] * 2)
    pair = decode_document(encode_record("key", arrays[1:], b"{}", roles=["context", "target"]), "here")
    assert [s.role for s in pair.segments] == ["context", "target"]
    for numbers, reason in (([1, 1, 1], "no target"), ([0, 1], "wrong roles"), ([0, 1, 2], "wrong roles")):
        short = record["roles.npy"][:-3].replace(b"(3,)", f"({len(numbers)},)".encode()) + bytes(numbers)
        with pytest.raises(BadRecord, match=reason):
            decode_document({**record, "roles.npy": short}, "here")
    with pytest.raises(BadRecord, match="wrong roles"):  # else what is given would be learnt
        decode_document({**encode_record("key", arrays[1:], b"{}"), "roles.npy": record["roles.npy"]}, "here")


def test_context_is_dropped_by_part_in_its_shares_and_only_where_an_image_is_drawn() -> None:
    order = OrderConfig(caption_dropout=1.0, text_dropout=0.2, image_dropout=0.1, context_dropout=0.3)
    edit, answer = documents()[:2]

    def kinds(document: Document, record: int) -> str:
        drawn = arrange(document, order, seed=0, epoch=0, source=0, shard=0, record=record)
        return "".join("t" if isinstance(segment, TextSegment) else "i" for segment in drawn.segments)

    found = Counter(kinds(edit, record) for record in range(4000))
    for layout, share in {"ii": 0.2, "ti": 0.1, "i": 0.3, "iti": 0.4}.items():
        assert found[layout] / 4000 == pytest.approx(share, abs=0.03), layout
    assert {kinds(answer, record) for record in range(50)} == {"itt"}, "an answer keeps its question"
    with pytest.raises(ValueError, match="at most 1"):
        OrderConfig(text_dropout=0.6, context_dropout=0.5)
    OrderConfig(text_dropout=0.34, image_dropout=0.55, context_dropout=0.11)  # 1, but for the rounding of a plain sum
    assert str(OrderConfig()) == "OrderConfig(caption_first=0.8, caption_dropout=0.1)", "as in old fingerprints"
    assert "text_dropout=0.2" in str(order)


def test_what_has_context_is_never_cut() -> None:
    """A question cut off its answer would teach to answer nothing."""
    rng = np.random.default_rng(0)
    question = Document((text(rng, 30, "context"), text(rng, 30)))
    assert lay_out(question, SPECIAL, 2).longest_uncut == 62
    assert lay_out(Document((text(rng, 30), text(rng, 30))), SPECIAL, 2).cuts


def test_clean_images_cost_their_encoding_alone() -> None:
    """P9: their patches are not decoded for any loss."""
    flops = replace(
        Flops.of(plain_model().config, VOCAB), per_token=0.0, per_pair=0.0, per_text_target=0.0, more_per_patch=0.0
    )
    images = [s for document in documents() for s in document.segments if isinstance(s, ImageSegment)]
    noised, clean = (sum(s.array[0].size for s in images if s.role == role) for role in ("target", "context"))
    of_model, _ = flops.of_batch(batch_of(rows_of(documents(), copies=False)))
    assert of_model == flops.per_latent_cell * noised + flops.per_encoded_cell * clean
    assert 0 < flops.per_encoded_cell < flops.per_latent_cell
