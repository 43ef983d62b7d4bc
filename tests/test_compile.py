"""Compiled, sharded, recomputing blocks under a BlockMask: how many graphs there are and what they compute again.

This is the path of a GPU, on a CPU: the real `parallelize`, FSDP2 over gloo, checkpointing and FlexAttention's own
forward and backward. FlexAttention refuses a backward on CPU because it has no kernel for it; that check is switched
off, and a backend that runs each traced graph operator by operator (as torch's `aot_eager`, with inductor's partition
into forward and backward) stands in for inductor's kernels. So graphs and their numbers are shown here, not speed.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch.nn.attention import flex_attention
from torch.utils.flop_counter import conv_flop_count, mm_flop

from bench.step import sharded_model
from data.dataset import open_data
from data.loader import Loader
from data.packing import PackedBatch
from data.tokenizer import Tokenizer
from model import attention
from model.attention import block_mask
from model.diffusion import DiffusionConfig
from model.lora import LoraConfig
from model.transformer import TransformerConfig
from model.transfusion import Transfusion, TransfusionConfig, init_weights
from model.unet import UNetConfig
from tests.ranks import run_ranks
from tests.sources import data_config, make_source, pairs, texts
from train.distributed.parallelize import ParallelConfig, gather_weights, set_micro_step
from train.distributed.ranks import Ranks
from train.flops import Flops
from train.optim.groups import freeze
from train.step import latent_stats, micro_step

LEVELS = ("none", "selective", "full")
VOCAB, LENGTH, ROWS = 301, 256, 1
LINEAR = TransfusionConfig(
    transformer=TransformerConfig(width=32, layers=2, heads=2, ffn_multiple_of=8), latent_channels=2
)
UNET = replace(
    LINEAR,
    transformer=replace(LINEAR.transformer, layers=1),
    patches="unet",
    patch_size=1,
    unet=UNetConfig(channels=(20,), blocks=2, timestep_width=36),
)


@dataclass
class Found:
    """What the blocks of one model did in several steps, and in the last of them."""

    graphs: list[int]  # traced so far, after each step
    broken: int  # graph breaks
    flops: Counter[tuple[str, str]]  # of the last step, by (forward or backward graph, operator); calls of attention
    losses: list[float]
    grads: dict[str, torch.Tensor]  # of the last step


class Counting:
    """A backend for torch.compile: runs graphs operator by operator and counts what their products cost."""

    def __init__(self) -> None:
        self.graphs, self.flops = 0, Counter[tuple[str, str]]()

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        self.graphs += 1
        compilers = {f"{name}_compiler": partial(self._run, of) for name, of in (("fw", "forward"), ("bw", "backward"))}
        split = partial(min_cut_rematerialization_partition, compiler="inductor")
        return aot_autograd(**compilers, partition_fn=split)(graph, inputs)

    def _run(self, direction: str, graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        return make_boxed_func(_CountingInterpreter(graph, direction, self.flops).run)


class _CountingInterpreter(torch.fx.Interpreter):
    def __init__(self, graph: torch.fx.GraphModule, direction: str, flops: Counter[tuple[str, str]]) -> None:
        super().__init__(graph)
        self.direction, self.flops = direction, flops

    def call_function(self, target: Any, args: tuple, kwargs: dict) -> Any:
        result, aten = super().call_function(target, args, kwargs), torch.ops.aten
        if target is aten.mm.default:
            self.flops[self.direction, "mm"] += mm_flop(args[0].shape, args[1].shape)
        elif target is aten.convolution.default:
            self.flops[self.direction, "convolution"] += conv_flop_count(args[0].shape, args[1].shape, result.shape)
        elif target is torch.ops.higher_order.flex_attention:
            self.flops[self.direction, "flex_attention"] += 1
        return result


def _emulate(
    ranks: Ranks, of: TransfusionConfig, batches: list[PackedBatch], variants: list[ParallelConfig]
) -> list[Found]:
    """Run a step with each batch, as on a GPU, for each way to wrap the model."""
    torch.set_num_threads(1)
    flex_attention._validate_device = lambda *_: None
    settings = {"diffusion": DiffusionConfig(), "image_weight": 5.0, "global_text_targets": 99, "global_images": 9}
    stats, found = latent_stats(None, of.latent_channels, ranks.device), []
    for config in variants:
        # Blocks that are not compiled call FlexAttention compiled, if they are on a GPU.
        attention.flex_attention = flex_attention.flex_attention if config.compile else attention._compiled_flex()
        torch._dynamo.reset()
        counters.clear()
        backend, graphs, losses = Counting(), [], []
        model = sharded_model(of, VOCAB, ranks, config)
        for batch in batches:
            backend.flops.clear()
            model.zero_grad()
            set_micro_step(model, config, is_last=True)
            with torch.compiler.set_stance(force_backend=backend):
                loss = micro_step(model, batch, stats=stats, mask_of=block_mask, **settings).total
                loss.backward()
            graphs.append(backend.graphs)
            losses.append(loss.item())
        broken = sum(counters["graph_break"].values())
        grads = gather_weights({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        found.append(Found(graphs, broken, backend.flops, losses, grads))
    return found


def _batches(
    tmp_path: Path, tokenizer: Tokenizer, *grids: list[tuple[int, int]], patch_size: int = 2
) -> list[PackedBatch]:
    """Return batches with images of these latent grids, or of text alone, packed from real files by the real loader."""
    batches = []
    for number, of_batch in enumerate(grids):
        documents = pairs(30, grids=of_batch, seed=number) if of_batch else texts(30, lengths=(30, 90), seed=number)
        folder = make_source(tmp_path / str(number), tokenizer, documents)
        settings = data_config(tokenizer, {"a": folder}, lanes=ROWS, sequence_length=LENGTH)
        loader = Loader(open_data(settings, number, patch_size), settings, rank=0, world_size=1, micro_batch_size=ROWS)
        batches += loader.next(30).micro_batches
        loader.close()
        assert batches[-1].images.keys() == set(of_batch)
    return batches


def _of_levels(
    of: TransfusionConfig, batches: list[PackedBatch], world_size: int, levels: Sequence[str], **options: Any
) -> dict[str, Found]:
    """Return what the first rank found for each kind of checkpointing, compiled."""
    variants = [ParallelConfig(activation_checkpointing=level, **{"compile": True, **options}) for level in levels]
    return dict(zip(levels, run_ranks(_emulate, world_size, of, batches, variants, timeout_s=280)[0], strict=True))


def _assert_same_bits(found: dict[str, Found]) -> None:
    first = next(iter(found.values()))
    for level, step in found.items():
        assert step.losses == first.losses, level
        assert [name for name, grad in step.grads.items() if not torch.equal(grad, first.grads[name])] == [], level


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_all_blocks_are_one_graph_whatever_the_batch(world_size: int, tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Other masks, other image grids and none: nothing is traced again, nothing breaks; recomputation changes no bit.

    Recomputed FLOPs are what the compiled backward computes beyond twice the forward's products (P9).
    """
    batches = _batches(tmp_path, tokenizer, [(4, 4), (8, 4)], [], [(6, 6)])
    found = _of_levels(LINEAR, batches, world_size, LEVELS, dtype="bfloat16")
    _assert_same_bits(found)
    for level, step in found.items():
        assert step.graphs == [1, 1, 1] and not step.broken, level
        flops, layers = Flops.of(LINEAR, VOCAB, level, compiled=True), LINEAR.transformer.layers
        again = step.flops["backward", "mm"] - 2 * step.flops["forward", "mm"]
        assert again == flops.again_per_token * ROWS * LENGTH
        assert step.flops["forward", "flex_attention"] == layers
        again = step.flops["backward", "flex_attention"]
        assert again * 4 * LINEAR.transformer.width == flops.again_per_pair == (level == "full") * flops.per_pair / 3


