"""Pictures per second: drawn by the sampler in batches of several sizes, and encoded by train.encode's encoder."""

import time
from pathlib import Path
from typing import Any, Literal, cast

import torch

from bench import sampling
from bench.gpu_ceiling import seconds
from bench.gpu_setting import Setting
from bench.loader import CHANNELS, GRID, make_pictures
from data.raw_document import RawDocument
from data.shards import BadRecords, write_shard
from model.diffusion import DiffusionConfig
from model.draws import SeededDraws
from model.sampler import Prompt, generate
from model.sampler_config import SamplerConfig
from model.transfusion import Transfusion, init_weights
from model.vae import VaeConfig, build_vae
from train.distributed.process import wait_for
from train.encoding.encoder import Encoder, EncoderConfig


def measure_sampling(setting: Setting, size: str, batches: list[int]) -> dict[str, Any]:
    """Return images/s by batch size, of pictures after captions of 64 tokens, with guidance."""
    device, dtype = torch.device(setting.device), torch.bfloat16 if setting.on_cuda else torch.float32
    steps = 50 if setting.on_cuda else 2
    with torch.device("meta"):
        model = Transfusion(setting.model(size), sampling.VOCAB)
    model.to_empty(device="cpu")
    init_weights(model, 0)
    model.to(device, dtype).eval()
    config = SamplerConfig(sampler="ddim", steps=steps, max_new_tokens=0, spacing="trailing")
    generator, found = torch.Generator().manual_seed(0), {}
    for rows in batches:
        captions = torch.randint(5, sampling.VOCAB, (rows, 64), generator=generator)
        prompts = [Prompt([caption], True, index) for index, caption in enumerate(captions)]
        taken = 0.0
        for _ in range(2):  # the first warms up
            wait_for(device)
            start = time.perf_counter()
            pictures = generate(model, prompts, config, DiffusionConfig(prediction="v"), sampling.SPECIAL, GRID,
                                SeededDraws(0))  # fmt: skip
            wait_for(device)
            taken = time.perf_counter() - start
        assert all(picture[0].isfinite().all() for picture in pictures)
        found[str(rows)] = rows / taken
    return {"size": size, "steps": steps, "images_per_s": found}


def measure_encoding(setting: Setting) -> dict[str, Any]:
    """Return pictures/s of decode, resize, encode and write with a VAE of the paper's size, and of the VAE alone."""
    device, folder = torch.device(setting.device), setting.folder / "encoding"
    count, batch_size, widths = (1024, 64, VaeConfig().block_channels) if setting.on_cuda else (2, 1, (8, 8, 8, 8))
    dtype: Literal["float32", "bfloat16"] = "bfloat16" if setting.on_cuda else "float32"
    config = VaeConfig(latent_channels=CHANNELS, block_channels=widths, norm_groups=8)
    cast(Any, build_vae(config)).save_pretrained(folder / "vae")
    settings = EncoderConfig(
        tokenizer=str(setting.tokenizer),
        vae=str(folder / "vae"),
        batch_size=batch_size,
        dtype=dtype,
        device=setting.device,
    )
    encoder = Encoder(settings, has_pictures=True)
    assert encoder.space is not None
    encode = encoder.space.encode
    files = make_pictures(min(count, 128))
    documents = [RawDocument(f"{i:05d}", "bench", ("word1", files[i % len(files)]), {}, 0) for i in range(count)]
    whole = seconds(lambda: _write(folder / "out.tar", encoder, documents), device, repeats=1)
    pixels = torch.randn(batch_size, 3, 256, 256, device=device)
    alone = seconds(lambda: encode(pixels), device, repeats=3)
    return {
        "images_per_s": count / whole,
        "vae_alone_images_per_s": batch_size / alone,
        "decode_threads": encoder.num_threads,
    }


def _write(path: Path, encoder: Encoder, documents: list[RawDocument]) -> None:
    write_shard(path, encoder.records(documents, BadRecords(0)))
