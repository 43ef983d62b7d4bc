"""One training step on fake tensors: what a rank holds and sends, counted on the real objects without their memory.

The real model is sharded by the real FSDP2 over a fake process group, and the real step and optimizer run; only the
tensors have no storage. A dispatch mode sees each allocation, its end and every collective, so whatever parallelism,
recomputation, loss and optimizer do is counted. Rejected: formulas for activations, which drift from the code; counting
saved tensors only, which misses what selective recomputation keeps, FSDP's buffers, and peaks between two saves.

The tensors claim to be on the CPU, because fake CUDA tensors need a CUDA build of torch. To stand for a GPU, attention
runs unmasked: torch's CPU kernel then keeps what FlexAttention keeps (queries, keys, values, the result and f32
log-sums), and never S x S scores.
"""

import sys
import traceback
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data.packing import PackedBatch
from model.document_attention import DocumentMask, document_mask
from model.transfusion import Transfusion
from train.distributed.local_shards import is_sharded
from train.distributed.parallelize import compute_dtype, parallelize, set_micro_step
from train.distributed.ranks import Ranks, alone
from train.optim.groups import freeze, resolve
from train.optim.optimizer import Optimizer
from train.pretrain_config import PretrainConfig
from train.step import latent_stats, micro_step, noise_schedule

COLLECTIVES = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all")
STATES = ("parameters", "frozen", "gradients", "optimizer", "ema")  # kinds that exist between steps
DEPTH = 4  # layers rehearsed in place of more; each further layer adds the same, unless prefetching reaches further


class Collective(NamedTuple):
    """One kind of collective of a step."""

    phase: str  # forward, backward or update
    name: str  # one of COLLECTIVES
    ranks: tuple[int, ...]  # that take part

    @property
    def passes(self) -> int:
        """How often each rank sends (n - 1) / n of the whole tensors' bytes: an all_reduce scatters and gathers."""
        return 2 if self.name == "all_reduce" else 1


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """Bytes of rank 0, whose shards are the largest."""

    states: dict[str, float]  # by kind, see STATES
    checkpoint: float  # size of a checkpoint: all ranks' states without gradients
    staged: float  # this rank's part of it
    largest_parameter: float  # unsharded, in float32: the most that initialization holds of the model
    peaks: dict[str, dict[str, float]]  # by phase (forward, backward, update, preview), by kind: at most bytes
    collectives: dict[Collective, float]  # of a step: bytes of the whole tensors

    @property
    def peak_phase(self) -> str:
        return max(self.peaks, key=lambda phase: sum(self.peaks[phase].values()))

    @property
    def peak(self) -> dict[str, float]:
        """Bytes by kind at the moment of most bytes."""
        return self.peaks[self.peak_phase]

    def extended(self, other: "Rehearsal", times: float) -> "Rehearsal":
        """Return self + times * (other - self): bytes are linear in the number of layers."""

        def line(a: dict[Any, float], b: dict[Any, float]) -> dict[Any, float]:
            return {name: a.get(name, 0) + times * (b.get(name, 0) - a.get(name, 0)) for name in {**a, **b}}

        names = ("checkpoint", "staged", "largest_parameter")
        numbers = line({name: getattr(self, name) for name in names}, {name: getattr(other, name) for name in names})
        return Rehearsal(
            states=line(self.states, other.states),
            peaks={phase: line(self.peaks[phase], other.peaks[phase]) for phase in self.peaks},
            collectives=line(self.collectives, other.collectives),
            **numbers,
        )


