"""The noise schedule: levels, shifts, and how timesteps are drawn, against closed forms and diffusers."""

import itertools
import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler

from model.diffusion import DiffusionConfig
from model.schedule import NoiseSchedule, alphas_cumprod, sampling_timesteps

TABLE = alphas_cumprod(DiffusionConfig())
FLOW = DiffusionConfig(schedule="flow", prediction="v")


def timesteps(u, before_caption, config):
    return NoiseSchedule.of(config, 1).timesteps(u, before_caption)


def evenly(count):
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


def falses(u):
    return torch.zeros(len(u), dtype=torch.bool)


def test_cosine_is_nichol_and_dhariwals_and_near_the_papers():
    def f(t):
        return math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2

    for t in (0, 1, 250, 500, 900, 998):
        assert TABLE[t].item() == pytest.approx(f(t + 1) / f(0), rel=1e-9)
    assert TABLE[999] / TABLE[998] == pytest.approx(1 - 0.999)
    papers = torch.cos(torch.arange(1, 1001) / 1000 * math.pi / 2)
    assert (TABLE.sqrt() - papers).abs().max() < 4.5e-3


@pytest.mark.parametrize(("schedule", "theirs"), [("cosine", "squaredcos_cap_v2"), ("linear", "linear")])
@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_levels_equal_diffusers(schedule, theirs, zero_terminal_snr):
    config = DiffusionConfig(schedule=schedule, zero_terminal_snr=zero_terminal_snr, prediction="v")
    oracle = DDPMScheduler(beta_schedule=theirs, rescale_betas_zero_snr=zero_terminal_snr)
    assert (alphas_cumprod(config) - oracle.alphas_cumprod).abs().max() < 1e-5
    signal, sigma = NoiseSchedule.of(config, 1).levels(torch.arange(1000))
    assert torch.allclose(signal**2 + sigma**2, torch.ones(1000, dtype=torch.float64))


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [1, 7, 50, 250, 1000])
def test_sampling_timesteps_equal_diffusers(spacing, steps):
    oracle = DDIMScheduler(timestep_spacing=spacing, steps_offset=0)
    oracle.set_timesteps(steps)
    expected = oracle.timesteps.tolist()[:steps]  # diffusers' own rounding adds one for some trailing counts
    assert sampling_timesteps(steps, spacing) == expected
    assert [t for t, _ in NoiseSchedule.of(DiffusionConfig(), 1).sampling_steps(steps, spacing)] == expected


def test_a_schedule_has_no_more_steps_than_timesteps_but_a_flow_any_number():
    with pytest.raises(ValueError, match="1001 sampling steps"):
        sampling_timesteps(1001, "leading")
    steps = NoiseSchedule.of(FLOW, 1).sampling_steps(2000, "leading")
    assert len(steps) == 2000 and steps[0] == (1000, (0.0, 1.0)) and steps[-1][0] == pytest.approx(0.5)


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
def test_a_flows_shift_is_sd3s_in_training_and_in_sampling(shift):
    schedule = NoiseSchedule.of(DiffusionConfig(schedule="flow", prediction="v", shift=shift), 1)
    oracle = FlowMatchEulerDiscreteScheduler(shift=shift)
    oracle.set_timesteps(sigmas=[1 - i / 10 for i in range(10)])
    assert [t for t, _ in schedule.sampling_steps(10, "leading")] == pytest.approx(oracle.timesteps.tolist(), abs=1e-3)
    u = evenly(10)
    assert torch.allclose(schedule.timesteps(u, falses(u)).double(), 1000 * shift * u / (1 + (shift - 1) * u))


def test_a_flow_is_sampled_from_its_last_timestep_whatever_the_shift():
    """Exactly: a rounding beyond it would lie outside the schedule, and outside any interval of guidance."""
    for numbers in range(1, 200):
        schedule = NoiseSchedule.of(DiffusionConfig(schedule="flow", prediction="v", shift_by_size=True), numbers)
        assert schedule.sampling_steps(3, "leading")[0] == (1000, (0, 1))


