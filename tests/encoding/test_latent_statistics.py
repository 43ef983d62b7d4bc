"""The statistics by which latents are whitened: measured, the VAE's own, or another data set's."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from data.manifest import Manifest
from model.autoencoders import load_latent_space
from tests.encoding.jobs import (
    OUT,
    Capsys,
    Contents,
    Encode,
    contents_of,
    latents_in,
    picture_record,
    raw_folder,
    write_times,
)

pytestmark = pytest.mark.usefixtures("one_thread", "in_an_empty_folder")


def test_statistics_may_come_from_another_data_set_of_the_same_latents(
    encode: Encode, raw: Path, vae_folder: Path
) -> None:
    """Held-out data is whitened as training data is; other latents are refused before any work."""
    encode(raw, Path("train"))
    held_out = raw_folder(Path("raw"), {"h": [picture_record(99)]})
    encode(held_out, Path("own"))
    encode(held_out, Path("theirs"), stats_from="train")
    own, theirs, train = (Manifest.load(name).latent_spec for name in ("own", "theirs", "train"))
    assert theirs == train != own
    encode(held_out, Path("small"), stats_from="train", resolution=16)
    assert Manifest.load("small").latent_spec == replace(train, resolution=16)
    vae = load_latent_space(vae_folder).module
    with torch.no_grad():
        next(vae.parameters()).add_(1e-3)
    vae.save_pretrained(Path("vae"))
    with pytest.raises(ValueError, match=r"has other latents: vae_hash .* \(here .*\)"):
        encode(held_out, stats_from="train", vae="vae")
    Path("a.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(ValueError, match="it and the inputs must hold pictures"):
        encode(Path("a.jsonl"), stats_from="train")
    assert contents_of(OUT) == {}


def foreign_vae(folder: Path, **changes: object) -> Path:
    """A tiny AutoencoderKL of stride 2 and 3 channels, as diffusers makes and saves it."""
    from diffusers import AutoencoderKL

    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"block_out_channels": [8, 8], "norm_num_groups": 4, "latent_channels": 3}
        AutoencoderKL(**blocks, **sizes, **changes).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("stated", "mean", "std"),
    [
        ({"scaling_factor": 0.18215}, [0.0] * 3, [1 / 0.18215] * 3),
        ({}, [0.0] * 3, [1 / 0.18215] * 3),  # diffusers' default
        ({"scaling_factor": 0.3611, "shift_factor": 0.1159, "use_quant_conv": False, "use_post_quant_conv": False},
         [0.1159] * 3, [1 / 0.3611] * 3),
        ({"scaling_factor": 0.5, "latents_mean": [-1.6, 2.0, 0.0], "latents_std": [9.0, 6.0, 1.0]},
         [-1.6, 2.0, 0.0], [18.0, 12.0, 2.0]),
        ({"scaling_factor": 1.0, "shift_factor": -0.5}, [-0.5] * 3, [1.0] * 3),
    ],
)  # fmt: skip
def test_a_vaes_own_scaling_goes_into_the_latent_spec(
    raw: Path, encode: Encode, capsys: Capsys,
    stated: dict[str, object], mean: list[float], std: list[float],
) -> None:  # fmt: skip
    """tests/test_vae.py holds whitening by these to diffusers' formula."""
    encode(raw, vae=foreign_vae(Path("vae"), **stated))
    assert "encode: latent statistics: the VAE's own scaling" in capsys.readouterr().out
    spec = Manifest.load(OUT).latent_spec
    assert (spec.channels, spec.stride, spec.resolution) == (3, 2, 32)
    assert Manifest.load(OUT).grids() == {(16, 16)}
    np.testing.assert_allclose(spec.mean, mean, rtol=1e-12)
    np.testing.assert_allclose(spec.std, std, rtol=1e-12)


def test_the_source_of_the_statistics_can_be_chosen_and_shards_stay(raw: Path, encode: Encode, capsys: Capsys) -> None:
    vae = foreign_vae(Path("vae"))
    own = encode(raw, vae=vae)
    before = write_times()
    capsys.readouterr()
    measured = encode(raw, vae=vae, latent_stats="measured")
    assert "encode: latent statistics: measured\n" in capsys.readouterr().out
    assert write_times() == before
    spec = Manifest.load(OUT).latent_spec
    np.testing.assert_allclose(spec.mean, latents_in(OUT)[:, :3].astype(np.float64).mean((0, 2, 3)), rtol=1e-9)
    assert encode(raw, vae=vae, latent_stats="vae") == own != measured


def test_a_vae_that_states_no_scaling_is_measured_unless_asked_otherwise(
    raw: Path, encode: Encode, capsys: Capsys, expected: Contents
) -> None:
    assert encode(raw) == expected
    assert "latent statistics: measured (the VAE states no scaling)" in capsys.readouterr().out
    assert encode(raw, latent_stats="measured") == expected
    encode(raw, latent_stats="vae")
    spec = Manifest.load(OUT).latent_spec
    assert (spec.mean, spec.std) == ((0.0, 0.0), (1.0, 1.0))


def test_diffusers_default_is_not_taken_for_a_vaes_own_scaling(raw: Path, encode: Encode, capsys: Capsys) -> None:
    vae = foreign_vae(Path("vae"))
    encode(raw, vae=vae)  # it states 0.18215, and that is far from right
    encode(raw, Path("measured"), vae=vae, latent_stats="measured")
    deviation = 0.18215 * np.sqrt(np.mean(np.square(Manifest.load("measured").latent_spec.std)))
    warning = f"warning: whitened latents have deviation {deviation:.3g}, but the noise schedule"
    assert not 0.5 < deviation < 2 and warning in capsys.readouterr().out
    config = json.loads((vae / "config.json").read_text())
    del config["scaling_factor"]
    (vae / "config.json").write_text(json.dumps(config))
    encode(raw, vae=vae)
    said = capsys.readouterr().out
    assert "statistics: measured (the VAE states no scaling)" in said and "warning" not in said
    encode(raw, vae=vae, latent_stats="vae")
    said = capsys.readouterr().out
    assert "statistics: diffusers' default, as the VAE's config states no scaling" in said and warning in said


def test_statistics_from_two_places_are_refused_and_another_data_sets_win(
    raw: Path, encode: Encode, capsys: Capsys
) -> None:
    vae = foreign_vae(Path("vae"))
    encode(raw, Path("train"), vae=vae, latent_stats="measured")
    for chosen in ("vae", "measured"):
        with pytest.raises(ValueError, match=rf"latent_stats={chosen} and stats_from=.*train both say.*leave one"):
            encode(raw, vae=vae, stats_from="train", latent_stats=chosen)
    capsys.readouterr()
    encode(raw / "a.tar", vae=vae, stats_from="train")
    assert "latent statistics: from train" in capsys.readouterr().out
    specs = [Manifest.load(name).latent_spec for name in ("train", "out")]
    assert specs[0] == specs[1] and specs[0].mean != (0.0, 0.0, 0.0)
    with pytest.raises(ValueError, match=r"latent_stats='both': expected one of auto, measured, vae"):
        encode(raw, vae=vae, latent_stats="both")


def test_a_scaling_that_cannot_be_is_refused_before_work(raw: Path, encode: Encode) -> None:
    vae = foreign_vae(Path("vae"), latents_mean=[0.0], latents_std=[1.0])
    with pytest.raises(ValueError, match=r"expected 3 channels; correct its config.json, or use latent_stats=measured"):
        encode(raw, vae=vae)
    assert contents_of(OUT) == {}
    encode(raw, vae=vae, latent_stats="measured")
