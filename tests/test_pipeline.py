"""A checkpoint becomes a model that draws and describes, or a clear refusal."""

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.pictures import contact_sheet, to_unit
from data.tokenizer import Tokenizer, train_tokenizer
from model.denoising import first_step_error
from model.diffusion import DiffusionConfig
from model.draws import SeededDraws
from model.latent_space import to_raw
from model.sampler_config import SamplerConfig
from model.vae import VaeConfig, build_vae
from tests.runs import PROMPTS, DrawingRun, saved_state
from tests.test_tokenizer import foreign_model
from train.checkpoints import checkpoint
from train.checkpoints.lookup import find_checkpoint
from train.checkpoints.run_folder import RunFolder
from train.config import load_config
from train.distributed.ranks import alone
from train.distributed.signals import StopKind, StopSignal
from train.inference.guide import require_comparable
from train.inference.pipeline import Pipeline, PipelineConfig, Progress
from train.metrics_log import MetricsLog
from train.optim.optimizer import Optimizer
from train.pretrain_config import PretrainConfig
from train.previews import Previews
from train.training_data import open_training_data

SAMPLER = SamplerConfig(sampler="ddim", steps=3, guidance=2.0, max_new_tokens=6)


def load(path: Path, **settings: str | int | float) -> Pipeline:
    return Pipeline.load(PipelineConfig(checkpoint=str(path), device="cpu", **settings), alone())


@pytest.fixture(scope="module")
def pipeline(drawn: DrawingRun) -> Pipeline:
    return load(drawn.run_dir)


def test_a_checkpoint_gives_the_averaged_or_the_live_weights_of_training(drawn: DrawingRun) -> None:
    """Trained on two ranks with activation checkpointing, loaded plain on one; with config, step and grid."""
    tensors, _, meta = saved_state(drawn.run_dir)
    assert meta["progress"]["step"] == 6
    for weights, entry in [("auto", "ema-7"), ("ema", "ema-7"), ("ema-7", "ema-7"), ("model", "model")]:
        pipeline = load(drawn.run_dir, weights=weights)
        assert (pipeline.saved.step, pipeline.config.optim.steps) == (6, 6)
        assert (pipeline.grid, pipeline.latent_spec.resolution) == ((8, 8), 32)
        parameters = dict(pipeline.model.named_parameters())
        assert parameters.keys() == {n.removeprefix("ema-7.") for n in tensors if n.startswith("ema-7.")}
        for name, parameter in parameters.items():
            assert torch.equal(parameter, tensors[f"{entry}.{name}"]), (weights, name)


def test_a_picture_depends_on_its_prompt_number_and_seed_and_not_on_its_neighbours(pipeline: Pipeline) -> None:
    """P12: at one batch shape bit for bit, across batches and whatever else is asked for."""
    small = replace(pipeline, batch_size=3)
    first = small.draw([*PROMPTS, "a", "b", PROMPTS[0]], SAMPLER, seed=1)
    assert [picture.shape for picture in first] == [(32, 32, 3)] * 5 and first[0].dtype == np.uint8
    again = small.draw(["c", "d", "b", PROMPTS[1]], SAMPLER, seed=1, numbers=[7, 8, 3, 1])
    assert np.array_equal(again[2], first[3]) and np.array_equal(again[3], first[1])
    large = pipeline.draw([*PROMPTS, "a", "b", PROMPTS[0]], SAMPLER, seed=1)
    assert all(np.array_equal(*pair) for pair in zip(first, large, strict=True)), "in one batch of 5"
    assert not np.array_equal(first[4], first[0]), "the same prompt under another number"
    assert not np.array_equal(small.draw([PROMPTS[0]] * 3, SAMPLER, seed=2)[0], first[0])
    reported = []
    small.draw(PROMPTS * 2, SAMPLER, 1, reported.append)
    assert sum(reported) == pytest.approx(4) and len(reported) > 6, "each denoising step is reported"


