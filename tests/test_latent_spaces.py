"""Each of diffusers' autoencoders, and pixels: what its denoiser would see, and from pictures through training back."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from data.documents import decode_document
from data.manifest import Manifest
from data.pictures import from_unit, to_unit
from data.tokenizer import Tokenizer
from model.autoencoders import Autoencoder, load_latent_space
from model.draws import SeededDraws
from model.latent_space import to_raw
from model.sampler import SamplerConfig
from model.vae_folder import CLASSES
from tests.encoding.jobs import arguments, picture_record, pixels_of, raw_folder
from tests.runs import finish, settings
from tests.sources import encoded_records
from train import encode, export, view
from train.distributed.ranks import alone
from train.inference.pipeline import Pipeline, PipelineConfig

pytestmark = pytest.mark.usefixtures("one_thread")
SIDE = 32  # pixels of every picture here
CONVOLUTIONS = {
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "block_out_channels": [8, 8, 8],
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "latent_channels": 4,
}
DC_BLOCKS = ("ResBlock", "ResBlock", "EfficientViTBlock")
SIZES: dict[str, dict[str, Any]] = {  # FLUX.1's kind of AutoencoderKL
    "AutoencoderKL": {
        **CONVOLUTIONS,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
    "AutoencoderKLFlux2": CONVOLUTIONS,
    "AutoencoderDC": {
        **{f"{side}_block_types": DC_BLOCKS for side in ("encoder", "decoder")},
        **{f"{side}_block_out_channels": (8, 8, 16) for side in ("encoder", "decoder")},
        **{f"{side}_layers_per_block": (1, 1, 1) for side in ("encoder", "decoder")},
        **{f"{side}_qkv_multiscales": ((), (), (5,)) for side in ("encoder", "decoder")},
        "latent_channels": 8,
        "attention_head_dim": 4,
        "scaling_factor": 0.41407,
    },
    "AutoencoderRAE": {
        "encoder_hidden_size": 64,
        "encoder_num_hidden_layers": 1,
        "encoder_input_size": 56,
        "patch_size": 8,
        "decoder_hidden_size": 32,
        "decoder_num_hidden_layers": 1,
        "decoder_num_attention_heads": 2,
        "decoder_intermediate_size": 32,
        "latents_mean": [[[0.3]]] * 64,
        "latents_std": [[[0.8]]] * 64,
    },
    "AutoencoderTiny": {
        **{f"{side}_block_out_channels": (8, 8, 8) for side in ("encoder", "decoder")},
        **{f"num_{side}_blocks": (1, 1, 1) for side in ("encoder", "decoder")},
    },
}
SHAPES = {  # of what is stored of a picture
    "AutoencoderKL": (8, 8, 8),
    "AutoencoderKLFlux2": (32, 4, 4),
    "AutoencoderDC": (8, 8, 8),
    "AutoencoderRAE": (64, 4, 4),
    "AutoencoderTiny": (4, 8, 8),
    "pixels": (3, 32, 32),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny untrained model of each class, made and saved by diffusers."""
    import diffusers

    root = tmp_path_factory.mktemp("spaces")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name in CLASSES:
            module = getattr(diffusers, name)(**SIZES[name])
            if name == "AutoencoderKLFlux2":
                module.bn.running_mean.normal_()
                module.bn.running_var.uniform_(0.5, 2)
            module.save_pretrained(root / name)
    return {name: root / name for name in CLASSES}


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    return torch.from_numpy(to_unit(np.stack([pixels_of(i) for i in range(2)])))


# ---- the scaling of diffusers' pipelines ----


@dataclass
class Oracle:
    """What a pipeline of diffusers feeds its denoiser, and what it makes of the denoiser's result."""

    encode: Callable[[Any, torch.Tensor], torch.Tensor]
    decode: Callable[[Any, torch.Tensor], torch.Tensor]


def oracle(name: str) -> Oracle:
    """By the pipelines' own methods where they are methods, else by the lines of their `__call__`."""
    from diffusers import DreamLitePipeline, Flux2Pipeline, FluxImg2ImgPipeline, SanaSprintImg2ImgPipeline

    pack, unpack = Flux2Pipeline._patchify_latents, Flux2Pipeline._unpatchify_latents

    def sana(vae: Any, x: torch.Tensor) -> torch.Tensor:
        of = SimpleNamespace(
            vae=vae, vae_scale_factor=4, scheduler=SimpleNamespace(config=SimpleNamespace(sigma_data=1))
        )
        sizes, start = (len(x), vae.config.latent_channels, *x.shape[2:]), torch.zeros(())  # no noise yet
        return SanaSprintImg2ImgPipeline.prepare_latents(of, x, start, *sizes, x.dtype, x.device, None)

    def flux2(vae: Any, z: torch.Tensor) -> torch.Tensor:
        std = torch.sqrt(vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps)
        return unpack(z * std + vae.bn.running_mean.view(1, -1, 1, 1))

    return {
        "AutoencoderKL": Oracle(
            lambda vae, x: FluxImg2ImgPipeline._encode_vae_image(
                SimpleNamespace(vae=vae), x, torch.Generator().manual_seed(7)
            ),
            lambda vae, z: z / vae.config.scaling_factor + vae.config.shift_factor,
        ),
        "AutoencoderKLFlux2": Oracle(
            lambda vae, x: Flux2Pipeline._encode_vae_image(SimpleNamespace(vae=vae, _patchify_latents=pack), x, None),
            flux2,
        ),
        "AutoencoderDC": Oracle(sana, lambda vae, z: z / vae.config.scaling_factor),
        "AutoencoderRAE": Oracle(lambda vae, x: vae.encode((x + 1) / 2).latent, lambda vae, z: z),  # it has none
        "AutoencoderTiny": Oracle(
            lambda vae, x: DreamLitePipeline.prepare_image_latents(SimpleNamespace(vae=vae), x, x.dtype, x.device),
            lambda vae, z: z / vae.config.scaling_factor + vae.config.shift_factor,
        ),
    }[name]


