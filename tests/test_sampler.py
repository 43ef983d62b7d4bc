"""Cached, batched decoding against a decoder that recomputes everything, one row and one branch at a time."""

import itertools
from functools import partial

import pytest
import torch

from model.attention import dense_mask
from model.diffusion import (
    CLEAN,
    DiffusionConfig,
    ddim_step,
    ddpm_step,
    dpmpp_step,
    to_x0_and_eps,
)
from model.draws import SeededDraws
from model.lora import LoraConfig
from model.nucleus import sample_tokens
from model.sampler import Prompt, SpecialTokens, generate
from model.sampler_config import SamplerConfig
from model.schedule import NoiseSchedule
from model.transformer import TransformerConfig
from model.transfusion import Transfusion, TransfusionConfig, init_weights
from model.unet import UNetConfig
from tests.untied_trunk import untied_trunk

SPECIAL = SpecialTokens(bos=1, eos=2, boi=3, eoi=4, never=(0,))
VOCAB, CHANNELS, GRID, PATCHES = 12, 3, (4, 4), 4
SCHEDULE = NoiseSchedule.of(DiffusionConfig(), 1)
FLOW = DiffusionConfig(schedule="flow", prediction="v", shift=2.0, shift_by_size=True)
UNET = UNetConfig(channels=(8, 12), blocks=2, timestep_width=16)


