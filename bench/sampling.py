"""Measure sampling: pictures with a cached prefix against the same model without a cache, and pictures per second.

usage: python -m bench.sampling [--size 0.16b] [--layers 2] [--prefix 512] [--steps 6] [--device auto]

Both ways draw the same pictures (which are compared) with the same sampler, guidance and precision. With the cache a
step runs the picture's tokens only, without it the whole prefix again; both run the two guidance branches in one
forward. They take turns; the speedup is of the medians, `cached_speedup` that of the largest batch. The last line is
one JSON object. The defaults take three minutes on two AVX2 cores; `--steps 50` takes eight times as long.
"""

import argparse
import dataclasses
import datetime
import json
import os
import platform
import sys
import time

import torch
from torch import Tensor

from model.attention import dense_mask
from model.diffusion import DiffusionConfig, alphas_cumprod, ddim_step, sampling_timesteps, to_x0_and_eps
from model.draws import SeededDraws
from model.sampler import Prompt, SamplerConfig, SpecialTokens, generate
from model.transformer import SIZES
from model.transfusion import Transfusion, TransfusionConfig, init_weights
from train.streams import open_streams

VOCAB, GRID = 32002, (32, 32)
SPECIAL = SpecialTokens(bos=1, eos=2, boi=3, eoi=4)


@torch.no_grad()
def draw_without_cache(model: Transfusion, prompts: list[Prompt], config: SamplerConfig) -> Tensor:
    """Return latents [R, C, h, w] from DDIM that runs every token of both branches in every step."""
    device, draws, table = model.text_head.weight.device, SeededDraws(0), alphas_cumprod().tolist()
    shape = (model.config.latent_channels, *GRID)
    patches = GRID[0] * GRID[1] // model.config.patch_size**2
    rows = len(prompts)
    ids = torch.stack([torch.cat([torch.tensor([1]), *p.segments, torch.tensor([3])]) for p in prompts]).to(device)
    length = ids.shape[1] + patches
    free = torch.full_like(ids, 0)  # the unconditional branch `BOS BOI` and its picture, then padding
    free[:, 0], free[:, 1] = SPECIAL.bos, SPECIAL.boi
    starts = torch.tensor([ids.shape[1]] * rows + [2] * rows, device=device)
    index = torch.arange(length, device=device).expand(2 * rows, -1)
    is_picture = (index >= starts[:, None]) & (index < starts[:, None] + patches)
    documents = (index < starts[:, None] + patches).long()
    mask = dense_mask(documents, torch.where(is_picture, 0, -1), torch.full_like(documents, length))
    embedded = model.embed_text(torch.cat([ids, free]))
    blank = embedded.new_zeros(2 * rows, patches, embedded.shape[-1])
    embedded = torch.cat([embedded, blank], dim=1)
    grid = torch.full((2 * rows, length, 2), -1, device=device)
    x = torch.stack([draws.noise(p.index, 0, 0, shape) for p in prompts]).to(device)
    timesteps = sampling_timesteps(config.steps, config.spacing)
    for step, t in enumerate(timesteps):
        at = torch.full((2 * rows,), t, device=device)
        tokens, skips = model.embed_images(x.repeat(2, 1, 1, 1), at)
        h = embedded.masked_scatter(is_picture[..., None], tokens)
        hidden = model.trunk(h, index, grid, mask)[is_picture].view(tokens.shape)
        conditional, unconditional = model.predict_noise(hidden, skips, at, *GRID).float().chunk(2)
        pred = unconditional + config.guidance * (conditional - unconditional)
        alpha = table[t]
        alpha_prev = 1.0 if step + 1 == len(timesteps) else table[timesteps[step + 1]]
        x = ddim_step(*to_x0_and_eps(pred, x, alpha, "v"), alpha, alpha_prev, 0.0, None)
    return x


def measure(model: Transfusion, rows: int, prefix: int, config: SamplerConfig, repeats: int) -> dict:
    """Draw `rows` pictures both ways in turn; return the medians' ratio and the pictures' largest difference."""
    generator = torch.Generator().manual_seed(0)
    caption = prefix - 2  # BOS and BOI belong to the prefix
    prompts = [Prompt([torch.randint(5, VOCAB, (caption,), generator=generator)], True, i) for i in range(rows)]

    def cached() -> Tensor:
        results = generate(model, prompts, config, DiffusionConfig(prediction="v"), SPECIAL, GRID, SeededDraws(0))
        return torch.stack([parts[0] for parts in results])

    def uncached() -> Tensor:
        return draw_without_cache(model, prompts, config).cpu()

    seconds: dict[str, list[float]] = {"cached": [], "uncached": []}
    pictures = {}
    for number in range(1, repeats + 1):
        for name, draw in (("cached", cached), ("uncached", uncached)):
            start = time.perf_counter()
            pictures[name] = draw()
            seconds[name].append(time.perf_counter() - start)
            print(f"{rows} rows {name}: {seconds[name][-1]:.2f} s", file=sys.stderr, flush=True)
        left = sum(map(sum, seconds.values())) / number * (repeats - number)
        print(f"{rows} rows: {datetime.timedelta(seconds=round(left))} left", file=sys.stderr, flush=True)
    medians = {name: sorted(times)[len(times) // 2] for name, times in seconds.items()}
    difference = (pictures["cached"] - pictures["uncached"]).abs().max().item()
    return {
        "speedup": medians["uncached"] / medians["cached"],
        "images_per_s": rows / medians["cached"],
        "largest_difference": difference,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="0.16b", help="whose blocks (0.16b)")
    parser.add_argument("--layers", type=int, default=2, help="blocks of the measured stack (2)")
    parser.add_argument("--patches", choices=("linear", "unet"), default="linear", help="patcher (linear)")
    parser.add_argument("--prefix", type=int, default=512, help="tokens before the picture (512)")
    parser.add_argument("--steps", type=int, default=6, help="denoising steps (6)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4], help="pictures per batch (1 4)")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each way; the median counts (3)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: CUDA if there is any")
    options = parser.parse_args()
    name = "cuda" if options.device != "cpu" and torch.cuda.is_available() else "cpu"
    if options.device == "cuda" and name != "cuda":
        print("bench.sampling: --device cuda, but there is no CUDA GPU; --device cpu runs here", file=sys.stderr)
        return 2
    trunk = dataclasses.replace(SIZES[options.size], layers=options.layers)
    model = Transfusion(TransfusionConfig(transformer=trunk, patches=options.patches), VOCAB).eval()
    init_weights(model, 0)
    model.to(name, torch.bfloat16 if name == "cuda" else torch.float32)
    config = SamplerConfig(sampler="ddim", steps=options.steps, max_new_tokens=0, spacing="trailing", prefill_chunk=512)
    results = {rows: measure(model, rows, options.prefix, config, options.repeats) for rows in options.batches}
    machine = torch.cuda.get_device_name() if name == "cuda" else f"{os.cpu_count()} cores, {platform.machine()}"
    record = {"bench": "sampling", **vars(options), "device": machine, "torch": torch.__version__}
    record["cached_speedup"] = round(results[max(options.batches)]["speedup"], 2)
    record["cached_speedup_by_batch"] = {rows: round(result["speedup"], 2) for rows, result in results.items()}
    record["images_per_s"] = {rows: round(result["images_per_s"], 4) for rows, result in results.items()}
    record["largest_difference"] = max(result["largest_difference"] for result in results.values())
    print(json.dumps(record))
    return 0


if __name__ == "__main__":
    open_streams()
    sys.exit(main())