@pytest.mark.parametrize("levels", [("selective",), pytest.param(("none", "selective"), marks=pytest.mark.slow)])
def test_untied_blocks_are_one_graph_whatever_the_share_of_images(
    levels: Sequence[str], tmp_path: Path, tokenizer: Tokenizer
) -> None:
    """Also of a batch without any, which leaves a product without rows."""
    trunk = replace(LINEAR.transformer, qk_norm=True, qkv_bias=True)
    of = replace(LINEAR, untied="all", transformer=trunk)
    batches = _batches(tmp_path, tokenizer, [(4, 4), (8, 4)], [], [(6, 6)])
    found = _of_levels(of, batches, 1, levels, dtype="float32")
    _assert_same_bits(found)
    for level, step in found.items():
        assert step.graphs == [1, 1, 1] and not step.broken, level
    plain = Transfusion(of, VOCAB)
    init_weights(plain, 0)
    counts = {"global_text_targets": 99, "global_images": 9}
    stats = latent_stats(None, of.latent_channels, torch.device("cpu"))
    losses = [
        micro_step(plain, batch, stats=stats, diffusion=DiffusionConfig(), image_weight=5.0, **counts).total.item()
        for batch in batches
    ]
    assert found["selective"].losses == pytest.approx(losses, rel=1e-5)


