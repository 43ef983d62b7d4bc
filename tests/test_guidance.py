"""Guidance by a weaker model, of two scales and rescaled, against full forwards of all branches and diffusers."""

import pytest
import torch
from diffusers.guiders.guider_utils import rescale_noise_cfg

from model.draws import SeededDraws
from model.guidance import guided
from model.sampler import Prompt, generate
from tests.test_sampler import (
    GRID,
    MIXED,
    SPECIAL,
    Slow,
    assert_same,
    diffusion_of,
    picture,
    settings,
    text,
    tiny_model,
)
from train.inference.pipeline import PipelineConfig


def weak_model(seed, patches="linear"):
    """Return a guide of another width and depth than `tiny_model`."""
    return tiny_model(seed + 10, patches, width=24, layers=1)


def run(model, prompts, config, guide=None, seed=0, prediction="eps"):
    return generate(model, prompts, config, diffusion_of(prediction), SPECIAL, GRID, SeededDraws(seed), guide=guide)


class SlowGuided(Slow):
    """Also runs the guide in full, over the same document, and rescales as diffusers does."""

    def __init__(self, model, guide):
        super().__init__(model)
        self.guide = guide and Slow(guide)

    def guided(self, pred, parts, x_t, t, config):
        if self.guide is None:
            result = super().guided(pred, parts, x_t, t, config)
        else:
            weak = self.guide.predict(parts, x_t, t)
            result = weak + config.guidance * (pred - weak)
        return rescale_noise_cfg(result[None], pred[None], config.guidance_rescale)[0]


@pytest.mark.parametrize("rescale", [0.0, 0.3, 0.7, 1.0])
def test_the_rescaled_prediction_is_diffusers_of_each_picture(rescale: float) -> None:
    strong, weak = torch.randn(2, 3, 4, 6, 5, generator=torch.Generator().manual_seed(0))
    strong = strong * torch.tensor([0.1, 1.0, 3.0])[:, None, None, None]  # of unequal contrast
    expected = rescale_noise_cfg(weak + 4 * (strong - weak), strong, rescale)
    found = guided(strong, weak, 4, rescale)
    assert torch.allclose(found, expected, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match=r"guidance_rescale=-0.1: expected 0 \(off\)...1"):
        settings(guidance_rescale=-0.1)
    if rescale == 1:
        assert torch.allclose(found.flatten(1).std(dim=1), strong.flatten(1).std(dim=1), rtol=1e-5)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_rescaling_gives_a_picture_the_same_bits_among_any_number(device: str) -> None:
    """P12."""
    strong, weak = torch.randn(2, 8, 16, 64, 64, generator=torch.Generator().manual_seed(0)).to(device)
    together = guided(strong, weak, 3.0, 0.7)
    for i in range(8):
        assert torch.equal(guided(strong[i : i + 1], weak[i : i + 1], 3.0, 0.7)[0], together[i])


@pytest.mark.parametrize(
    ("changes", "patches", "guide_patches", "prediction"),
    [
        ({"guidance_rescale": 0.7, "guidance_interval": (200, 600)}, "unet", None, "eps"),
        ({"guidance_interval": (200, 600), "sampler": "ddpm"}, "unet", "linear", "v"),
        ({"guidance_rescale": 0.7, "sampler": "heun", "steps": 2}, "linear", "unet", "flow"),
    ],
)
def test_decoding_with_a_guide_equals_the_full_forwards_of_both_models(changes, patches, guide_patches, prediction):
    """Text after a drawn picture and pictures after text among them; None: classifier-free guidance."""
    config, kinds = settings(**changes), set()
    for seed in range(2):
        model, guide = tiny_model(seed, patches), guide_patches and weak_model(seed, guide_patches)
        slow, draws = SlowGuided(model, guide), SeededDraws(seed)
        for prompt, ours in zip(MIXED, run(model, MIXED, config, guide, seed, prediction), strict=True):
            assert_same(ours, slow.generate(prompt, config, draws, prediction))
            kinds.add("".join("t" if part.ndim == 1 else "i" for part in ours))
    assert any("it" in kind for kind in kinds) and any("ti" in kind for kind in kinds), kinds


