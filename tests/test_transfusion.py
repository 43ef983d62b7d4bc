"""The whole model on tiny batches: assembly, losses, gradients, initial values."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from model.attention import dense_mask
from model.transformer import TransformerConfig
from model.transfusion import (
    Timesteps,
    Transfusion,
    TransfusionConfig,
    init_weights,
    initial_value,
    parameter_generator,
)

GRIDS = {(4, 4): 2, (2, 6): 1}  # grid -> slots
VOCAB = 11


def tiny_config(**changes):
    trunk = TransformerConfig(width=16, layers=2, heads=2, ffn_hidden=24, **changes)
    return TransfusionConfig(transformer=trunk, patch_size=2, latent_channels=3)


def tiny_model(seed=0, **changes):
    model = Transfusion(tiny_config(**changes), VOCAB)
    init_weights(model, seed)
    return model


def tiny_batch(seed=0, images=True, text=True):
    """Two rows of 16: row 0 holds a 4x4 image at 3...6, row 1 a 2x6 image at 8...10; one 4x4 slot is unused."""
    generator = torch.Generator().manual_seed(seed)
    rows, length = 2, 16
    image_ids = torch.full((rows, length), -1, dtype=torch.int32)
    grid_positions = torch.full((rows, length, 2), -1, dtype=torch.int32)
    if images:
        image_ids[0, 3:7], image_ids[1, 8:11] = 0, 0
        grid_positions[0, 3:7] = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])
        grid_positions[1, 8:11] = torch.tensor([[0, 0], [0, 1], [0, 2]])
    document_ids = torch.ones(rows, length, dtype=torch.int32)
    document_ids[1, 13:] = 0
    index = torch.zeros(4 + 4 + 3, dtype=torch.int64)
    if images:
        index[:4], index[8:] = torch.arange(3, 7), 16 + torch.arange(8, 11)
    text_targets = torch.randint(0, VOCAB, (6,), generator=generator)
    text_targets[4:] = -100
    if not text:
        text_targets[:] = -100
    text_target_index = torch.tensor([0, 9, 17, 20, 0, 0])
    return {
        "input_ids": torch.randint(0, VOCAB, (rows, length), generator=generator),
        "position_ids": torch.arange(length, dtype=torch.int32).expand(rows, length),
        "grid_positions": grid_positions,
        "is_image": image_ids >= 0,
        "mask": dense_mask(document_ids, image_ids, torch.full_like(document_ids, length)),
        "text_target_index": text_target_index,
        "text_targets": text_targets,
        "noisy": {grid: torch.randn(n, 3, *grid, generator=generator) for grid, n in GRIDS.items()},
        "timesteps": Timesteps({g: torch.randint(0, 1000, (n,), generator=generator) for g, n in GRIDS.items()}),
        "image_valid": {(4, 4): torch.tensor([images, False]), (2, 6): torch.tensor([images])},
        "image_token_index": index,
    }


def slow_forward(model, batch):
    """Each row by itself, embeddings laid down one by one, losses by the definition."""
    nll = torch.zeros(())
    noise_pred = {grid: [None] * n for grid, n in GRIDS.items()}
    hidden_rows = []
    for b in range(2):
        h = [model.text_embedding.weight[token] for token in batch["input_ids"][b]]
        spans = []
        for grid, slot, row, first in [((4, 4), 0, 0, 3), ((2, 6), 0, 1, 8)]:
            if row != b or not batch["image_valid"][grid][slot]:
                continue
            latent = batch["noisy"][grid][slot]
            embedding = model.patches.timestep(batch["timesteps"][grid][slot : slot + 1])[0]
            tokens = []
            for i in range(0, grid[0], 2):
                for j in range(0, grid[1], 2):
                    patch = latent[:, i : i + 2, j : j + 2].permute(1, 2, 0).reshape(-1)
                    tokens.append(model.patches.to_width(patch + embedding))
            h[first : first + len(tokens)] = tokens
            spans.append((grid, slot, first, len(tokens)))
        row = slice(b, b + 1)
        hidden = model.transformer(
            torch.stack(h)[None], batch["position_ids"][row], batch["grid_positions"][row], batch["mask"][row]
        )[0]
        for grid, slot, first, count in spans:
            noise_pred[grid][slot] = model.patches.decode(hidden[None, first : first + count], None, None, *grid)[0]
        hidden_rows.append(hidden)
    hidden = torch.cat(hidden_rows)
    for index, target in zip(batch["text_target_index"].tolist(), batch["text_targets"].tolist(), strict=True):
        if target != -100:
            nll = nll - F.log_softmax(model.text_head(hidden[index]), -1)[target]
    return nll, noise_pred


@pytest.mark.parametrize("changes", [{}, {"rope_2d": True}, {"kv_heads": 1, "qk_norm": True}])
def test_forward_equals_rows_assembled_one_by_one(changes):
    model, batch = tiny_model(**changes), tiny_batch()
    output = model(**batch)
    nll, noise_pred = slow_forward(model, batch)
    assert torch.allclose(output.text_nll_sum, nll, atol=1e-5)
    assert output.text_count == 4
    for grid, slot in [((4, 4), 0), ((2, 6), 0)]:
        assert torch.allclose(output.noise_pred[grid][slot], noise_pred[grid][slot], atol=1e-5)


def loss_of(output):
    return output.text_nll_sum + sum(pred.square().sum() for pred in output.noise_pred.values())


@pytest.mark.parametrize("images,text", [(True, True), (False, True), (True, False), (False, False)])
def test_every_parameter_has_a_finite_gradient_whatever_the_batch_holds(images, text):
    model = tiny_model()
    loss_of(model(**tiny_batch(images=images, text=text))).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_unused_slots_change_nothing():
    model, batch = tiny_model(), tiny_batch()
    nll, _, pred, _ = model(**batch)
    batch["noisy"][4, 4][1] = 1e3
    batch["input_ids"][batch["is_image"]] = 0
    changed = model(**batch)
    assert torch.equal(changed.text_nll_sum, nll)
    assert torch.equal(changed.noise_pred[4, 4][0], pred[4, 4][0])
    assert torch.equal(changed.noise_pred[2, 6], pred[2, 6])


def test_rows_without_text_targets_give_zero_loss_and_count():
    output = tiny_model()(**tiny_batch(text=False))
    assert output.text_nll_sum == 0 and output.text_count == 0


def test_text_before_an_image_does_not_see_it_but_text_after_does():
    model, batch = tiny_model(), tiny_batch()
    batch["text_target_index"], batch["text_targets"] = torch.tensor([0, 9]), torch.tensor([1, -100])
    before = model(**batch).text_nll_sum
    batch["text_targets"] = torch.tensor([-100, 1])
    after = model(**batch).text_nll_sum
    batch["noisy"][4, 4][0] += 1.0
    assert not torch.equal(model(**batch).text_nll_sum, after)
    batch["text_targets"] = torch.tensor([1, -100])
    assert torch.equal(model(**batch).text_nll_sum, before)


def test_initial_values_depend_on_seed_and_name_alone():
    first, second, other = tiny_model(3), tiny_model(3), tiny_model(4)
    for (name, a), b, c in zip(first.named_parameters(), second.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name
        assert torch.equal(a, c) == (a.unique().numel() == 1), name


def test_a_model_built_on_meta_and_filled_equals_one_built_on_cpu():
    expected = tiny_model(1)(**tiny_batch())
    with torch.device("meta"):
        model = Transfusion(tiny_config(), VOCAB)
    assert not list(model.buffers()), "a buffer would be lost under meta-device init"
    model.to_empty(device="cpu")
    init_weights(model, 1)
    output = model(**tiny_batch())
    assert torch.equal(output.text_nll_sum, expected.text_nll_sum)
    assert torch.equal(output.noise_pred[4, 4][0], expected.noise_pred[4, 4][0])


def test_padding_of_the_vocabulary_is_zero_and_changes_no_real_row_loss_or_logit():
    plain, padded = tiny_model(1), Transfusion(replace(tiny_config(), vocab_multiple_of=64), VOCAB)
    init_weights(padded, 1)
    for (name, ours), theirs in zip(padded.named_parameters(), plain.parameters(), strict=True):
        rows = VOCAB if name.startswith("text_") else len(ours)
        assert torch.equal(ours[:rows], theirs) and not ours[rows:].any(), name
        assert (len(ours) == 64 * -(-VOCAB // 64)) == name.startswith("text_"), name
    outputs = [model(**tiny_batch()) for model in (padded, plain)]
    assert outputs[0].text_nll_sum.item() == pytest.approx(outputs[1].text_nll_sum.item(), rel=1e-6)
    outputs[0].text_nll_sum.backward()
    assert padded.text_head.weight.grad[:VOCAB].any() and not padded.text_head.weight.grad[VOCAB:].any()
    hidden = torch.randn(2, 16)
    assert torch.allclose(padded.text_logits(hidden), plain.text_logits(hidden), atol=1e-6)
    assert padded.text_logits(hidden).shape == (2, VOCAB)


def test_initial_values_have_the_stated_spread():
    config = TransfusionConfig(transformer=TransformerConfig(width=256, layers=8, heads=4))
    draw = lambda name, shape: initial_value(name, shape, config, parameter_generator(0, name))  # noqa: E731
    assert draw("transformer.blocks.0.attention_norm.weight", (256,)).eq(1).all()
    assert draw("patches.to_patch.bias", (32,)).eq(0).all()
    for name, shape, std in [
        ("text_embedding.weight", (1000, 256), 1 / 16),
        ("transformer.blocks.3.attention.qkv.weight", (768, 256), 1 / 16),
        ("transformer.blocks.3.ffn.down.weight", (256, 1024), 1 / 32 / 4),
        ("patches.to_patch.weight", (320, 256), 0.1 / 16),
    ]:
        assert abs(draw(name, shape).std() / std - 1) < 0.02, name


def test_the_first_losses_are_those_of_knowing_nothing():
    model = tiny_model()
    batch = tiny_batch()
    output = model(**batch)
    noise = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(9))
    assert abs((output.noise_pred[4, 4][:1] - noise).square().mean() - noise.square().mean()) < 0.2
    assert abs(output.text_nll_sum / output.text_count - torch.log(torch.tensor(float(VOCAB)))) < 1.5


def test_config_refuses_impossible_sizes():
    with pytest.raises(ValueError, match="heads=3"):
        TransformerConfig(width=16, heads=3)
    with pytest.raises(ValueError, match="kv_heads=3"):
        TransformerConfig(width=16, heads=2, kv_heads=3)
    with pytest.raises(ValueError, match="patch_size=0"):
        TransfusionConfig(patch_size=0)