@pytest.mark.parametrize("levels", [("selective",), pytest.param(("none", "selective"), marks=pytest.mark.slow)])
def test_adapters_are_in_the_same_graph_and_no_frozen_weight_has_a_gradient(
    levels: Sequence[str], tmp_path: Path, tokenizer: Tokenizer
) -> None:
    """The products are those that `Flops` counts; an adapter's are computed again, a frozen weight's are not."""
    of = replace(LINEAR, lora=LoraConfig(rank=2))
    found = _of_levels(of, _batches(tmp_path, tokenizer, [(4, 4)], []), 1, levels, dtype="bfloat16")
    _assert_same_bits(found)
    with torch.device("meta"):
        model = Transfusion(of, VOCAB)
    freeze(model, {}, torch.bfloat16, adapted=True)
    for level, step in found.items():
        assert step.graphs == [1, 1] and not step.broken, level
        assert all(".lora_" in name or name.startswith("patches.") for name in step.grads)
        flops = Flops.of_model(model, level, compiled=True)
        products = step.flops["forward", "mm"] + step.flops["backward", "mm"]
        assert products == (flops.per_token + flops.again_per_token) * ROWS * LENGTH, level


def test_blocks_that_are_not_compiled_attend_again(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Selective recomputation cannot see into their compiled attention."""
    batches = _batches(tmp_path, tokenizer, [(4, 4)])
    for level, step in _of_levels(LINEAR, batches, 1, ("none", "selective"), dtype="bfloat16", compile=False).items():
        again = step.flops["forward", "flex_attention"] - LINEAR.transformer.layers
        assert again * 4 * LINEAR.transformer.width == Flops.of(LINEAR, VOCAB, level).again_per_pair


@pytest.mark.parametrize("levels", [("full",), pytest.param(LEVELS, marks=pytest.mark.slow)])
def test_residual_blocks_have_few_graphs_for_any_grids(
    levels: Sequence[str], tmp_path: Path, tokenizer: Tokenizer
) -> None:
    """One for each pair of widths, here two, beside the trunk's; torch traces one of them twice, before it runs.

    So a batch with other grids and other numbers of images, or with none, has no graphs of its own. (Numbers that are
    1, or equal a width, may have.)
    """
    batches = _batches(tmp_path, tokenizer, [(4, 4), (4, 8)], [], [(8, 4), (6, 6)], patch_size=1)
    found = _of_levels(UNET, batches, 1, levels, dtype="float32")
    _assert_same_bits(found)
    for level, step in found.items():
        assert step.graphs[0] == step.graphs[2] <= 4 and not step.broken, (level, step.graphs)
        cells = sum(len(images.u) * math.prod(grid) for grid, images in batches[-1].images.items())
        again = Flops.of(UNET, VOCAB, level, compiled=True).again_per_latent_cell
        assert step.flops["backward", "convolution"] == again * cells