def rehearse(
    config: PretrainConfig, vocab_size: int, world_size: int, batches: Sequence[PackedBatch], *, cuda: bool
) -> Rehearsal:
    """Return what a step of `config` takes on `world_size` ranks, using the most memory-hungry of `batches`.

    Without batches no step is run: only the states are known. Deep models whose layers are alike are rehearsed at two
    depths and extrapolated linearly. Raises ValueError for a mesh that does not divide the ranks. A process group that
    exists already must have this world size.
    """
    layers = config.model.transformer.layers
    least = max(DEPTH, config.parallel.prefetch + 3)  # layers from which on each further one adds the same
    with _ranks_of(world_size) as ranks:
        whole = planned_model(config, vocab_size)
        resolve((name for name, _ in whole.named_parameters()), config.optim.groups, config.model.lora.rank > 0)
        if layers <= least + 1 or not _layers_alike(whole):
            return _Stage(config, layers, vocab_size, ranks, cuda).rehearse(batches)
        low, high = (_Stage(config, depth, vocab_size, ranks, cuda).rehearse(batches) for depth in (least, least + 1))
    return low.extended(high, layers - least)


def planned_model(config: PretrainConfig, vocab_size: int, dtype: torch.dtype = torch.bfloat16) -> Transfusion:
    """Return the run's model on the meta device; what is frozen requires no gradient and is held in `dtype`."""
    with torch.device("meta"):
        model = Transfusion(config.model, vocab_size)
    freeze(model, config.optim.groups, dtype, config.model.lora.rank > 0)
    return model


def _layers_alike(model: Transfusion) -> bool:
    """Return whether all layers have the same parameters and train the same ones."""
    blocks = [[(name, p.requires_grad) for name, p in block.named_parameters()] for block in model.transformer.blocks]
    return all(block == blocks[0] for block in blocks)


