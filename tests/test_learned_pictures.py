"""A model trained on two captioned pictures draws and describes each."""

import torch

from model.attention import dense_mask
from model.diffusion import DiffusionConfig, add_noise, training_target
from model.sampler import Prompt
from model.transformer import TransformerConfig
from model.transfusion import Timesteps, Transfusion, TransfusionConfig, init_weights
from tests.test_sampler import CHANNELS, GRID, PATCHES, SCHEDULE, SPECIAL, VOCAB, picture, run, settings


def lay_out(rows):
    """Return the model's inputs for rows of equal length, each of token ids and a (noisy latents, t) image."""
    images = [part for row in rows for part in row if not isinstance(part, int)]
    flat = [[token for part in row for token in ([part] if isinstance(part, int) else [-1] * PATCHES)] for row in rows]
    is_image = torch.tensor(flat) == -1
    ids = torch.tensor(flat).clamp(min=0)
    image_ids = is_image.int() - 1
    grids = torch.full((*ids.shape, 2), -1)
    grids[is_image] = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]]).repeat(len(images), 1)
    follows = torch.cat((ids[:, 1:], torch.full_like(ids[:, :1], SPECIAL.eoi)), dim=1)  # no target after the last
    is_target = ~is_image & ~is_image.roll(-1, dims=1) & (follows != SPECIAL.eoi)
    return {
        "input_ids": ids,
        "position_ids": torch.arange(ids.shape[1]).expand_as(ids),
        "grid_positions": grids,
        "is_image": is_image,
        "mask": dense_mask(torch.ones_like(image_ids), image_ids, torch.full_like(image_ids, ids.shape[1])),
        "text_target_index": is_target.flatten().nonzero()[:, 0],
        "text_targets": follows[is_target],
        "noisy": {GRID: torch.stack([latents for latents, _ in images])},
        "timesteps": Timesteps({GRID: torch.tensor([t for _, t in images])}),
        "image_valid": {GRID: torch.ones(len(images), dtype=torch.bool)},
        "image_token_index": is_image.flatten().nonzero()[:, 0],
    }


def test_a_model_that_learned_two_pictures_draws_and_describes_each():
    trunk = TransformerConfig(width=32, layers=2, heads=2, ffn_hidden=64)
    model = Transfusion(TransfusionConfig(transformer=trunk, patch_size=2, latent_channels=CHANNELS), VOCAB)
    init_weights(model, 0)
    captions, pictures = [[5, 6, 10], [7, 8, 9]], [picture(1), picture(2)]
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    x0 = torch.stack(pictures * 4)
    for _ in range(300):
        noise = torch.randn(x0.shape, generator=generator)
        t = torch.randint(0, 1000, (8,), generator=generator)
        x_t = add_noise(x0, noise, SCHEDULE.levels(t))
        rows = []
        for i in range(8):
            caption, image = captions[i % 2], [SPECIAL.boi, (x_t[i], int(t[i])), SPECIAL.eoi]
            rows.append([SPECIAL.bos, *(caption + image if i < 4 else image + caption), SPECIAL.eos])
        output = model(**lay_out(rows))
        error = output.noise_pred[GRID] - training_target(
            x0, noise, SCHEDULE.levels(t), DiffusionConfig(prediction="v")
        )
        (output.text_nll_sum / output.text_count + 5 * error.square().mean()).backward()
        optimizer.step()
        optimizer.zero_grad()

    prompts = [Prompt((torch.tensor(caption),), draw=True, index=i) for i, caption in enumerate(captions)]
    config = settings(steps=25, guidance=1.0, max_new_tokens=0)
    for i, (drawn,) in enumerate(run(model, prompts, config, prediction="v")):
        own, other = ((drawn - pictures[j]).square().mean() for j in (i, 1 - i))
        assert own < 0.5 and other > 1.5, (own, other)
    prompts = [Prompt((clean,), index=i) for i, clean in enumerate(pictures)]
    described = run(model, prompts, settings(temperature=0.0, max_images=0), prediction="v")
    assert [part.tolist() for (part,) in described] == captions
