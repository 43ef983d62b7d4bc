"""Scores and held-out losses that mean what they say, and do not depend on the number of ranks."""

import itertools
import json
import logging
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bench.ranks import ProgramRanks
from data.documents import Document, ImageSegment, TextSegment
from data.layout import IGNORE, lay_out
from data.loader import draw_images
from data.manifest import Manifest
from data.packing import collate, pack
from data.scene_judge import Verdict
from data.scenes import Shape, held_out_examples, make_splits
from data.tokenizer import SpecialIds, Tokenizer
from model.diffusion import DiffusionConfig
from model.log_snr_bins import BINS, EDGES
from model.sampler_config import SamplerConfig
from tests.ranks import run_ranks
from tests.runs import DrawingRun, expect
from tests.sources import make_source, pairs, texts
from train import evaluate, export
from train.checkpoints import checkpoint
from train.distributed.ranks import Ranks
from train.distributed.signals import StopSignal
from train.evaluation.scenes import SceneItem, judge, read_scenes, shares
from train.evaluation.scores import share
from train.heldout import KINDS, Heldout, HeldoutConfig, captions_alone
from train.inference.pipeline import Pipeline, PipelineConfig
from train.scenes import write_held_out


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Raw held-out scenes in two shards: 12 seen, 12 unseen, 3 of two shapes."""
    folder, splits = tmp_path_factory.mktemp("scenes"), make_splits(0)
    examples = list(held_out_examples(splits, 32, 3))
    chosen = [e for split in ("seen", "unseen", "two_shapes") for e in [e for e in examples if e[0] == split][:12]]
    for number, part in enumerate((chosen[:10], chosen[10:])):
        write_held_out(folder / f"{number}.tar", splits.seed, part)
    return folder


def test_scenes_are_read_with_what_they_show_and_spread_over_each_split(scenes: Path) -> None:
    every = read_scenes(scenes, 32, 100)
    counts = {split: sum(item.split == split for item in every) for split in ("seen", "unseen", "two_shapes")}
    assert counts == {"seen": 12, "unseen": 12, "two_shapes": 3}
    assert all(item.picture.shape == (32, 32, 3) and item.caption for item in every)
    assert {len(item.shapes) for item in every if item.split == "two_shapes"} == {2}
    captions = [item.caption for item in every if item.split == "seen"]
    assert [item.caption for item in read_scenes(scenes, 32, 4) if item.split == "seen"] == captions[::3]


@dataclass
class Knowing:
    """What a perfect model would answer, and a model that answers with another scene's."""

    items: list[SceneItem]
    shift: int = 0

    def draw(self, prompts: list[str], sampler: object, seed: int, done: object, numbers: range) -> list[np.ndarray]:
        assert prompts == [self.items[number].caption for number in numbers]
        return [self.items[(number + self.shift) % len(self.items)].picture for number in numbers]

    def describe(self, pictures: list, sampler: object, seed: int, done: object, numbers: range) -> list[str]:
        assert all(np.array_equal(p, self.items[n].picture) for p, n in zip(pictures, numbers, strict=True))
        return [self.items[(number + self.shift) % len(self.items)].caption for number in numbers]


def _judge(ranks: Ranks, scenes: Path) -> list[list[dict]]:
    items, sampler = read_scenes(scenes, 32, 100), SamplerConfig()
    found = []
    for shift in (0, 7):
        drawn, described = judge(Knowing(items, shift), items, sampler, 0, ranks, print)
        assert all(np.array_equal(p, items[(i + shift) % len(items)].picture) for i, (p, _) in enumerate(drawn))
        found.append([shares(items, [verdict for _, verdict in answers]) for answers in (drawn, described)])
    return found


def test_truth_scores_one_and_the_answers_come_back_in_order_on_any_number_of_ranks(scenes: Path) -> None:
    """What a perfect model gives is all right; those to another scene are not."""
    by_world_size = [run_ranks(_judge, world_size, scenes) for world_size in (1, 3)]
    right, wrong = by_world_size[0][0]
    assert all(found == [right, wrong] for of_ranks in by_world_size for found in of_ranks)
    for scores, wrong_scores in zip(right, wrong, strict=True):
        assert set(scores) == {"all", "colour", "shape", "position", "all_unseen", "all_two_shapes"}
        assert {score.value for score in scores.values()} == {1.0} and scores["all"].items == 12
        assert wrong_scores["all"].value < 0.5


