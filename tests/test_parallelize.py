"""Parallelism is invisible: the same weights, losses and gradients however the model is wrapped (P3)."""

from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.step import backward, sharded_model
from data.dataset import open_data
from data.loader import Loader
from data.tokenizer import Tokenizer
from model import transfusion
from model.diffusion import DiffusionConfig
from model.transformer import TransformerConfig
from model.transfusion import Transfusion, TransfusionConfig, init_weights
from model.unet import UNetConfig
from tests.ranks import run_ranks
from tests.sources import data_config
from train.distributed.parallelize import ParallelConfig, compute_dtype, gather_weights, mesh_shape
from train.distributed.ranks import Ranks
from train.optim.guard import GuardConfig
from train.optim.optimizer import OptimConfig, Optimizer
from train.step import latent_stats, micro_step, noised_images

MODEL = TransfusionConfig(
    transformer=TransformerConfig(width=24, layers=3, heads=2, ffn_multiple_of=8, qk_norm=True), latent_channels=2
)
VOCAB = 301  # divisible by no number of ranks, as is 305
PADDED = replace(MODEL, vocab_multiple_of=5)


def _initial_weights(ranks: Ranks, piece: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], float]:
    transfusion.INIT_CHUNK = piece
    model = sharded_model(PADDED, VOCAB, ranks, ParallelConfig(activation_checkpointing="full"), seed=7)
    parameters = dict(model.named_parameters())
    largest = sum(p.to_local().numel() for p in parameters.values()) / sum(p.numel() for p in parameters.values())
    return gather_weights(parameters), gather_weights(parameters, keep=False), largest


def test_initial_weights_are_those_of_the_plain_model_on_any_number_of_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """P3: bit for bit, drawn in pieces with arbitrary borders; and each rank holds only its share of them."""
    monkeypatch.setattr(transfusion, "INIT_CHUNK", 500)
    plain = Transfusion(PADDED, VOCAB)
    init_weights(plain, 7)
    expected = dict(plain.named_parameters())
    for world_size in (1, 2, 3):
        for weights, nothing, share in run_ranks(_initial_weights, world_size, 500):
            assert nothing == {} and weights.keys() == expected.keys()
            assert all(torch.equal(weights[name], p) for name, p in expected.items()), world_size
            assert share < 1 / world_size + 0.05


class CollectiveCounts(TorchDispatchMode):
    """Counts this thread's collectives, those of backward included."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, operator: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if operator.namespace == "c10d":
            self.counts[operator.overloadpacket.__name__] += 1
        return operator(*args, **(kwargs or {}))


@dataclass
class Step:
    """The results of one step, the same on every rank."""

    loss: float
    grads: dict[str, torch.Tensor]
    grad_norm: float
    weights: dict[str, torch.Tensor]  # after the update
    dtypes: set[torch.dtype]  # of weights and gradients
    collectives: Counter[str]  # of forward and backward, by operator


def _step_with(
    ranks: Ranks, options: dict[str, dict], data_settings: Any, of: TransfusionConfig = MODEL, count: bool = False
) -> dict[str, Step]:
    """Make a step with each of `options`; `micro_batch_size` among them is the loader's."""
    data = open_data(data_settings, 3, MODEL.patch_size)
    found = {}
    for name, changes in options.items():
        changes = {"dtype": "float32", **changes}
        rows = changes.pop("micro_batch_size", 1)
        config = ParallelConfig(**changes)
        model = sharded_model(of, data.tokenizer.vocab_size, ranks, config, seed=7)
        loader = Loader(data, data_settings, rank=ranks.rank, world_size=ranks.world_size, micro_batch_size=rows)
        batches, collectives = loader.next(30).micro_batches, CollectiveCounts()
        with collectives if count else nullcontext():
            total = backward(model, batches, ranks, config, spec=data.latent_spec, targets=100, images=10)
        loader.close()
        torch.distributed.all_reduce(total)
        parameters = dict(model.named_parameters())
        dtypes = {p.dtype for p in parameters.values()} | {p.grad.dtype for p in parameters.values()}
        grads = gather_weights({n: p.grad for n, p in parameters.items()})
        # A large eps: without it the first update is the gradient's sign, which rounding flips where it is near zero.
        config = OptimConfig(learning_rate=0.1, warmup_steps=0, clip_norm=0.1, eps=0.1)
        norm = Optimizer(model, config, GuardConfig()).update(1)
        weights = gather_weights(parameters)
        found[name] = Step(total.item(), grads, norm.item(), weights, dtypes, collectives.counts)
    return found


