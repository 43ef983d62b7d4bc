"""Pictures are drawn once, compared with the references as stated, and no number of ranks changes a score."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench.ranks import ProgramRanks
from data.pictures import decode_picture, encode_png
from data.shards import BadRecords, read_shard, write_shard
from tests.runs import DrawingRun, expect
from tests.test_distances import moments
from tests.vision_models import WORDS, save_clip, save_dinov2
from train import evaluate
from train.distributed.ranks import alone
from train.evaluation.distances import cmmd, frechet
from train.evaluation.drawn_folder import begin
from train.evaluation.features import FeatureModels
from train.evaluation.generation import GenerationConfig
from train.evaluation.vision import ClipText, VisionModel, clip_scores

COUNT, BATCH = 22, 4
CAPTIONS = [" ".join(WORDS[(i + j) % len(WORDS)] for j in range(3 + i % 4)) for i in range(COUNT)]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tars of captioned pictures of several sizes, a DINOv2 and a CLIP."""
    folder, random = tmp_path_factory.mktemp("inputs"), np.random.default_rng(0)
    pictures = [random.integers(0, 256, (40 + i, 50, 3), dtype=np.uint8) for i in range(COUNT)]
    records = [
        {"__key__": f"{i:03d}".encode(), "png": encode_png(picture), "txt": caption.encode()}
        for i, (picture, caption) in enumerate(zip(pictures, CAPTIONS, strict=True))
    ]
    (folder / "tars").mkdir()
    for number, part in enumerate((records[:9], records[9:])):
        write_shard(folder / "tars" / f"{number}.tar", part)
    save_dinov2(folder / "dinov2")
    save_clip(folder / "clip")
    return folder


def run(
    drawn: DrawingRun, inputs: Path, output: Path, *more: str, world_size: int | None = None, status: int = 0
) -> str:
    argv = [f"checkpoint={drawn.run_dir}", f"output={output}", "device=cpu", "steps=2", "seed=3", f"batch_size={BATCH}"]
    argv += [f"generation.pictures={inputs}/tars", f"generation.models.dinov2={inputs}/dinov2"]
    argv += [f"generation.clip={inputs}/clip", *more]
    with ProgramRanks(evaluate.main, argv, world_size, output.parent / f"{output.name}.log") as ranks:
        return expect(ranks, status)


def scores(output: Path) -> dict[str, Any]:
    return json.loads((output / "evaluation.json").read_text())["scores"]