def test_what_a_prompt_holds_that_the_tokenizer_does_not_know_is_said_once(
    pipeline: Pipeline, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    foreign = Tokenizer(foreign_model(tmp_path / "foreign.model"))
    other = replace(pipeline, tokenizer=foreign, batch_size=2)
    for _ in range(2):
        other.draw(["some 中 words", "some words"], SAMPLER, 0)
    assert [record.getMessage() for record in caplog.records] == [
        "prompt 'some 中 words': ['中'] unknown to the tokenizer: the model cannot tell them apart"
    ]


def test_what_asks_for_nothing_is_refused_and_what_is_too_long_is_named(pipeline: Pipeline) -> None:
    """P10."""
    picture = np.zeros((32, 32, 3), np.uint8)
    for run, words in (
        (lambda: pipeline.draw(["a", " "], SAMPLER, 0), "prompt=' ': expected words"),
        (lambda: pipeline.edit([([picture], "")], SAMPLER, 0), "instruction='': expected words"),
        (lambda: pipeline.edit([([], "make it blue")], SAMPLER, 0), "pictures=[]: expected one or more"),
        (lambda: pipeline.answer([([picture], "\n")], SAMPLER, 0), "question='\\n': expected words"),
        (lambda: pipeline.answer([([], "what?", " ")], SAMPLER, 0), "system=' ': expected words"),
        (lambda: pipeline.draw(["", "a" * 30], replace(SAMPLER, max_length=18), 0), "number 1 takes"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            run()
    assert len(pipeline.draw([""], replace(SAMPLER, steps=1), 0)) == 1, "any picture"
    # BOS, BOI, patches, EOI, text, BOI, patches: what sampling allocates for the longest row, but for text and EOI.
    room = pipeline.room(replace(SAMPLER, max_length=40))
    text, patches = len(pipeline.tokenizer.encode("make it blue")), 64 // pipeline.model.config.patch_size**2
    assert room.taken([picture, "make it blue"], True) == 1 + patches + 2 + text + 1 + patches
    assert room.taken(["make it blue"], False) == 1 + text
    prompts = [(f"row {i}", ["make it blue"] * i) for i in (1, 30, 40, 50, 60)]
    with pytest.raises(
        ValueError, match=rf"edits: 4 of 5 .* row 30 takes {1 + 30 * text}, .*max_length={1 + 60 * text + 6}"
    ):
        room.require("edits", prompts, False)


def test_captions_depend_on_the_picture_and_on_its_number(pipeline: Pipeline) -> None:
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (32, 32, 3), dtype=np.uint8) for _ in range(4)]
    small = replace(pipeline, batch_size=2)
    captions = small.describe(pictures, SAMPLER, seed=1)
    assert len(captions) == 4 and all(isinstance(caption, str) for caption in captions) and any(captions)
    assert small.describe(pictures[2:], SAMPLER, 1, numbers=[2, 3]) == captions[2:]
    assert small.describe([], SAMPLER, 1) == [] and small.draw([], SAMPLER, 1) == []


def test_a_given_picture_is_drawn_from_its_posterior_as_in_training(pipeline: Pipeline) -> None:
    """P12: the same function of moments and noise, which (seed, number, place) decides; not the posterior's mean."""
    picture = np.random.default_rng(1).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    draws, places = SeededDraws(3), [(5, 0), (6, 0), (5, 1)]
    given = torch.stack(list(pipeline._encode([picture] * 3, places, draws)))
    encoded = pipeline.space.encode(torch.from_numpy(to_unit(picture[None])))
    for latents, place in zip(given, places, strict=True):
        trained = to_raw(encoded, draws.posterior(*place, tuple(latents.shape))[None])
        assert torch.allclose(latents, pipeline.stats.whiten(trained)[0], atol=1e-4)
    mean = pipeline.stats.whiten(encoded.chunk(2, dim=1)[0])
    deviation = (encoded.chunk(2, dim=1)[1] / 2).exp()
    assert ((given - mean) / deviation).std().item() == pytest.approx(1, abs=0.2)
    alone_again = next(iter(pipeline._encode([picture], places[1:2], draws)))
    assert torch.allclose(alone_again, given[1], atol=1e-4) and not torch.equal(given[0], given[2])


def test_new_pictures_are_square_where_training_had_aspects(pipeline: Pipeline, drawn: DrawingRun) -> None:
    for grids, expected in [
        ([(4, 16), (8, 8), (16, 4)], (8, 8)),
        ([(8, 8), (12, 12), (16, 4)], (12, 12)),
        ([(4, 16), (6, 10), (10, 6), (16, 4)], (6, 10)),
    ]:
        config, spec = pipeline.config, pipeline.latent_spec
        made = Pipeline.of(pipeline.model, pipeline.tokenizer, config, spec, grids, str(drawn.vae))
        assert made.grid == expected


def test_a_spacing_that_multiplies_the_error_of_predicted_noise_is_warned_of(
    drawn: DrawingRun, caplog: pytest.LogCaptureFixture
) -> None:
    """The factor is what a small error of the first prediction becomes, relative to the same step without it."""
    for spacing, steps, factor in (("trailing", 250, 125), ("linspace", 50, 631), ("leading", 250, 1.3)):
        assert first_step_error(SamplerConfig(spacing=spacing, steps=steps), DiffusionConfig()) == pytest.approx(
            factor, rel=0.03
        )
        caplog.clear()
        load(drawn.run_dir, spacing=spacing, steps=steps)
        warned = [record.getMessage() for record in caplog.records if "spacing=" in record.getMessage()]
        assert len(warned) == (factor > 100) and all(f"{factor} times" in words for words in warned), warned
    caplog.clear()
    load(drawn.run_dir, spacing="trailing", steps=50, clip_x0=4.0)
    assert not [record for record in caplog.records if "spacing=" in record.getMessage()]


def test_any_of_three_paths_names_a_checkpoint_and_the_newest_whole_one_is_taken(
    drawn: DrawingRun, tmp_path: Path
) -> None:
    older, newer = checkpoint.saved(drawn.run_dir / "checkpoints")
    for path, expected in [(drawn.run_dir, newer), (older.parent, newer), (older, older)]:
        assert find_checkpoint(path, alone()) == expected
    run_dir = Path(shutil.copytree(drawn.run_dir, tmp_path / "run"))
    older, newer = checkpoint.saved(run_dir / "checkpoints")
    (newer / "meta.json").write_text("{}")
    assert find_checkpoint(run_dir, alone()) == older
    with pytest.raises(ValueError, match=r"is damaged: meta\.json"):
        find_checkpoint(newer, alone())
    (older / "index.json").unlink()
    with pytest.raises(ValueError, match="all 2 checkpoints in it are damaged"):
        find_checkpoint(run_dir, alone())
    for nothing in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match="expected a checkpoint, a run folder"):
            find_checkpoint(nothing, alone())


