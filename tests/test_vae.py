"""The VAE's border is as stated, its loss and whitening are the closed forms, and its training resumes exactly."""

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
from safetensors.torch import load_file, save_file

from bench.ranks import ProgramRanks
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
    stated_stats,
    stride_of,
    vae_hash,
    vae_loss,
)
from tests.runs import rows, wait_for
from tests.test_perceptual import random_weights
from train.config import load_config
from train.optim.optimizer import OptimConfig, learning_rate
from train.vae import main
from train.vae_loss import VaeLoss
from train.vae_training import VaeTrainConfig, VaeTraining

PAPER = Path(__file__).parents[1] / "configs/paper/vae.yaml"
TINY = VaeConfig(latent_channels=3, block_channels=(8, 8, 8), layers_per_block=1, norm_groups=4, mid_attention=False)
PICTURES = np.stack([training_example(make_splits(0), index, 32, 0.15).picture for index in range(40)])


@pytest.fixture(autouse=True, scope="module")
def one_thread_a_process(one_thread):
    """Fix the number of threads, on which bits depend, before any run that tests share."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


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


# What a VAE's config can state, and the formula that diffusers' pipelines make of it, for latents of 3 channels.
SCALINGS = [
    ({"scaling_factor": 0.18215}, lambda z: z * 0.18215),
    ({"scaling_factor": 1.5305, "shift_factor": 0.0609}, lambda z: (z - 0.0609) * 1.5305),
    (
        {"scaling_factor": 0.5, "shift_factor": 7.0, "latents_mean": [0.1, -2.0, 3.0], "latents_std": [0.5, 1.0, 4.0]},
        lambda z: (z - torch.tensor([[[0.1]], [[-2.0]], [[3.0]]])) * 0.5 / torch.tensor([[[0.5]], [[1.0]], [[4.0]]]),
    ),
    ({"scaling_factor": 1.0}, lambda z: z),
]


@pytest.mark.parametrize(("stated", "formula"), SCALINGS)
def test_whitening_by_what_the_vae_states_is_diffusers_formula(vae, stated, formula):
    vae.register_to_config(**stated)
    latents = 5 * torch.randn(2, 3, 4, 4)
    stats = stated_stats(vae)
    torch.testing.assert_close(stats.whiten(latents), formula(latents))
    torch.testing.assert_close(stats.unwhiten(formula(latents)), latents)


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"scaling_factor": 0.0}, r"states scaling_factor=0\.0, .*expected scaling_factor > 0; correct its config"),
        ({"scaling_factor": None}, "states scaling_factor=None"),
        ({"latents_mean": [0.0, 0.0, 0.0]}, "expected latents_mean and latents_std, or neither"),
        ({"latents_mean": [0.0], "latents_std": [1.0]}, r"expected 3 channels.*or use latent_stats=measured"),
        ({"latents_mean": [0.0, 0.0, 0.0], "latents_std": [1.0, 0.0, 1.0]}, "expected finite and std > 0"),
        ({"shift_factor": "much"}, "states .*shift_factor=much"),
    ],
)
def test_a_stated_scaling_that_cannot_scale_is_refused(vae, stated, message):
    vae.register_to_config(**stated)
    with pytest.raises(ValueError, match=message):
        stated_stats(vae)


@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_the_stride_of_a_loaded_vae_is_pixels_a_cell(blocks):
    loaded = build_vae(VaeConfig(block_channels=(4,) * blocks, layers_per_block=1, norm_groups=2, mid_attention=False))
    cells = moments(loaded, torch.zeros(1, 3, 16, 16)).shape[-1]
    assert stride_of(loaded) == 16 / cells == 2 ** (blocks - 1)


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


def test_every_part_enters_the_loss_with_its_weight():
    pixels, reconstruction, encoded = torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8, 8), torch.randn(2, 8, 2, 2)
    lpips, scores = torch.tensor([0.2, 0.4]), torch.randn(2, 1, 3, 3)
    perceptual = {"lpips_weight": 0.7, "lpips_weights": "file", "gan_weight": 0.5, "gan_start_step": 4}
    config = VaeLossConfig(pixel_loss="absolute", kl_weight=0.1, **perceptual)
    networks = {"lpips": lpips, "fake_scores": scores}
    late, early = (vae_loss(config, pixels, reconstruction, encoded, step, **networks) for step in (4, 3))
    torch.testing.assert_close(late["pixel_error"], torch.nn.functional.l1_loss(reconstruction, pixels))
    without_gan = late["pixel_error"] + 0.1 * late["kl"] + 0.7 * 0.3
    torch.testing.assert_close(late["loss"], without_gan - 0.5 * scores.mean())
    torch.testing.assert_close(early["loss"], without_gan)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"id_weight": 0.2}, r"loss\.id_weight=0\.2: the MoCo v2 identity term is not .*set loss\.id_weight=0"),
        ({"lpips_weight": 1.0}, r"lpips_weight=1\.0, but lpips_weights is not given.*set lpips_weight=0"),
        ({"lpips_weight": -1.0}, r"lpips_weight=-1\.0: expected 0 or more"),
        ({"gan_weight": -0.5}, r"gan_weight=-0\.5: expected 0 or more"),
        ({"gan_start_step": -1}, r"gan_start_step=-1: expected 0 or more"),
        ({"gan_channels": 12}, r"gan_channels=12: expected a multiple of 8"),
        ({"gan_learning_rate": 0.0}, r"gan_learning_rate=0\.0: expected more than 0"),
        ({"kl_weight": 0.0}, r"kl_weight=0\.0: expected more than 0"),
    ],
)
def test_weights_that_are_no_loss_are_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        VaeLossConfig(**settings)


def test_the_paper_vae_is_the_papers():
    """P1: every number of the preset, and 83.7M parameters where the paper counts 86M."""
    config = load_config(VaeTrainConfig, [f"config={PAPER}", "inputs=[/data]"])
    assert config.model == VaeConfig(
        latent_channels=8, block_channels=(128, 256, 512, 512), layers_per_block=2, norm_groups=32, mid_attention=True
    )
    assert config.resolution == 256 and config.model.stride == 8  # 32x32x8
    assert config.loss == VaeLossConfig(
        pixel_loss="absolute",
        kl_weight=1e-6,
        kl_warmup_steps=0,
        edge_weight=0.0,
        lpips_weight=1.0,
        lpips_weights="runs/paper/lpips_vgg16.safetensors",
        gan_weight=0.5,
        gan_start_step=50_000,
        gan_channels=64,
        gan_learning_rate=None,
        id_weight=0.0,  # the paper: 0.2
    )
    assert (config.loss.gan_weight_at(49_999), config.loss.gan_weight_at(50_000)) == (0.0, 0.5)
    assert config.optim == OptimConfig(
        learning_rate=1e-4, min_learning_rate=1e-6, warmup_steps=1000, steps=1_000_000,
        beta1=0.5, beta2=0.9, weight_decay=0.0,
    )  # fmt: skip
    assert (config.batch_size, config.seed) == (96, 0)
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in build_vae(config.model).parameters())
    assert parameters == 83_709_419


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
    file = tmp_path / "vae.safetensors"
    file.write_bytes(b"")
    with pytest.raises(ValueError, match=r"is a file, expected a folder.*from_single_file"):
        load_vae(file)
    with pytest.raises(ValueError, match=r"holds \['vae.safetensors'\], expected an AutoencoderKL"):
        load_vae(tmp_path)
    for config, words in [("{}", r"holds \['config.json', 'vae.saf"), ("[]", "of class list"), ("{", "is not JSON")]:
        (tmp_path / "config.json").write_text(config)
        with pytest.raises(ValueError, match=words):
            load_vae(tmp_path)


@pytest.mark.parametrize("name", ["runs/vae", "here/vae", "vae", "./owner/name", "owner/name/vae", "/owner", "~/vae"])
def test_what_looks_like_a_path_is_no_question_to_the_hub(name, tmp_path, monkeypatch):
    """Nor is the default output of train.vae: somebody else may have a repository of that name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    with pytest.raises(FileNotFoundError, match=f"^vae={name}: no such folder; make one with `python -m train.vae`"):
        load_vae(name)