@torch.no_grad()
@pytest.mark.parametrize("name", CLASSES)
def test_whitened_latents_are_those_that_diffusers_pipeline_feeds_its_denoiser(
    name: str, folders: dict[str, Path], pictures: torch.Tensor
) -> None:
    space, theirs = load_latent_space(folders[name]), oracle(name)
    assert isinstance(space, Autoencoder)
    exact, noise = space._encode(pictures), None  # before it is stored in 16 bits
    if name == "AutoencoderKL":  # its pipeline draws, the other one's takes the mean
        noise = torch.randn(len(exact), space.channels, *exact.shape[2:], generator=torch.Generator().manual_seed(7))
    whitened = space.stated_stats().whiten(to_raw(exact if noise is not None else exact[:, : space.channels], noise))
    expected = theirs.encode(space.module, pictures)
    torch.testing.assert_close(whitened, expected, atol=1e-5, rtol=1e-5)
    assert whitened.std() > 1e-3 and torch.equal(space.encode(pictures), exact.half())
    decoded = space.decode(space.stated_stats().unwhiten(expected))
    by_theirs = space.module.decode(theirs.decode(space.module, expected)).sample
    if name == "AutoencoderRAE":  # of pictures in [0, 1]
        by_theirs = 2 * by_theirs - 1
    torch.testing.assert_close(decoded, by_theirs, atol=1e-5, rtol=1e-5)
    assert decoded.shape == pictures.shape


# ---- from pictures through training back ----


def encoded(name: str, folders: dict[str, Path], folder: Path, tokenizer: Tokenizer, **options: object) -> Path:
    """Encode eight pictures with captions."""
    raw = raw_folder(folder / "raw", {"a": [picture_record(i) for i in range(8)]})
    encode.main(arguments(raw, folder / "out", tokenizer, vae=folders.get(name, name), **options))
    return folder / "out"


