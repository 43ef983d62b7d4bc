"""Measure one GPU: flex against dense attention and a compiled bf16 training step with its MFU, for the blocks of all
the paper's sizes; linear and U-Net patches; sampling with and without the cache; encoding of pictures.

usage: python -m bench.gpu [--sizes 7b] [--layers 4] [--rows 2] [--length 4096] [--device cuda]

Progress goes to stderr; the last line of stdout is one JSON object. `--device cpu` is a smoke run of the same code at a
tiny size, without compilation: its numbers mean nothing. A few of the paper's blocks stand for the whole stack: blocks
are alike, and the rest is less than a tenth of the work at 7B.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from bench import sampling
from data.raw import RawDocument
from data.shards import BadRecords, write_shard
from model.attention import attend, block_mask, dense_mask
from model.losses import noise_error
from model.sampler import SamplerConfig
from model.transformer import SIZES, TransformerConfig
from model.transfusion import Transfusion, TransfusionConfig, init_weights
from model.unet import UNetConfig
from model.vae import VaeConfig, build_vae, moments
from train import hardware
from train.encoding.encoder import Encoder, EncoderConfig
from train.flops import Flops
from train.streams import open_streams

VOCAB = sampling.VOCAB
GRID = sampling.GRID  # the paper's latents: 256 tokens in 2 x 2 patches
CAPTION = 64  # text tokens of each caption in the measured layout


@dataclass(frozen=True)
class Layout:
    """Rows of `BOS caption BOI image EOI EOS` documents followed by text: about the paper's 1:1 mix."""

    document_ids: Tensor  # int32 [B, S]
    image_ids: Tensor  # int32 [B, S]
    visible_until: Tensor  # int32 [B, S]
    image_starts: list[int]  # first patch of each image in a row