@pytest.mark.parametrize("kind", ["cosine", "linear", "flow"])
def test_a_shift_multiplies_sigma_over_signal_whatever_the_schedule(kind):
    plain, shifted = (
        NoiseSchedule.of(DiffusionConfig(schedule=kind, prediction="v", shift=shift), 1) for shift in (1.0, 3.0)
    )
    u = evenly(7)
    before, after = (schedule.levels(schedule.timesteps(u, falses(u))) for schedule in (plain, shifted))
    assert torch.allclose(after.sigma / after.signal, 3 * before.sigma / before.signal, rtol=1e-5)
    for (_, low), (_, high) in zip(*(each.sampling_steps(9, "leading") for each in (plain, shifted)), strict=True):
        assert high.sigma * low.signal == pytest.approx(3 * low.sigma * high.signal, rel=1e-9)


@pytest.mark.parametrize("kind", ["cosine", "flow"])
def test_a_shift_by_size_is_the_root_of_an_images_numbers_over_4096(kind):
    by_size = DiffusionConfig(schedule=kind, prediction="v", shift=1.5, shift_by_size=True)
    for numbers in (1024, 4096, 768 * 16 * 16):
        fixed = DiffusionConfig(schedule=kind, prediction="v", shift=1.5 * math.sqrt(numbers / 4096))
        steps = NoiseSchedule.of(by_size, numbers).sampling_steps(10, "trailing")
        assert steps == NoiseSchedule.of(fixed, 1).sampling_steps(10, "trailing")


@pytest.mark.parametrize("config", [DiffusionConfig(), DiffusionConfig(schedule="linear", shift=2.0), FLOW], ids=str)
def test_the_nearest_timestep_of_a_log_snr(config):
    schedule = NoiseSchedule.of(config, 1)
    wanted = torch.linspace(-6, 6, 101, dtype=torch.float64)
    found = schedule.levels(schedule.nearest(wanted)).log_snr
    if config.schedule == "flow":
        assert torch.allclose(found, wanted, atol=1e-4)
        return
    every = schedule.levels(torch.arange(1000)).log_snr
    assert torch.equal((every[:, None] - wanted).abs().min(0).values, (found - wanted).abs())
    out_of_reach = torch.tensor([-100.0, 100.0], dtype=torch.float64)
    assert schedule.nearest(out_of_reach).tolist() == [999, 0]


def test_uniform_draws_reach_every_timestep_alike_and_capped_ones_0_to_500():
    u = evenly(501_000)
    free = timesteps(u, falses(u), DiffusionConfig())
    capped = timesteps(u, ~falses(u), DiffusionConfig())
    assert torch.equal(free.bincount(), torch.full((1000,), 501))
    assert torch.equal(capped.bincount(), torch.full((501,), 1000))
    mixed = timesteps(torch.tensor([0.9999, 0.9999]), torch.tensor([True, False]), DiffusionConfig())
    assert mixed.tolist() == [500, 999]


@pytest.mark.parametrize("kind", ["cosine", "flow"])
def test_no_draw_leaves_the_schedule(kind):
    u = torch.tensor([0.0, 1.0 - 2**-24], dtype=torch.float32)
    for sampling, cap, before in itertools.product(("uniform", "logit_normal"), (0, 500, None), (False, True)):
        config = DiffusionConfig(
            schedule=kind, prediction="v", timestep_sampling=sampling, before_caption_max_timestep=cap, shift=2.0
        )
        t = timesteps(u, torch.tensor([before, before]), config)
        assert t.min() >= 0 and t.max() <= (cap if before and cap is not None else 999 + (kind == "flow"))
        level = NoiseSchedule.of(config, 1).levels(t)
        assert torch.isfinite(torch.stack([level.signal, level.sigma])).all()


@pytest.mark.parametrize("kind", ["cosine", "flow"])
def test_logit_normal_draws_have_the_stated_median_and_spread(kind):
    config = DiffusionConfig(
        schedule=kind, prediction="v", timestep_sampling="logit_normal", logit_normal_mean=0.5, logit_normal_std=0.8
    )
    u = evenly(10_000)
    t = timesteps(u, falses(u), config)
    logits = torch.logit((t + (0.5 if kind == "cosine" else 0.0)).double() / 1000)
    assert logits.median().item() == pytest.approx(0.5, abs=0.01)
    assert logits.std().item() == pytest.approx(0.8, abs=0.02)