def test_shares_are_of_their_own_split_and_absent_where_there_is_nothing_to_judge() -> None:
    blank, shape = np.zeros((8, 8, 3), np.uint8), Shape(shape="circle", colour="red", position="centre", size="small")
    items = [SceneItem(split, "", blank, (shape,)) for split in ("seen", "seen", "seen", "unseen")]
    right = [(True, True, True), (True, False, True), (False, False, True), (True, True, True)]
    expected = {"all": share(1, 3), "colour": share(2, 3), "shape": share(1, 3), "position": share(3, 3)}
    expected |= {"all_unseen": share(1, 1)}
    assert shares(items, [Verdict(*verdict) for verdict in right]) == expected


def _heldout_pairs(folder: Path, drawn: DrawingRun, count: int = 30) -> Path:
    vae_hash = Manifest.load(drawn.data).latent_spec.vae_hash
    return make_source(folder, drawn.tokenizer, pairs(count, grids=[(8, 8)], seed=9), vae_hash=vae_hash)


def _heldout(ranks: Ranks, run_dir: Path, sources: dict[str, str], lone: str) -> list[dict]:
    pipeline = Pipeline.load(PipelineConfig(checkpoint=str(run_dir)), ranks)
    spec = pipeline.latent_spec
    heldout = Heldout(HeldoutConfig(heldout=sources), pipeline.config, spec, ranks)
    trained = heldout.losses(pipeline.model, pipeline.stats, StopSignal())
    with torch.no_grad():
        pipeline.model.text_head.weight.zero_()
        pipeline.model.patches.to_patch.weight.zero_()
        pipeline.model.patches.to_patch.bias.zero_()
    silent = heldout.losses(pipeline.model, pipeline.stats, StopSignal())
    other = replace(pipeline.config, seed=99, diffusion=DiffusionConfig(before_caption_max_timestep=0))
    heldout = Heldout(HeldoutConfig(heldout={"pairs": sources["pairs"], "lone": lone}), other, spec, ranks)
    said: list[str] = []
    logging.getLogger("train.heldout").addFilter(lambda record: not said.append(record.getMessage()))
    elsewhere = [heldout.losses(pipeline.model, pipeline.stats, StopSignal()) for _ in range(2)]
    assert elsewhere[0] == elsewhere[1]
    assert len(said) == int(ranks.is_first) and all("source lone: none of its images" in words for words in said)
    return [*trained.values(), *silent.values(), *elsewhere[0].values()]