FAST = ("AutoencoderKLFlux2", "AutoencoderRAE", "pixels")


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in SHAPES])
def test_pictures_are_encoded_trained_on_drawn_and_exported(
    name: str, folders: dict[str, Path], tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Previews, prompts with pictures and the sheet of train.view decode too; pixels need no VAE anywhere."""
    data, vae = encoded(name, folders, tmp_path, tokenizer), folders.get(name)
    spec = Manifest.load(data).latent_spec
    patch = 4 if name == "pixels" else 2
    changes = {"optim__steps": 2, "checkpoint__interval_steps": 2, "preview__interval_steps": 2, "preview__steps": 2}
    changes |= {"data__sequence_length": 128, "data__lanes": 2, "preview__prompts": json.dumps(["a circle"])}
    model = {"model__latent_channels": spec.channels, "model__patch_size": patch}
    argv = settings(tmp_path / "run", tokenizer, {"data": data}, **changes, **model, vae=vae or "null")
    finish(argv, None)
    assert (tmp_path / "run" / "previews" / "step-00000002.png").exists()
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(row["image_loss"]) for row in rows if "image_loss" in row)
    export.main([f"checkpoint={tmp_path / 'run'}", f"output={tmp_path / 'export'}"])
    assert (tmp_path / "export" / "vae").exists() == (vae is not None)
    sampler = SamplerConfig(sampler="ddim", steps=2, guidance=1.0, max_new_tokens=2)
    drawn = []
    for checkpoint in (tmp_path / "run", tmp_path / "export"):
        pipeline = Pipeline.load(PipelineConfig(checkpoint=str(checkpoint), device="cpu"), alone())
        drawn.append(pipeline.draw(["a circle"], sampler, 0)[0])
    assert drawn[0].shape == (SIDE, SIDE, 3) and np.array_equal(drawn[0], drawn[1])
    given = list(pipeline._encode([pixels_of(0)] * 2, [(0, 0), (1, 0)], SeededDraws(0)))
    assert given[0].shape == (spec.channels, *Manifest.load(data).grids().pop())
    assert torch.equal(given[0], given[1]) == (spec.kind != "moments")  # which are drawn from
    capsys.readouterr()
    view.main([f"shards={data}", f"output={tmp_path / 'view'}", *([f"vae={vae}"] if vae else [])])
    assert "8 of the 8 pictures decoded" in capsys.readouterr().out and (tmp_path / "view" / "sheet.png").exists()


@pytest.mark.parametrize("name", SHAPES)
def test_what_is_stored_of_a_picture_is_what_the_space_says(
    name: str, folders: dict[str, Path], tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Deterministic spaces keep half of what a posterior would take; the folder verifies."""
    data = encoded(name, folders, tmp_path, tokenizer)
    space, spec = load_latent_space(folders.get(name, name)), Manifest.load(data).latent_spec
    assert (spec.vae_hash, spec.kind, spec.channels, spec.stride) == (
        space.hash, space.kind, space.channels, space.stride,
    )  # fmt: skip
    for number, record in enumerate(encoded_records(data)):
        image = decode_document(record, "here").segments[1]
        assert image.array.shape == SHAPES[name] and image.kind == spec.kind
        if name == "pixels":
            assert image.array.dtype == np.uint8 and np.array_equal(image.array.transpose(1, 2, 0), pixels_of(number))
            continue
        assert image.array.dtype == np.float16
        assert len(image.array) == (2 if name.startswith("AutoencoderKL") else 1) * spec.channels
        alone_again = space.encode(torch.from_numpy(to_unit(pixels_of(number)[None])))[0]
        np.testing.assert_allclose(image.array, alone_again.numpy(), rtol=2e-3, atol=2e-3)
    stated = space.stated_stats()
    is_stated = name != "AutoencoderTiny"
    assert ((spec.mean, spec.std) == (tuple(stated.mean.tolist()), tuple(stated.std.tolist()))) is is_stated
    capsys.readouterr()
    before = (data / "manifest.json").read_bytes()
    rest = [f"vae={folders.get(name, name)}", f"tokenizer={tokenizer.path}", f"resolution={SIDE}"]
    encode.main([f"index={data}", *rest])
    assert (data / "manifest.json").read_bytes() == before
    assert encode.main([f"verify={data}"]) == 0
    assert "8 records in 1 shard" in capsys.readouterr().out


def test_pixels_are_the_pictures_bytes_both_ways() -> None:
    """Every byte, through training's numbers and the drawing's rounding."""
    space, every = load_latent_space("pixels"), torch.arange(256, dtype=torch.uint8).repeat(3).reshape(1, 3, 16, 16)
    assert torch.equal(space.encode(to_raw(every)), every)
    drawn = from_unit(space.decode(space.stated_stats().whiten(to_raw(every))).numpy())
    assert np.array_equal(drawn.transpose(0, 3, 1, 2), every.numpy())


# ---- refusals ----


def test_what_a_space_cannot_take_is_refused_by_name(
    folders: dict[str, Path], tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"_class_name": "AutoencoderKLWan"}')
    with pytest.raises(ValueError, match=f"a model of class AutoencoderKLWan, expected {', '.join(CLASSES)}; .*pixels"):
        load_latent_space(tmp_path / "other")
    for number, options in enumerate([{"resolution": 64}, {"crop": "buckets"}]):
        with pytest.raises(ValueError, match=r"takes squares of 32 pixels alone; set resolution=32 crop=centre"):
            encoded("AutoencoderRAE", folders, tmp_path / str(number), tokenizer, **options)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"AutoencoderRAE is a model of transformers, .*; pip install transformers"):
        load_latent_space(folders["AutoencoderRAE"])
    import diffusers.models.autoencoders as theirs

    monkeypatch.delattr(theirs, "AutoencoderDC")
    with pytest.raises(ValueError, match=r"diffusers \S+ has no AutoencoderDC; pip install -U diffusers"):
        load_latent_space(folders["AutoencoderDC"])


@pytest.mark.parametrize("name", CLASSES)
def test_latents_that_leave_the_range_of_16_bits_are_counted(
    name: str, folders: dict[str, Path], tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    space = load_latent_space(folders[name])
    with torch.no_grad():
        if name == "AutoencoderRAE":
            space.module._latents_std /= 1e8
        else:  # its last bias
            list(space.module.encoder.parameters())[-1][0] = 1e9
    space.save(tmp_path / "vae")
    with pytest.raises(ValueError, match="non-finite latents"):
        encoded(str(tmp_path / "vae"), folders, tmp_path, tokenizer, dtype="bfloat16")


@pytest.mark.parametrize("name", CLASSES)
def test_half_precision_rounds_latents_and_not_the_statistics(
    name: str, folders: dict[str, Path], pictures: torch.Tensor
) -> None:
    space, half = load_latent_space(folders[name]), load_latent_space(folders[name])
    half.to(torch.device("cpu"), torch.bfloat16)
    latents, rounded = space.encode(pictures).float(), half.encode(pictures).float()
    assert 0 < (latents - rounded).norm() / latents.norm() < 0.1
    assert torch.equal(space.stated_stats().mean, half.stated_stats().mean)
    assert torch.equal(space.stated_stats().std, half.stated_stats().std)
    assert half.decode(to_raw(half.encode(pictures)[:, : half.channels])).dtype == torch.float32
