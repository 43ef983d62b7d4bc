"""The formulas of noise against closed forms and diffusers' schedulers."""

import itertools
import math

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)

from model.diffusion import (
    CLEAN,
    LEAST_SIGMA,
    DiffusionConfig,
    Level,
    add_noise,
    ddim_step,
    ddpm_step,
    dpmpp_step,
    heun_step,
    loss_weights,
    to_x0_and_eps,
    training_target,
    x0_error_factor,
)
from model.schedule import NoiseSchedule, alphas_cumprod

COSINE = NoiseSchedule.of(DiffusionConfig(), 1)
TABLE = alphas_cumprod(DiffusionConfig())
DIFFUSERS_NAMES = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
DIFFUSERS_SCHEDULES = {"cosine": "squaredcos_cap_v2", "linear": "linear"}
# Every pair of what is predicted and how noise comes in that makes sense.
KINDS = [
    *(DiffusionConfig(schedule=s, prediction=p) for s in ("cosine", "linear") for p in ("eps", "v", "x0")),
    *(DiffusionConfig(schedule="cosine", zero_terminal_snr=True, prediction=p) for p in ("v", "x0")),
    *(DiffusionConfig(schedule="flow", prediction=p) for p in ("v", "x0")),
]


def scheduler(kind, config, **settings):
    oracle = kind(
        num_train_timesteps=1000,
        beta_schedule=DIFFUSERS_SCHEDULES[config.schedule],
        prediction_type=DIFFUSERS_NAMES[config.prediction],
        clip_sample=False,
        **settings,
    )
    table = alphas_cumprod(config)
    assert (oracle.alphas_cumprod - table).abs().max() < 1e-5
    # In f32, diffusers' own 1 - alpha_bar is off by a thousandth near t = 0: give it the digits.
    oracle.alphas_cumprod, oracle.one = table, torch.ones((), dtype=torch.float64)
    return oracle


def draws(n=4, seed=0):
    return torch.randn(3, n, 2, 4, 4, generator=torch.Generator().manual_seed(seed))


def steps_of(schedule, count, spacing):
    """Return (t, level, next level) of each sampling step."""
    steps = [*schedule.sampling_steps(count, spacing), (None, CLEAN)]
    return [(t, level, cleaner) for (t, level), (_, cleaner) in itertools.pairwise(steps)]


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_noise_and_velocity_equal_diffusers(kind):
    config = DiffusionConfig(schedule=kind, prediction="v")
    oracle = DDPMScheduler(beta_schedule=DIFFUSERS_SCHEDULES[kind])
    x0, noise, _ = draws(n=5)
    timesteps = torch.tensor([0, 1, 400, 998, 999])
    level = NoiseSchedule.of(config, 1).levels(timesteps)
    assert (add_noise(x0, noise, level) - oracle.add_noise(x0, noise, timesteps)).abs().max() < 1e-5
    velocity = training_target(x0, noise, level, config)
    assert (velocity - oracle.get_velocity(x0, noise, timesteps)).abs().max() < 1e-5


def test_a_flows_noise_and_velocity_equal_diffusers():
    config = DiffusionConfig(schedule="flow", prediction="v")
    oracle = FlowMatchEulerDiscreteScheduler()
    x0, noise, _ = draws(n=5)
    timesteps = oracle.timesteps[[0, 10, 500, 900, 999]]  # 1000 t
    level = NoiseSchedule.of(config, 1).levels(timesteps)
    x_t = add_noise(x0, noise, level)
    assert (x_t - oracle.scale_noise(x0, timesteps, noise)).abs().max() < 1e-5
    # BAGEL and its relatives: x_t = (1 - t) clean + t noise, and the target is noise - clean.
    t = (timesteps / 1000).view(-1, 1, 1, 1)
    assert (x_t - ((1 - t) * x0 + t * noise)).abs().max() < 1e-6
    assert torch.equal(training_target(x0, noise, level, config), noise - x0)


@pytest.mark.parametrize("config", KINDS, ids=str)
def test_a_perfect_prediction_gives_back_x0_and_noise(config):
    x0, noise, _ = draws(n=5).double()
    first, last = (1, 1000) if config.schedule == "flow" else (0, 999)  # at its 0 a flow has no noise to find
    level = NoiseSchedule.of(config, 1).levels(torch.tensor([first, 2, 400, 990, last]))
    x_t = add_noise(x0, noise, level)
    target = training_target(x0, noise, level, config)
    for n, (signal, sigma) in enumerate(zip(level.signal.tolist(), level.sigma.tolist(), strict=True)):
        recovered, eps = to_x0_and_eps(target[n], x_t[n], Level(signal, sigma), config)
        assert torch.allclose(recovered, x0[n], atol=1e-9) and torch.allclose(eps, noise[n], atol=1e-9)
    batched = to_x0_and_eps(target, x_t, level, config)
    assert torch.allclose(batched[0], x0, atol=1e-9) and torch.allclose(batched[1], noise, atol=1e-9)