class _Stage:
    """Model and optimizer of `depth` layers on rank 0, after an update, so that every state exists."""

    def __init__(self, config: PretrainConfig, depth: int, vocab_size: int, ranks: Ranks, cuda: bool) -> None:
        model = replace(config.model, transformer=replace(config.model.transformer, layers=depth))
        # Only a compiler knows what compiled blocks keep; and `auto` would depend on this machine.
        dtype = "bfloat16" if cuda and config.parallel.dtype == "auto" else config.parallel.dtype
        self.config = replace(config, model=model, parallel=replace(config.parallel, compile=False, dtype=dtype))
        self.cuda, self.ranks, self.live, self.fake = cuda, ranks, _LiveBytes(), FakeTensorMode()
        self.model = planned_model(self.config, vocab_size, compute_dtype(self.config.parallel, ranks.device))
        parallelize(self.model, self.config.parallel, ranks)
        self.stats = latent_stats(None, self.config.model.latent_channels, ranks.device)
        self.fake.allow_non_fake_inputs = True  # meta tensors and the latents' statistics
        with self.fake, self.live:
            self.model.to_empty(device=ranks.device)
            self.parameters: list[torch.Tensor] = list(self.model.parameters())
            self.trained = [parameter for parameter in self.parameters if parameter.requires_grad]
            self.optimizer = Optimizer(self.model, self.config.optim, self.config.guard)
            for parameter in self.trained:
                parameter.grad = torch.zeros_like(parameter)
            self.optimizer.update(1)
            self.live.taken()
        known = {id(parameter) for parameter in self.parameters}
        self.held: dict[str, list[torch.Tensor]] = {kind: [] for kind in STATES}
        self.held["parameters"] = self.held["gradients"] = self.trained
        self.held["frozen"] = [parameter for parameter in self.parameters if not parameter.requires_grad]
        for name, value in vars(self.optimizer).items():
            self.held["ema" if name.startswith("ema") else "optimizer"] += _tensors_in(value, known)
        for kind in ("parameters", "frozen", "optimizer", "ema"):
            self.live.name(kind, self.held[kind])
        self.states: dict[str, float] = {kind: _bytes(map(_local, self.held[kind])) for kind in STATES}

    def rehearse(self, batches: Sequence[PackedBatch]) -> Rehearsal:
        collectives: dict[Collective, float] = {}
        noise_schedule.cache_clear()  # real tensors must not mix with fake ones, here or in a later real step
        for batch in batches:
            mask = None if self.cuda else self._mask(batch)  # what it holds depends on values, which fake tensors lack
            with self.fake, self.live:
                collectives = self._step(batch, mask)
        noise_schedule.cache_clear()
        kept = [kind for kind in STATES if kind != "gradients"]  # between steps
        saved = [tensor for kind in kept if kind != "frozen" for tensor in self.held[kind]]
        peaks = {phase: self.live.peak(phase) for phase in ("forward", "backward", "update") if batches}
        if batches and self.config.preview.interval_steps is not None:  # rank 0 then draws with a whole model
            peaks["preview"] = {kind: self.states[kind] for kind in kept} | {
                "preview": 4 * sum(p.numel() for p in self.parameters)
            }
        return Rehearsal(
            states=self.states,
            checkpoint=_bytes(saved),
            staged=_bytes(map(_local, saved)),
            largest_parameter=4 * max(parameter.numel() for parameter in self.parameters),
            peaks=peaks,
            collectives=collectives,
        )

    def _mask(self, batch: PackedBatch) -> DocumentMask:
        trunk = self.config.model.transformer
        mask = document_mask(batch.document_ids, batch.image_ids, batch.visible_until)
        mask.moved = lambda place: mask  # type: ignore[method-assign]  # its sizes do not depend on the tokens' order
        for parts in ((trunk.heads, trunk.num_kv_heads, trunk.num_kv_heads), (trunk.heads,)):
            mask.places(parts)
        return mask

    def _step(self, batch: PackedBatch, mask: DocumentMask | None) -> dict[Collective, float]:
        """Run the first and the last micro-step and the update; return the traffic of all micro-steps."""
        config, live = self.config, self.live
        lanes = -(-config.data.lanes // self.ranks.world_size)
        micro_steps = -(-lanes // min(lanes, config.micro_batch_size))
        live.phase = "batch"
        batch = batch.map(torch.empty_like)
        first = self._micro_step(batch, mask, is_last=False) if micro_steps > 1 else Counter()
        last = self._micro_step(batch, mask, is_last=True)
        live.name("gradients", [parameter.grad for parameter in self.parameters if parameter.grad is not None])
        live.phase = "update"
        self.optimizer.update(2)
        total = Counter(live.taken())
        for what in first | last:
            # A micro-step in between gathers what the last one does and reduces what the first one does.
            between = last if what.name == "all_gather" else first
            total[what] += first[what] + last[what] + max(micro_steps - 2, 0) * between[what]
        return dict(total)

    def _micro_step(self, batch: PackedBatch, mask: DocumentMask | None, *, is_last: bool) -> Counter[Collective]:
        set_micro_step(self.model, self.config.parallel, is_last=is_last)
        self.live.phase = "forward"
        loss = micro_step(
            self.model,
            batch,
            stats=self.stats,
            diffusion=self.config.diffusion,
            image_weight=self.config.loss.image_weight,
            global_text_targets=1,
            global_images=1,
            mask_of=lambda *_: mask,
        ).total
        self.live.phase = "backward"
        loss.backward()
        return self.live.taken()


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor._local_tensor if is_sharded(tensor) else tensor


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _tensors_in(value: Any, known: set[int]) -> list[torch.Tensor]:
    """Return the tensors in an optimizer's attribute except those of `known` ids, to which theirs are added."""
    if isinstance(value, torch.Tensor):
        new = [] if id(value) in known else [value]
        known.add(id(value))
        return new
    if isinstance(value, torch.optim.Optimizer):
        value = value.state
    elif type(value).__module__.startswith("train.") and hasattr(value, "__dict__"):
        value = vars(value)
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for part in parts for tensor in _tensors_in(part, known)]


@dataclass(eq=False)
class _Allocation:
    kind: str
    storage: weakref.ref  # kept alive so that its callback runs
    num_bytes: int = 0


class _LiveBytes(TorchDispatchMode):
    """Track every tensor's storage from allocation to release; remember each phase's moment of most bytes."""

    def __init__(self) -> None:
        # Together a second, which a program that only checks its config need not wait for.
        from torch.distributed._tools import fake_collectives
        from torch.distributed.tensor import DTensor

        super().__init__()
        self._dtensor = DTensor
        self._sizes = fake_collectives.CollectiveOp
        self._collective_ops = fake_collectives.collective_ops - fake_collectives.sync_ops
        self.phase = "states"
        self._collectives: Counter[Collective] = Counter()
        self._allocations: dict[int, _Allocation] = {}  # by the address of the storage
        self._total = 0
        self._most: dict[str, tuple[int, list[tuple[_Allocation, int]]]] = {}  # by phase: total, parts

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if any(issubclass(kind, self._dtensor) for kind in types):
            return NotImplemented  # DTensor calls again with local tensors
        result = func(*args, **(kwargs or {}))
        if func in self._collective_ops:
            self._count(func, result, args, kwargs)
        callers = traceback.walk_stack(sys._getframe())
        by_fsdp = any("_fully_shard" in frame.f_code.co_filename for frame, _ in callers)
        storages = [tensor.untyped_storage() for tensor in tree_leaves(result) if isinstance(tensor, torch.Tensor)]
        new = [storage for storage in storages if storage._cdata not in self._allocations]
        for storage in new:
            self._add(storage, "gathered" if by_fsdp else self.phase)
        if new or by_fsdp:
            self._update_most(resized=by_fsdp)  # FSDP frees and refills storages in place
        return result

    def name(self, kind: str, tensors: Iterable[torch.Tensor]) -> None:
        """Set the kind of the storages of `tensors`, in remembered moments too."""
        for tensor in tensors:
            self._allocations[_local(tensor).untyped_storage()._cdata].kind = kind

    def taken(self) -> Counter[Collective]:
        """Return the traffic since the last call."""
        taken, self._collectives = self._collectives, Counter()
        return taken

    def peak(self, phase: str) -> dict[str, float]:
        """Return the bytes by kind at a phase's moment of most bytes."""
        kinds: Counter[str] = Counter()
        for allocation, num_bytes in self._most[phase][1]:
            kinds[allocation.kind] += num_bytes
        return dict(kinds)

    def _add(self, storage: torch.UntypedStorage, kind: str) -> None:
        address, num_bytes = storage._cdata, storage.nbytes()

        def gone(_: weakref.ref) -> None:
            self._total -= self._allocations.pop(address).num_bytes

        self._allocations[address] = _Allocation(kind, weakref.ref(storage, gone), num_bytes)
        self._total += num_bytes

    def _update_most(self, resized: bool) -> None:
        if resized:
            for allocation in list(self._allocations.values()):
                storage = allocation.storage()
                if storage is not None:
                    storage._fix_weakref()  # torch may have been its only owner
                    allocation.num_bytes = storage.nbytes()
            self._total = sum(allocation.num_bytes for allocation in self._allocations.values())
        if self.phase not in self._most or self._total > self._most[self.phase][0]:
            sizes = [(allocation, allocation.num_bytes) for allocation in self._allocations.values()]
            self._most[self.phase] = self._total, sizes

    def _count(self, func: Any, result: Any, args: tuple, kwargs: dict | None) -> None:
        operator = func.name().replace("allgather", "all_gather").replace("allreduce", "all_reduce")
        name = next(name for name in COLLECTIVES if name in operator.replace("alltoall", "all_to_all"))
        group = self._sizes.get_process_group(func, args)
        what = Collective(self.phase, name, tuple(dist.get_process_group_ranks(group)))
        self._collectives[what] += self._sizes.get_comm_tensor_size(func, result, args, kwargs)


@contextmanager
def _ranks_of(world_size: int) -> Iterator[Ranks]:
    """Yield rank 0 of `world_size`: of the existing process group, else of a fake one."""
    ours = not dist.is_initialized()
    if ours:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        assert dist.get_world_size() == world_size, (dist.get_world_size(), world_size)
        yield replace(alone(), world_size=world_size)
    finally:
        if ours:
            dist.destroy_process_group()