def tiny_model(seed=0, patches="linear", image_attention="bidirectional", untied="none", rank=0, **changes):
    trunk = TransformerConfig(**{"width": 16, "layers": 2, "heads": 2, "ffn_hidden": 24, **changes})
    settings = {"patches": patches, "unet": UNET, "image_attention": image_attention, "untied": untied}
    lora = LoraConfig(rank=rank)
    config = TransfusionConfig(transformer=trunk, patch_size=2, latent_channels=CHANNELS, lora=lora, **settings)
    model = Transfusion(config, VOCAB)
    init_weights(model, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        last = model.patches.to_patch if patches == "linear" else model.patches.to_latents
        last.weight.mul_(10)  # predictions that matter
        for name, parameter in model.patches.named_parameters():
            if name.endswith("conv_out.weight"):  # zero at the start
                parameter.normal_(std=parameter[0].numel() ** -0.5, generator=generator)
        for name, parameter in model.transformer.named_parameters():
            if name.endswith("lora_b"):  # likewise
                parameter.normal_(std=0.05, generator=generator)
        model.text_head.weight.mul_(2)
    return model


def settings(**changes):
    defaults = {"sampler": "ddim", "steps": 4, "guidance": 2.5, "max_new_tokens": 10, "max_images": 2}
    return SamplerConfig(**{**defaults, "prefill_chunk": 3, "max_length": 64, **changes})


def diffusion_of(prediction):
    """Return the objective: the cosine schedule with this prediction, or `flow`."""
    return FLOW if prediction == "flow" else DiffusionConfig(prediction=prediction)


def run(model, prompts, config, seed=0, prediction="eps"):
    return generate(model, prompts, config, diffusion_of(prediction), SPECIAL, GRID, SeededDraws(seed))


def text(*ids):
    return torch.tensor(ids)


def picture(seed, grid=GRID):
    return torch.randn(CHANNELS, *grid, generator=torch.Generator().manual_seed(seed))


class Slow:
    """A document as a list of token ids and (latents, t) images; every question is one full forward over it."""

    def __init__(self, model):
        self.model = model

    @torch.no_grad()
    def hidden(self, parts):
        embedded, images, grids, spans = [], [], [], []
        for part in parts:
            if isinstance(part, int):
                embedded.append(self.model.embed_text(torch.tensor([part])))
                images.append(-1)
                grids.append((-1, -1))
                continue
            latents, t = part
            tokens, self.skips = self.model.embed_images(latents[None], torch.tensor([t]))
            spans.append((len(images), tokens.shape[1], latents.shape[1:]))
            embedded.append(tokens[0])
            images += [len(spans) - 1] * tokens.shape[1]
            grids += [(i, j) for i in range(latents.shape[1] // 2) for j in range(latents.shape[2] // 2)]
        length = len(images)
        ids = torch.tensor([images], dtype=torch.int32)
        seen_whole = ids if self.model.config.image_attention == "bidirectional" else torch.full_like(ids, -1)
        mask = dense_mask(torch.ones_like(ids), seen_whole, torch.full_like(ids, length))
        h, is_image = torch.cat(embedded)[None], ids >= 0
        trunk = self.model.trunk if self.model.config.untied == "none" else partial(untied_trunk, self.model)
        more = () if self.model.config.untied == "none" else (is_image,)
        hidden = trunk(h, torch.arange(length)[None], torch.tensor([grids]), mask, *more)
        return hidden[0], spans

    def predict(self, parts, x_t, t):
        hidden, spans = self.hidden([*parts, (x_t, t)])
        first, count, grid = spans[-1]
        timesteps = torch.tensor([t])
        with torch.no_grad():
            return self.model.predict_noise(hidden[None, first : first + count], self.skips, timesteps, *grid)[0]

    def guided(self, pred, parts, x_t, t, config):
        free = self.predict([SPECIAL.bos, SPECIAL.boi], x_t, t)
        return free + config.guidance * (pred - free)

    def denoise(self, parts, config, draws, index, image, prediction):
        x = draws.noise(index, image, 0, (CHANNELS, *GRID))
        diffusion, before = diffusion_of(prediction), None
        schedule = NoiseSchedule.of(diffusion, x.numel())
        steps = [*schedule.sampling_steps(config.steps, config.spacing), (0, CLEAN)]
        lowest, highest = config.guidance_interval or (0, 1000)

        def guided(x, t):
            pred = self.predict(parts, x, t)
            if not (config.is_guided and lowest <= t <= highest):
                return pred
            return self.guided(pred, parts, x, t, config)

        for step, ((t, level), (t_next, cleaner)) in enumerate(itertools.pairwise(steps)):
            pred = guided(x, t)
            x0, eps = to_x0_and_eps(pred, x, level, diffusion)
            if config.sampler in ("euler", "heun"):
                dt = cleaner.sigma - level.sigma
                euler = x + dt * pred  # the prediction is the velocity
                is_last = config.sampler == "euler" or cleaner is CLEAN
                x = euler if is_last else x + dt / 2 * (pred + guided(euler, t_next))
                continue
            noise = draws.noise(index, image, step + 1, (CHANNELS, *GRID))
            if config.sampler == "ddpm":
                x = ddpm_step(x, x0, level, cleaner, noise)
            elif config.sampler == "dpm++":
                x, before = dpmpp_step(x, x0, level, cleaner, before), (x0, level)
            else:
                x = ddim_step(x0, eps, level, cleaner, config.eta, noise)
        return x

    def generate(self, prompt, config, draws, prediction="eps"):
        parts = [SPECIAL.bos]
        for segment in prompt.segments:
            parts += segment.tolist() if segment.ndim == 1 else [SPECIAL.boi, (segment, 0), SPECIAL.eoi]
        output, tokens, images = [], 0, 0
        drawing = prompt.draw
        if drawing:
            parts.append(SPECIAL.boi)
        while True:
            if drawing:
                clean = self.denoise(parts, config, draws, prompt.index, images, prediction)
                output.append(clean)
                parts += [(clean, 0), SPECIAL.eoi]
                images, drawing = images + 1, False
            if tokens == config.max_new_tokens:
                return output
            with torch.no_grad():
                logits = self.model.text_logits(self.hidden(parts)[0][-1])
            logits[[0, SPECIAL.bos, SPECIAL.eoi]] = -torch.inf
            if images >= config.max_images:
                logits[SPECIAL.boi] = -torch.inf
            u = torch.tensor([draws.uniform(prompt.index, tokens)])
            token = sample_tokens(logits[None], u, config.temperature, config.top_p).item()
            tokens += 1
            if token == SPECIAL.eos:
                return output
            parts.append(token)
            if token == SPECIAL.boi:
                drawing = True
            elif output and isinstance(output[-1], list):
                output[-1].append(token)
            else:
                output.append([token])


def assert_same(ours, expected):
    for part, wanted in zip(ours, map(torch.as_tensor, expected), strict=True):
        assert part.shape == wanted.shape and torch.allclose(part, wanted, atol=1e-4)


MIXED = [
    Prompt((text(5, 6, 7, 8, 9, 10, 11),), draw=True, index=0),
    Prompt((text(5),), draw=True, index=1),
    Prompt((picture(1),), index=2),
    Prompt((), index=3),
    Prompt((text(9, 9), picture(2), text(6, 7, 5, 8), picture(3, (2, 6)), text(10)), draw=True, index=4),
]


@pytest.mark.parametrize(
    "changes,model_changes,prediction",
    [
        ({}, {}, "eps"),
        ({}, {"rope_2d": True}, "eps"),
        ({"sampler": "ddpm"}, {"kv_heads": 1, "qk_norm": True}, "v"),
        ({"guidance": 1.0, "eta": 0.5, "spacing": "trailing"}, {}, "x0"),
        ({"temperature": 0.7, "top_p": 0.8, "max_length": None}, {"rope_2d": True}, "v"),
        ({"sampler": "dpm++", "steps": 5}, {}, "v"),
        ({}, {"patches": "unet"}, "eps"),
        ({"sampler": "dpm++", "guidance_interval": (200, 600)}, {"patches": "unet"}, "v"),
        ({}, {"image_attention": "causal"}, "v"),
        ({}, {"untied": "ffn"}, "v"),
        ({}, {"untied": "all", "qk_norm": True, "head_dim": 12, "rank": 3}, "v"),
        ({}, {"rank": 3}, "eps"),
        ({"sampler": "euler", "guidance_interval": (200, 600)}, {}, "flow"),
        ({"sampler": "heun", "steps": 4}, {"patches": "unet"}, "flow"),
    ],
)
def test_decoding_equals_a_full_forward_for_every_token_and_step(changes, model_changes, prediction):
    config = settings(**changes)
    kinds = set()
    for seed in range(3):
        model, draws = tiny_model(seed, **model_changes), SeededDraws(seed)
        outputs = run(model, MIXED, config, seed, prediction)
        for prompt, ours in zip(MIXED, outputs, strict=True):
            assert_same(ours, Slow(model).generate(prompt, config, draws, prediction))
            kinds.add("".join("t" if part.ndim == 1 else "i" for part in ours))
    # Text after a drawn image and images after text were among them.
    assert any("it" in kind for kind in kinds) and any("ti" in kind for kind in kinds), kinds


@pytest.mark.parametrize("patches", ["linear", "unet"])
def test_a_row_keeps_its_bits_whatever_its_neighbours_hold_and_without_any(patches):
    model, config = tiny_model(1, patches), settings(max_length=None)
    mine = Prompt((text(5, 6, 7), picture(9), text(8)), draw=True, index=7)
    others = [MIXED, [Prompt((text(*([6] * 30)),), index=i) for i in range(5)], [Prompt((), draw=True, index=1)] * 5]
    results = [run(model, [*neighbours[:4], mine], config)[4] for neighbours in others]
    results += [run(model, [mine, *MIXED], config)[0], run(model, [mine], config)[0]]  # other places and numbers
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_draws_follow_the_sample_and_not_its_place():
    model, config = tiny_model(), settings()
    forwards = run(model, MIXED[:2], config)
    backwards = run(model, MIXED[1::-1], config)
    assert all(torch.equal(a, b) for a, b in zip(forwards[0], backwards[1], strict=True))
    same, other = SeededDraws(0), SeededDraws(1)
    assert torch.equal(same.noise(3, 0, 0, (2, 2)), SeededDraws(0).noise(3, 0, 0, (2, 2)))
    places = itertools.product((same, other), (0, 1), (0, 1), (0, 1))
    assert len({draws.noise(*place, (1,)).item() for draws, *place in places}) == 16


@pytest.mark.parametrize(("interval", "branches"), [(None, [2] * 5), ((300, 700), [1, 2, 2, 1, 1])])
def test_a_picture_costs_its_own_tokens_and_one_branch_outside_the_interval_of_guidance(interval, branches):
    config = settings(max_new_tokens=0, steps=5, guidance_interval=interval, prefill_chunk=8)
    model, prompt, shapes = tiny_model(), Prompt((text(*range(5, 12)),), draw=True), []
    model.transformer.register_forward_pre_hook(lambda module, inputs: shapes.append(tuple(inputs[0].shape[:2])))
    generate(model, [prompt], config, DiffusionConfig(), SPECIAL, (8, 4), SeededDraws(0))
    # The unconditional prefix, 9 prompt tokens in chunks of 8, then t = 800, 600, 400, 200, 0.
    assert shapes[0][1] == 2 and shapes[1:] == [(1, 8)] * 2 + [(rows, 8) for rows in branches]


def test_a_row_with_text_left_after_its_picture_runs_alone():
    """The other seven have no room for any."""
    model, shapes = tiny_model(), []
    model.transformer.register_forward_pre_hook(lambda module, inputs: shapes.append(tuple(inputs[0].shape[:2])))
    config = settings(max_new_tokens=5, guidance=1.0, max_length=22, prefill_chunk=16)
    prompts = [Prompt((text(*[5] * length),), draw=True) for length in (2, *[12] * 7)]
    generate(model, prompts, config, DiffusionConfig(), SPECIAL, (8, 4), SeededDraws(0))
    assert shapes[:5] == [(8, 16)] + [(8, 8)] * 4 and shapes[5] == (1, 8), "its clean picture, then EOI and text"
    assert len(shapes) > 6 and all(rows * tokens <= 8 for rows, tokens in shapes[6:]), shapes


def test_guidance_one_is_the_conditional_branch_and_zero_ignores_the_prompt():
    model = tiny_model()
    prompts = [Prompt((text(5, 6),), draw=True), Prompt((text(7, 8, 9),), draw=True)]
    first, second = run(model, prompts, settings(guidance=0.0, max_new_tokens=0))
    assert torch.equal(first[0], second[0])
    first, second = run(model, prompts, settings(guidance=1.0, max_new_tokens=0))
    assert not torch.allclose(first[0], second[0], atol=1e-3)


def test_progress_rises_to_the_number_of_prompts():
    shares = []
    generate(tiny_model(), MIXED, settings(), DiffusionConfig(), SPECIAL, GRID, SeededDraws(0), shares.append)
    assert min(shares) >= 0 and sum(shares) == pytest.approx(len(MIXED))
    shares.clear()
    pictures = [Prompt((text(5),), draw=True, index=i) for i in range(3)]
    config = settings(max_new_tokens=0, max_images=1, steps=4)
    generate(tiny_model(), pictures, config, DiffusionConfig(), SPECIAL, GRID, SeededDraws(0), shares.append)
    assert [round(share, 6) for share in shares if share] == [0.75] * 4


def test_a_row_alone_and_in_a_batch_agree_within_rounding():
    """P12: 1e-4 between batch sizes."""
    for patches in ("linear", "unet"):
        model, config = tiny_model(3, patches), settings(temperature=0.0)
        together = run(model, MIXED, config)
        for prompt, ours in zip(MIXED, together, strict=True):
            (single,) = run(model, [prompt], config)
            assert_same(ours, single)


def test_limits_hold():
    model = tiny_model(2)
    for output in run(model, MIXED, settings(max_new_tokens=3, max_images=0, temperature=3.0)):
        assert sum(len(part) for part in output if part.ndim == 1) <= 3
    prompts = [Prompt((), index=i) for i in range(20)]
    for output in run(model, prompts, settings(max_length=14, max_new_tokens=50, temperature=3.0)):
        length = 1 + sum(len(part) if part.ndim == 1 else PATCHES + 2 for part in output)
        assert length <= 15  # the last image needs no EOI
        assert all(not set(part.tolist()) & {0, 1, 2, 3, 4} for part in output if part.ndim == 1)
    assert run(model, [], settings()) == []
    with pytest.raises(ValueError, match="max_length=8"):
        run(model, [Prompt((text(*([5] * 4)),), draw=True)], settings(max_length=8))


def test_an_end_that_is_bos_and_pad_as_well_still_ends_a_text():
    """As of language models without BOS, such as GPT-2."""
    model = tiny_model()
    with torch.no_grad():
        model.text_head.weight.zero_()  # any allowed token is as likely
    special = SpecialTokens(bos=2, eos=2, boi=3, eoi=4, never=(2,))
    prompts, config = [Prompt((), index=i) for i in range(4)], settings(max_images=0, max_new_tokens=40)
    outputs = generate(model, prompts, config, diffusion_of("eps"), special, GRID, SeededDraws(0))
    assert all(sum(map(len, parts)) < 40 for parts in outputs)
