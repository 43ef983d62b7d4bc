"""configs/best depart from configs/paper in what they give evidence for, alike at every size, and can be planned."""

import json
import re
from dataclasses import replace

import pytest

from tests.test_paper import PAPER, SIZES, preset
from train.config import load_config
from train.plan import main as plan
from train.pretrain_config import PretrainConfig

BEST = PAPER.parent / "best"
HARDWARE = {
    "0.16b": ("4090", 8),
    "0.37b": ("a100", 16),
    "0.76b": ("h100", 32),
    "1.4b": ("h100", 64),
    "7b": ("h100", 256),
}


def best(name: str) -> PretrainConfig:
    return load_config(PretrainConfig, [f"config={BEST / name}.yaml"])


@pytest.mark.parametrize("name", SIZES)
def test_a_preset_is_the_papers_but_for_its_departures(name: str) -> None:
    """With these put back it is the paper's to the last setting: size, rate, batch, length, lambda and order too."""
    config, paper = best(name), preset(name)
    model, optim = config.model, config.optim
    assert (model.patches, model.untied, model.transformer.qk_norm) == ("unet", "all", True)
    assert (optim.optimizer, optim.ema_half_lives) == ("muon", (6931,))
    assert (config.diffusion.schedule, config.diffusion.prediction) == ("flow", "v")
    model = replace(model, patches="linear", untied="none", transformer=replace(model.transformer, qk_norm=False))
    optim = replace(optim, optimizer="adamw", ema_half_lives=())
    assert config.data.clean_copies and config.diffusion.before_caption_max_timestep is None
    data = replace(config.data, clean_copies=False)
    put_back = replace(config, run_dir=paper.run_dir, model=model, optim=optim, data=data, diffusion=paper.diffusion)
    assert put_back == paper


@pytest.mark.parametrize("name", SIZES)
def test_each_departure_stands_below_its_evidence(name: str) -> None:
    lines = (BEST / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    for setting in ("patches:", "untied:", "transformer:", "schedule:", "clean_copies", "optimizer:", "ema_half"):
        (at,) = [i for i, line in enumerate(lines) if line.strip().startswith(setting)]
        above = lines[at - 1]
        while lines[at - 2].strip().startswith("#"):
            at, above = at - 1, f"{lines[at - 2]} {above}"
        assert re.search(r"paper's table \d|\((\w[\w ]*, )?[\w ]+( et al\.)? 20\d\d[,)]", above) and "Ours" in above, (
            above
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", SIZES)
def test_a_preset_fits_the_hardware_that_it_names(name: str, capsys: pytest.CaptureFixture) -> None:
    gpu, world_size = HARDWARE[name]
    assert f"# Hardware: {world_size} GPUs" in (BEST / f"{name}.yaml").read_text(encoding="utf-8")
    plan([f"config={BEST / name}.yaml", f"world_size={world_size}", f"gpu={gpu}", "json=true"])
    assert json.loads(capsys.readouterr().out)["fits"]
