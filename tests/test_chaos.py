"""Faults of every kind, at random instants of a real training: nothing is lost (P4-P7, P10, P13).

Slow; test_pretrain.py and test_pretrain_faults.py hold the same at chosen instants.
"""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.chaos import ChaosConfig, plan, survive, target_of
from bench.faults import KINDS, NotSurvived
from bench.harms import flip_bit
from bench.job import Job
from bench.trajectory import End, check_rows, compare, read_again, saved_lanes
from data.dataset import open_data
from train.config import load_config
from train.pretrain_config import PretrainConfig

THREE, STEPS = ["kill_rank", "sigterm", "bit_flipped"], 28
SEED = 292  # draws two ranks for all three faults, which strike in a commit, an evaluation and a save


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("chaos")


@pytest.fixture(scope="module")
def survived(folder: Path) -> dict[str, Any]:
    """The result of three faults."""
    return survive(ChaosConfig(faults=3, kinds=THREE, steps=STEPS, faults_per_training=3, seed=SEED), folder)


@pytest.fixture(scope="module")
def finished(survived: dict[str, Any], folder: Path) -> Job:
    """A job that ended undisturbed."""
    return Job(folder / "undisturbed", {}, folder / "logs")


@pytest.mark.slow
def test_three_faults_are_survived_bit_for_bit(survived: dict[str, Any]) -> None:
    """P4, P5, P6: a rank killed, a stop signal, a bit flipped in the newest checkpoint."""
    assert survived["failures"] == []
    assert [survived[name] for name in ("faults", "resumed", "same_world_size", "bit_identical")] == [3, 3, 3, 3]
    assert (survived["documents_lost"], survived["documents_repeated"]) == (0, 0)
    assert set(survived["by_kind"]) == set(THREE) and survived["seconds_to_first_step"]["max"] < 60


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_a_dozen_faults_are_survived(tmp_path: Path, seed: int) -> None:
    """P4-P7, P10, P13: every kind but one, on several world sizes."""
    result = survive(ChaosConfig(faults=12, seed=seed), tmp_path)
    assert result["failures"] == [] and result["resumed"] == 12
    assert result["bit_identical"] == result["same_world_size"]
    assert (result["documents_lost"], result["documents_repeated"]) == (0, 0)


@pytest.mark.slow
def test_one_bit_of_one_weight_one_row_or_one_lane_is_a_difference(finished: Job) -> None:
    expected, other = End.of(finished), End.of(finished)
    assert compare(other, expected, 0.0) == []
    name = min(name for name in other.tensors if name.startswith("ema"))
    other.tensors[name].view(torch.int32).flatten()[0] ^= 1
    assert [words.split()[0] for words in compare(other, expected, 0.0)] == [name]
    assert compare(other, expected, 1e-3) == []
    other = End.of(finished)
    other.rows[7]["text_loss"] *= 1 + 1e-15
    assert "step 8: text_loss" in compare(other, expected, 0.0)[0]
    other = End.of(finished)
    other.lanes[3] = replace(other.lanes[3], rows=other.lanes[3].rows + 1)
    assert compare(other, expected, 0.0) == ["other lanes or counters"]


@pytest.mark.slow
def test_a_step_trained_twice_or_left_out_shows_in_the_documents(finished: Job) -> None:
    """With lanes that are one step behind the weights, or one ahead."""
    config = load_config(PretrainConfig, [f"config={finished.run_dir}/config.yaml"])
    data = open_data(config.data, config.seed, config.model.patch_size)
    whole, tokens = read_again(data, {}, 0, STEPS)
    seen = [row["tokens_seen"] for row in finished.rows()]
    assert tokens == [after - before for before, after in zip([0, *seen], seen, strict=False)]
    saved = finished.saved()[0]
    first, last = read_again(data, {}, 0, saved)[0], read_again(data, saved_lanes(finished, saved), saved, STEPS)[0]
    assert first + last == whole
    late = read_again(data, {}, 0, saved - 1)[0] + last
    assert (whole - late).total() > 0 and not late - whole, "a step left out"
    early = read_again(data, {}, 0, saved + 1)[0] + last
    assert (early - whole).total() > 0 and not whole - early, "a step trained twice"


@pytest.mark.slow
def test_resuming_from_another_step_or_without_a_row_is_not_survival(finished: Job) -> None:
    rows = finished.rows()
    before = [*rows[:20], *({**row, "step_s": -1.0} for row in rows[20:])]
    check_rows(rows, before, 20, True)
    check_rows(rows[:18], before, 16, False)
    for found, resume, words in [(rows, 16, "resumed from step 20, but 16 is"), (rows[1:], 20, "has the steps")]:
        with pytest.raises(NotSurvived, match=words):
            check_rows(found, before, resume, True)


def test_a_plan_is_drawn_from_its_seed_and_has_every_kind_in_every_round() -> None:
    config = ChaosConfig(faults=2 * len(KINDS), seed=4)
    faults = plan(config, list(KINDS))
    assert faults == plan(config, list(KINDS)) != plan(ChaosConfig(faults=26, seed=5), list(KINDS))
    assert sorted(fault.kind for fault in faults) == sorted(2 * list(KINDS))
    assert [fault.number for fault in faults] == list(range(1, 27))
    assert all(fault.phase in KINDS[fault.kind].phases for fault in faults)
    targets = [target_of(fault, place % 5, 0, config) for place, fault in enumerate(faults)]
    assert all(1 <= target <= config.steps for target in targets)


def test_a_flipped_bit_is_one_bit(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(50))
    flip_bit(path, random.Random(1))
    assert sum(byte.bit_count() for byte in path.read_bytes()) == 1 and path.stat().st_size == 50


def test_unknown_kinds_and_numbers_are_refused() -> None:
    for changes in ({"faults": 0}, {"steps": 3}, {"kinds": ["earthquake"]}):
        with pytest.raises(ValueError, match=next(iter(changes))):
            ChaosConfig(**changes)
