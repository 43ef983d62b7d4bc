"""Pictures are described once each, scored as pycocoevalcap does, and written so that it can do so itself."""

import json
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from pycocoevalcap.cider.cider import Cider
from pycocotools.coco import COCO

from data.pictures import encode_png
from data.shards import write_shard
from model.sampler_config import SamplerConfig
from tests.ranks import run_ranks
from tests.runs import DrawingRun
from tests.test_pipeline import load
from train.distributed.ranks import Ranks, alone
from train.evaluation.captioning import CaptioningConfig, evaluate_captioning, read_captioned
from train.evaluation.cider import tokens_of
from train.evaluation.part import Inputs, Part, bar_of
from train.inference.pipeline import Pipeline, PipelineConfig

COUNT = 7
TEXTS = [[f"a large red circle beside {i} squares.", f"{i} small blue squares"] for i in range(COUNT)]
SAMPLER = SamplerConfig(max_new_tokens=5)


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same pictures in COCO's form, in Karpathy's and in raw tars."""
    folder, random = tmp_path_factory.mktemp("coco"), np.random.default_rng(0)
    (folder / "val2014").mkdir()
    names = [f"COCO_val2014_{i:012d}.jpg" for i in range(COUNT)]
    records, images, annotations, karpathy = [], [], [], []
    for i, (name, texts) in enumerate(zip(names, TEXTS, strict=True)):
        data = encode_png(random.integers(0, 256, (40, 48, 3), dtype=np.uint8))
        (folder / "val2014" / name).write_bytes(data)
        records.append(
            {"__key__": name.split(".")[0].encode(), "png": data, "json": json.dumps({"caption": texts}).encode()}
        )
        images.append({"id": 100 + i, "file_name": name})
        annotations += [{"image_id": 100 + i, "id": 2 * i + j, "caption": text} for j, text in enumerate(texts)]
        sentences = [{"raw": text, "tokens": text.split()} for text in texts]
        entry = {"filepath": "val2014", "filename": name, "cocoid": 100 + i, "sentences": sentences}
        karpathy.append({**entry, "split": "val" if i == 2 else "test"})
    (folder / "captions_val2014.json").write_text(json.dumps({"images": images, "annotations": annotations[::-1]}))
    (folder / "dataset_coco.json").write_text(json.dumps({"images": karpathy, "dataset": "coco"}))
    (folder / "tars").mkdir()
    for number, part in enumerate((records[:3], records[3:])):
        write_shard(folder / "tars" / f"{number}.tar", part)
    return folder


def config_of(coco: Path, form: str, **more: object) -> CaptioningConfig:
    paths = {
        "coco": {"pictures": str(coco / "val2014"), "annotations": str(coco / "captions_val2014.json")},
        "karpathy": {"pictures": str(coco), "annotations": str(coco / "dataset_coco.json")},
        "tars": {"pictures": str(coco / "tars")},
    }
    return CaptioningConfig(**paths[form], **more)


def test_every_form_gives_the_same_pictures_with_their_captions(coco: Path) -> None:
    by_form = {form: list(read_captioned(config_of(coco, form))) for form in ("coco", "karpathy", "tars")}
    assert [item.image_id for item in by_form["coco"]] == [100 + i for i in range(COUNT)]
    assert [item.image_id for item in by_form["karpathy"]] == [100 + i for i in range(COUNT) if i != 2]
    assert [sorted(item.references) for item in by_form["coco"]] == [sorted(texts) for texts in TEXTS]
    assert [list(item.references) for item in by_form["tars"]] == TEXTS
    pixels = [item.pixels(32) for item in by_form["coco"]]
    assert all(np.array_equal(*pair) for pair in zip(pixels, (i.pixels(32) for i in by_form["tars"]), strict=True))
    assert np.array_equal(by_form["karpathy"][2].pixels(32), pixels[3]) and pixels[0].shape == (32, 32, 3)
    assert [item.image_id for item in read_captioned(config_of(coco, "karpathy", split="val"))] == [102]
    beside = replace(config_of(coco, "karpathy", max_pictures=2), pictures=str(coco / "val2014"))
    assert [item.image_id for item in read_captioned(beside)] == [100, 101]


def test_what_cannot_be_read_is_refused_by_name(coco: Path, tmp_path: Path) -> None:
    for change, error, words in [
        ({"split": "dev"}, ValueError, "split=dev: the file has test, val"),
        ({"annotations": str(coco / "captions_val2014.json"), "split": "test"}, ValueError, "only Karpathy's file"),
        ({"pictures": str(tmp_path)}, FileNotFoundError, r"6 of 6 pictures are not there, such as .*\.jpg"),
        ({"annotations": str(coco / "tars" / "0.tar")}, ValueError, r"0\.tar: expected COCO's"),
    ]:
        with pytest.raises(error, match=words):
            list(read_captioned(replace(config_of(coco, "karpathy"), **change)))
    with pytest.raises(ValueError, match="give their folder"):
        CaptioningConfig(annotations="x.json")


def evaluate(ranks: Ranks, run_dir: Path, config: CaptioningConfig, output: Path) -> Part:
    pipeline = Pipeline.load(PipelineConfig(checkpoint=str(run_dir), device="cpu", batch_size=2), ranks)
    output.mkdir(exist_ok=True)
    return evaluate_captioning(config, Inputs(pipeline, SAMPLER, 3, output, ranks, bar_of(ranks), {}))


def test_cocos_own_tools_read_the_files_and_score_what_we_scored(coco: Path, drawn: DrawingRun, tmp_path: Path) -> None:
    config = config_of(coco, "karpathy")
    part = evaluate(alone(), drawn.run_dir, config, tmp_path)
    with redirect_stdout(StringIO()):
        truth = COCO(tmp_path / "references.json")
        results = truth.loadRes(str(tmp_path / "captions.json"))
    assert results.getImgIds() == [100 + i for i in range(COUNT) if i != 2]
    texts = [
        {image: [" ".join(tokens_of(line["caption"])) for line in made.imgToAnns[image]] for image in truth.getImgIds()}
        for made in (truth, results)
    ]
    mean, each = Cider().compute_score(*texts)
    score = part.scores["captioning/cider"]
    assert score.value == pytest.approx(mean, rel=1e-9) and score.items == COUNT - 1
    assert score.low <= score.value <= score.high
    captions = load(drawn.run_dir).describe([item.pixels(32) for item in read_captioned(config)], SAMPLER, 3)
    assert [line["caption"] for line in part.examples] == [" ".join(caption.split()) for caption in captions]
    assert [line["score"] for line in part.examples] == pytest.approx(each.tolist(), rel=1e-9)
    assert all((tmp_path / line["true"]).is_file() and line["score_name"] == "cider" for line in part.examples)
    assert part.data["items"] == COUNT - 1


@pytest.mark.slow
def test_any_number_of_ranks_gives_the_same_captions(coco: Path, drawn: DrawingRun, tmp_path: Path) -> None:
    for form in ("karpathy", "tars"):
        written = []
        for world_size in (1, 3):
            output = tmp_path / f"{form}{world_size}"
            parts = run_ranks(evaluate, world_size, drawn.run_dir, config_of(coco, form), output)
            written.append((parts[0], (output / "captions.json").read_text()))
            assert all(part.scores == parts[0].scores for part in parts)
        assert written[0] == written[1]
