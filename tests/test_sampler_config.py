"""Settings of sampling: what no model could use, and what the schedule of the model at hand cannot."""

import pytest

from model.diffusion import DiffusionConfig
from model.sampler_config import SamplerConfig

FLOW = DiffusionConfig(schedule="flow", prediction="v")


def test_a_sampler_must_suit_the_schedule_and_auto_does():
    cosine = DiffusionConfig()
    assert [SamplerConfig().suited_to(each).sampler for each in (cosine, FLOW)] == ["ddpm", "euler"]
    assert SamplerConfig(steps=5000).suited_to(FLOW).steps == 5000
    for settings, diffusion, said in (
        ({"sampler": "heun"}, cosine, "schedule=cosine; expected auto or one of ddpm, ddim"),
        ({"sampler": "ddim"}, FLOW, "schedule=flow; expected auto or one of euler, heun"),
        ({"steps": 1001}, cosine, "at most 1000 steps"),
        ({"guidance_interval": (0, 1000)}, cosine, "timesteps in 0...999"),
        ({"guidance_interval": (0, 1001)}, FLOW, "timesteps in 0...1000"),
    ):
        with pytest.raises(ValueError, match=said):
            SamplerConfig(**settings).suited_to(diffusion)


def test_config_refuses_what_makes_no_sense():
    for bad in ({"steps": 0}, {"eta": 1.5}, {"top_p": 0.0}, {"temperature": -1.0}, {"prefill_chunk": 0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            SamplerConfig(**bad)
