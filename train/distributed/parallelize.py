"""Parallelism, applied to the model from outside, block by block: activation checkpointing -> compile -> fully_shard.

The model knows nothing of ranks. It is built on the meta device, sharded, and only then given memory, so no rank ever
holds a full copy; each parameter is drawn on the CPU from (seed, name), so every world size starts alike (P3). Ranks
form a mesh dp_replicate x dp_shard: dp_shard neighbours share one copy of the states; gradients are summed over all.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointWrapper,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from model.linear import PRODUCT
from model.transfusion import Transfusion, TransfusionConfig, drawn_shape, initial_pieces, parameter_generator
from model.unet import ResidualBlock
from train.distributed.local_shards import first_element, is_sharded, local
from train.distributed.ranks import Ranks

if TYPE_CHECKING:  # FSDP takes half a second to import: only the functions that need it do
    from torch.distributed.fsdp import FSDPModule

ADAPTER_WIDENS = 16  # a product with more than so many times as many outputs as inputs is taken for an adapter's second
GRAPHS = 64  # that compiled blocks may have in all before torch runs further ones uncompiled; its own limit is 8


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    # Copies of the sharded states (HSDP), >= 1, a divisor of the number of ranks. Each copy is sharded over ranks /
    # dp_replicate neighbours: only gradients leave that group, which may be one machine. 1: FSDP.
    dp_replicate: int = 1
    # Dtype of parameters in forward and backward; master weights and gradient sums stay float32. auto: bfloat16 if the
    # processor multiplies it natively (every CUDA device we support), else float32.
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    # What backward recomputes in each block and each residual block of a U-Net. none: nothing; full: everything;
    # selective: all but the outputs of matrix products, convolutions and attention, which costs little time. auto: the
    # first of none, selective, full with which the plan's largest step fits the least memory of any rank (train.plan).
    activation_checkpointing: Literal["auto", "none", "selective", "full"] = "auto"
    # torch.compile each block, and each residual block of a U-Net (needs a C++ compiler on CPU, Triton on CUDA)
    compile: bool = False
    shard_blocks: bool = True  # each block is its own FSDP unit; false: one unit for the whole (small) model
    # What happens to a block's gathered parameters between its forward and backward. true: freed; false: kept, also
    # between micro-steps; N: spread over groups of N neighbours, 1 < N < dp_shard and a divisor of it, so that backward
    # gathers within the group (creates process groups for every block). null: freed; kept where a rank has all states
    # to itself, as freeing would only repeat the cast to `dtype`.
    reshard_after_forward: bool | int | None = None
    # Blocks whose parameters are gathered ahead of the running one, >= 0; each takes its size in `dtype`. 0: FSDP's
    # default order, one ahead in backward, and in forward as far as the host runs ahead of the device.
    prefetch: int = 1
    # Accumulate gradients over micro-steps before reducing them: one reduction per step instead of one per micro-step,
    # at the cost of a whole float32 gradient (4 bytes per parameter of the model) on every rank. A rank that has all
    # states to itself always does: it costs nothing there.
    accumulate_unsharded: bool = False

    def __post_init__(self) -> None:
        if self.dp_replicate < 1:
            raise ValueError(f"parallel.dp_replicate={self.dp_replicate}: expected at least 1")
        if self.prefetch < 0:
            raise ValueError(f"parallel.prefetch={self.prefetch}: expected at least 0")
        if self.group_size is not None and self.group_size < 2:
            raise ValueError(
                f"parallel.reshard_after_forward={self.group_size}: expected true, false, null or at least 2"
            )

    @property
    def group_size(self) -> int | None:
        """Return over how many ranks a block's parameters are spread after its forward; None: dp_shard or 1."""
        return None if isinstance(self.reshard_after_forward, bool) else self.reshard_after_forward

    def keeps_gathered(self, dp_shard: int) -> bool:
        """Return whether states sharded over `dp_shard` ranks stay gathered from forward to backward."""
        return self.reshard_after_forward is False or (self.reshard_after_forward is None and dp_shard == 1)


def mesh_shape(config: ParallelConfig, world_size: int) -> tuple[int, int]:
    """Return (dp_replicate, dp_shard), whose product is `world_size`; raises ValueError if there is none (P10)."""
    if world_size % config.dp_replicate:
        divisors = [n for n in range(1, world_size + 1) if world_size % n == 0]
        raise ValueError(
            f"parallel.dp_replicate={config.dp_replicate} on {world_size} ranks: expected a divisor of that, one of "
            f"{divisors}; set another, or start another number of ranks"
        )
    dp_shard, group = world_size // config.dp_replicate, config.group_size
    if group is not None and (group >= dp_shard or dp_shard % group):
        groups = ", ".join(str(n) for n in range(2, dp_shard) if dp_shard % n == 0)
        raise ValueError(
            f"parallel.reshard_after_forward={group} with states sharded over {dp_shard} ranks: expected null, true, "
            f"false or a divisor of that between 1 and {dp_shard} ({groups or 'none'})"
        )
    return config.dp_replicate, dp_shard


