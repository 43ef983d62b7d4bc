"""What the device could do at best: its rate of matrix products at a model's own shapes, its bandwidth, a roofline.

The roofline of a step is a lower bound of its time: every product of the model at the rate that the product alone
reaches on this device, attention at those products' mean rate, and the bytes that everything else must move at the
bandwidth of a plain copy. A step's distance to it is what better code, not a better device, could still gain.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from model.transfusion import TransfusionConfig
from train.distributed.process import wait_for

# Passes over a tensor of width D (the residual stream and its like) or H (SwiGLU's) that no fusion saves, forward; the
# backward pass takes twice as many. Norms: 2 x (read, write); residual sums: 2 x (read 2, write); rotary positions:
# queries and keys, read and write; SwiGLU: read 2, write 1.
PASSES_OF_WIDTH, PASSES_OF_HIDDEN = 2 * 2 + 2 * 3 + 2 * 2, 3
OPTIMIZER_BYTES = 4 + 16 + 12  # a parameter: the norm reads gradients; AdamW reads four tensors and writes three


@dataclass(frozen=True)
class Ceiling:
    gemm_tflops: float  # of all products of a micro-step, weighted by their FLOPs
    gemm_s: float  # all products of a micro-step, forward and backward
    copy_gb_per_s: float  # read and written bytes of a large copy


def seconds(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Return the median wall time of `run` after two warm-up runs, waiting for the device."""
    times = []
    for attempt in range(repeats + 2):
        wait_for(device)
        start = time.perf_counter()
        run()
        wait_for(device)
        if attempt >= 2:
            times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def measure(config: TransfusionConfig, tokens: int, targets: int, vocab_size: int, dtype: torch.dtype,
            device: torch.device) -> Ceiling:  # fmt: skip
    """Time each product of a micro-step of `tokens` positions and `targets` text targets, and a copy of 1 GiB."""
    trunk = config.transformer
    heads = trunk.heads + 2 * trunk.num_kv_heads
    of_block = [  # rows, in, out
        (tokens, trunk.width, heads * trunk.head_width),
        (tokens, trunk.width, trunk.width),
        (tokens, trunk.width, 2 * trunk.hidden),
        (tokens, trunk.hidden, trunk.width),
    ]
    chunk = min(config.text_loss_chunk, max(targets, 1))
    total_s = total_flops = 0.0
    for shape, times in [*((shape, float(trunk.layers)) for shape in of_block),
                         ((chunk, trunk.width, vocab_size), targets / chunk)]:  # fmt: skip
        total_s += times * _products(*shape, dtype, device)
        total_flops += times * 6 * shape[0] * shape[1] * shape[2]
    return Ceiling(total_flops / total_s / 1e12, total_s, _copy_rate(device))


def _products(rows: int, width_in: int, width_out: int, dtype: torch.dtype, device: torch.device) -> float:
    """Return the seconds of a linear layer's three products, run ten at a time so that launches do not count."""
    x = torch.randn(rows, width_in, dtype=dtype, device=device)
    weight = torch.randn(width_out, width_in, dtype=dtype, device=device)
    gradient = torch.randn(rows, width_out, dtype=dtype, device=device)
    times = 10 if device.type == "cuda" else 1

    def run() -> None:
        for _ in range(times):
            torch.mm(x, weight.T)
            torch.mm(gradient, weight)
            torch.mm(gradient.T, x)

    return seconds(run, device, 3) / times


def _copy_rate(device: torch.device) -> float:
    size = 1 << (30 if device.type == "cuda" else 24)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / seconds(lambda: target.copy_(source), device, 5) / 1e9


def roofline_s(
    ceiling: Ceiling, config: TransfusionConfig, *, micro_steps: int, tokens: float, attention_flops: float,
    parameters: int, element_bytes: int,
) -> float:  # fmt: skip
    """Return the least seconds of a step of `tokens` in `micro_steps` on this device."""
    trunk = config.transformer
    passes = 3 * trunk.layers * (PASSES_OF_WIDTH * trunk.width + PASSES_OF_HIDDEN * trunk.hidden)
    moved = tokens * passes * element_bytes + parameters * OPTIMIZER_BYTES
    products = micro_steps * ceiling.gemm_s + attention_flops / (ceiling.gemm_tflops * 1e12)
    return products + moved / (ceiling.copy_gb_per_s * 1e9)
