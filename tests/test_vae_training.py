"""The VAE's training: every part of the loss, skipped pictures, refusals; a killed run resumes with the same bits."""

import json
import re
import shutil
import signal
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from bench.ranks import ProgramRanks
from data.pictures import encode_png, to_unit
from data.scenes import make_splits, training_example
from data.shards import write_shard
from model.autoencoders import load_latent_space, vae_hash
from model.vae import VaeLossConfig, decode, moments
from tests.runs import rows, wait_for
from tests.test_perceptual import random_weights
from train.optim.optimizer import OptimConfig, learning_rate
from train.vae import main
from train.vae_loss import VaeLoss
from train.vae_training import VaeTraining

PICTURES = np.stack([training_example(make_splits(0), index, 32, 0.15).picture for index in range(40)])


@pytest.fixture(autouse=True, scope="module")
def one_thread_a_process(one_thread):
    """Fix the number of threads, on which bits depend, before any run that tests share."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for shard in range(2):
        keys = range(shard * 20, shard * 20 + 20)
        records = [{"__key__": f"{key:04d}".encode(), "png": encode_png(PICTURES[key])} for key in keys]
        write_shard(folder / f"{shard:05d}.tar", records)
    return folder


@pytest.fixture(scope="module")
def vgg16(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("vgg") / "vgg16.safetensors"
    save_file({name: tensor.half() for name, tensor in random_weights().items()}, path)
    return path


def every_part(vgg16: Path) -> dict[str, object]:
    """Settings of a run whose loss has all parts, the discriminator from the third update on."""
    return {
        "resolution": 24,
        "batch_size": 3,
        "optim.steps": 10,
        "optim.learning_rate": 2e-4,  # higher, and Adam makes 1e-3 of the float's last digits
        "loss.pixel_loss": "absolute",
        "loss.lpips_weight": 1.0,
        "loss.lpips_weights": vgg16,
        "loss.gan_weight": 0.5,
        "loss.gan_start_step": 3,
        "loss.gan_learning_rate": 1e-4,
        "loss.gan_channels": 8,
    }


@pytest.fixture(scope="module")
def whole(shards, vgg16, tmp_path_factory) -> Path:
    """An undisturbed run with every part of the loss."""
    output = tmp_path_factory.mktemp("whole") / "vae"
    main(arguments(shards, output, **every_part(vgg16)))
    return output


def arguments(shards: Path | str, output: Path, **settings: object) -> list[str]:
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
    loaded = load_latent_space(output).module
    assert vae_hash(loaded) == summary["hash"] and loaded.config.scaling_factor == 1.0
    with torch.no_grad():
        pixels = torch.from_numpy(to_unit(PICTURES[20:]))
        error = (decode(loaded, moments(loaded, pixels)[:, :3]).clamp(-1, 1) - pixels).abs().mean().item()
    assert error == pytest.approx(summary["absolute_error"], abs=1e-4)

    main(argv)
    assert "reusing" in capsys.readouterr().out


def test_a_killed_run_resumes_and_ends_with_the_same_bits(shards, vgg16, whole, tmp_path, capsys):
    """With every part of the loss; the metrics say so, because they are bits of all networks and optimizers."""
    argv = arguments(shards, tmp_path / "cut", **every_part(vgg16))
    state = tmp_path / "cut.partial" / "state.pt"
    with ProgramRanks(main, argv, None, tmp_path / "log") as run:
        wait_for(state.exists, run, 120)
        run.signal(signal.SIGKILL)
        run.wait()
    assert state.exists() and not (tmp_path / "cut").exists()
    assert torch.load(state, weights_only=True)["loss"]["adamw"]["state"]  # the discriminator was under way
    main(argv)
    assert "resuming from step" in capsys.readouterr().out
    hashes = [json.loads((folder / "vae.json").read_text())["hash"] for folder in (whole, tmp_path / "cut")]
    assert hashes[0] == hashes[1]
    expected, found = (
        [{name: value for name, value in row.items() if name != "seconds"} for row in rows(folder)]
        for folder in (whole, tmp_path / "cut")
    )
    assert found == expected and [row["step"] for row in found] == [3, 6, 9, 10]


def test_metrics_show_every_part_that_is_active(shards, whole, tmp_path):
    always = {"step", "loss", "pixel_error", "edge_error", "kl", "grad_norm", "learning_rate", "seconds"}
    adversarial = {"gan", "discriminator_loss", "discriminator_grad_norm"}
    for row in rows(whole):
        assert row.keys() == always | {"lpips"} | adversarial
        weighed = row["pixel_error"] + row["lpips"] + 0.5 * row["gan"] + 1e-3 * row["kl"]
        assert row["loss"] == pytest.approx(weighed, rel=1e-5) and row["discriminator_loss"] > 0
    main(arguments(shards, tmp_path / "plain", **{"optim.steps": 1}))
    assert rows(tmp_path / "plain")[0].keys() == always


def test_the_discriminator_starts_at_its_step_and_not_before(shards, tmp_path, monkeypatch):
    """Its weights stay as drawn, and the VAE is that of a run without it, bit for bit, up to the step before."""
    settings = {"resolution": 24, "batch_size": 2, "optim.steps": 5, "log_interval_steps": 1, "loss.gan_channels": 8}
    seen: list[tuple[int, dict]] = []

    def remember(training, pictures, update=VaeTraining._update):
        measured = update(training, pictures)
        state = training.loss.state_dict().get("discriminator", {})
        seen.append((training.step, {name: tensor.clone() for name, tensor in state.items()}))
        return measured

    monkeypatch.setattr(VaeTraining, "_update", remember)
    main(arguments(shards, tmp_path / "gan", **settings, **{"loss.gan_weight": 0.5, "loss.gan_start_step": 4}))
    weights = [state["layers.0.weight"] for _, state in seen]
    assert torch.equal(weights[0], weights[1]) and torch.equal(weights[1], weights[2])
    assert not torch.equal(weights[2], weights[3]) and not torch.equal(weights[3], weights[4])
    main(arguments(shards, tmp_path / "plain", **settings))
    with_gan, plain = rows(tmp_path / "gan"), rows(tmp_path / "plain")
    for name in ("gan", "discriminator_loss"):
        assert [name in row for row in with_gan] == 3 * [False] + 2 * [True]
    for name in ("loss", "pixel_error", "kl", "grad_norm"):
        assert [row[name] for row in with_gan[:3]] == [row[name] for row in plain[:3]]
    assert with_gan[3]["pixel_error"] == plain[3]["pixel_error"]  # the fourth update is the first with another gradient
    assert with_gan[3]["grad_norm"] != plain[3]["grad_norm"] and with_gan[4]["pixel_error"] != plain[4]["pixel_error"]


def test_the_discriminator_follows_its_own_peak_rate():
    optim = OptimConfig(learning_rate=1e-3, min_learning_rate=1e-4, warmup_steps=2, steps=10)
    config = VaeLossConfig(gan_weight=0.5, gan_channels=8, gan_learning_rate=2e-4)
    own = VaeLoss(config, optim, None, torch.device("cpu")).optimizer.config
    for step in (1, 2, 5, 10):
        assert learning_rate(step, own) == pytest.approx(0.2 * learning_rate(step, optim))


def test_the_saved_vae_holds_nothing_of_its_losss_networks(whole, vae_folder):
    ours, plain = (load_latent_space(folder).module.state_dict() for folder in (whole, vae_folder))
    assert ours.keys() == plain.keys()
    assert len(list(whole.iterdir())) == 4


def test_another_vgg16_in_the_same_file_trains_again(shards, vgg16, tmp_path, capsys):
    settings = every_part(vgg16) | {"optim.steps": 1, "loss.gan_weight": 0.0, "batch_size": 1}
    copy = tmp_path / "vgg16.safetensors"
    shutil.copy(vgg16, copy)
    argv = arguments(shards, tmp_path / "vae", **(settings | {"loss.lpips_weights": copy}))
    main(argv)
    assert f"LPIPS from {copy}, with its linear heads" in capsys.readouterr().out
    save_file({name: tensor.half() for name, tensor in random_weights(heads=False).items()}, copy)
    main(argv)
    printed = capsys.readouterr().out
    assert "without heads: every channel weighs 1" in printed and "was made with another lpips; making" in printed


def test_a_run_keeps_its_folder_to_itself_and_a_stop_signal_saves_at_once(shards, tmp_path):
    argv = arguments(shards, tmp_path / "vae", **{"optim.steps": 100_000, "state_interval_steps": 100_000})
    metrics = tmp_path / "vae.partial" / "metrics.jsonl"
    with ProgramRanks(main, argv, None, tmp_path / "log") as run:
        wait_for(metrics.exists, run, 120)
        assert re.search(r"vae\.partial is in use by pid \d+ .*give another folder", refusal(argv))  # a second copy
        run.signal(signal.SIGTERM)
        assert run.wait() == [75], run.output
    state = torch.load(tmp_path / "vae.partial" / "state.pt", weights_only=True)
    assert state["step"] >= 3


def test_two_ranks_train_as_one(shards, vgg16, whole, tmp_path):
    """With every part of the loss, and one picture on one rank, two on the other."""
    argv = arguments(shards, tmp_path / "two", **every_part(vgg16))
    with ProgramRanks(main, argv, 2, tmp_path / "log") as run:
        assert run.wait() == [0, 0], run.output
    for row, (one, two) in enumerate(zip(rows(whole), rows(tmp_path / "two"), strict=True)):
        assert one.keys() == two.keys()
        growth = 20 if row else 1  # of what rounding made different, by Adam's first steps of equal size
        for name in one.keys() - {"seconds"}:
            within = {"abs": 1e-4 * growth} if name == "gan" else {"rel": 1e-3 * growth}  # gan: scores of both signs
            assert one[name] == pytest.approx(two[name], **within), name


def test_other_settings_train_again(shards, tmp_path, capsys):
    main(arguments(shards, tmp_path / "vae", **{"optim.steps": 1}))
    main(arguments(shards, tmp_path / "vae", **{"optim.steps": 2}))
    assert "was made with another optim; making it again" in capsys.readouterr().out
    assert json.loads((tmp_path / "vae/vae.json").read_text())["steps"] == 2


def test_shards_may_be_urls(shards, tmp_path):
    store = fsspec.filesystem("memory")
    for path in shards.iterdir():
        store.pipe(f"/vae/{path.name}", path.read_bytes())
    main(arguments("memory://vae", tmp_path / "vae", **{"optim.steps": 1}))
    assert json.loads((tmp_path / "vae/vae.json").read_text())["pictures"] == 40


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
    (tmp_path / "page.tar").write_bytes(b"<!DOCTYPE html><title>404 Not Found</title>")
    argv[0] = f"inputs=[{tmp_path / 'bad.tar'},{tmp_path / 'page.tar'}]"
    assert "page.tar: no record; it is an HTML page" in refusal([*argv, "max_bad_fraction=0.1"])
    main([*argv, "max_bad_fraction=0.1", "max_failed_files=1"])
    assert "failed file" in capsys.readouterr().out


def test_bad_input_is_refused_with_a_message(shards, tmp_path):
    (tmp_path / "empty").mkdir()
    for given, words in (
        (f"inputs={tmp_path / 'empty'}", r"no \.tar files"),
        (f"inputs={tmp_path / 'nowhere'}", "does not exist"),
        ("resolution=30", "multiple of the stride 4"),
        ("optim.ema_half_lives=9", r"ema_half_lives=\(9,\).*no average"),
        ("optim.optimizer=muon", "optimizer=muon.*no blocks for Muon"),
        ("model.norm_groups=3", "multiple of norm_groups"),
        ("loss.id_weight=0.2", r"loss\.id_weight=0\.2: .* not implemented"),
        ("resolution=16 loss.gan_weight=0.5", "the loss needs 24 pixels"),
        (f"loss.lpips_weight=1 loss.lpips_weights={tmp_path / 'none'}", "lpips_weights=.*none: no such file; make it"),
        (f"output={shards}", r"was not made by train\.vae"),
        ("output=/proc/vae", "cannot write there"),
    ):
        assert re.search(words, refusal([*arguments(shards, tmp_path / "v"), *given.split()])), words
