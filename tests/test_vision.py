"""Pictures reach a vision model as its own library prepares them, and CLIP's score is what its own model says."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from tests.vision_models import change_json, save_clip, save_dinov2
from train.evaluation.vision import ClipText, Preparation, VisionModel, clip_scores

CPU = torch.device("cpu")
CONFIG = "preprocessor_config.json"


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_dinov2(tmp_path_factory.mktemp("models") / "dinov2")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("models") / "clip")


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((45, 61), (80, 33), (32, 32), (20, 20))]


def test_pictures_are_prepared_bit_for_bit_as_transformers_does_without_torchvision(
    dinov2: Path, clip: Path, tmp_path: Path, pictures: list[np.ndarray]
) -> None:
    """SigLIP's squares, and the plain numbers of CLIP's earliest configs too."""
    transformers.SiglipImageProcessorPil(size={"height": 24, "width": 30}).save_pretrained(tmp_path)
    for folder in (dinov2, clip, tmp_path):
        theirs = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
        ours = Preparation.read(str(folder), "k")
        for picture in pictures:
            assert np.array_equal(ours(picture), theirs(picture, return_tensors="np")["pixel_values"][0])
    early = shutil.copytree(clip, tmp_path / "early")
    change_json(early / CONFIG, size=28, crop_size=28)
    assert Preparation.read(str(early), "k") == Preparation.read(str(clip), "k")


def test_features_are_the_librarys_and_the_clip_score_is_clips_own_cosine(
    dinov2: Path, clip: Path, pictures: list[np.ndarray]
) -> None:
    model, texts = VisionModel.load(str(dinov2), CPU, "k"), ["a large red circle", "blue " * 20, "", "square"]
    prepared = torch.from_numpy(np.stack([model.prepare(picture) for picture in pictures]))
    with torch.no_grad():
        expected = transformers.Dinov2Model.from_pretrained(dinov2).eval()(prepared).last_hidden_state[:, 0]
        features = model.features(pictures)
        torch.testing.assert_close(features, expected)
        whole = transformers.CLIPModel.from_pretrained(clip).eval()
        pixels = transformers.AutoImageProcessor.from_pretrained(clip, backend="pil")(pictures, return_tensors="pt")
        tokenizer = transformers.AutoTokenizer.from_pretrained(clip)
        tokens = tokenizer(texts, padding=True, truncation=True, max_length=8, return_tensors="pt")
        tokens.pop("token_type_ids", None)
        cosines = whole(**pixels, **tokens).logits_per_image.diag() / whole.logit_scale.exp()
    of_clip = VisionModel.load(str(clip), CPU, "k")
    scores = clip_scores(of_clip.features(pictures), ClipText.of(of_clip, "k").features(texts))
    np.testing.assert_allclose(scores, 100 * cosines.clamp(min=0).numpy(), rtol=1e-5)
    assert (features.shape[1], of_clip.features(pictures).shape[1]) == (model.dim, of_clip.dim) == (16, 12)
    assert clip_scores(torch.eye(2), -torch.eye(2)).tolist() == [0, 0]


def test_what_cannot_be_used_is_refused_with_its_option_and_a_remedy(dinov2: Path, clip: Path, tmp_path: Path) -> None:
    key, copies = "generation.models.x", iter(range(20))

    def changed(folder: Path, file: str, **changes: object) -> str:
        copy = shutil.copytree(folder, tmp_path / str(next(copies)))
        change_json(copy / file, **changes) if changes else (copy / file).unlink()
        return str(copy)

    def half(folder: Path, file: str) -> str:
        copy = shutil.copytree(folder, tmp_path / str(next(copies)))
        (copy / file).write_bytes((copy / file).read_bytes()[:-100])
        return str(copy)

    for name, words in (
        (str(tmp_path / "nowhere"), "no model there"),
        (changed(dinov2, "config.json", model_type="vit"), "its model_type is vit; expected one of dinov2, "),
        (changed(dinov2, CONFIG), "no preprocessor_config.json"),
        (changed(dinov2, CONFIG, do_pad=True), r"'do_pad'.* are not known"),
        (changed(dinov2, CONFIG, size={"longest_edge": 3}), "expected size, image_mean"),
        (changed(clip, CONFIG, do_resize=False), "a crop of .* from pictures of None"),
        (changed(dinov2, "model.safetensors"), "no readable weights in safetensors"),
        (changed(dinov2, CONFIG, size={"shortest_edge": 10**6}), "a size of"),
        (changed(dinov2, CONFIG, image_std=[1, 1, 0]), "image_std"),
        (changed(dinov2, CONFIG, resample=99), "99 is not a valid"),
        (half(dinov2, "model.safetensors"), "no readable weights in safetensors"),
        (half(dinov2, "config.json"), "no model there"),
        (changed(dinov2, "config.json", num_hidden_layers=3), "weights are missing, such as encoder.layer.2"),
    ):
        with pytest.raises(ValueError, match=rf"generation.models.x={name}.*{words}"):
            VisionModel.load(name, CPU, key)
    with pytest.raises(ValueError, match="is a Dinov2Model; expected a CLIPModel"):
        ClipText.of(VisionModel.load(str(dinov2), CPU, key), key)