@pytest.mark.parametrize("config", KINDS, ids=str)
def test_the_factor_turns_a_predictions_squared_error_into_that_of_x0(config):
    x0, noise, error = draws(n=4).double()
    level = NoiseSchedule.of(config, 1).levels(torch.tensor([10, 300, 700, 990]))
    x_t, target = add_noise(x0, noise, level), training_target(x0, noise, level, config)
    wrong, _ = to_x0_and_eps(target + error, x_t, level, config)
    expected = (wrong - x0).square().flatten(1).mean(1)
    found = x0_error_factor(level, config) * error.square().flatten(1).mean(1)
    assert torch.allclose(found, expected, rtol=1e-9)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "flow"])
@pytest.mark.parametrize(("prediction", "loss"), [("x0", "v"), ("v", "x0"), ("x0", "x0"), ("v", "v"), ("v", "own")])
def test_the_loss_may_be_the_error_of_another_prediction(schedule, prediction, loss):
    config = DiffusionConfig(schedule=schedule, prediction=prediction, loss=loss)
    meant = DiffusionConfig(schedule=schedule, prediction=prediction if loss == "own" else loss)
    x0, noise, error = draws(n=4).double()
    level = NoiseSchedule.of(config, 1).levels(torch.tensor([60, 300, 700, 990]))
    assert level.sigma.min() > LEAST_SIGMA
    x_t, target = add_noise(x0, noise, level), training_target(x0, noise, level, config)
    # The x0 and noise that the wrong prediction implies, and what `loss` would have predicted of them.
    implied = to_x0_and_eps(target + error, x_t, level, config)
    theirs = training_target(*implied, level, meant) - training_target(x0, noise, level, meant)
    weights = loss_weights(level, config)
    ours = error.square().flatten(1).mean(1) * (1 if weights is None else weights)
    assert torch.allclose(ours, theirs.square().flatten(1).mean(1), rtol=1e-6)


def test_near_clean_images_jits_bound_holds():
    config = DiffusionConfig(schedule="flow", prediction="x0", loss="v")
    weights = loss_weights(NoiseSchedule.of(config, 1).levels(torch.tensor([0.0, 1.0, 50.0, 100.0])), config)
    assert weights.tolist() == pytest.approx([400, 400, 400, 100])


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("eta", [0.0, 0.7, 1.0])
def test_each_ddim_step_equals_diffusers(prediction, spacing, eta):
    config = DiffusionConfig(prediction=prediction)
    oracle = scheduler(DDIMScheduler, config, timestep_spacing=spacing, set_alpha_to_one=True)
    oracle.set_timesteps(50)
    x_t, pred, noise = draws().double()
    for t, level, cleaner in steps_of(COSINE, 50, spacing):
        ours = ddim_step(*to_x0_and_eps(pred, x_t, level, config), level, cleaner, eta, noise)
        theirs = oracle.step(pred, t, x_t, eta=eta, variance_noise=noise if eta else None).prev_sample
        assert (ours - theirs).abs().max() <= 1e-9 * max(1.0, theirs.abs().max().item()), t


@pytest.mark.parametrize("prediction", ["x0", "v"])
@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_zero_terminal_snr_and_its_steps_equal_diffusers(prediction, kind):
    config = DiffusionConfig(schedule=kind, zero_terminal_snr=True, prediction=prediction)
    oracle = scheduler(
        DDIMScheduler, config, timestep_spacing="trailing", set_alpha_to_one=True, rescale_betas_zero_snr=True
    )
    assert alphas_cumprod(config)[-1] == 0
    oracle.set_timesteps(25)
    x_t, pred, _ = draws().double()
    for t, level, cleaner in steps_of(NoiseSchedule.of(config, 1), 25, "trailing"):
        ours = ddim_step(*to_x0_and_eps(pred, x_t, level, config), level, cleaner, 0.0, None)
        assert (ours - oracle.step(pred, t, x_t).prev_sample).abs().max() < 1e-9, t


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("prediction", ["v", "x0"])
def test_each_euler_step_of_a_flow_equals_diffusers(shift, prediction):
    config = DiffusionConfig(schedule="flow", shift=shift, prediction=prediction)
    oracle = FlowMatchEulerDiscreteScheduler(shift=shift)
    oracle.set_timesteps(sigmas=[1 - i / 20 for i in range(20)])  # as FLUX's and BAGEL's pipelines do
    x_t, velocity, _ = draws()
    steps = steps_of(NoiseSchedule.of(config, 1), 20, "leading")
    for expected, (t, level, cleaner) in zip(oracle.timesteps, steps, strict=True):
        assert t == pytest.approx(expected.item(), abs=1e-3)
        pred = velocity if prediction == "v" else x_t - level.sigma * velocity
        ours = ddim_step(*to_x0_and_eps(pred, x_t, level, config), level, cleaner, 0.0, None)
        x_t = oracle.step(velocity, expected, x_t).prev_sample
        assert (ours - x_t).abs().max() < 1e-5, t