@pytest.mark.parametrize("subfolder", ["", "vae"])
def test_a_hub_id_is_loaded_from_the_hub(vae, subfolder, tmp_path, monkeypatch):
    """By the hub's own cache, without a network: a VAE's repository, and a pipeline's."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--owner--name"
    vae.save_pretrained(repository / "snapshots" / ("0" * 40) / subfolder)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    assert vae_hash(load_vae("owner/name")) == vae_hash(vae)
    with pytest.raises(ValueError, match=r"vae=owner/other: not an AutoencoderKL in safetensors: .*owner/other"):
        load_vae("owner/other")


def test_a_pipelines_vae_and_weights_of_one_variant_are_taken(vae, tmp_path):
    vae.save_pretrained(tmp_path / "pipeline" / "vae", variant="fp16")
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    assert vae_hash(load_vae(tmp_path / "pipeline")) == vae_hash(vae)
    vae.save_pretrained(tmp_path / "shards", variant="fp16", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").iterdir())) > 3
    assert vae_hash(load_vae(tmp_path / "shards")) == vae_hash(vae)
    vae.save_pretrained(tmp_path / "pipeline" / "vae", variant="ema")
    with pytest.raises(ValueError, match=r"holds weights of \['ema', 'fp16'\]; copy the one you want to diffusion_py"):
        load_vae(tmp_path / "pipeline")
    vae.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model.bin.*pickled.*use_safetensors=False\)\.save_pre"):
        load_vae(tmp_path / "pickled")


def test_a_model_of_another_class_is_named(tmp_path):
    from diffusers import AutoencoderKLTemporalDecoder, VQModel

    blocks = {"block_out_channels": (32,), "down_block_types": ("DownEncoderBlock2D",)}
    for other in (VQModel(block_out_channels=(32,)), AutoencoderKLTemporalDecoder(**blocks)):
        other.save_pretrained(tmp_path / type(other).__name__)
        with pytest.raises(ValueError, match=f"a model of class {type(other).__name__}, expected AutoencoderKL"):
            load_vae(tmp_path / type(other).__name__)


def test_weights_that_do_not_fit_the_config_are_refused_by_name_and_never_drawn(vae, tmp_path):
    vae.save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    whole = {name: tensor.clone() for name, tensor in load_file(path).items()}
    bias = "decoder.conv_out.bias"
    lacking = {name: tensor for name, tensor in whole.items() if name != bias}
    cases = [
        (lacking, f"do not match its config.json: {bias} is missing; restore"),
        ({**whole, "more": whole[bias].clone()}, "more is not in the model"),
        ({**whole, bias: torch.zeros(5)}, rf"size mismatch for {bias}"),
        ({name: tensor for name, tensor in whole.items() if "encoder" in name}, r"and \d+ more"),
    ]
    for weights, words in cases:
        save_file(weights, path, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=words):
            load_vae(tmp_path)
    save_file(whole, path, metadata={"format": "pt"})
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match="not an AutoencoderKL in safetensors"):
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


def test_the_saved_vae_holds_nothing_of_its_losss_networks(whole, vae):
    assert load_vae(whole).state_dict().keys() == vae.state_dict().keys()
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
