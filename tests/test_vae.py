"""The VAE's border is as stated, its loss and whitening are the closed forms, and its training resumes exactly."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from data.pictures import encode_png, to_unit
from data.scenes import make_splits, training_example
from data.shards import write_shard
from model.vae import (
    LatentStats,
    VaeConfig,
    VaeLossConfig,
    build_vae,
    decode,
    load_vae,
    moments,
    sample_latents,
    vae_hash,
    vae_loss,
)
from train.vae import main

TINY = VaeConfig(latent_channels=3, block_channels=(8, 8, 8), layers_per_block=1, norm_groups=4, mid_attention=False)
PICTURES = np.stack([training_example(make_splits(0), index, 32, 0.15).picture for index in range(40)])


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Fix the number of threads, on which bits depend."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def vae():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build_vae(TINY).eval()


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for shard in range(2):
        keys = range(shard * 20, shard * 20 + 20)
        records = [{"__key__": f"{key:04d}".encode(), "png": encode_png(PICTURES[key])} for key in keys]
        write_shard(folder / f"{shard:05d}.tar", records)
    return folder


def arguments(shards: Path, output: Path, **settings: object) -> list[str]:
    small = {
        "resolution": 32,
        "batch_size": 8,
        "model.latent_channels": 3,
        "model.block_channels": "[8,8,8]",
        "model.layers_per_block": 1,
        "model.norm_groups": 4,
        "model.mid_attention": "false",
        "optim.learning_rate": 5e-3,
        "optim.warmup_steps": 2,
        "optim.steps": 12,
        "log_interval_steps": 3,
        "state_interval_steps": 4,
        "device": "cpu",
    }
    return [f"inputs=[{shards}]", f"output={output}", *(f"{k}={v}" for k, v in (small | settings).items())]


def refusal(argv: list[str]) -> str:
    """Return the message with which the program refuses, and take down the process group it leaves (it would exit)."""
    with pytest.raises((ValueError, OSError)) as caught:
        main(argv)
    if dist.is_initialized():
        dist.destroy_process_group()
    return str(caught.value)


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_moments_and_pixels_have_the_stated_shapes_and_ranges(vae):
    pixels = torch.from_numpy(to_unit(PICTURES[:2]))
    encoded = moments(vae, pixels)
    assert TINY.stride == 4 and encoded.shape == (2, 6, 8, 8) and encoded.dtype == torch.float32
    wild = moments(vae, 1e6 * torch.randn(2, 3, 32, 32))[:, 3:]
    assert wild.min() >= -30 and wild.max() <= 20
    assert decode(vae, sample_latents(encoded, torch.zeros(2, 3, 8, 8))).shape == pixels.shape


def test_a_latent_is_mean_plus_deviation_times_noise():
    mean, deviation, noise = torch.randn(2, 3, 4, 4), torch.rand(2, 3, 4, 4) + 0.1, torch.randn(2, 3, 4, 4)
    drawn = sample_latents(torch.cat([mean, 2 * deviation.log()], dim=1).half(), noise)
    assert drawn.dtype == torch.float32
    torch.testing.assert_close(drawn, mean + deviation * noise, rtol=5e-3, atol=5e-3)


def test_whitening_centres_scales_and_can_be_undone():
    latents = torch.randn(64, 3, 8, 8) * torch.tensor([0.1, 2.0, 30.0])[:, None, None] + 5
    stats = LatentStats(latents.mean((0, 2, 3)), latents.std((0, 2, 3)))
    white = stats.whiten(latents)
    torch.testing.assert_close(white.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(white.std((0, 2, 3)), torch.ones(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(stats.unwhiten(white), latents, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("std", [[1.0, 0.0], [1.0, float("nan")], [1.0]])
def test_statistics_that_cannot_whiten_are_refused(std):
    with pytest.raises(ValueError, match="expected"):
        LatentStats(torch.zeros(2), torch.tensor(std))


def test_the_loss_is_squared_error_plus_weighted_kl():
    pixels, reconstruction = torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8, 8)
    mean, logvar = torch.randn(2, 4, 2, 2), torch.randn(2, 4, 2, 2)
    config = VaeLossConfig(kl_weight=0.1, edge_weight=0.5)
    parts = vae_loss(config, pixels, reconstruction, torch.cat([mean, logvar], dim=1), step=1)
    normal = torch.distributions.Normal
    posterior = normal(mean, (0.5 * logvar).exp())
    kl = torch.distributions.kl_divergence(posterior, normal(torch.zeros(()), torch.ones(()))).sum() / (2 * 3 * 8 * 8)
    torch.testing.assert_close(parts["kl"], kl)
    torch.testing.assert_close(parts["pixel_error"], torch.nn.functional.mse_loss(reconstruction, pixels))
    expected = parts["pixel_error"] + 0.5 * parts["edge_error"] + 0.1 * parts["kl"]
    torch.testing.assert_close(parts["loss"], expected)
    exact = vae_loss(config, pixels, pixels + 0.3, torch.zeros(2, 8, 2, 2), step=1)
    assert exact["edge_error"] < 1e-12 and exact["kl"] == 0


def test_the_kl_weight_rises_linearly_and_stays():
    config = VaeLossConfig(kl_weight=0.2, kl_warmup_steps=4)
    assert [config.kl_weight_at(step) for step in (1, 2, 4, 9)] == pytest.approx([0.05, 0.1, 0.2, 0.2])
    assert VaeLossConfig(kl_weight=0.2).kl_weight_at(1) == 0.2


def test_the_hash_names_weights_and_structure_not_the_folder(vae, tmp_path):
    vae.save_pretrained(tmp_path / "a")
    assert vae_hash(load_vae(tmp_path / "a")) == vae_hash(vae)
    load_vae(tmp_path / "a").save_pretrained(tmp_path / "b")
    assert vae_hash(load_vae(tmp_path / "b")) == vae_hash(vae)
    before = vae_hash(vae)
    with torch.no_grad():
        vae.decoder.conv_out.bias[0] += 1e-6
    assert vae_hash(vae) != before


def test_a_folder_without_a_vae_is_refused_clearly(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such folder.*train\.vae"):
        load_vae(tmp_path / "missing")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="not an AutoencoderKL"):
        load_vae(tmp_path)


def test_training_lowers_the_loss_and_writes_what_diffusers_loads(shards, tmp_path, capsys):
    output = tmp_path / "vae"
    argv = arguments(shards, output, **{"optim.steps": 40, "heldout": f"[{shards / '00001.tar'}]"})
    assert main(argv) is None
    assert sorted(path.name for path in output.iterdir()) == [
        "config.json", "diffusion_pytorch_model.safetensors", "metrics.jsonl", "vae.json"
    ]  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == ["vae"]
    losses = [row["pixel_error"] for row in rows(output)]
    assert losses[-1] < 0.5 * losses[0]
    summary = json.loads((output / "vae.json").read_text())
    assert summary["steps"] == 40 and summary["measured_on"] == "20 held-out pictures"
    loaded = load_vae(output)
    assert vae_hash(loaded) == summary["hash"] and loaded.config.scaling_factor == 1.0
    with torch.no_grad():
        pixels = torch.from_numpy(to_unit(PICTURES[20:]))
        error = (decode(loaded, moments(loaded, pixels)[:, :3]).clamp(-1, 1) - pixels).abs().mean().item()
    assert error == pytest.approx(summary["absolute_error"], abs=1e-4)

    main(argv)
    assert "reusing" in capsys.readouterr().out


def test_a_killed_run_goes_on_and_ends_with_the_same_bits(shards, tmp_path, capsys):
    main(arguments(shards, tmp_path / "whole"))
    argv = arguments(shards, tmp_path / "cut")
    process = subprocess.Popen([sys.executable, "-m", "train.vae", *argv])
    state = tmp_path / "cut.partial" / "state.pt"
    deadline = time.monotonic() + 120
    while not state.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert state.exists() and not (tmp_path / "cut").exists()
    main(argv)
    assert "going on from step" in capsys.readouterr().out
    hashes = [json.loads((tmp_path / name / "vae.json").read_text())["hash"] for name in ("whole", "cut")]
    assert hashes[0] == hashes[1]
    assert [row["step"] for row in rows(tmp_path / "cut")] == [3, 6, 9, 12]


def test_a_stop_signal_saves_at_once(shards, tmp_path):
    argv = arguments(shards, tmp_path / "vae", **{"optim.steps": 100_000, "state_interval_steps": 100_000})
    process = subprocess.Popen([sys.executable, "-m", "train.vae", *argv])
    metrics = tmp_path / "vae.partial" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not metrics.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 75
    state = torch.load(tmp_path / "vae.partial" / "state.pt", weights_only=True)
    assert state["step"] >= 3


def test_two_ranks_train_as_one(shards, tmp_path):
    main(arguments(shards, tmp_path / "one", batch_size=5))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    subprocess.run([*launcher, "train.vae", *arguments(shards, tmp_path / "two", batch_size=5)], check=True)
    for one, two in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        for name in ("loss", "pixel_error", "kl", "grad_norm"):
            assert one[name] == pytest.approx(two[name], rel=1e-3)


def test_other_settings_train_anew(shards, tmp_path, capsys):
    main(arguments(shards, tmp_path / "vae", **{"optim.steps": 1}))
    main(arguments(shards, tmp_path / "vae", **{"optim.steps": 2}))
    assert "was made with another optim; making it anew" in capsys.readouterr().out
    assert json.loads((tmp_path / "vae/vae.json").read_text())["steps"] == 2


def test_bad_pictures_are_skipped_by_name_and_too_many_stop(shards, tmp_path, capsys):
    records = [{"__key__": f"{key:04d}".encode(), "png": encode_png(PICTURES[key])} for key in range(24)]
    records[7]["png"] = b"not a picture"
    del records[9]["png"]
    records[9]["txt"] = b"a caption alone"
    write_shard(tmp_path / "bad.tar", records)
    argv = arguments(tmp_path / "bad.tar", tmp_path / "vae", **{"optim.steps": 1})
    assert re.search(r"2 of 24 records are bad.*max_bad_fraction", refusal(argv))
    main([*argv, "max_bad_fraction=0.1"])
    printed = capsys.readouterr().out
    assert "bad.tar/0007: undecodable picture" in printed and "bad.tar/0009: no picture" in printed
    assert json.loads((tmp_path / "vae/vae.json").read_text())["pictures"] == 22


def test_bad_input_is_refused_with_a_message(shards, tmp_path):
    (tmp_path / "empty").mkdir()
    for argv, words in (
        (arguments(tmp_path / "empty", tmp_path / "v"), r"no \.tar files"),
        (arguments(tmp_path / "nowhere", tmp_path / "v"), "does not exist"),
        (arguments(shards, tmp_path / "v", resolution=30), "multiple of the stride 4"),
        (arguments(shards, tmp_path / "v", **{"model.norm_groups": 3}), "multiple of norm_groups"),
        (arguments(shards, shards), r"was not made by train\.vae"),
        (arguments(shards, Path("/proc/vae")), "cannot write there"),
    ):
        assert re.search(words, refusal(argv)), words