def test_heldout_losses_are_those_of_knowing_nothing_for_a_model_that_knows_nothing_and_equal_on_any_ranks(
    drawn: DrawingRun, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    """A silent head's text loss is log V, its noise error the noise's own variance; None where nothing is measured."""
    sources = {
        "pairs": str(_heldout_pairs(tmp_path / "pairs", drawn)),
        "texts": str(make_source(tmp_path / "texts", tokenizer, texts(20, seed=9))),
        "few": str(make_source(tmp_path / "few", tokenizer, texts(2, seed=9))),
    }
    lone = str(_heldout_pairs(tmp_path / "lone", drawn, 1))
    by_world_size = [run_ranks(_heldout, world_size, drawn.run_dir, sources, lone) for world_size in (1, 3)]
    first = by_world_size[0][0]
    for of_ranks in by_world_size:
        for found in of_ranks:
            for losses, expected in zip(found, first, strict=True):
                assert _with_nan(losses) == pytest.approx(_with_nan(expected), rel=1e-5, nan_ok=True)
    trained_pairs, trained_texts, _, pairs_loss, texts_loss, few_loss, elsewhere, lone_loss = first
    for losses in (pairs_loss, texts_loss, few_loss):
        assert losses["text_loss"] == pytest.approx(math.log(tokenizer.vocab_size), rel=1e-6)
    assert pairs_loss["captioning_loss"] == pytest.approx(math.log(tokenizer.vocab_size), rel=1e-6)
    assert pairs_loss["image_loss"] == pytest.approx(1.0, abs=5 * math.sqrt(2 / (30 * 2 * 64)))
    by_bin = pairs_loss["x0_error_by_log_snr"]
    for name, (low, high) in zip(BINS, itertools.pairwise(EDGES), strict=True):  # silence errs by noise / signal
        error, least, most = by_bin[name]["error"], math.exp(-high), math.exp(-low)
        assert 0.8 * least < error < 1.2 * most, (name, error)
    assert pairs_loss["x0_error"] == pytest.approx(sum(found["error"] for found in by_bin.values()) / len(BINS))
    assert sum(found["images"] for found in by_bin.values()) == 30 and texts_loss["x0_error_by_log_snr"] == {}
    assert elsewhere["image_loss"] != pairs_loss["image_loss"], "other noise, by the seed"
    assert elsewhere["x0_error_by_log_snr"] == by_bin, "the same noise, whatever the seed and the config"
    of_lone = [found for found in lone_loss["x0_error_by_log_snr"].values() if found["images"]]
    assert len(of_lone) == 1 and of_lone[0]["error"] > 0 and lone_loss["x0_error"] is None
    assert trained_pairs["x0_error"] not in (None, pairs_loss["x0_error"])
    assert [trained_texts[kind] is None for kind in KINDS] == [False, True, True, True]
    assert trained_pairs["captioning_loss"] != trained_pairs["text_loss"] != pairs_loss["text_loss"]
    words = np.concatenate([tokens for tokens, _ in pairs(30, seed=9)])  # at random, so that some are BOI
    counts = {"documents": 30, "images": 30, "text_targets": len(words) + 30 * len(("BOI", "EOS"))}
    counts["caption_targets"] = (words != tokenizer.special.boi).sum() + 30 * len(("EOS",))
    assert counts.items() <= pairs_loss.items() and few_loss["documents"] == 2


def test_captioning_is_measured_on_captions_of_pictures_that_come_first_and_on_nothing_else() -> None:
    """Not on texts, on what follows a picture within a longer document, on the BOI that announces a picture, or on an
    EOS right after one, as an edit has: it describes nothing.
    """
    special = SpecialIds(bos=2, eos=3, boi=4, eoi=5, pad=0)
    text, image = TextSegment(np.arange(6, 9)), ImageSegment(np.zeros((4, 4, 4), np.float16))
    edit = (replace(image, role="context"), replace(text, role="context"), image)
    documents = [(text,), (image, text), (text, image, text), (image,), (image, text, image), edit]
    pieces = [lay_out(Document(segments), special, 2) for segments in documents]
    rows = [pack(pieces[:3], 64, special.pad), pack(pieces[3:], 64, special.pad)]
    draws = [draw_images(0, 1, lane, row) for lane, row in enumerate(rows)]
    batch = collate(rows, draws, 2)
    kept = captions_alone(batch, special)
    targets = kept.text_targets[kept.text_targets != IGNORE].tolist()
    assert targets == [6, 7, 8, 3, 6, 7, 8] and kept.num_text_targets == 7
    assert batch.num_text_targets > 7 and torch.equal(kept.input_ids, batch.input_ids)


def _with_nan(losses: dict[str, Any]) -> dict[str, float]:
    """Return a source's losses without levels, which pytest.approx cannot compare, or None."""
    by_bin = losses.get("x0_error_by_log_snr", {})
    flat = {f"{kind}/{name}": found[kind] for name, found in by_bin.items() for kind in found}
    flat |= {name: loss for name, loss in losses.items() if name != "x0_error_by_log_snr"}
    return {name: math.nan if loss is None else loss for name, loss in flat.items()}


def _evaluate(argv: list[str], log: Path, world_size: int | None = None, status: int = 0) -> str:
    with ProgramRanks(evaluate.main, argv, world_size, log) as run:
        return expect(run, status)


def test_an_export_is_evaluated_where_its_training_data_is_not_and_still_knows_it(
    drawn: DrawingRun, tmp_path: Path
) -> None:
    """P10: the export names its data by fingerprint; its records in other shards are refused."""
    folder, output = tmp_path / "export", tmp_path / "output"
    export.main([f"checkpoint={drawn.run_dir}", f"output={folder}"])
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(config.replace(str(drawn.data), "/nowhere/data"))
    held, vae_hash = _heldout_pairs(tmp_path / "held", drawn), Manifest.load(drawn.data).latent_spec.vae_hash
    twin = make_source(
        tmp_path / "twin", drawn.tokenizer, pairs(40, grids=[(8, 8)]), shard_sizes=[13, 27], vae_hash=vae_hash
    )
    argv = [f"checkpoint={folder}", f"output={output}", "device=cpu"]
    _evaluate([*argv, f"heldout.fresh={held}"], tmp_path / "fresh.log")
    data = json.loads((output / "evaluation.json").read_text())["data"]
    assert data["training"]["pairs"] == {"path": "/nowhere/data", "fingerprint": Manifest.load(drawn.data).content_hash}
    assert data["heldout"]["fresh"] == {"path": str(held), "fingerprint": Manifest.load(held).content_hash}
    said = _evaluate([*argv, f"heldout.twin={twin}"], tmp_path / "twin.log", status=2)
    assert "held-out source twin: 100 % of the documents" in said
    (folder / "trained.keys").unlink()  # as an earlier version exported it
    said = _evaluate([*argv, f"heldout.fresh={held}"], tmp_path / "old.log", status=2)
    assert "does not say which records it was trained on" in said and "/nowhere/data" in said


def test_the_program_writes_scores_settings_and_every_example_alike_on_one_and_two_ranks(
    drawn: DrawingRun, scenes: Path, tmp_path: Path
) -> None:
    held = _heldout_pairs(tmp_path / "held", drawn)
    results, examples = [], []
    for world_size in (1, 2):
        output = tmp_path / f"output{world_size}"
        argv = [f"checkpoint={drawn.run_dir}", f"output={output}", f"scenes={scenes}", f"heldout.pairs={held}"]
        argv += ["max_prompts=3", "sampler=ddim", "steps=2", "max_new_tokens=4", "device=cpu", "seed=3"]
        argv += ["guide_weights=model"]
        _evaluate(argv, tmp_path / f"log{world_size}", world_size)
        results.append(json.loads((output / "evaluation.json").read_text()))
        examples.append([json.loads(line) for line in (output / "examples.jsonl").read_text().splitlines()])
        pictures = {path.name for path in (output / "pictures").iterdir()}
        assert pictures == {f"{i:04d}-{kind}.png" for i in range(9) for kind in ("drawn", "true")}
    one, two = results
    newest = checkpoint.saved(drawn.run_dir / "checkpoints")[-1]
    expected = {"checkpoint": str(newest), "step": 6, "seed": 3, "weights": "ema-7", "dtype": "float32"}
    expected["guide"] = {"checkpoint": str(newest), "step": 6, "weights": "model"}
    assert {key: one[key] for key in expected} == expected
    assert (one["world_size"], two["world_size"]) == (1, 2) and one["data"] == two["data"]
    judged = {"items": 9, "items_of_split": {"seen": 3, "two_shapes": 3, "unseen": 3}}
    assert judged.items() <= one["data"]["scenes"].items() and one["heldout"]["pairs"]["documents"] == 30
    assert {"sampler", "steps", "guidance", "spacing", "temperature"} <= one["settings"].keys()
    losses = (_with_nan(found["heldout"]["pairs"]) for found in results)
    assert next(losses) == pytest.approx(next(losses), rel=1e-5, nan_ok=True)
    assert [e["caption"] for e in examples[0]] == [e["caption"] for e in examples[1]]
    for example, twin in zip(*examples, strict=True):
        drawings = [
            np.asarray(Image.open(tmp_path / f"output{n}" / e["drawn"]), int) for n, e in ((1, example), (2, twin))
        ]
        assert np.abs(drawings[0] - drawings[1]).max() <= 1, "the same up to rounding"
    assert [e["prompt"] for e in examples[0]] == [item.caption for item in read_scenes(scenes, 32, 3)]