@pytest.mark.parametrize("patches", ["linear", "unet"])
def test_a_guided_row_keeps_its_bits_whatever_runs_beside_it(patches: str) -> None:
    """P12."""
    model, guide = tiny_model(1, patches), weak_model(1, patches)
    config = settings(max_length=None, guidance_rescale=0.7, max_new_tokens=6)
    mine = Prompt((text(5, 6, 7), picture(9), text(8)), draw=True, index=7)
    others = [Prompt((text(*[6] * 70),), draw=True, index=1), *MIXED[2:]]
    wanted = run(model, [mine], config, guide)[0]
    for rows, place in (([mine, *others], 0), ([*others[:2], mine], 2)):
        found = run(model, rows, config, guide)[place]
        assert len(found) == len(wanted) and all(map(torch.equal, found, wanted))


def test_the_guide_runs_where_guidance_acts_and_the_unconditional_branch_nowhere() -> None:
    model, guide, shapes = tiny_model(), weak_model(0), {"model": [], "guide": []}
    for name, part in (("model", model), ("guide", guide)):
        part.transformer.register_forward_pre_hook(
            lambda module, inputs, name=name: shapes[name].append(tuple(inputs[0].shape[:2]))
        )
    prompt = Prompt((text(*range(5, 12)),), draw=True)
    config = settings(max_new_tokens=0, steps=5, guidance_interval=(300, 700), prefill_chunk=8)
    run(model, [prompt], config, guide)
    prefill, step = (2, 8), (2, 4)  # 9 prompt tokens in chunks of 8; rows padded on a CPU
    assert shapes["model"][2:] == [step] * 5 and shapes["guide"][2:] == [step] * 2, shapes
    assert [len(rows) for rows in shapes.values()] == [7, 4] and prefill[1] == shapes["guide"][0][1]
    shapes["guide"].clear()
    unguided = run(model, [prompt], settings(max_new_tokens=0, guidance=1.0), guide)[0]
    assert shapes["guide"] == []
    assert torch.equal(unguided[0], run(model, [prompt], settings(max_new_tokens=0, guidance=1.0))[0][0])
    own = run(model, [prompt], settings(max_new_tokens=0, guidance=4.0), model)[0]
    assert torch.allclose(own[0], unguided[0], atol=1e-5), "a model is no guide of its own"


class SlowTwoScales(Slow):
    """Runs all three branches in full; what was sampled belongs to the one without the prompt's texts too."""

    def generate(self, prompt, config, draws, prediction="eps"):
        images = [part for part in prompt.segments if part.ndim == 3]
        self.without_texts = [SPECIAL.bos]
        for image in images:
            self.without_texts += [SPECIAL.boi, (image, 0), SPECIAL.eoi]
        self.given = 1 + sum(len(part) if part.ndim == 1 else 3 for part in prompt.segments)
        return super().generate(prompt, config, draws, prediction)

    def guided(self, pred, parts, x_t, t, config):
        free = self.predict([SPECIAL.bos, SPECIAL.boi], x_t, t)
        without = self.predict([*self.without_texts, *parts[self.given :]], x_t, t)
        result = free + config.image_guidance * (without - free) + config.guidance * (pred - without)
        return rescale_noise_cfg(result[None], pred[None], config.guidance_rescale)[0]


@pytest.mark.parametrize(
    ("changes", "patches", "prediction"),
    [
        ({"guidance": 4.0, "guidance_rescale": 0.7, "guidance_interval": (200, 600)}, "unet", "eps"),
        ({"guidance": 1.0, "sampler": "heun", "steps": 2}, "linear", "flow"),
        ({"guidance": 4.0, "sampler": "ddpm"}, "linear", "v"),
    ],
)
def test_decoding_with_two_scales_equals_the_full_forwards_of_three_branches(changes, patches, prediction):
    """Prompts of texts, of pictures, of both and of neither; text sampled before and after a drawn picture."""
    config, kinds = settings(image_guidance=1.5, **changes), set()
    for seed in range(2):
        model, draws = tiny_model(seed, patches, rope_2d=True), SeededDraws(seed)
        for prompt, ours in zip(MIXED, run(model, MIXED, config, None, seed, prediction), strict=True):
            assert_same(ours, SlowTwoScales(model).generate(prompt, config, draws, prediction))
            kinds.add("".join("t" if part.ndim == 1 else "i" for part in ours))
    assert any("it" in kind for kind in kinds) and any("ti" in kind for kind in kinds), kinds