def assert_close(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, score in found.items():
        assert score == pytest.approx(expected[name], rel=1e-6), name


@pytest.fixture(scope="module")
def evaluated(drawn: DrawingRun, inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("evaluated") / "one"
    run(drawn, inputs, output)
    return output


def test_scores_are_those_of_the_pictures_that_were_written(evaluated: Path, inputs: Path) -> None:
    """Computed again from the files, by the same distances; every sample has its CLIP score."""
    found = json.loads((evaluated / "evaluation.json").read_text())
    drawn = [decode_picture(path.read_bytes(), [(32, 32)], "") for path in sorted((evaluated / "drawn").glob("*.png"))]
    records = [read_shard(path, BadRecords(0.0)) for path in sorted((inputs / "tars").iterdir())]
    references = [decode_picture(record["png"], [(32, 32)], "") for of_tar in records for record in of_tar]
    dinov2, clip = (VisionModel.load(str(inputs / name), torch.device("cpu"), "k") for name in ("dinov2", "clip"))
    of_dinov2 = [moments(dinov2.features(pictures).numpy()) for pictures in (drawn, references)]
    of_clip = [clip.features(pictures) for pictures in (drawn, references)]
    texts = ClipText.of(clip, "k").features(CAPTIONS)
    of_samples = clip_scores(of_clip[0], texts)
    expected = {"pictures/frechet_dinov2": frechet(*of_dinov2), "pictures/cmmd": cmmd(*of_clip, alone())}
    assert len(drawn) == len(references) == COUNT
    for name, score in expected.items():
        assert found["scores"][name] == pytest.approx(vars(score), rel=1e-4), name
    score = found["scores"]["pictures/clip_score"]
    assert score["value"] == pytest.approx(of_samples.mean(), rel=1e-5) and score["items"] == COUNT
    assert score["low"] < score["value"] < score["high"]
    lines = [json.loads(line) for line in (evaluated / "examples.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == CAPTIONS
    assert [line["drawn"] for line in lines] == [f"drawn/{i:06d}.png" for i in range(COUNT)]
    np.testing.assert_allclose([line["score"] for line in lines], of_samples, rtol=1e-4)
    data = found["data"]["generation"]
    assert data["items"] == COUNT and data["size"] == [32, 32] and set(data["models"]) == {"dinov2", "clip"}
    assert found["resolution"] == [32, 32] and found["batch_size"] == BATCH and len(found["weights_hash"]) == 16


def test_an_interrupted_evaluation_goes_on_with_what_is_missing_on_any_number_of_ranks(
    drawn: DrawingRun, evaluated: Path, inputs: Path, tmp_path: Path
) -> None:
    """A whole batch is drawn again if one of its pictures is missing; nothing else is; scores agree within 1e-6."""
    output = tmp_path / "two"
    run(drawn, inputs, output, world_size=2)
    names = [path.name for path in sorted((evaluated / "drawn").glob("*.png"))]
    for name in names:
        assert (output / "drawn" / name).read_bytes() == (evaluated / "drawn" / name).read_bytes()
    expected = scores(evaluated)
    assert_close(scores(output), expected)
    (output / "drawn" / names[5]).unlink()
    kept = {path: path.stat().st_ino for path in [*(output / "drawn").glob("*.png"), output / "references.safetensors"]}
    run(drawn, inputs, output)
    changed = sorted(path.name for path, inode in kept.items() if path.stat().st_ino != inode)
    assert changed == [name for name in names[4:8] if name != names[5]]
    assert_close(scores(output), expected)


def test_pictures_of_other_settings_are_refused_and_so_are_more_samples_than_there_are(
    drawn: DrawingRun, evaluated: Path, inputs: Path, tmp_path: Path
) -> None:
    said = run(drawn, inputs, evaluated, "seed=4", "guidance=2", status=2)
    assert "drawn with another value of seed, settings" in said and "Choose another output" in said
    said = run(drawn, inputs, tmp_path / "many", "generation.samples=99", status=2)
    assert f"holds {COUNT} captioned pictures, expected at least 99" in said
    assert not (tmp_path / "many" / "drawn").exists()


def test_a_model_of_broken_numbers_is_refused(inputs: Path) -> None:
    models = FeatureModels.load({"broken": str(inputs / "dinov2")}, None, torch.device("cpu"))
    next(models.vision["broken"].module.parameters()).data.fill_(torch.nan)
    with pytest.raises(ValueError, match="dinov2: features of pictures are not finite"):
        models.measure([([0], [np.zeros((32, 32, 3), np.uint8)])], None, jackknife=False, ranks=alone())


def test_a_kill_before_the_first_mark_leaves_a_folder_to_go_on_with(tmp_path: Path) -> None:
    (tmp_path / "drawn").mkdir()
    (tmp_path / "drawn" / ".settings.json.new").write_text("{")
    begin(tmp_path / "drawn", tmp_path / "drawn" / "settings.json", {"seed": 1})
    assert json.loads((tmp_path / "drawn" / "settings.json").read_text()) == {"seed": 1}


def test_a_setting_that_is_off_is_that_of_a_version_without_it(tmp_path: Path) -> None:
    folder, mark = tmp_path / "drawn", tmp_path / "drawn.json"
    begin(folder, mark, {"seed": 1, "settings": {"steps": 5}})
    begin(folder, mark, {"seed": 1, "settings": {"steps": 5, "image_guidance": None}})
    with pytest.raises(ValueError, match="another value of settings;"):
        begin(folder, mark, {"seed": 1, "settings": {"steps": 5, "image_guidance": 1.5}})


def test_a_config_that_compares_nothing_or_with_nothing_is_refused() -> None:
    for settings in ({"pictures": "tars"}, {"models": {"dinov2": "folder"}}, {"inception": True}):
        with pytest.raises(ValueError, match=r"generation.pictures=.*: expected pictures with captions together with"):
            GenerationConfig(**settings)
    with pytest.raises(ValueError, match=r"generation.samples=1: expected at least 2"):
        GenerationConfig(pictures="tars", clip="folder", samples=1)


@pytest.mark.skipif(find_spec("torch_fidelity") is not None, reason="torch-fidelity is here")
def test_the_inception_fid_is_refused_by_name_without_torch_fidelity(
    drawn: DrawingRun, inputs: Path, tmp_path: Path
) -> None:
    said = run(drawn, inputs, tmp_path / "out", "generation.inception=true", status=2)
    assert "torch_fidelity and torchvision not installed; expected `pip install torch-fidelity`" in said