def test_what_is_not_the_trainings_own_is_refused(drawn: DrawingRun, tmp_path: Path) -> None:
    """P10: another VAE, another tokenizer under the old name, averages that were never kept."""
    other = VaeConfig(latent_channels=2, block_channels=(8, 8, 8), layers_per_block=1, norm_groups=2)
    build_vae(other).save_pretrained(tmp_path / "vae")
    with pytest.raises(ValueError, match="has hash"):
        load(drawn.run_dir, vae=str(tmp_path / "vae"))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load(drawn.run_dir, vae=str(tmp_path / "nowhere"))
    other = tmp_path / "other.model"
    train_tokenizer((f"green triangles, {i} of them" for i in range(200)), other, 290)
    with pytest.raises(ValueError, match=rf"was trained with the tokenizer of hash .* none of {other} "):
        load(drawn.run_dir, tokenizer=str(other))


def test_a_model_trained_on_text_alone_writes_and_neither_draws_nor_sees(drawn: DrawingRun, pipeline: Pipeline) -> None:
    made = Pipeline.of(pipeline.model, pipeline.tokenizer, pipeline.config, None, [], None)
    sampler, picture = SamplerConfig(max_new_tokens=4, max_images=0), np.zeros((32, 32, 3), np.uint8)
    (parts,) = made.complete([["a red"]], sampler, seed=0)
    assert all(isinstance(part, str) for part in parts)
    for ask in (
        lambda: made.draw(["a red"], sampler, 0),
        lambda: made.describe([picture], sampler, 0),
        lambda: list(made.complete([["a red"]], SamplerConfig(), 0)),
        lambda: made.latent_spec,
    ):
        with pytest.raises(ValueError, match="trained on text alone: it neither draws nor sees pictures"):
            ask()


