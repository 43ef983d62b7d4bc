"""P1: the presets are the published recipe, number by number (Zhou et al. 2024); what goes beyond it is off."""

from pathlib import Path

import pytest
import torch

from model.diffusion import DiffusionConfig
from model.sampler_config import SamplerConfig
from model.transformer import SIZES as TRUNKS
from model.vae import VaeConfig, VaeLossConfig, build_vae
from train.config import load_config
from train.distributed.parallelize import ParallelConfig
from train.optim.optimizer import OptimConfig, learning_rate
from train.planning.estimate import parameters
from train.planning.rehearsal import planned_model
from train.pretrain_config import PretrainConfig
from train.sample import SampleConfig
from train.vae_training import VaeTrainConfig

PAPER = Path(__file__).parents[1] / "configs" / "paper"
SIZES = {  # layers, width, heads; and the parameters of the blocks in Llama's form
    "0.16b": (16, 768, 12, 113e6),
    "0.37b": (24, 1024, 16, 308e6),
    "0.76b": (24, 1536, 24, 680e6),
    "1.4b": (24, 2048, 16, 1.23e9),
    "7b": (32, 4096, 32, 6.48e9),
}


def preset(name: str, *more: str) -> PretrainConfig:
    return load_config(PretrainConfig, [f"config={PAPER / name}.yaml", *more])


@pytest.mark.parametrize("name", SIZES)
def test_a_presets_model_is_the_papers(name: str) -> None:
    model = preset(name).model
    trunk = model.transformer
    assert (trunk.layers, trunk.width, trunk.heads, trunk.num_kv_heads) == (*SIZES[name][:3], trunk.heads)
    assert trunk == TRUNKS[name]
    assert (model.patches, model.patch_size, model.latent_channels) == ("linear", 2, 8)
    assert model.image_attention == "bidirectional"
    assert not (trunk.rope_2d or trunk.qk_norm or model.timestep_after_patches)
    assert preset(name).parallel == ParallelConfig(compile=True)  # recomputation: what the memory of the GPUs asks for


@pytest.mark.parametrize("name", SIZES)
def test_a_presets_recipe_is_the_papers(name: str) -> None:
    config = preset(name)
    assert config.optim == OptimConfig(
        learning_rate=3e-4,
        min_learning_rate=1.5e-5,
        warmup_steps=4000,
        steps=250_000,
        beta1=0.9,
        beta2=0.95,
        eps=1e-8,
        weight_decay=0.1,
        clip_norm=1.0,
        ema_half_lives=(),
    )
    rates = [learning_rate(step, config.optim) for step in (2000, 4000, 250_000)]
    assert rates == pytest.approx([1.5e-4, 3e-4, 1.5e-5])
    assert config.data.sequence_length == 4096
    assert config.data.lanes * config.data.sequence_length == 2 * 2**20  # 2M tokens a batch, 0.5T in all
    assert config.loss.image_weight == 5.0
    assert config.data.order.caption_first == 0.8
    assert config.data.image_share == 0.5
    assert config.diffusion == DiffusionConfig(
        num_timesteps=1000,
        prediction="eps",
        timestep_sampling="uniform",
        before_caption_max_timestep=None,  # 500 is table 8's ablation, whose baseline is table 7's column
        min_snr_gamma=None,
    )


def test_the_large_run_is_4m_tokens_and_500k_steps() -> None:
    header = (PAPER / "7b.yaml").read_text()
    more = header.split("The paper's large run, 2T tokens, 4M a batch: add ")[1].splitlines()[0].split()
    config = preset("7b", *more)
    assert config.data.lanes * config.data.sequence_length == 4 * 2**20
    assert config.optim.steps == 500_000
    assert config.model.patches == "unet"  # 7.3B


def test_pictures_are_drawn_in_250_steps_with_guidance_5_and_3() -> None:
    sample = load_config(SampleConfig, [f"config={PAPER / 'sample.yaml'}"])
    assert (sample.sampler, sample.steps, sample.guidance, sample.clip_x0) == ("ddpm", 250, 5.0, None)
    ablations = SamplerConfig()
    assert (ablations.suited_to(DiffusionConfig()).sampler, ablations.steps, ablations.guidance) == ("ddpm", 250, 3.0)


@pytest.mark.parametrize("name", SIZES)
def test_the_plan_counts_parameters_by_part(name: str) -> None:
    """The U-Net's are 0.27B within a twentieth at every size; linear patches are next to nothing."""
    counts = {}
    for patches in ("linear", "unet"):
        counts[patches] = parameters(planned_model(preset(name, f"model.patches={patches}"), 32_002))
        parts = {"embeddings", "blocks", "patches", "heads"}
        assert counts[patches].keys() == {"total", *parts}
        assert counts[patches]["total"] == sum(counts[patches][part] for part in parts)
    linear, unet = counts["linear"], counts["unet"]
    width = SIZES[name][1]
    assert linear["embeddings"] == linear["heads"] == 32_064 * width  # the next multiple of 64, for GPUs
    assert linear["blocks"] == pytest.approx(SIZES[name][3], rel=0.02)
    assert linear["patches"] < 0.005 * linear["total"]
    assert unet["patches"] == pytest.approx(0.27e9, rel=0.05)
    assert all(unet[part] == linear[part] for part in ("embeddings", "blocks", "heads"))


def test_the_paper_vae_is_the_papers() -> None:
    """Every number of the preset, and 83.7M parameters where the paper counts 86M."""
    config = load_config(VaeTrainConfig, [f"config={PAPER / 'vae.yaml'}", "inputs=[/data]"])
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
        count = sum(parameter.numel() for parameter in build_vae(config.model).parameters())
    assert count == 83_709_419
