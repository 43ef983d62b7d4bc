"""Flex attention on the mask of real batches: its speed beside causal SDPA, and whether it is right.

Right means: not much further from dense attention in float32 than dense attention in bfloat16 is.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from bench.gpu_ceiling import seconds
from bench.gpu_setting import ROWS, Setting
from data.dataset import open_data
from data.loader import Loader
from data.packing import PackedBatch
from model.attention import attend, block_mask, dense_mask
from model.transformer import TransformerConfig


def measure(setting: Setting, sizes: list[str]) -> dict[str, Any]:
    """Return the figures of each size's attention on one micro-batch of at most two rows."""
    device, found = torch.device(setting.device), {}
    for size in sizes:
        batch = real_batch(setting, size).to(device)
        torch.compiler.reset()  # past eight graphs of a function flex attention runs unfused
        found[size] = measure_size(setting.trunk(size), batch, 10 if setting.on_cuda else 1)
    return found


def real_batch(setting: Setting, size: str) -> PackedBatch:
    """Return the first micro-batch of a run's loader, of one or two rows."""
    config = setting.config(size, setting.folder / "unused")
    data = open_data(config.data, config.seed, config.model.patch_size)
    loader = Loader(data, config.data, rank=0, world_size=1, micro_batch_size=min(2, ROWS[size]))
    step = loader.next(120)
    loader.close()
    assert step is not None, "no batch within two minutes"
    return step.micro_batches[0]


def measure_size(config: TransformerConfig, batch: PackedBatch, repeats: int) -> dict[str, Any]:
    ids = batch.document_ids, batch.image_ids, batch.visible_until
    device, (rows, length) = ids[0].device, ids[0].shape
    generator = torch.Generator(device).manual_seed(0)
    shape = (rows, config.heads, length, config.head_width)
    q, k, v, upstream = (torch.randn(shape, generator=generator, device=device) for _ in range(4))
    flex = block_mask(*ids)
    masks: dict[str, BlockMask | Tensor] = {"dense": dense_mask(*ids), "flex": flex}
    exact = _run(attend, (q, k, v), upstream, masks["dense"], backward=True)
    half, half_upstream = (q.bfloat16(), k.bfloat16(), v.bfloat16()), upstream.bfloat16()
    record: dict[str, Any] = {
        "head_dim": config.head_width,
        "heads": config.heads,
        "mask_ms": 1e3 * seconds(lambda: block_mask(*ids), device, repeats),
        "blocks_skipped": flex.sparsity() / 100,
        "pairs_of_causal": batch.num_attention_pairs / (rows * length * (length + 1) / 2),
    }
    ways = {"dense": (attend, masks["dense"]), "flex": (attend, flex), "causal": (_causal, None)}
    for name, (way, mask) in ways.items():
        run = partial(_run, way, half, half_upstream, mask)
        backward = name != "flex" or device.type == "cuda"  # flex has no backward on CPU
        record[name] = {"forward_ms": 1e3 * seconds(partial(run, backward=False), device, repeats)}
        if backward:
            record[name]["forward_backward_ms"] = 1e3 * seconds(partial(run, backward=True), device, repeats)
        if name == "causal":
            continue
        results = run(backward=backward)
        errors = [_relative_error(ours, theirs) for ours, theirs in zip(results, exact, strict=False)]
        record[name] |= {"forward_error": errors[0], "backward_error": max(errors[1:], default=0.0)}
    record["flex_is_right"] = all(
        record["flex"][error] <= 2 * record["dense"][error] + 1e-3 for error in ("forward_error", "backward_error")
    )
    common = "forward_backward_ms" if "forward_backward_ms" in record["flex"] else "forward_ms"
    record["flex_over_causal"] = record["flex"][common] / record["causal"][common]
    return record


def _causal(q: Tensor, k: Tensor, v: Tensor, mask: None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def _run(
    way: Any, qkv: tuple[Tensor, Tensor, Tensor], upstream: Tensor, mask: BlockMask | Tensor | None, *, backward: bool
) -> list[Tensor]:
    """Return [out], or [out, grad q, grad k, grad v]."""
    if not backward:
        with torch.no_grad():
            return [way(*qkv, mask)]
    q, k, v = (tensor.detach().requires_grad_() for tensor in qkv)
    out = way(q, k, v, mask)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), upstream)]


def _relative_error(ours: Tensor, exact: Tensor) -> float:
    return ((ours.float() - exact).norm() / exact.norm()).item()