def test_an_earlier_checkpoint_or_other_weights_of_the_same_one_guide(drawn: DrawingRun, pipeline: Pipeline) -> None:
    older, newest = checkpoint.saved(drawn.run_dir / "checkpoints")
    assert pipeline.guide is None and pipeline.describe_guide() is None
    own = load(drawn.run_dir, guide_weights="model", dtype="bfloat16")
    assert own.describe_guide() == {"checkpoint": str(newest), "step": 6, "weights": "model"}
    tensors = saved_state(drawn.run_dir)[0]
    for name, parameter in own.guide.model.named_parameters():
        assert torch.equal(parameter, tensors[f"model.{name}"].bfloat16())
    earlier = load(drawn.run_dir, guide=str(older))
    assert earlier.describe_guide() == {"checkpoint": str(older), "step": 3, "weights": "ema-7"}
    assert (earlier.saved.step, earlier.weights) == (6, "ema-7")
    for guidance, alike in ((3.0, False), (1.0, True)):  # 1 is none, with or without a guide
        config = replace(SAMPLER, guidance=guidance, steps=2)
        pictures = [each.draw(PROMPTS[:1], config, seed=0)[0] for each in (pipeline, earlier)]
        assert np.array_equal(*pictures) == alike


def test_a_guide_that_is_not_there_or_is_the_model_itself_is_refused(drawn: DrawingRun) -> None:
    """P10."""
    for changes, words in [
        ({"guide": "/nowhere"}, "guide=/nowhere: expected a checkpoint"),
        ({"guide_weights": "best"}, "guide_weights=best: .* holds ema-7, model; use guide_weights=ema-7"),
        ({"guide_weights": "ema"}, "ema-7 of .* is the model itself; expected a weaker one: set guide to an earlier"),
        ({"guide": str(drawn.run_dir)}, "ema-7 of .* is the model itself"),
    ]:
        with pytest.raises((FileNotFoundError, ValueError), match=words):
            load(drawn.run_dir, **changes)


def test_a_guide_whose_predictions_mean_something_else_is_refused_and_another_size_is_not(pipeline: Pipeline) -> None:
    """P10."""
    saved, config, meta = pipeline.saved, pipeline.saved.config, pipeline.saved.meta
    model, diffusion, spec = config.model, config.diffusion, meta["latent_spec"]
    other_v, other_schedule = replace(diffusion, prediction="v"), replace(diffusion, num_timesteps=2000)
    for changes, words in [
        ({"config": replace(config, model=replace(model, patch_size=1))}, "model.patch_size is 1, expected 2"),
        ({"config": replace(config, model=replace(model, image_attention="causal"))}, "image_attention is causal"),
        ({"config": replace(config, diffusion=other_v)}, "diffusion.prediction is v, expected eps"),
        ({"config": replace(config, diffusion=other_schedule)}, "diffusion.num_timesteps is 2000"),
        ({"meta": {**meta, "fingerprint": {"tokenizer": "other"}}}, "tokenizer is other"),
        ({"meta": {**meta, "latent_spec": {**spec, "std": [2.0, 3.0]}}}, "latent std is"),
        ({"meta": {**meta, "latent_spec": {**spec, "vae_hash": "other"}}}, "latent vae_hash is other"),
        ({"meta": {**meta, "latent_spec": None}}, "latent channels is None, expected 2"),
    ]:
        with pytest.raises(ValueError, match=f"guide=/weak cannot guide .*{re.escape(words)}.* Set guide to"):
            require_comparable(replace(saved, folder=Path("/weak"), **changes), saved)
    smaller = replace(model, transformer=replace(model.transformer, width=64, layers=1))
    easier = replace(diffusion, min_snr_gamma=5.0, timestep_sampling="logit_normal")
    require_comparable(replace(saved, config=replace(config, model=smaller, diffusion=easier)), saved)