def test_each_heun_step_of_a_flow_equals_diffusers():
    config = DiffusionConfig(schedule="flow", prediction="v")
    oracle = FlowMatchHeunDiscreteScheduler()
    oracle.set_timesteps(10)
    sigmas = [*dict.fromkeys(oracle.sigmas.tolist())]  # those of second evaluations stand there twice
    x_t, *velocities = draws()
    for i, (sigma, following) in enumerate(itertools.pairwise(sigmas)):
        level, cleaner = Level(1 - sigma, sigma), Level(1 - following, following)
        now = to_x0_and_eps(velocities[0] * (i + 1) / 10, x_t, level, config)
        ours = euler = ddim_step(*now, level, cleaner, 0.0, None)
        # diffusers takes a step in two calls, and the last one in one, which is Euler's.
        theirs = oracle.step(velocities[0] * (i + 1) / 10, oracle.timesteps[2 * i], x_t).prev_sample
        if following:
            then = to_x0_and_eps(velocities[1], euler, cleaner, config)
            ours = heun_step(x_t, now, then, level, cleaner)
            theirs = oracle.step(velocities[1], oracle.timesteps[2 * i + 1], theirs).prev_sample
        assert (ours - theirs).abs().max() < 1e-5, sigma
        x_t = theirs


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_each_ddpm_step_equals_diffusers(prediction, spacing):
    config = DiffusionConfig(prediction=prediction)
    oracle = scheduler(DDPMScheduler, config, timestep_spacing=spacing)
    oracle.set_timesteps(250)
    x_t, pred, _ = draws().double()
    for t, level, cleaner in steps_of(COSINE, 250, spacing):
        noise = torch.randn(pred.shape, generator=torch.Generator().manual_seed(t), dtype=torch.float64)
        theirs = oracle.step(pred, t, x_t, generator=torch.Generator().manual_seed(t)).prev_sample
        x0, _ = to_x0_and_eps(pred, x_t, level, config)
        ours = ddpm_step(x_t, x0, level, cleaner, noise)
        # diffusers raises the variance to at least 1e-20.
        assert (ours - theirs).abs().max() <= 1e-9 * max(1.0, theirs.abs().max().item()), t


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize("spacing", ["leading", "linspace"])
def test_each_dpmpp_step_equals_diffusers(prediction, spacing):
    config = DiffusionConfig(prediction=prediction)
    oracle = DPMSolverMultistepScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type=DIFFUSERS_NAMES[prediction], final_sigmas_type="zero"
    )
    steps = steps_of(COSINE, 50, spacing)
    oracle.set_timesteps(timesteps=[t for t, *_ in steps])
    exact = TABLE[[t for t, *_ in steps]]  # in f32, diffusers' sigmas have lost the digits of alpha_bar near t = 999
    oracle.sigmas = torch.cat([((1 - exact) / exact).sqrt(), torch.zeros(1, dtype=torch.float64)])
    x_t, *_ = draws().double()
    generator, before, scale = torch.Generator().manual_seed(1), None, 1.0
    for t, level, cleaner in steps:
        pred = torch.randn(x_t.shape, generator=generator, dtype=torch.float64)
        theirs = oracle.step(pred, t, x_t).prev_sample
        x0, _ = to_x0_and_eps(pred, x_t, level, config)
        ours = dpmpp_step(x_t, x0, level, cleaner, before)
        scale = max(scale, theirs.abs().max().item())
        assert (ours - theirs).abs().max() <= 1e-5 * scale, t
        x_t, before = theirs, (x0, level)


def test_dpmpp_starts_from_pure_noise():
    config = DiffusionConfig(zero_terminal_snr=True, prediction="v")
    x_t, pred, later = draws().double()
    (t, level, cleaner), (_, _, next_one), *_ = steps_of(NoiseSchedule.of(config, 1), 10, "trailing")
    assert (t, level.signal) == (999, 0.0)
    x0, eps = to_x0_and_eps(pred, x_t, level, config)
    x = dpmpp_step(x_t, x0, level, cleaner, None)
    assert torch.allclose(x, ddim_step(x0, eps, level, cleaner, 0.0, None), atol=1e-12)
    # The second step's slope over an infinite step of log SNR is 0: it is of first order too.
    x0, eps = to_x0_and_eps(later, x, cleaner, config)
    second = dpmpp_step(x, x0, cleaner, next_one, (pred, level))
    assert torch.allclose(second, ddim_step(x0, eps, cleaner, next_one, 0.0, None), atol=1e-12)