def parallelize(model: Transfusion, config: ParallelConfig, ranks: Ranks) -> "FSDPModule":
    """Wrap a meta-device model in place for `ranks`; gradients are summed over ranks, never averaged.

    Raises ValueError on every rank if their number does not allow the mesh.
    """
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    shape, names = mesh_shape(config, ranks.world_size), ("dp_replicate", "dp_shard")
    first = 1 if config.dp_replicate == 1 else 0  # one axis is plain FSDP, without an all-reduce
    mesh = init_device_mesh(ranks.device.type, shape[first:], mesh_dim_names=names[first:])
    dtype = compute_dtype(config, ranks.device)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    reshards = config.group_size or not config.keeps_gathered(shape[1])
    # Frozen parameters are held as forward needs them. A rank that has all of them would only copy them: FSDP gathers
    # into memory of its own, which would double a language model whose adapters are trained on one GPU.
    frozen = {p for p in model.parameters() if not p.requires_grad and p.dtype == dtype} if shape[1] == 1 else set()
    shard = partial(fully_shard, mesh=mesh, mp_policy=policy, ignored_params=frozen)
    blocks = model.transformer.blocks
    recomputes = config.activation_checkpointing in ("selective", "full")  # auto that no plan has decided: nothing
    if recomputes:
        recomputed = partial(checkpoint_wrapper, preserve_rng_state=False)  # modules draw no random numbers
        if config.activation_checkpointing == "selective":
            contexts = partial(create_selective_checkpoint_contexts, _recompute_policy)
            recomputed = partial(recomputed, context_fn=contexts)
        apply_activation_checkpointing(model.patches, recomputed, lambda module: isinstance(module, ResidualBlock))
        for i, block in enumerate(blocks):
            blocks[i] = recomputed(block)
    if config.compile:
        # Residual blocks see every image grid and number of images, so their graphs are for sizes of any value: one for
        # each pair of widths, if sizes that are equal by chance are not taken for the same size. Sizes of 1, and those
        # that equal a width, may have graphs of their own.
        from torch._dynamo import config as tracing
        from torch.fx.experimental import _config as symbolic_sizes

        symbolic_sizes.use_duck_shape = False
        tracing.recompile_limit = max(GRAPHS, tracing.recompile_limit)
        outermost = CheckpointWrapper if recomputes else ResidualBlock
        for block in [module for module in model.patches.modules() if isinstance(module, outermost)]:
            block.compile(dynamic=True)
    for block in blocks:
        if config.compile:
            block.compile(dynamic=False)
        if config.shard_blocks:
            shard(block, reshard_after_forward=reshards)
    # The patchers stay in the root's unit: they run once per image grid, a unit gathers at each run, and ranks may have
    # unequal numbers of grids.
    shard(model, reshard_after_forward=False)
    units: list[FSDPModule] = [m for m in model.modules() if isinstance(m, FSDPModule)]  # root, then blocks in order
    for i, unit in enumerate(units):
        if ranks.world_size > 1:  # a single rank's gradients would be copied once more
            unit.set_gradient_divide_factor(1.0)  # the loss is already divided by global counts
        unit.set_force_sum_reduction_for_comms(True)  # else a pre-multiplied sum, which gloo lacks
        if config.prefetch:
            unit.set_modules_to_forward_prefetch(units[i + 1 : i + 1 + config.prefetch])
            before = units[1:i] if i else units[1:]  # the root's backward runs first
            unit.set_modules_to_backward_prefetch(before[: -1 - config.prefetch : -1])
    if ranks.device.type == "cuda" and shape[1] > 1:
        separate_reductions(units[0])
    return units[0]


def separate_reductions(model: "FSDPModule") -> None:
    """Give gradients a communicator of their own; NCCL runs the collectives of one in turn, gathers among them.

    From torch 2.13 on. Collective.
    """
    if hasattr(model, "set_separate_reduce_scatter_group"):
        model.set_separate_reduce_scatter_group()