def test_a_run_that_was_moved_is_read_where_it_lies(drawn: DrawingRun, tmp_path: Path) -> None:
    """With the tokenizer that it keeps, or one that is named; its config still says the places of then."""
    moved = shutil.copytree(drawn.run_dir, tmp_path / "moved")
    for config in moved.glob("checkpoints/*/config.yaml"):
        assert str(drawn.tokenizer.path) in config.read_text()
    expected = drawn.tokenizer.path.read_bytes()
    assert (moved / "tokenizer.model").read_bytes() == expected
    assert load(moved, vae=str(drawn.vae)).config.data.tokenizer == str(moved / "tokenizer.model")
    (tmp_path / "named.model").write_bytes(expected)
    named = str(tmp_path / "named.model")
    assert load(moved, tokenizer=named).config.data.tokenizer == named
    (moved / "tokenizer.model").unlink()  # of an older version, which kept none
    assert load(moved).config.data.tokenizer == str(drawn.tokenizer.path)


def test_previews_show_the_prompts_by_the_averaged_weights(drawn: DrawingRun, pipeline: Pipeline) -> None:
    """P13 too: sheets at every interval, a page kept offline in the run folder, and the run unharmed by either."""
    sheets = sorted(path.name for path in (drawn.run_dir / "previews").iterdir())
    assert sheets == ["step-00000003.png", "step-00000006.png"]
    assert "wandb is off" not in drawn.output and list((drawn.run_dir / "wandb").glob("offline-run-*"))
    pictures = pipeline.draw(PROMPTS, replace(SAMPLER, guidance=3.0), seed=0)
    expected = np.asarray(contact_sheet(pictures, PROMPTS), dtype=int)
    found = np.asarray(Image.open(drawn.run_dir / "previews" / sheets[-1]), dtype=int)
    assert np.abs(found - expected).max() <= 1


def test_previews_hold_a_model_only_while_they_draw(
    drawn: DrawingRun, pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole float32 copy on one device is no part of training; nor is it after a stop in the middle."""
    config = load_config(PretrainConfig, [*drawn.argv, f"run_dir={tmp_path}", "log.wandb=disabled"])
    ranks, held = alone(), []

    def watch(self: Pipeline, prompts: Sequence[str], sampler: SamplerConfig, seed: int, poll: Progress) -> list:
        held.append([parameter.device.type for parameter in self.model.parameters()])
        return draw(self, prompts, sampler, seed, poll)

    draw = Pipeline.draw
    monkeypatch.setattr(Pipeline, "draw", watch)
    with RunFolder(tmp_path, ranks) as folder, StopSignal() as stop:
        log = MetricsLog(config.log, folder, ranks, {})
        previews = Previews(config, open_training_data(config), ranks, folder, log)
        optimizer = Optimizer(pipeline.model, replace(config.optim, ema_half_lives=()), config.guard)
        for step, kind in ((3, StopKind.NONE), (6, StopKind.REQUEUE)):
            stop._kind = kind
            previews.make(optimizer, step, stop)
            assert {parameter.device.type for parameter in previews._pipeline.model.parameters()} == {"meta"}
    assert [set(devices) for devices in held] == [{"cpu"}] * 2
    assert [path.name for path in (tmp_path / "previews").iterdir()] == ["step-00000003.png"]
    sheets = [Image.open(root / "previews/step-00000003.png") for root in (tmp_path, drawn.run_dir)]
    assert sheets[0].size == sheets[1].size


def test_the_config_in_a_checkpoint_is_the_runs_and_meta_holds_nothing_else(drawn: DrawingRun) -> None:
    """P11: the resolved config, readable, the same in the run folder and in every checkpoint."""
    folders = checkpoint.saved(drawn.run_dir / "checkpoints")
    saved = {checkpoint.read_extra(folder, "config.yaml") for folder in folders}
    assert saved == {(drawn.run_dir / "config.yaml").read_bytes()}
    meta = json.loads(checkpoint.read_extra(folders[0], "meta.json"))
    expected = {"progress", "guard", "back_to", "metrics", "learning_rate", "fingerprint", "latent_spec", "grids"}
    assert meta.keys() == expected