@pytest.mark.parametrize(("kind", "low", "high"), [("ddim", 1.7, 2.4), ("dpm++", 3.2, 5.0), ("heun", 3.2, 5.0)])
def test_dpmpp_and_heun_are_of_second_order_and_ddim_of_first(kind, low, high):
    """On a Gaussian the probability flow is known: x scales with its own deviation."""
    spread = 0.5
    config = DiffusionConfig(schedule="flow" if kind == "heun" else "cosine", prediction="x0")

    def deviation(level):
        return math.hypot(level.signal * spread, level.sigma)

    def implied(x, level):
        x0 = level.signal * spread**2 / deviation(level) ** 2 * x  # the best prediction
        return to_x0_and_eps(x0, x, level, config)

    def error(stride):
        times = torch.arange(800, 79, -stride)
        levels = [Level(a.item(), s.item()) for a, s in zip(*NoiseSchedule.of(config, 1).levels(times), strict=True)]
        x, before = torch.ones(1, dtype=torch.float64), None
        for level, cleaner in itertools.pairwise(levels):
            x0, eps = implied(x, level)
            euler = ddim_step(x0, eps, level, cleaner, 0.0, None)
            if kind == "dpm++":
                x, before = dpmpp_step(x, x0, level, cleaner, before), (x0, level)
            elif kind == "heun":
                x = heun_step(x, (x0, eps), implied(euler, cleaner), level, cleaner)
            else:
                x = euler
        return abs((x - deviation(levels[-1]) / deviation(levels[0])).item())

    assert low < error(20) / error(10) < high


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_sampling_with_the_exact_denoiser_of_a_gaussian_reaches_its_variance(eta):
    # For x0 ~ N(0, s^2) the best eps is linear in x_t, so the sampler's result has a known spread.
    spread, config = 0.5, DiffusionConfig()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200_000, generator=generator, dtype=torch.float64)
    for _, level, cleaner in steps_of(COSINE, 250, "trailing"):
        best_eps = level.sigma / (level.signal**2 * spread**2 + level.sigma**2) * x
        noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        x = ddim_step(*to_x0_and_eps(best_eps, x, level, config), level, cleaner, eta, noise)
    assert x.std().item() == pytest.approx(spread, rel=0.02)


def test_min_snr_weighs_the_error_in_x0_alike_whatever_is_predicted():
    level = COSINE.levels(torch.tensor([10, 300, 700, 990]))
    x0, noise, error = draws().double()
    x_t = add_noise(x0, noise, level)
    assert loss_weights(level, DiffusionConfig()) is None
    for prediction in ("x0", "eps", "v"):
        config = DiffusionConfig(prediction=prediction, min_snr_gamma=5.0)
        weights = loss_weights(level, config)
        wrong_x0, _ = to_x0_and_eps(training_target(x0, noise, level, config) + error, x_t, level, config)
        snr = level.signal**2 / level.sigma**2
        in_x0 = (wrong_x0 - x0).square().flatten(1).mean(1) * snr.clamp(max=5.0)
        assert torch.allclose(weights * error.square().flatten(1).mean(1), in_x0, rtol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        *(
            {"num_timesteps": 1},
            {"before_caption_max_timestep": 1000},
            {"min_snr_gamma": 0.0},
            {"shift": 1e-9},
            {"shift": 1e4},
        ),
        *({"schedule": "flow"}, {"zero_terminal_snr": True}, {"loss": "v"}),  # each with prediction=eps
        {"zero_terminal_snr": True, "schedule": "flow", "prediction": "v"},
        {"min_snr_gamma": 5.0, "schedule": "flow", "prediction": "v"},
        {"min_snr_gamma": 5.0, "loss": "x0", "prediction": "v"},
    ],
    ids=str,
)
def test_config_refuses_what_makes_no_sense(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        DiffusionConfig(**settings)


def test_ddim_with_eta_one_is_ddpm():
    x_t, pred, noise = draws().double()
    signal, sigma = COSINE.levels(torch.tensor([600, 560]))
    level, cleaner = (Level(*pair) for pair in zip(signal.tolist(), sigma.tolist(), strict=True))
    x0, eps = to_x0_and_eps(pred, x_t, level, DiffusionConfig())
    ancestral = ddpm_step(x_t, x0, level, cleaner, noise)
    assert torch.allclose(ddim_step(x0, eps, level, cleaner, 1.0, noise), ancestral, atol=1e-12)