def set_micro_step(model: nn.Module, config: ParallelConfig, *, is_last: bool) -> None:
    """Set before each forward whether its backward is the step's last; only then are gradients reduced over all ranks.

    Earlier micro-steps' gradients are summed within dp_shard only, or not sent at all (`accumulate_unsharded`).
    Parameters that stay gathered until backward anyway stay so for the next micro-step: weights do not change between.
    """
    from torch.distributed.fsdp import FSDPModule

    assert isinstance(model, FSDPModule), "parallelize comes first"
    dp_shard = dist.get_world_size() // config.dp_replicate
    if config.accumulate_unsharded or dp_shard == 1:
        model.set_requires_gradient_sync(is_last)
    else:
        model.set_requires_all_reduce(is_last)
    model.set_reshard_after_backward(is_last, recurse=config.keeps_gathered(dp_shard))


def reshard(model: nn.Module) -> None:
    """Free what a forward without a backward has left gathered, so that parameters are shards again."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def is_cheap(inputs: int, outputs: int) -> bool:
    """Return whether a product of this shape costs little time for the memory of its output."""
    return outputs < inputs or outputs > ADAPTER_WIDENS * inputs  # the second: an adapter's


def _recompute_policy(_: Any, operator: Any, *args: Any, **__: Any) -> CheckpointPolicy:
    """Save what is expensive to compute: outputs of matrix products, convolutions and attention.

    Except products that narrow, such as SwiGLU's last: they feed the residual sum, whose backward does not read them.
    Also except those of adapters (model/lora.py), which cost little: saving the second would double what is saved.
    Also except baddbmm, whose outputs are the S x S scores of bf16 attention on CPU. In uncompiled blocks flex
    attention is a separate compiled function, which the policy cannot see: it is recomputed.
    """
    aten = torch.ops.aten
    if operator in (aten.mm.default, PRODUCT, torch.ops.transfusion.two_products.default):
        inputs, outputs = args[1].shape if operator is aten.mm.default else args[1].T.shape
        return CheckpointPolicy.PREFER_RECOMPUTE if is_cheap(inputs, outputs) else CheckpointPolicy.MUST_SAVE
    expensive = operator in (
        aten.addmm.default,
        aten.bmm.default,
        aten.convolution.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
        torch.ops.higher_order.flex_attention,
    )
    return CheckpointPolicy.MUST_SAVE if expensive else CheckpointPolicy.PREFER_RECOMPUTE


@torch.no_grad()
def initialize(model: Transfusion, seed: int, device: torch.device) -> None:
    """Give a sharded meta-device model memory and its initial weights, the same for every world size (P3).

    Every rank draws each parameter piece by piece up to the end of its own rows and keeps only those, so the ranks of a
    machine together stay far below one copy of the model.
    """
    model.to_empty(device=device)
    parameters = {plain_name(name): parameter for name, parameter in model.named_parameters()}
    draw(parameters, model.config, model.vocab_size, seed)


@torch.no_grad()
def draw(parameters: Mapping[str, torch.Tensor], config: TransfusionConfig, vocab_size: int, seed: int) -> None:
    """Fill parameters, or shards of them, by plain name with their initial values (see `initialize`)."""
    for name, parameter in parameters.items():
        mine = local(parameter).view(-1)
        start = -first_element(parameter)  # of the next piece, relative to this rank's elements
        drawn = drawn_shape(name, parameter, vocab_size)
        for piece in initial_pieces(name, drawn, config, parameter_generator(seed, name)):
            overlap = piece[max(0, -start) : max(0, len(mine) - start)]
            mine[max(0, start) :][: len(overlap)] = overlap
            start += len(piece)
            if start >= len(mine):
                break
        mine[max(0, start) :].zero_()  # padding


def compute_dtype(config: ParallelConfig, device: torch.device) -> torch.dtype:
    """Return the dtype of forward and backward. A CPU without native bfloat16 would take ten times as long in it."""
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    native = device.type == "cuda" or torch.cpu._is_avx512_bf16_supported()  # as has every CPU with amx_bf16
    return torch.bfloat16 if native else torch.float32


def plain_name(name: str) -> str:
    """Return a parameter's name as in the unwrapped model."""
    return name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")


def gather_weights(weights: dict[str, torch.Tensor], keep: bool = True) -> dict[str, torch.Tensor]:
    """Return unsharded copies on the CPU by plain name; an empty dict on ranks with `keep` False. Collective."""
    copies = {}
    for name, tensor in weights.items():
        tensor = tensor.detach()
        full = tensor.full_tensor() if is_sharded(tensor) else tensor
        if keep:
            copies[plain_name(name)] = full.cpu().clone()
    return copies