def make_layout(rows: int, length: int, patches: int, device: torch.device) -> Layout:
    """Lay out half of each row as image-caption documents and the rest as one text."""
    document, image, starts = torch.ones(length, dtype=torch.int32), torch.full((length,), -1, dtype=torch.int32), []
    size = CAPTION + patches + 4
    for number in range(max(1, length // 2 // patches)):
        first = number * size
        if first + size > length:
            break
        starts.append(first + CAPTION + 2)
        document[first : first + size] = number + 2
        image[starts[-1] : starts[-1] + patches] = number
    columns = (document, image, torch.full((length,), length, dtype=torch.int32))
    document_ids, image_ids, visible_until = (c.expand(rows, -1).contiguous().to(device) for c in columns)
    return Layout(document_ids, image_ids, visible_until, starts)


def seconds(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Return the median wall time of `run` after two warm-up runs, waiting for the device."""
    times = []
    for attempt in range(repeats + 2):
        _wait(device)
        start = time.perf_counter()
        run()
        _wait(device)
        if attempt >= 2:
            times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def measure_attention(config: TransformerConfig, layout: Layout, repeats: int) -> dict:
    """Compare flex with the block mask and SDPA with the dense mask, both against SDPA in f32."""
    ids = layout.document_ids, layout.image_ids, layout.visible_until
    device = ids[0].device
    rows, length = ids[0].shape
    generator = torch.Generator(device).manual_seed(0)
    shape = (rows, config.heads, length, config.head_dim)
    q, k, v, upstream = (torch.randn(shape, generator=generator, device=device) for _ in range(4))
    flex = block_mask(*ids)
    masks: dict[str, BlockMask | Tensor] = {"dense": dense_mask(*ids), "flex": flex}
    exact = _attention_run((q, k, v), upstream, masks["dense"], backward=True)
    half, half_upstream = (q.bfloat16(), k.bfloat16(), v.bfloat16()), upstream.bfloat16()
    record: dict = {
        "block_mask_ms": _ms(seconds(lambda: block_mask(*ids), device, repeats)),
        "blocks_skipped": round(flex.sparsity() / 100, 3),
    }
    for name, mask in masks.items():
        run = partial(_attention_run, half, half_upstream, mask)
        backward = name == "dense" or device.type == "cuda"  # flex has no backward on CPU
        results = run(backward=backward)
        forward = seconds(partial(run, backward=False), device, repeats)
        record[name] = {"forward_ms": _ms(forward), "forward_error": _relative_error(results[0], exact[0])}
        if backward:
            both = seconds(partial(run, backward=True), device, repeats)
            errors = [_relative_error(ours, theirs) for ours, theirs in zip(results[1:], exact[1:], strict=True)]
            record[name] |= {"forward_backward_ms": _ms(both), "backward_error": max(errors)}
    # Both are bf16: flex may not be much further from f32 than SDPA is.
    record["flex_is_right"] = all(
        record["flex"].get(error, 0.0) <= 2 * record["dense"][error] + 1e-3
        for error in ("forward_error", "backward_error")
    )
    return record


def measure_training(config: TransfusionConfig, layout: Layout, repeats: int, peak_tflops: float | None) -> dict:
    """Time whole steps (forward, backward, fused AdamW) of a bf16 model whose blocks are compiled."""
    device = layout.document_ids.device
    model = _model(config, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        for block in model.transformer.blocks:
            block.compile(dynamic=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    batch, noise = _batch(config, layout)

    def step() -> None:
        output = model(**batch)
        error, images = noise_error(output.noise_pred[GRID], noise, batch["image_valid"][GRID])
        (output.text_nll_sum / output.text_count + 5 * error / images).backward()
        optimizer.step()
        optimizer.zero_grad()

    start = time.perf_counter()
    step()
    _wait(device)
    first = time.perf_counter() - start
    step_seconds = seconds(step, device, repeats)
    flops, tokens = _step_flops(model, batch, layout), batch["input_ids"].numel()
    return {
        "first_step_s": round(first, 1),
        "step_ms": _ms(step_seconds),
        "tokens_per_s": round(tokens / step_seconds),
        "step_tflop": round(flops / 1e12, 4),
        "achieved_tflops": round(flops / step_seconds / 1e12, 2),
        "mfu": None if peak_tflops is None else round(flops / step_seconds / 1e12 / peak_tflops, 4),
        "peak_memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if device.type == "cuda" else None,
    }


def measure_patches(config: TransfusionConfig, device: torch.device, images: int, repeats: int) -> dict:
    """Time a bf16 patcher, both directions, forward and backward, on `images` of the paper's latents."""
    model = _model(config, device)
    latents = torch.randn(images, config.latent_channels, *GRID, device=device)
    timesteps = torch.randint(0, 1000, (images,), device=device)

    def step() -> None:
        tokens, skips = model.embed_images(latents, timesteps)
        model.predict_noise(tokens, skips, timesteps, *GRID).float().square().mean().backward()

    taken = seconds(step, device, repeats)
    flops = Flops.of(config, VOCAB).per_latent_cell * GRID[0] * GRID[1] * images
    return {
        "parameters": sum(parameter.numel() for parameter in model.patches.parameters()),
        "ms_an_image": _ms(taken / images),
        "achieved_tflops": round(flops / taken / 1e12, 2),
    }


def measure_encoding(device: torch.device, tiny: bool) -> dict:
    """Time the encoder with a VAE of the paper's size in bf16 (decode, resize, encode, write), and the VAE alone."""
    from bench.loader import make_data, make_pictures

    count, batch_size, widths = (2, 1, (8, 8, 8, 8)) if tiny else (1024, 64, VaeConfig().block_channels)
    # Few CPUs compute in bfloat16, and convolutions in it take ten times as long.
    dtype: Literal["float32", "bfloat16"] = "float32" if tiny else "bfloat16"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        tokenizer = make_data(folder, 0, 0)
        config = VaeConfig(latent_channels=8, block_channels=widths, norm_groups=8)
        cast(Any, build_vae(config)).save_pretrained(folder / "vae")
        settings = EncoderConfig(
            tokenizer=str(tokenizer.path),
            vae=str(folder / "vae"),
            batch_size=batch_size,
            dtype=dtype,
            device=device.type,
        )
        encoder = Encoder(settings, has_pictures=True)
        vae: Any = encoder.vae
        files = make_pictures(min(count, 128))
        documents = [RawDocument(f"{i:05d}", "bench", ("a circle", files[i % len(files)]), {}, 0) for i in range(count)]
        whole = seconds(
            lambda: write_shard(folder / "out.tar", encoder.records(documents, BadRecords(0))), device, repeats=3
        )
        pixels = torch.randn(batch_size, 3, 256, 256, device=device, dtype=vae.dtype)
        with torch.no_grad():
            alone = seconds(lambda: moments(vae, pixels), device, repeats=5)
    per_s = {"images_per_s": count / whole, "vae_alone_images_per_s": batch_size / alone}
    return {name: round(value, 1) for name, value in per_s.items()} | {"decode_threads": encoder.num_threads}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", choices=SIZES, nargs="+", default=[*SIZES], help="whose blocks (all five)")
    parser.add_argument("--layers", type=int, default=4, help="blocks of the measured stack (4)")
    parser.add_argument("--rows", type=int, default=2, help="sequences per step (2)")
    parser.add_argument("--length", type=int, default=4096, help="tokens per sequence (4096)")
    parser.add_argument("--repeats", type=int, default=10, help="timed runs; the median counts (10)")
    parser.add_argument("--peak-tflops", type=float, help="dense bf16 peak of the device, TFLOP/s (by its name)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a tiny smoke run (cuda)")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("bench.gpu: needs a CUDA GPU and finds none; --device cpu runs a smoke test", file=sys.stderr)
        return 2
    tiny, device = options.device == "cpu", torch.device(options.device)
    trunks = {size: dataclasses.replace(SIZES[size], layers=options.layers) for size in options.sizes}
    unet, draws = UNetConfig(), {"rows": 8, "prefix": 512, "repeats": 2}
    if tiny:
        trunks = {"tiny": TransformerConfig(width=32, layers=1, heads=2)}
        unet, draws = UNetConfig(channels=(8, 8), blocks=1), {"rows": 1, "prefix": 16, "repeats": 1}
        options.length, options.rows, options.repeats = 512, 1, 1
    name = "cpu" if tiny else torch.cuda.get_device_name()
    gpu = hardware.find(name)
    peak = options.peak_tflops or (gpu.peak_tflops if gpu else None)
    layout = make_layout(options.rows, options.length, GRID[0] * GRID[1] // 4, device)
    record: dict = {"bench": "gpu", "device": name, "torch": torch.__version__, "peak_tflops": peak}
    record |= {"layers": options.layers, "rows": options.rows, "length": options.length, "sizes": {}}
    for size, trunk in trunks.items():
        torch.compiler.reset()  # eight graphs a function are the limit, past which flex attention runs unfused
        config = TransfusionConfig(transformer=trunk)
        parts = {"attention": measure_attention(trunk, layout, options.repeats)}
        parts["training"] = measure_training(config, layout, options.repeats, peak)
        record["sizes"][size] = parts
        print(f"{size}: {parts}", file=sys.stderr, flush=True)
    trunk = trunks.get("0.76b") or next(iter(trunks.values()))
    kinds = {kind: TransfusionConfig(transformer=trunk, patches=kind, unet=unet) for kind in ("linear", "unet")}
    record["patches"] = {kind: measure_patches(config, device, 16, options.repeats) for kind, config in kinds.items()}
    print(f"patches: {record['patches']}", file=sys.stderr, flush=True)
    steps = SamplerConfig(sampler="ddim", steps=2 if tiny else 50, max_new_tokens=0, spacing="trailing")
    record["sampling"] = sampling.measure(_model(kinds["linear"], device), config=steps, **draws)
    record["encoding"] = measure_encoding(device, tiny)
    print(json.dumps(record))
    return 0 if all(parts["attention"]["flex_is_right"] for parts in record["sizes"].values()) else 1


def _attention_run(
    qkv: tuple[Tensor, Tensor, Tensor], upstream: Tensor, mask: BlockMask | Tensor, *, backward: bool
) -> list[Tensor]:
    """Return [out], or [out, grad q, grad k, grad v]."""
    if not backward:
        with torch.no_grad():
            return [attend(*qkv, mask)]
    q, k, v = (tensor.detach().requires_grad_() for tensor in qkv)
    out = attend(q, k, v, mask)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), upstream)]


def _model(config: TransfusionConfig, device: torch.device) -> Transfusion:
    with torch.device("meta"):
        model = Transfusion(config, VOCAB)
    model.to_empty(device="cpu")
    init_weights(model, 0)
    return model.to(device, torch.bfloat16)


def _batch(config: TransfusionConfig, layout: Layout) -> tuple[dict, Tensor]:
    """Return the model's inputs and the noise that it should predict."""
    device, (rows, length) = layout.document_ids.device, layout.document_ids.shape
    generator = torch.Generator(device).manual_seed(0)
    patches = GRID[0] * GRID[1] // config.patch_size**2
    starts = torch.tensor([b * length + start for b in range(rows) for start in layout.image_starts], device=device)
    shape = (len(starts), config.latent_channels, *GRID)
    is_image = layout.image_ids >= 0
    text = (~is_image).flatten().nonzero()[:, 0]
    inside = torch.arange(patches, device=device)
    batch = {
        "input_ids": torch.randint(0, VOCAB, (rows, length), generator=generator, device=device),
        "position_ids": torch.arange(length, dtype=torch.int32, device=device).expand(rows, -1),
        "grid_positions": torch.full((rows, length, 2), -1, dtype=torch.int32, device=device),
        "is_image": is_image,
        "mask": (block_mask if device.type == "cuda" else dense_mask)(
            layout.document_ids, layout.image_ids, layout.visible_until
        ),
        "text_target_index": text,
        "text_targets": torch.randint(0, VOCAB, text.shape, generator=generator, device=device),
        "noisy": {GRID: torch.randn(shape, generator=generator, device=device)},
        "timesteps": {GRID: torch.randint(0, 1000, (len(starts),), generator=generator, device=device)},
        "image_valid": {GRID: torch.ones(len(starts), dtype=torch.bool, device=device)},
        "image_token_index": (starts[:, None] + inside).flatten(),
    }
    return batch, torch.randn(shape, generator=generator, device=device)


def _step_flops(model: Transfusion, batch: dict, layout: Layout) -> float:
    """Return the useful FLOPs of a step, of attention those of the pairs that its mask allows; there is no padding."""
    flops = Flops.of(model.config, VOCAB)
    allowed_pairs = int(dense_mask(layout.document_ids, layout.image_ids, layout.visible_until).sum())
    return (
        flops.per_token * batch["input_ids"].numel()
        + flops.per_pair * allowed_pairs
        + flops.per_text_target * len(batch["text_targets"])
        + flops.per_latent_cell * batch["noisy"][GRID][:, 0].numel()
    )


def _relative_error(ours: Tensor, exact: Tensor) -> float:
    return round(((ours.float() - exact).norm() / exact.norm()).item(), 6)


def _ms(duration: float) -> float:
    return round(1e3 * duration, 3)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    open_streams()
    sys.exit(main())
