"""The VAE's border is as stated, its loss and whitening are the closed forms; what is no VAE is refused by name."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.autoencoders import KL, load_latent_space, vae_hash
from model.latent_space import LatentStats, to_raw
from model.vae import VaeConfig, VaeLossConfig, build_vae, decode, moments, vae_loss

TINY = VaeConfig(latent_channels=3, block_channels=(8, 8, 8), layers_per_block=1, norm_groups=4, mid_attention=False)


@pytest.fixture
def vae():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build_vae(TINY).eval()


def test_moments_and_pixels_have_the_stated_shapes_and_ranges(vae):
    pixels = 2 * torch.rand(2, 3, 32, 32) - 1
    encoded = moments(vae, pixels)
    assert TINY.stride == 4 and encoded.shape == (2, 6, 8, 8) and encoded.dtype == torch.float32
    wild = moments(vae, 1e6 * torch.randn(2, 3, 32, 32))[:, 3:]
    assert wild.min() >= -30 and wild.max() <= 20
    assert decode(vae, to_raw(encoded, torch.zeros(2, 3, 8, 8))).shape == pixels.shape


def test_a_latent_is_mean_plus_deviation_times_noise():
    mean, deviation, noise = torch.randn(2, 3, 4, 4), torch.rand(2, 3, 4, 4) + 0.1, torch.randn(2, 3, 4, 4)
    drawn = to_raw(torch.cat([mean, 2 * deviation.log()], dim=1).half(), noise)
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
    stats = KL(vae).stated_stats()
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
        KL(vae).stated_stats()


@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_the_stride_of_a_loaded_vae_is_pixels_a_cell(blocks):
    loaded = build_vae(VaeConfig(block_channels=(4,) * blocks, layers_per_block=1, norm_groups=2, mid_attention=False))
    cells = moments(loaded, torch.zeros(1, 3, 16, 16)).shape[-1]
    assert KL(loaded).stride == 16 / cells == 2 ** (blocks - 1)


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


def test_the_kl_weight_rises_linearly_and_stays():
    config = VaeLossConfig(kl_weight=0.2, kl_warmup_steps=4)
    assert [config.kl_weight_at(step) for step in (1, 2, 4, 9)] == pytest.approx([0.05, 0.1, 0.2, 0.2])
    assert VaeLossConfig(kl_weight=0.2).kl_weight_at(1) == 0.2


def test_the_hash_names_weights_and_structure_not_the_folder(vae, tmp_path):
    vae.save_pretrained(tmp_path / "a")
    assert load_latent_space(tmp_path / "a").hash == vae_hash(vae)
    load_latent_space(tmp_path / "a").module.save_pretrained(tmp_path / "b")
    assert load_latent_space(tmp_path / "b").hash == vae_hash(vae)
    before = vae_hash(vae)
    with torch.no_grad():
        vae.decoder.conv_out.bias[0] += 1e-6
    assert vae_hash(vae) != before


def test_a_folder_without_a_vae_is_refused_clearly(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such folder.*train\.vae"):
        load_latent_space(tmp_path / "missing")
    file = tmp_path / "vae.safetensors"
    file.write_bytes(b"")
    with pytest.raises(ValueError, match=r"is a file, expected a folder.*from_single_file"):
        load_latent_space(file)
    with pytest.raises(ValueError, match=r"holds \['vae.safetensors'\], expected an autoencoder"):
        load_latent_space(tmp_path)
    for config, words in [("{}", r"holds \['config.json', 'vae.saf"), ("[]", "of class list"), ("{", "is not JSON")]:
        (tmp_path / "config.json").write_text(config)
        with pytest.raises(ValueError, match=words):
            load_latent_space(tmp_path)


@pytest.mark.parametrize("name", ["runs/vae", "here/vae", "vae", "./owner/name", "owner/name/vae", "/owner", "~/vae"])
def test_what_looks_like_a_path_is_no_question_to_the_hub(name, tmp_path, monkeypatch):
    """Nor is the default output of train.vae: somebody else may have a repository of that name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    with pytest.raises(FileNotFoundError, match=f"^vae={name}: no such folder; make one with `python -m train.vae`"):
        load_latent_space(name)


@pytest.mark.parametrize("subfolder", ["", "vae"])
def test_a_hub_id_is_loaded_from_the_hub(vae, subfolder, tmp_path, monkeypatch):
    """By the hub's own cache, without a network: a VAE's repository, and a pipeline's."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--owner--name"
    vae.save_pretrained(repository / "snapshots" / ("0" * 40) / subfolder)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    assert load_latent_space("owner/name").hash == vae_hash(vae)
    with pytest.raises(ValueError, match=r"vae=owner/other is not in this .* cache .* hub cannot be reached: download"):
        load_latent_space("owner/other")


def test_a_pipelines_vae_and_weights_of_one_variant_are_taken(vae, tmp_path):
    vae.save_pretrained(tmp_path / "pipeline" / "vae", variant="fp16")
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    assert load_latent_space(tmp_path / "pipeline").hash == vae_hash(vae)
    vae.save_pretrained(tmp_path / "shards", variant="fp16", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").iterdir())) > 3
    assert load_latent_space(tmp_path / "shards").hash == vae_hash(vae)
    vae.save_pretrained(tmp_path / "pipeline" / "vae", variant="ema")
    with pytest.raises(ValueError, match=r"holds weights of \['ema', 'fp16'\]; copy the one you want to diffusion_py"):
        load_latent_space(tmp_path / "pipeline")
    vae.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model.bin.*pickled.*use_safetensors=False\)\.save_pre"):
        load_latent_space(tmp_path / "pickled")


def test_a_model_of_another_class_is_named(tmp_path):
    from diffusers import AutoencoderKLTemporalDecoder, VQModel

    blocks = {"block_out_channels": (32,), "down_block_types": ("DownEncoderBlock2D",)}
    for other in (VQModel(block_out_channels=(32,)), AutoencoderKLTemporalDecoder(**blocks)):
        other.save_pretrained(tmp_path / type(other).__name__)
        with pytest.raises(ValueError, match=f"a model of class {type(other).__name__}, expected AutoencoderKL"):
            load_latent_space(tmp_path / type(other).__name__)


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
            load_latent_space(tmp_path)
    save_file(whole, path, metadata={"format": "pt"})
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match="not an autoencoder in safetensors"):
        load_latent_space(tmp_path)
