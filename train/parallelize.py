"""Parallelism, applied from outside and block by block: activation checkpointing -> compile -> fully_shard.

The model does not know its ranks. It is built on the meta device, sharded, and only then given memory, so no rank
ever holds more than one full parameter; each is drawn on the CPU from (seed, name), so every world size starts alike.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from model.transfusion import initial_value, parameter_generator
from model.unet import ResidualBlock
from train.distributed import Ranks


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    # Number format of parameters in forward and backward; master weights and gradient sums stay float32.
    # auto: bfloat16 where the processor multiplies it natively (every CUDA device we support), else float32.
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    # What backward recomputes. none: nothing; full: each block, and each residual block of a U-Net.
    activation_checkpointing: Literal["none", "full"] = "none"
    compile: bool = False  # torch.compile each block (needs a C++ compiler on CPU, Triton on CUDA)
    shard_blocks: bool = True  # each block its own FSDP unit; false: one unit for the whole (small) model
    reshard_after_forward: bool = True  # free gathered parameters between forward and backward


def parallelize(model: nn.Module, config: ParallelConfig, ranks: Ranks) -> FSDPModule:
    """Wrap a meta-device model for `ranks`; gradients come out summed over ranks, never averaged."""
    mesh = init_device_mesh(ranks.device.type, (ranks.world_size,), mesh_dim_names=("dp_shard",))
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype(config, ranks.device), reduce_dtype=torch.float32)
    if config.activation_checkpointing == "full":
        apply_activation_checkpointing(model.patches, check_fn=lambda module: isinstance(module, ResidualBlock))
    blocks = model.transformer.blocks
    for i, block in enumerate(blocks):
        if config.activation_checkpointing == "full":
            blocks[i] = block = checkpoint_wrapper(block)
        if config.compile:
            block.compile()
        if config.shard_blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=config.reshard_after_forward)
    # The patchers stay in the root's unit: they run once an image grid, of which ranks may have unequal numbers, and
    # a unit of their own would gather as often.
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # the loss is divided by global counts already
            module.set_force_sum_reduction_for_comms(True)  # else a pre-multiplied sum, which gloo refuses
    return model


def initialize(model: nn.Module, seed: int, device: torch.device) -> None:
    """Give a sharded meta-device model memory and its initial weights, the same for every world size (P3)."""
    model.to_empty(device=device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            name = plain_name(name)
            generator = parameter_generator(seed, name)
            full = initial_value(name, tuple(parameter.shape), model.config, generator).to(device)
            if isinstance(parameter, DTensor):
                mesh, placements = parameter.device_mesh, parameter.placements
                # src_data_rank=None: each rank cuts its own slice, nothing is sent
                full = distribute_tensor(full, mesh, placements, src_data_rank=None)
            parameter.copy_(full)


def compute_dtype(config: ParallelConfig, device: torch.device) -> torch.dtype:
    """Return the dtype of forward and backward; without native bfloat16 a CPU would take ten times as long in it."""
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    native = device.type == "cuda" or any(flag in _cpu_flags() for flag in ("avx512_bf16", "amx_bf16"))
    return torch.bfloat16 if native else torch.float32


def _cpu_flags() -> set[str]:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
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
