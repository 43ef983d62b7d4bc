"""The paper's row is that of the model's size and patches; what differs or is missing is said."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from model.transfusion import Transfusion
from train.config import load_config
from train.evaluation.paper_table import COLUMNS, PAPER, SUITE, nearest_size, paper_table
from train.evaluation.scores import Score, share
from train.pretrain_config import PretrainConfig

CONFIGS = Path(__file__).parents[1] / "configs" / "paper"
SETTINGS = {"sampler": "ddpm", "steps": 250, "guidance": 3.0}


def model_of(size: str, **changes: Any) -> Transfusion:
    config = load_config(PretrainConfig, [f"config={CONFIGS / f'{size.lower()}.yaml'}"]).model
    with torch.device("meta"):
        return Transfusion(replace(config, **changes), 32_000)


@pytest.mark.parametrize("size", PAPER["linear"])
def test_each_of_the_papers_models_has_its_own_row(size: str) -> None:
    for patches, rows in PAPER.items():
        model = model_of(size, patches=patches)
        assert nearest_size(model) == (size, pytest.approx(float(size[:-1]), rel=0.06))
        table = paper_table(model, {"scores": {}, "settings": SETTINGS})
        row = table.splitlines()[1]
        assert row.split()[1:3] == [f"{size},", patches] and row.split()[3:] == [f"{value:g}" for value in rows[size]]


def test_ours_have_intervals_in_the_papers_units_and_a_dash_is_explained() -> None:
    scores = {"captioning/cider": Score(0.337, 0.31, 0.36, 50), "heldout/c4/perplexity": Score(9.5, None, None, 9)}
    scores |= {f"choices/{name}/accuracy_per_character": share(60, 100) for name in SUITE}
    results = {"scores": {name: vars(score) for name, score in scores.items()}, "settings": SETTINGS}
    table = paper_table(model_of("1.4B"), results)
    assert nearest_size(model_of("1.4B", untied="all")) == nearest_size(model_of("1.4B"))
    ours = table.splitlines()[2]
    assert "9.5 " in ours and "33.7 [31.0, 36.0]" in ours and ours.count("–") == len(COLUMNS) - 2
    assert "not measured: Llama 2 suite, %: choices.NAME=" in table, "BoolQ counts without normalisation"
    assert "not measured: COCO FID: generation.inception=true" in table and "differs" not in table
    scores["choices/boolq/accuracy"] = share(60, 100)
    results["scores"] = {name: vars(score) for name, score in scores.items()}
    ours = paper_table(model_of("1.4B"), results).splitlines()[2]
    assert "60.0 [56.4, 63.6]" in ours  # a seventh of the variance of one


def test_other_settings_than_the_papers_are_said() -> None:
    results = {"scores": {}, "settings": {"sampler": "ddim", "steps": 50, "guidance": 5.0}, "guide": {"step": 3}}
    said = paper_table(model_of("7B", patch_size=4), results).splitlines()
    assert [line for line in said if line.startswith("differs")] == [
        "differs: sampler=ddim, the paper ddpm",
        "differs: steps=50, the paper 250",
        "differs: guidance=5.0, the paper 3.0",
        "differs: patch_size=4, the paper 2",
        "differs: autoguidance, the paper classifier-free guidance",
    ]
