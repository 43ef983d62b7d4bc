"""Parallelism, applied from outside and block by block: activation checkpointing -> compile -> fully_shard.

The model does not know its ranks. It is built on the meta device, sharded, and only then given memory, so no rank
ever holds a full copy; each parameter is drawn on the CPU from (seed, name), so every world size starts alike.
Ranks form a mesh dp_replicate x dp_shard: neighbours share one copy of the states, gradients are summed over all.
"""

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from model.transfusion import initial_pieces, parameter_generator
from model.unet import ResidualBlock
from train.distributed.ranks import Ranks


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    # Copies of the sharded states, >= 1, a divisor of the number of ranks (HSDP): each copy is sharded over ranks /
    # dp_replicate neighbours, so gathers stay among those (say, in a machine) and only gradients go further. 1: FSDP.
    dp_replicate: int = 1
    # Number format of parameters in forward and backward; master weights and gradient sums stay float32.
    # auto: bfloat16 where the processor multiplies it natively (every CUDA device we support), else float32.
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    # What backward recomputes in each block and each residual block of a U-Net. none: nothing; full: all of it;
    # selective: all but the outputs of matrix products, convolutions and attention, at little cost in time.
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    compile: bool = False  # torch.compile each block (needs a C++ compiler on CPU, Triton on CUDA)
    shard_blocks: bool = True  # each block its own FSDP unit; false: one unit for the whole (small) model
    # Gathered parameters of a block between its forward and backward. true: freed; false: kept, also between
    # micro-steps; N: spread over groups of N neighbours, 1 < N < dp_shard and a divisor of it, so that backward
    # gathers within them (makes process groups for every block).
    reshard_after_forward: bool | int = True
    # Blocks whose parameters are gathered ahead of the one that runs, >= 0; each takes its size in `dtype`. 0: FSDP's
    # own order, one ahead in backward, and in forward as far as the host runs ahead of the device.
    prefetch: int = 1
    # Add micro-steps up before anything is sent: one reduction a step in place of one a micro-step, for a whole
    # float32 gradient (4 bytes a parameter of the model) on every rank.
    accumulate_unsharded: bool = False

    def __post_init__(self) -> None:
        if self.dp_replicate < 1 or self.prefetch < 0:
            raise ValueError(
                f"parallel.dp_replicate={self.dp_replicate}, prefetch={self.prefetch}: expected dp_replicate >= 1, "
                "prefetch >= 0"
            )
        if self.group_size is not None and self.group_size < 2:
            raise ValueError(
                f"parallel.reshard_after_forward={self.group_size}: expected true, false or a group of at least 2 ranks"
            )

    @property
    def group_size(self) -> int | None:
        """Return the ranks that a block's parameters are spread over after its forward; None: all of dp_shard, or 1."""
        return None if isinstance(self.reshard_after_forward, bool) else self.reshard_after_forward


def mesh_shape(config: ParallelConfig, world_size: int) -> tuple[int, int]:
    """Return (dp_replicate, dp_shard), whose product is `world_size`; raises ValueError where there is none (P10)."""
    if world_size % config.dp_replicate:
        divisors = [n for n in range(1, world_size + 1) if world_size % n == 0]
        raise ValueError(
            f"parallel.dp_replicate={config.dp_replicate} on {world_size} ranks: expected one of their divisors "
            f"{divisors}; set another, or start another number of ranks"
        )
    dp_shard, group = world_size // config.dp_replicate, config.group_size
    if group is not None and (group >= dp_shard or dp_shard % group):
        groups = [n for n in range(2, dp_shard) if dp_shard % n == 0]
        raise ValueError(
            f"parallel.reshard_after_forward={group} with states sharded over {dp_shard} ranks: expected true, false"
            + "".join(f" or {n}" for n in groups)
        )
    return config.dp_replicate, dp_shard


def parallelize(model: nn.Module, config: ParallelConfig, ranks: Ranks) -> FSDPModule:
    """Wrap a meta-device model for `ranks`; gradients come out summed over ranks, never averaged.

    Raises ValueError on every rank for a mesh that their number does not allow.
    """
    shape, names = mesh_shape(config, ranks.world_size), ("dp_replicate", "dp_shard")
    first = 1 if config.dp_replicate == 1 else 0  # a mesh of one axis is FSDP's plain case, without an all-reduce
    mesh = init_device_mesh(ranks.device.type, shape[first:], mesh_dim_names=names[first:])
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype(config, ranks.device), reduce_dtype=torch.float32)
    blocks = model.transformer.blocks
    if config.activation_checkpointing != "none":
        recomputed = partial(_recomputed, selective=config.activation_checkpointing == "selective")
        apply_activation_checkpointing(
            model.patches, recomputed, check_fn=lambda module: isinstance(module, ResidualBlock)
        )
        for i, block in enumerate(blocks):
            blocks[i] = recomputed(block)
    for block in blocks:
        if config.compile:
            block.compile()
        if config.shard_blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=config.reshard_after_forward)
    # The patchers stay in the root's unit: they run once an image grid, of which ranks may have unequal numbers, and
    # a unit of their own would gather as often.
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]  # the root, then blocks in order
    for i, unit in enumerate(units):
        unit.set_gradient_divide_factor(1.0)  # the loss is divided by global counts already
        unit.set_force_sum_reduction_for_comms(True)  # else a pre-multiplied sum, which gloo refuses
        if config.prefetch:
            unit.set_modules_to_forward_prefetch(units[i + 1 : i + 1 + config.prefetch])
            before = units[1:i] if i else units[1:]  # the root's backward comes first
            unit.set_modules_to_backward_prefetch(before[: -1 - config.prefetch : -1])
    return model