def _assert_same(name: str, step: Step, expected: Step, tolerance: float) -> None:
    assert step.loss == pytest.approx(expected.loss, rel=min(tolerance, 0.01)), name
    assert step.grad_norm == pytest.approx(expected.grad_norm, rel=tolerance), name
    for kind in ("grads", "weights"):
        tensors, others = getattr(expected, kind), getattr(step, kind)
        assert tensors.keys() == others.keys()
        for parameter, tensor in tensors.items():
            error = (others[parameter] - tensor).norm()
            assert error <= tolerance * tensor.norm() + 1e-7, f"{name}: {kind}: {parameter}: {error:.1e}"


OPTIONS = {
    "plain": {},
    "full": {"activation_checkpointing": "full"},
    "selective": {"activation_checkpointing": "selective"},
    "one unit": {"shard_blocks": False},
    "one unit, full": {"shard_blocks": False, "activation_checkpointing": "full"},
    "kept": {"reshard_after_forward": False},
    "FSDP's order": {"prefetch": 0},
    "two ahead": {"prefetch": 2, "activation_checkpointing": "full"},
    "bfloat16": {"dtype": "bfloat16"},
    "bfloat16, selective": {"dtype": "bfloat16", "activation_checkpointing": "selective"},
}


def test_options_change_memory_and_speed_but_not_the_result(tokenizer: Tokenizer, sources: dict[str, Path]) -> None:
    """Within 1e-6 in float32; bfloat16 is close, and its weights and gradient sums are float32."""
    settings = data_config(tokenizer, sources, lanes=4, sequence_length=64)
    found = run_ranks(_step_with, 2, OPTIONS, settings)[0]
    assert all(grad.any() for grad in found["plain"].grads.values())
    for name, step in found.items():
        assert step.dtypes == {torch.float32}
        _assert_same(name, step, found["plain"], 0.1 if "bfloat16" in name else 1e-6)
    _assert_same("bfloat16, selective", found["bfloat16, selective"], found["bfloat16"], 1e-6)
    assert found["bfloat16"].loss != found["plain"].loss


