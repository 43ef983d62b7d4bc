"""A checkpoint becomes a model that draws and describes, or a clear refusal."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.tokenizer import Tokenizer, train_tokenizer
from model.sampler import SamplerConfig
from model.vae import VaeConfig, build_vae
from tests.runs import PROMPTS, DrawingRun, saved_state
from tests.test_tokenizer import foreign_model
from train import checkpoint
from train.distributed import alone
from train.figures import contact_sheet
from train.generation import Generation, GenerationConfig
from train.stored import find_checkpoint

SAMPLER = SamplerConfig(sampler="ddim", steps=3, guidance=2.0, max_new_tokens=6)


def load(path: Path, **settings: str) -> tuple:
    return Generation.load(GenerationConfig(checkpoint=str(path), device="cpu", **settings), alone())


@pytest.fixture(scope="module")
def generation(drawn: DrawingRun) -> Generation:
    return load(drawn.run_dir)[0]


def test_a_checkpoint_gives_the_averaged_or_the_live_weights_of_training(drawn: DrawingRun) -> None:
    """Trained on two ranks with activation checkpointing, loaded plain on one; with recipe, step and grid."""
    tensors, _, meta = saved_state(drawn.run_dir)
    assert meta["progress"]["step"] == 6
    for weights, entry in [("auto", "ema-7"), ("ema", "ema-7"), ("ema-7", "ema-7"), ("model", "model")]:
        generation, recipe, step = load(drawn.run_dir, weights=weights)
        assert (step, recipe.optim.steps, generation.grid, generation.resolution) == (6, 6, (8, 8), 32)
        parameters = dict(generation.model.named_parameters())
        assert parameters.keys() == {n.removeprefix("ema-7.") for n in tensors if n.startswith("ema-7.")}
        for name, parameter in parameters.items():
            assert torch.equal(parameter, tensors[f"{entry}.{name}"]), (weights, name)


def test_a_picture_depends_on_its_prompt_number_and_seed_and_not_on_its_neighbours(generation: Generation) -> None:
    """P12: at one batch shape bit for bit, across batches and whatever else is asked for."""
    small = replace(generation, batch_size=3)
    first = small.draw([*PROMPTS, "a", "b", PROMPTS[0]], SAMPLER, seed=1)
    assert [picture.shape for picture in first] == [(32, 32, 3)] * 5 and first[0].dtype == np.uint8
    again = small.draw(["c", "d", "b", PROMPTS[1]], SAMPLER, seed=1, numbers=[7, 8, 3, 1])
    assert np.array_equal(again[2], first[3]) and np.array_equal(again[3], first[1])
    assert not np.array_equal(first[4], first[0]), "the same prompt under another number"
    assert not np.array_equal(small.draw([PROMPTS[0]] * 3, SAMPLER, seed=2)[0], first[0])
    reported = []
    small.draw(PROMPTS * 2, SAMPLER, 1, reported.append)
    assert sum(reported) == pytest.approx(4) and len(reported) > 6, "each denoising step is reported"


def test_what_a_prompt_holds_that_the_tokenizer_does_not_know_is_said_once(
    generation: Generation, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    foreign = Tokenizer(foreign_model(tmp_path / "foreign.model"))
    other = replace(generation, tokenizer=foreign, batch_size=2)
    for _ in range(2):
        other.draw(["some 中 words", "some words"], SAMPLER, 0)
    assert [record.getMessage() for record in caplog.records] == [
        "prompt 'some 中 words': ['中'] unknown to the tokenizer: the model cannot tell them apart"
    ]


def test_captions_depend_on_the_picture_and_on_its_number(generation: Generation) -> None:
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (32, 32, 3), dtype=np.uint8) for _ in range(4)]
    small = replace(generation, batch_size=2)
    captions = small.describe(pictures, SAMPLER, seed=1)
    assert len(captions) == 4 and all(isinstance(caption, str) for caption in captions) and any(captions)
    assert small.describe(pictures[2:], SAMPLER, 1, numbers=[2, 3]) == captions[2:]
    assert small.describe([], SAMPLER, 1) == [] and small.draw([], SAMPLER, 1) == []


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
        with pytest.raises(FileNotFoundError, match="neither a checkpoint, a run folder"):
            find_checkpoint(nothing, alone())


def test_what_is_not_the_trainings_own_is_refused(drawn: DrawingRun, tmp_path: Path) -> None:
    """P10: another VAE, another tokenizer under the old name, averages that were never kept."""
    other = VaeConfig(latent_channels=2, block_channels=(8, 8, 8), layers_per_block=1, norm_groups=2)
    build_vae(other).save_pretrained(tmp_path / "vae")
    with pytest.raises(ValueError, match="has hash"):
        load(drawn.run_dir, vae=str(tmp_path / "vae"))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load(drawn.run_dir, vae=str(tmp_path / "nowhere"))
    kept = drawn.tokenizer.path.read_bytes()
    try:
        train_tokenizer((f"green triangles, {i} of them" for i in range(200)), drawn.tokenizer.path, 290)
        with pytest.raises(ValueError, match="is not the tokenizer"):
            load(drawn.run_dir)
    finally:
        drawn.tokenizer.path.write_bytes(kept)
    with pytest.raises(ValueError, match="trained on text alone"):
        Generation.of(torch.nn.Linear(1, 1), drawn.tokenizer, None, None, [], None)


def test_previews_show_the_prompts_by_the_averaged_weights(drawn: DrawingRun, generation: Generation) -> None:
    """P13 too: sheets at every interval, a page kept offline in the run folder, and the run unharmed by either."""
    sheets = sorted(path.name for path in (drawn.run_dir / "previews").iterdir())
    assert sheets == ["step-00000003.png", "step-00000006.png"]
    assert "wandb is off" not in drawn.output and list((drawn.run_dir / "wandb").glob("offline-run-*"))
    pictures = generation.draw(PROMPTS, replace(SAMPLER, guidance=3.0), seed=0)
    expected = np.asarray(contact_sheet(pictures, PROMPTS), dtype=int)
    found = np.asarray(Image.open(drawn.run_dir / "previews" / sheets[-1]), dtype=int)
    assert np.abs(found - expected).max() <= 1


def test_the_recipe_in_a_checkpoint_holds_no_more_than_the_config(drawn: DrawingRun) -> None:
    """P11: what is stored is the resolved config, readable, the same in the run folder and in every checkpoint."""
    folders = checkpoint.saved(drawn.run_dir / "checkpoints")
    stored = {checkpoint.read_extra(folder, "config.yaml") for folder in folders}
    assert stored == {(drawn.run_dir / "config.yaml").read_bytes()}
    meta = json.loads(checkpoint.read_extra(folders[0], "meta.json"))
    assert meta.keys() == {
        "progress",
        "guard",
        "back_to",
        "metrics",
        "learning_rate",
        "fingerprint",
        "latent_spec",
        "grids",
    }