def set_micro_step(model: FSDPModule, config: ParallelConfig, *, is_last: bool) -> None:
    """Say before each forward whether its backward ends the step; only then is every gradient reduced to the end.

    Before the last, FSDP sums each micro-step's gradients within dp_shard and HSDP keeps those partial sums to itself,
    or nothing is sent at all (`accumulate_unsharded`). What stays gathered until backward anyway also stays gathered
    for the next micro-step: weights do not change in between.
    """
    if config.accumulate_unsharded:
        model.set_requires_gradient_sync(is_last)
    else:
        model.set_requires_all_reduce(is_last)
    model.set_reshard_after_backward(is_last, recurse=config.reshard_after_forward is False)


def reshard(model: nn.Module) -> None:
    """Free what a forward without a backward has left gathered: until then states would be looked for in vain."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _recomputed(module: nn.Module, selective: bool) -> nn.Module:
    """Return `module` wrapped so that backward recomputes it. Nothing in it draws: no random state to restore."""
    if not selective:
        return checkpoint_wrapper(module, preserve_rng_state=False)
    contexts = partial(create_selective_checkpoint_contexts, _what_to_keep)
    return checkpoint_wrapper(module, preserve_rng_state=False, context_fn=contexts)


def _what_to_keep(_: Any, operator: Any, *args: Any, **__: Any) -> CheckpointPolicy:
    """Keep what is dear to compute: outputs of matrix products, convolutions and attention.

    Not those of a product that narrows, as SwiGLU's last: they go into the residual sum, whose backward reads nothing.
    Nor baddbmm's, which are bf16 attention's S x S scores on CPU. Uncompiled blocks run flex attention as a compiled
    function of its own, which the policy cannot see: it runs again.
    """
    aten = torch.ops.aten
    if operator is aten.mm.default:
        narrows = args[1].shape[1] < args[1].shape[0]
        return CheckpointPolicy.PREFER_RECOMPUTE if narrows else CheckpointPolicy.MUST_SAVE
    dear = operator in (
        aten.addmm.default,
        aten.bmm.default,
        aten.convolution.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
        torch.ops.higher_order.flex_attention,
    )
    return CheckpointPolicy.MUST_SAVE if dear else CheckpointPolicy.PREFER_RECOMPUTE


@torch.no_grad()
def initialize(model: nn.Module, seed: int, device: torch.device) -> None:
    """Give a sharded meta-device model memory and its initial weights, the same for every world size (P3).

    Every rank draws each parameter up to the end of its own rows and keeps those; it never holds more of the rest
    than a piece, so that the ranks of a machine together stay far below one copy of the model.
    """
    model.to_empty(device=device)
    for name, parameter in model.named_parameters():
        local, first, name = parameter.detach(), 0, plain_name(name)  # first: flat index of this rank's first element
        if isinstance(parameter, DTensor):
            _, rows = compute_local_shape_and_global_offset(
                parameter.shape, parameter.device_mesh, parameter.placements
            )
            local, first = local.to_local(), rows[0] * math.prod(parameter.shape[1:])
        local, start = local.view(-1), -first  # start: of the next piece, within `local`
        for piece in initial_pieces(name, tuple(parameter.shape), model.config, parameter_generator(seed, name)):
            mine = piece[max(0, -start) : max(0, len(local) - start)]
            local[max(0, start) :][: len(mine)] = mine
            start += len(piece)
            if start >= len(local):
                break


def compute_dtype(config: ParallelConfig, device: torch.device) -> torch.dtype:
    """Return the dtype of forward and backward; without native bfloat16 a CPU would take ten times as long in it."""
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    native = device.type == "cuda" or any(flag in _cpu_flags() for flag in ("avx512_bf16", "amx_bf16"))
    return torch.bfloat16 if native else torch.float32


def _cpu_flags() -> set[str]:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return next((set(line.split(":")[1].split()) for line in lines if line.startswith("flags")), set())


def plain_name(name: str) -> str:
    """Return a parameter's name as in the unwrapped model."""
    return name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")


def gather_weights(weights: dict[str, torch.Tensor], keep: bool = True) -> dict[str, torch.Tensor]:
    """Return unsharded copies on the CPU, by plain name; nothing where `keep` is False. Collective."""
    kept = {}
    for name, tensor in weights.items():
        tensor = tensor.detach()
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if keep:
            kept[plain_name(name)] = full.cpu().clone()
    return kept