def _embedded_timesteps(ranks: Ranks, data_settings: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the timesteps of a flow's batch, and those that a model in bfloat16 embeds."""
    data, flow = open_data(data_settings, 3, MODEL.patch_size), DiffusionConfig(schedule="flow", prediction="v")
    model = sharded_model(MODEL, data.tokenizer.vocab_size, ranks, ParallelConfig(dtype="bfloat16"))
    loader = Loader(data, data_settings, rank=0, world_size=1, micro_batch_size=4)
    batch, stats = loader.next(30).micro_batches[0], latent_stats(data.latent_spec, 2, ranks.device)
    loader.close()
    embedded: list[torch.Tensor] = []
    hook = model.patches.timestep.register_forward_pre_hook(lambda _, arguments: embedded.append(arguments[0]))
    micro_step(model, batch, stats=stats, diffusion=flow, image_weight=1.0, global_text_targets=1, global_images=1)
    hook.remove()
    return torch.cat([*noised_images(batch, stats, flow, MODEL)[1].values()]), torch.cat(embedded)


def test_bfloat16_leaves_a_flows_timesteps_exact(tokenizer: Tokenizer, sources: dict[str, Path]) -> None:
    """Sampling embeds exact ones (P12)."""
    settings = data_config(tokenizer, sources, lanes=4, sequence_length=64)
    ((timesteps, embedded),) = run_ranks(_embedded_timesteps, 1, settings)
    assert len(timesteps) > 4 and torch.equal(embedded, timesteps)


ROW, SUMS, KEPT = {"micro_batch_size": 1}, {"accumulate_unsharded": True}, {"reshard_after_forward": False}
MESHES = {
    2: {"1x2": {}, "2x1": {"dp_replicate": 2}, "2x1, a row at a time": {"dp_replicate": 2} | ROW},
    3: {"3x1": {"dp_replicate": 3}, "1x3, unsharded sums": ROW | SUMS},
    4: {
        "2x2": {"dp_replicate": 2},
        "2x2, a row at a time": {"dp_replicate": 2} | ROW,
        "2x2, unsharded sums": {"dp_replicate": 2} | ROW | SUMS,
        "2x2, kept": {"dp_replicate": 2} | ROW | KEPT,
        "2x2, kept, unsharded sums": {"dp_replicate": 2} | ROW | KEPT | SUMS,
        "1x4 in groups of two": {"reshard_after_forward": 2} | ROW,
    },
}


def test_any_mesh_and_any_split_into_micro_steps_make_the_update_of_one_rank(
    tokenizer: Tokenizer, sources: dict[str, Path]
) -> None:
    """P3: loss, summed gradients, their norm over the mesh and the clipped update, uneven shards included.

    The number of reductions is what each option says, with four units and two micro-steps.
    """
    settings = data_config(tokenizer, sources, lanes=8, sequence_length=64)
    expected = run_ranks(_step_with, 1, {"plain": {}}, settings)[0]["plain"]
    steps = {}
    for world_size, options in MESHES.items():
        options = {name: {"micro_batch_size": 4, **changes} for name, changes in options.items()}
        for of_rank in run_ranks(_step_with, world_size, options, settings, MODEL, True):
            steps |= of_rank
            for name, step in of_rank.items():
                _assert_same(name, step, expected, 1e-5)
    reductions = {
        name: (step.collectives["_reduce_scatter_base_"], step.collectives["allreduce_"])
        for name, step in steps.items()
    }
    assert reductions["2x2"] == reductions["2x2, unsharded sums"] == reductions["2x2, kept, unsharded sums"] == (4, 4)
    assert reductions["2x2, a row at a time"] == (8, 4)
    assert reductions["2x1"] == reductions["2x1, a row at a time"] == (0, 4)
    gathers = {name: step.collectives["_allgather_base_"] for name, step in steps.items()}
    assert (gathers["2x2"], gathers["2x2, a row at a time"], gathers["2x2, kept"]) == (1 + 2 * 3, 1 + 4 * 3, 4)


def test_a_mesh_that_the_ranks_do_not_make_is_refused() -> None:
    """P10: with value, expectation and remedy; a group of ranks must be a true part of a copy."""
    assert [mesh_shape(ParallelConfig(dp_replicate=n), 12) for n in (1, 3, 12)] == [(1, 12), (3, 4), (12, 1)]
    assert mesh_shape(ParallelConfig(dp_replicate=2, reshard_after_forward=3), 12) == (2, 6)
    with pytest.raises(ValueError, match=r"dp_replicate=5 on 12 ranks: expected .* \[1, 2, 3, 4, 6, 12\]; set another"):
        mesh_shape(ParallelConfig(dp_replicate=5), 12)
    for group in (4, 6, 8):
        with pytest.raises(ValueError, match=rf"forward={group} with .* over 6 ranks: expected null, .* \(2, 3\)"):
            mesh_shape(ParallelConfig(dp_replicate=2, reshard_after_forward=group), 12)
    for wrong in ({"dp_replicate": 0}, {"prefetch": -1}, {"reshard_after_forward": 1}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}={next(iter(wrong.values()))}"):
            ParallelConfig(**wrong)


def _refused_mesh(ranks: Ranks) -> str:
    with pytest.raises(ValueError) as refusal:
        sharded_model(MODEL, VOCAB, ranks, ParallelConfig(dp_replicate=3))
    return str(refusal.value)


def test_every_rank_refuses_a_wrong_mesh_alike() -> None:
    """P10."""
    assert len(set(run_ranks(_refused_mesh, 2))) == 1


def _timeouts(ranks: Ranks) -> list[float]:
    sharded_model(MODEL, VOCAB, ranks, ParallelConfig(dp_replicate=2))
    ranks.set_timeout(40)
    groups = torch.distributed.distributed_c10d._world.pg_map
    return [group._get_backend(ranks.device).options._timeout.total_seconds() for group in groups]


def test_a_hanging_rank_is_noticed_on_every_axis_of_the_mesh() -> None:
    """The groups of a mesh wait a little longer than the vote, not the half hour of torch's default."""
    for timeouts in run_ranks(_timeouts, 2):
        assert sorted(timeouts)[:3] == [20, 20, 40], "unchanged for saves, then the vote's"
        assert len(timeouts) > 4 and set(timeouts) == {20, 40, 50}


class LiveTensors(TorchDispatchMode):
    """Tracks which of the memory returned by operators is still held by Python, autograd or a checkpointing cache."""

    def __init__(self) -> None:
        super().__init__()
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, operator: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = operator(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                reference = StorageWeakRef(storage)
                self._storages[reference.cdata] = reference, storage.nbytes()
        return result

    @property
    def num_bytes(self) -> int:
        return sum(size for reference, size in self._storages.values() if not reference.expired())


def _kept_for_backward(ranks: Ranks, data_settings: Any) -> dict[str, tuple[int, dict[str, torch.Tensor]]]:
    """Return, by choice of checkpointing, the bytes alive between forward and backward, and the gradients."""
    data, found = open_data(data_settings, 3, MODEL.patch_size), {}
    unet = UNetConfig(channels=(16, 32), blocks=2, timestep_width=16)
    trunk = TransformerConfig(width=64, layers=4, heads=2, ffn_multiple_of=8, qk_norm=True)
    of = TransfusionConfig(transformer=trunk, latent_channels=2, patches="unet", unet=unet)
    loader = Loader(data, data_settings, rank=ranks.rank, world_size=ranks.world_size, micro_batch_size=2)
    (batch,) = loader.next(30).micro_batches
    loader.close()
    for choice in ("none", "selective", "full"):
        config = ParallelConfig(dtype="float32", activation_checkpointing=choice)
        model = sharded_model(of, data.tokenizer.vocab_size, ranks, config, seed=7)
        settings = {"diffusion": DiffusionConfig(), "image_weight": 5.0, "global_text_targets": 9, "global_images": 9}
        with LiveTensors() as live:
            loss = micro_step(model, batch, stats=latent_stats(data.latent_spec, 2, ranks.device), **settings)
            num_bytes = live.num_bytes
        loss.total.backward()
        found[choice] = num_bytes, gather_weights({name: p.grad for name, p in model.named_parameters()})
    return found


def test_checkpointing_trades_memory_for_time_bit_for_bit(tokenizer: Tokenizer, pairs_folder: Path) -> None:
    """Recomputation gives the same bits; full keeps the least memory, selective less than no checkpointing."""
    settings = data_config(tokenizer, {"pairs": pairs_folder}, lanes=2, sequence_length=256)
    (found,) = run_ranks(_kept_for_backward, 1, settings)
    (none, grads), (selective, _), (full, _) = (found[choice] for choice in ("none", "selective", "full"))
    assert full < 0.5 * selective and selective < 0.7 * none
    for choice in ("selective", "full"):
        assert [name for name, grad in found[choice][1].items() if not torch.equal(grad, grads[name])] == []


def test_a_unet_gives_the_same_loss_and_gradients_however_it_is_sharded_and_recomputed(
    tokenizer: Tokenizer, sources: dict[str, Path]
) -> None:
    """P3: on 1, 2 and 3 ranks, some without images or with fewer grid sizes than others."""
    settings = data_config(tokenizer, sources, lanes=5, sequence_length=64)
    unet = UNetConfig(channels=(8, 12), blocks=2, timestep_width=16)
    model = replace(MODEL, patches="unet", unet=unet)
    choices = {2: ("full", "selective"), 3: ("plain", "bfloat16")}
    expected = run_ranks(_step_with, 1, {"plain": {}}, settings, model)[0]["plain"]
    learned = [name for name in expected.grads if name.startswith("patches.") and expected.grads[name].any()]
    assert len(learned) > 30
    for world_size, names in choices.items():
        options = {name: OPTIONS[name] for name in names}
        for name, step in run_ranks(_step_with, world_size, options, settings, model)[0].items():
            _assert_same(name, step, expected, 0.1 if name == "bfloat16" else 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("patches", ["linear", "unet"])
def test_compiled_blocks_give_the_same_result(patches: Any, tokenizer: Tokenizer, pairs_folder: Path) -> None:
    """Needs a C++ compiler."""
    settings = data_config(tokenizer, {"pairs": pairs_folder}, lanes=2, sequence_length=64)
    of = replace(MODEL, patches=patches, unet=UNetConfig(channels=(8, 12), blocks=2, timestep_width=16))
    names = ("plain", "full", "selective") if patches == "linear" else ("full",)
    compiled = {f"compiled, {name}": {"compile": True} | OPTIONS[name] for name in names}
    found = run_ranks(_step_with, 2, {"plain": {}} | compiled, settings, of, timeout_s=280)[0]
    for name, step in found.items():
        _assert_same(name, step, found["plain"], 1e-4)


def test_the_compute_dtype_is_native_or_as_asked() -> None:
    assert compute_dtype(ParallelConfig(), torch.device("cuda")) == torch.bfloat16
    for name in ("float32", "bfloat16"):
        assert compute_dtype(ParallelConfig(dtype=name), torch.device("cpu")) == getattr(torch, name)