@pytest.mark.parametrize("patches", ["linear", "unet"])
def test_a_row_with_two_scales_keeps_its_bits_whatever_runs_beside_it(patches: str) -> None:
    """P12."""
    model, config = tiny_model(1, patches), settings(max_length=None, image_guidance=1.5, max_new_tokens=6)
    mine = Prompt((picture(9), text(8, 5)), draw=True, index=7)
    others = [Prompt((text(*[6] * 70), picture(8), picture(7)), draw=True, index=1), *MIXED[2:]]
    wanted = run(model, [mine], config)[0]
    for rows, place in (([mine, *others], 0), ([*others[:2], mine], 2)):
        found = run(model, rows, config)[place]
        assert len(found) == len(wanted) and all(map(torch.equal, found, wanted))


def test_without_pictures_the_branch_without_texts_is_the_unconditional_one_and_without_texts_the_prompt() -> None:
    """So the scale of what a prompt does not hold is none."""
    model = tiny_model()
    captions, given = [Prompt((text(5, 6, 7),), draw=True)], [Prompt((picture(1),), draw=True)]
    one, four, ten = ({"guidance": 3.0, "image_guidance": scale, "max_new_tokens": 0} for scale in (None, 4.0, 10.0))
    first, second, third = (run(model, captions, settings(**scales))[0][0] for scales in (one, four, ten))
    assert torch.allclose(first, second, atol=1e-5) and torch.allclose(first, third, atol=1e-5)
    first, second = (run(model, given, settings(**four | {"guidance": scale}))[0][0] for scale in (0.0, 9.0))
    assert torch.allclose(first, second, atol=1e-5)
    first, second = (run(model, given, settings(**scales))[0][0] for scales in (four, ten))
    assert not torch.allclose(first, second, atol=1e-2)
    both, alone = [Prompt((picture(1), text(5, 6)), draw=True)], {"guidance": 1.0, "max_new_tokens": 0}
    for scale, prompts in ((1.0, given), (0.0, [Prompt((), draw=True)])):
        found = run(model, both, settings(guidance=0.0, image_guidance=scale, max_new_tokens=0))[0][0]
        assert torch.allclose(found, run(model, prompts, settings(**alone))[0][0], atol=1e-5), scale


def test_two_scales_cost_a_third_branch_where_guidance_acts_and_scales_of_one_cost_none() -> None:
    model, shapes = tiny_model(), []
    model.transformer.register_forward_pre_hook(lambda module, inputs: shapes.append(tuple(inputs[0].shape[:2])))
    prompts = [Prompt((picture(1), text(5, 6)), draw=True, index=i) for i in range(2)]
    acts = {"guidance_interval": (300, 700), "steps": 5, "max_new_tokens": 0}
    run(model, prompts, settings(guidance=4.0, image_guidance=1.5, **acts))
    assert [rows for rows, tokens in shapes[-5:]] == [2, 6, 6, 2, 2] and {tokens for _, tokens in shapes[-5:]} == {4}
    shapes.clear()
    unguided = run(model, prompts, settings(guidance=1.0, image_guidance=1.0, **acts))
    assert [rows for rows, _ in shapes[-5:]] == [2] * 5
    shapes.clear()
    plain = run(model, prompts, settings(guidance=1.0, **acts))
    assert all(torch.equal(ours[0], theirs[0]) for ours, theirs in zip(unguided, plain, strict=True))


def test_two_scales_with_a_guide_and_a_negative_one_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"image_guidance=1.5 with a guide, which reads the whole prompt: expected null"
    ):
        run(tiny_model(), MIXED, settings(image_guidance=1.5), weak_model(0))
    with pytest.raises(ValueError, match=r"image_guidance=-1: expected 0 or more, or null"):
        settings(image_guidance=-1)
    for guide in ({"guide": "runs/x"}, {"guide_weights": "model"}):
        with pytest.raises(ValueError, match=r"image_guidance=1.5, guide=.*: a guide reads the whole prompt"):
            PipelineConfig(image_guidance=1.5, **guide)
