"""The noise process against closed forms and diffusers' schedulers."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

from model.diffusion import (
    DiffusionConfig,
    add_noise,
    alphas_cumprod,
    ddim_step,
    ddpm_step,
    dpmpp_step,
    loss_weights,
    sampling_timesteps,
    timesteps_from_uniform,
    to_x0_and_eps,
    training_target,
)

TABLE = alphas_cumprod()
DIFFUSERS_NAMES = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}


def scheduler(kind, prediction="eps", **settings):
    oracle = kind(
        num_train_timesteps=1000,
        beta_schedule="squaredcos_cap_v2",
        prediction_type=DIFFUSERS_NAMES[prediction],
        clip_sample=False,
        **settings,
    )
    assert (oracle.alphas_cumprod - TABLE).abs().max() < 1e-5
    # In f32, diffusers' own 1 - alpha_bar is off by a thousandth near t = 0: give it the digits.
    oracle.alphas_cumprod, oracle.one = TABLE, torch.ones((), dtype=torch.float64)
    return oracle


def draws(n=4, seed=0):
    return torch.randn(3, n, 2, 4, 4, generator=torch.Generator().manual_seed(seed))


def test_schedule_is_nichol_and_dhariwals_and_near_the_papers_cosine():
    def f(t):
        return math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2

    for t in (0, 1, 250, 500, 900, 998):
        assert TABLE[t].item() == pytest.approx(f(t + 1) / f(0), rel=1e-9)
    assert TABLE[999] / TABLE[998] == pytest.approx(1 - 0.999)
    papers = torch.cos(torch.arange(1, 1001) / 1000 * math.pi / 2)
    assert (TABLE.sqrt() - papers).abs().max() < 4.5e-3


def test_schedule_and_add_noise_equal_diffusers():
    oracle = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    assert (TABLE - oracle.alphas_cumprod).abs().max() < 1e-5
    x0, noise, _ = draws(n=5)
    timesteps = torch.tensor([0, 1, 400, 998, 999])
    ours = add_noise(x0, noise, timesteps, TABLE)
    assert (ours - oracle.add_noise(x0, noise, timesteps)).abs().max() < 1e-5
    velocity = training_target(x0, noise, timesteps, TABLE, "v")
    assert (velocity - oracle.get_velocity(x0, noise, timesteps)).abs().max() < 1e-5


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_a_perfect_prediction_gives_back_x0_and_noise(prediction):
    x0, noise, _ = draws(n=5).double()
    timesteps = torch.tensor([0, 1, 400, 990, 999])
    x_t = add_noise(x0, noise, timesteps, TABLE)
    target = training_target(x0, noise, timesteps, TABLE, prediction)
    for n, t in enumerate(timesteps.tolist()):
        recovered, eps = to_x0_and_eps(target[n], x_t[n], TABLE[t].item(), prediction)
        assert torch.allclose(recovered, x0[n], atol=1e-9) and torch.allclose(eps, noise[n], atol=1e-9)
    batched = to_x0_and_eps(target, x_t, TABLE[timesteps], prediction)
    assert torch.allclose(batched[0], x0, atol=1e-9) and torch.allclose(batched[1], noise, atol=1e-9)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [1, 7, 50, 250, 1000])
def test_sampling_timesteps_equal_diffusers(spacing, steps):
    oracle = scheduler(DDIMScheduler, timestep_spacing=spacing, steps_offset=0)
    oracle.set_timesteps(steps)
    expected = oracle.timesteps.tolist()[:steps]  # diffusers' own rounding adds one for some trailing counts
    assert sampling_timesteps(steps, spacing) == expected


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("eta", [0.0, 0.7, 1.0])
def test_each_ddim_step_equals_diffusers(prediction, spacing, eta):
    oracle = scheduler(DDIMScheduler, prediction, timestep_spacing=spacing, set_alpha_to_one=True)
    oracle.set_timesteps(50)
    x_t, pred, noise = draws().double()
    timesteps = sampling_timesteps(50, spacing)
    for t, t_prev in zip(timesteps, [*timesteps[1:], None], strict=True):
        alpha, alpha_prev = TABLE[t].item(), 1.0 if t_prev is None else TABLE[t_prev].item()
        x0, eps = to_x0_and_eps(pred, x_t, alpha, prediction)
        ours = ddim_step(x0, eps, alpha, alpha_prev, eta, noise)
        theirs = oracle.step(pred, t, x_t, eta=eta, variance_noise=noise if eta else None).prev_sample
        assert (ours - theirs).abs().max() <= 1e-9 * max(1.0, theirs.abs().max().item()), t


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_each_ddpm_step_equals_diffusers(prediction, spacing):
    oracle = scheduler(DDPMScheduler, prediction, timestep_spacing=spacing)
    oracle.set_timesteps(250)
    x_t, pred, _ = draws().double()
    timesteps = sampling_timesteps(250, spacing)
    for t, t_prev in zip(timesteps, [*timesteps[1:], None], strict=True):
        noise = torch.randn(pred.shape, generator=torch.Generator().manual_seed(t), dtype=torch.float64)
        theirs = oracle.step(pred, t, x_t, generator=torch.Generator().manual_seed(t)).prev_sample
        alpha, alpha_prev = TABLE[t].item(), 1.0 if t_prev is None else TABLE[t_prev].item()
        x0, _ = to_x0_and_eps(pred, x_t, alpha, prediction)
        ours = ddpm_step(x_t, x0, alpha, alpha_prev, noise)
        # diffusers raises the variance to at least 1e-20.
        assert (ours - theirs).abs().max() <= 1e-9 * max(1.0, theirs.abs().max().item()), t


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize("spacing", ["leading", "linspace"])
def test_each_dpmpp_step_equals_diffusers(prediction, spacing):
    oracle = DPMSolverMultistepScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type=DIFFUSERS_NAMES[prediction], final_sigmas_type="zero"
    )
    timesteps = sampling_timesteps(50, spacing)
    oracle.set_timesteps(timesteps=timesteps)
    exact = TABLE[timesteps]  # in f32, diffusers' own sigmas have lost the digits of alpha_bar near t = 999
    oracle.sigmas = torch.cat([((1 - exact) / exact).sqrt(), torch.zeros(1, dtype=torch.float64)])
    x_t, *_ = draws().double()
    generator, before, scale = torch.Generator().manual_seed(1), None, 1.0
    for t, t_prev in zip(timesteps, [*timesteps[1:], None], strict=True):
        alpha, alpha_prev = TABLE[t].item(), 1.0 if t_prev is None else TABLE[t_prev].item()
        pred = torch.randn(x_t.shape, generator=generator, dtype=torch.float64)
        theirs = oracle.step(pred, t, x_t).prev_sample
        x0, _ = to_x0_and_eps(pred, x_t, alpha, prediction)
        ours = dpmpp_step(x_t, x0, alpha, alpha_prev, before)
        scale = max(scale, theirs.abs().max().item())
        assert (ours - theirs).abs().max() <= 1e-5 * scale, t
        x_t, before = theirs, (x0, alpha)


def test_dpmpp_is_of_second_order_and_ddim_of_first():
    """On a Gaussian the probability flow is known: x scales with its own deviation sqrt(alpha spread^2 + 1 - alpha)."""
    spread, start = 0.5, torch.ones(1, dtype=torch.float64)

    def deviation(t):
        return math.sqrt(TABLE[t].item() * spread**2 + 1 - TABLE[t].item())

    def error(kind, stride):
        x, before = start, None
        for t in range(800, 80, -stride):
            alpha, alpha_prev = TABLE[t].item(), TABLE[t - stride].item()
            best_eps = math.sqrt(1 - alpha) / deviation(t) ** 2 * x
            x0, eps = to_x0_and_eps(best_eps, x, alpha, "eps")
            if kind == "ddim":
                x = ddim_step(x0, eps, alpha, alpha_prev, 0.0, None)
            else:
                x, before = dpmpp_step(x, x0, alpha, alpha_prev, before), (x0, alpha)
        return abs((x - deviation(80) / deviation(800)).item())

    for kind, low, high in (("ddim", 1.7, 2.4), ("dpm++", 3.2, 5.0)):
        ratio = error(kind, 20) / error(kind, 10)
        assert low < ratio < high, (kind, ratio)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_sampling_with_the_exact_denoiser_of_a_gaussian_reaches_its_variance(eta):
    # For x0 ~ N(0, s^2) the best eps is linear in x_t, so the sampler's result has a known spread.
    spread = 0.5
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200_000, generator=generator, dtype=torch.float64)
    timesteps = sampling_timesteps(250, "trailing")
    for t, t_prev in zip(timesteps, [*timesteps[1:], None], strict=True):
        alpha, alpha_prev = TABLE[t].item(), 1.0 if t_prev is None else TABLE[t_prev].item()
        best_eps = math.sqrt(1 - alpha) / (alpha * spread**2 + 1 - alpha) * x
        x0, eps = to_x0_and_eps(best_eps, x, alpha, "eps")
        noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        x = ddim_step(x0, eps, alpha, alpha_prev, eta, noise)
    assert x.std().item() == pytest.approx(spread, rel=0.02)


def test_uniform_draws_reach_every_timestep_alike_and_capped_ones_0_to_500():
    u = (torch.arange(501_000, dtype=torch.float64) + 0.5) / 501_000
    free = timesteps_from_uniform(u, torch.zeros(len(u), dtype=torch.bool), DiffusionConfig())
    capped = timesteps_from_uniform(u, torch.ones(len(u), dtype=torch.bool), DiffusionConfig())
    assert torch.equal(free.bincount(), torch.full((1000,), 501))
    assert torch.equal(capped.bincount(), torch.full((501,), 1000))
    mixed = timesteps_from_uniform(torch.tensor([0.9999, 0.9999]), torch.tensor([True, False]), DiffusionConfig())
    assert mixed.tolist() == [500, 999]


def test_no_draw_leaves_the_schedule():
    u = torch.tensor([0.0, 1.0 - 2**-24], dtype=torch.float32)
    for sampling in ("uniform", "logit_normal"):
        for cap in (0, 500, None):
            config = DiffusionConfig(timestep_sampling=sampling, before_caption_max_timestep=cap)
            for before in (False, True):
                t = timesteps_from_uniform(u, torch.tensor([before, before]), config)
                assert t.min() >= 0 and t.max() <= (cap if before and cap is not None else 999)


def test_logit_normal_draws_have_the_stated_median_and_spread():
    config = DiffusionConfig(timestep_sampling="logit_normal", logit_normal_mean=0.5, logit_normal_std=0.8)
    u = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    t = timesteps_from_uniform(u, torch.zeros(len(u), dtype=torch.bool), config)
    logits = torch.logit((t + 0.5) / 1000)
    assert logits.median().item() == pytest.approx(0.5, abs=0.01)
    assert logits.std().item() == pytest.approx(0.8, abs=0.02)


def test_min_snr_weighs_the_error_in_x0_alike_whatever_is_predicted():
    timesteps = torch.tensor([10, 300, 700, 990])
    x0, noise, error = draws().double()
    x_t = add_noise(x0, noise, timesteps, TABLE)
    assert loss_weights(timesteps, TABLE, DiffusionConfig()) is None
    losses = []
    for prediction in ("x0", "eps", "v"):
        weights = loss_weights(timesteps, TABLE, DiffusionConfig(prediction=prediction, min_snr_gamma=5.0))
        target = training_target(x0, noise, timesteps, TABLE, prediction)
        wrong_x0, _ = to_x0_and_eps(target + error, x_t, TABLE[timesteps], prediction)
        snr = TABLE[timesteps] / (1 - TABLE[timesteps])
        in_x0 = (wrong_x0 - x0).square().flatten(1).mean(1) * snr.clamp(max=5.0)
        losses.append((weights * error.square().flatten(1).mean(1), in_x0))
    for weighted, expected in losses:
        assert torch.allclose(weighted, expected, rtol=1e-5)


def test_config_refuses_what_makes_no_sense():
    for settings in ({"num_timesteps": 1}, {"before_caption_max_timestep": 1000}, {"min_snr_gamma": 0.0}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            DiffusionConfig(**settings)
    with pytest.raises(ValueError, match="1001 sampling steps"):
        sampling_timesteps(1001, "leading")


def test_ddim_with_eta_one_is_ddpm():
    x_t, pred, noise = draws().double()
    alpha, alpha_prev = TABLE[600].item(), TABLE[560].item()
    x0, eps = to_x0_and_eps(pred, x_t, alpha, "eps")
    ancestral = ddpm_step(x_t, x0, alpha, alpha_prev, noise)
    assert torch.allclose(ddim_step(x0, eps, alpha, alpha_prev, 1.0, noise), ancestral, atol=1e-12)
