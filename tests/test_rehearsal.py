"""A step on fake tensors holds, keeps and sends what the real step does."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from data.dataset import DataConfig
from model.attention import attend
from model.transformer import TransformerConfig
from model.transfusion import Transfusion, TransfusionConfig
from tests.ranks import run_ranks
from train.checkpoints import checkpoint
from train.checkpoints.run_folder import RunFolder
from train.checkpoints.staging import Staging
from train.distributed.local_shards import local
from train.distributed.parallelize import ParallelConfig, compute_dtype, initialize, parallelize, set_micro_step
from train.distributed.ranks import Ranks
from train.nested import leaves
from train.optim.groups import GroupConfig
from train.optim.optimizer import OptimConfig, Optimizer
from train.planning import rehearsal
from train.planning.estimate import largest_batches_of, parameters
from train.planning.rehearsal import Rehearsal, planned_model, rehearse
from train.pretrain_config import PretrainConfig, PreviewConfig
from train.step import latent_stats, micro_step

VOCAB, GRIDS = 301, [(8, 8), (8, 12)]
TRUNK = TransformerConfig(width=48, layers=7, heads=4, ffn_multiple_of=8)
CONFIG = PretrainConfig(
    run_dir="",
    model=TransfusionConfig(transformer=TRUNK, text_loss_chunk=64, latent_channels=4),
    parallel=ParallelConfig(dtype="float32"),
    optim=OptimConfig(ema_half_lives=(10, 100)),
    micro_batch_size=2,
    data=DataConfig(tokenizer="", lanes=4, sequence_length=192),
)
PARALLEL = {"sharded": {}, "replicated": {"dp_replicate": 2}}
TEXT = {"text": GroupConfig(parameters=("text_*", "transformer.blocks.[0-3].*"), frozen=True)}
OPTIM = {
    "averages": {},
    "bfloat16": {"state_dtype": "bfloat16", "ema_half_lives": ()},
    "muon": {"optimizer": "muon"},
    "frozen": {"groups": TEXT},
}


def _variant(parallel: dict[str, Any], optim: dict[str, Any] | None = None) -> PretrainConfig:
    optim = replace(CONFIG.optim, **(optim or {}))
    return replace(CONFIG, parallel=replace(CONFIG.parallel, **parallel), optim=optim)


def _trainee(config: PretrainConfig, ranks: Ranks, vocab_size: int) -> tuple[torch.nn.Module, Optimizer]:
    model = planned_model(config, vocab_size, compute_dtype(config.parallel, ranks.device))
    parallelize(model, config.parallel, ranks)
    initialize(model, 0, ranks.device)
    return model, Optimizer(model, config.optim, config.guard)


def _real_states(ranks: Ranks, variants: list[PretrainConfig]) -> list[dict[str, int]]:
    found = []
    for config in variants:
        model, optimizer = _trainee(config, ranks, VOCAB)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in trained]
        optimizer.update(1)
        states = [tensor for part in optimizer.parts for state in part.state.values() for tensor in state.values()]
        held = {
            "parameters": trained,
            "frozen": [parameter for parameter in model.parameters() if not parameter.requires_grad],
            "gradients": gradients,
            "optimizer": [*states, optimizer.guard.counts],
            "ema": [tensor for ema in optimizer.emas.values() for tensor in ema.weights.values()],
        }
        found.append({k: sum(local(t).numel() * t.element_size() for t in tensors) for k, tensors in held.items()})
    return found


@pytest.mark.parametrize(
    ("world_size", "parallel", "optim"),
    [
        (2, "replicated", ["muon", "frozen"]),
        (4, "sharded", ["averages"]),
        pytest.param(1, "sharded", [*OPTIM], marks=pytest.mark.slow),
        pytest.param(2, "sharded", [*OPTIM], marks=pytest.mark.slow),
        pytest.param(4, "replicated", [*OPTIM], marks=pytest.mark.slow),
    ],
)
def test_states_are_the_real_ones_to_the_byte(world_size: int, parallel: str, optim: list[str]) -> None:
    """P10: of the fullest rank, for FSDP and HSDP, for every optimizer, though only two depths are looked at."""
    variants = [_variant(PARALLEL[parallel], OPTIM[name]) for name in optim]
    ranks = run_ranks(_real_states, world_size, variants)
    for i, config in enumerate(variants):
        fullest = {kind: max(found[i][kind] for found in ranks) for kind in rehearsal.STATES}
        assert rehearse(config, VOCAB, world_size, [], cuda=False).states == fullest, (config.parallel, config.optim)


def _staged(ranks: Ranks, config: PretrainConfig) -> tuple[int, int]:
    """Return the host memory that a save takes, and the number of tensors in it."""
    model, optimizer = _trainee(config, ranks, VOCAB)
    state = checkpoint.training_state(model, optimizer.adamw)
    staging = Staging(ranks.device)
    staging.copy(state)
    return staging.num_bytes, len(list(leaves(state)))


def test_a_save_takes_the_host_memory_that_is_planned() -> None:
    """P10: up to a cache line a tensor, on the fullest rank."""
    config = _variant(PARALLEL["sharded"], {"ema_half_lives": ()})
    planned = rehearse(config, VOCAB, 2, [], cuda=False).staged
    taken, num_tensors = max(run_ranks(_staged, 2, config))
    assert 0 <= taken - planned <= 64 * num_tensors < 0.1 * planned


def test_previews_hold_the_whole_model_between_steps() -> None:
    config = replace(CONFIG, preview=PreviewConfig(interval_steps=5, prompts=["a circle"]))
    batches = largest_batches_of(config, 2, GRIDS)[:1]
    found = rehearse(config, VOCAB, 2, batches, cuda=True)
    states = {kind: found.states[kind] for kind in ("parameters", "frozen", "optimizer", "ema")}
    assert found.peaks["preview"] == states | {"preview": 4 * parameters(planned_model(config, VOCAB))["total"]}
    assert "preview" not in rehearse(CONFIG, VOCAB, 2, batches, cuda=True).peaks


def _real_peaks(ranks: Ranks, variants: list[tuple[PretrainConfig, bool]]) -> list[int]:
    """Return the bytes that torch's CPU allocator gave out at once for the last micro-step, states left out."""
    peaks = []
    for config, unmasked in variants:
        model, _ = _trainee(config, ranks, VOCAB)
        stats = latent_stats(None, config.model.latent_channels, ranks.device)

        def step(is_last: bool, model=model, config=config, unmasked=unmasked, stats=stats) -> None:
            set_micro_step(model, config.parallel, is_last=is_last)
            loss = micro_step(
                model,
                largest_batches_of(config, ranks.world_size, GRIDS)[0],
                stats=stats,
                diffusion=config.diffusion,
                image_weight=5.0,
                global_text_targets=100,
                global_images=10,
                mask_of=(lambda *_: None) if unmasked else None,
            )
            loss.total.backward()

        step(is_last=True)  # what is made once
        for parameter in model.parameters():
            parameter.grad = None
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            step(is_last=True)
        events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
        held = peak = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            held += event.nbytes()
            peak = max(peak, held)
        peaks.append(peak)
    return peaks


def _working(found: Rehearsal) -> float:
    """Bytes at the peak beyond the states before the step."""
    peaks = [found.peaks[phase] for phase in ("forward", "backward")]
    return max(sum(peak.values()) for peak in peaks) - sum(found.states[k] for k in ("parameters", "optimizer", "ema"))


FULL, NONE = {"activation_checkpointing": "full"}, {"activation_checkpointing": "none"}


@pytest.mark.parametrize(
    "options",
    [
        [(FULL, False), (NONE, True)],
        pytest.param([(FULL, True), (NONE, False)], marks=pytest.mark.slow),
        pytest.param(
            [({"activation_checkpointing": "selective"}, gpu) for gpu in (False, True)], marks=pytest.mark.slow
        ),
        pytest.param([({**FULL, "dtype": "bfloat16", "prefetch": 0}, True)], marks=pytest.mark.slow),
        pytest.param([({"shard_blocks": False}, False)], marks=pytest.mark.slow),
        pytest.param([({"reshard_after_forward": False}, True)], marks=pytest.mark.slow),
    ],
)
def test_the_peak_of_a_step_is_what_the_allocator_gives_out(options: list[tuple[dict[str, Any], bool]]) -> None:
    """Within a tenth, on 2 ranks, FSDP's buffers included; also on the path that stands for a GPU's (True)."""
    variants = [(_variant(option), unmasked) for option, unmasked in options]
    real = run_ranks(_real_peaks, 2, variants)[0]
    for (config, unmasked), measured in zip(variants, real, strict=True):
        found = rehearse(config, VOCAB, 2, largest_batches_of(config, 2, GRIDS)[:1], cuda=unmasked)
        assert _working(found) == pytest.approx(measured, rel=0.1), (config.parallel, unmasked)


@pytest.mark.parametrize("level", ["full", pytest.param("none", marks=pytest.mark.slow)])
def test_two_depths_tell_of_all(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Deep models are rehearsed at two depths: the same numbers as at their own, within a thousandth."""
    config = _variant({"activation_checkpointing": level})
    batches = largest_batches_of(config, 2, GRIDS)[:1]
    short = rehearse(config, VOCAB, 2, batches, cuda=True)
    with monkeypatch.context() as patch:
        patch.setattr(rehearsal, "DEPTH", TRUNK.layers)
        whole = rehearse(config, VOCAB, 2, batches, cuda=True)
    assert short.states == whole.states
    for phase, kinds in whole.peaks.items():
        assert sum(short.peaks[phase].values()) == pytest.approx(sum(kinds.values()), rel=1e-3), phase
    assert short.collectives == pytest.approx(whole.collectives)
    assert short.checkpoint == whole.checkpoint


def _padded(world_size: int, *, blocks: bool) -> int:
    """Numbers in the blocks, or in all parameters, as FSDP pads them."""
    with torch.device("meta"):
        model = Transfusion(CONFIG.model, VOCAB)
    of = model.transformer.blocks if blocks else model
    return sum(-(-p.shape[0] // world_size) * world_size * (p.numel() // p.shape[0]) for p in of.parameters())


def test_traffic_is_two_gathers_and_a_scatter() -> None:
    """In closed form: each unit's parameters gathered for forward, the blocks' for backward, float32 sums scattered;
    each micro-step, but for the root, which stays gathered until the step ends. HSDP sums shards once a step."""
    config = _variant({"dtype": "bfloat16", "dp_replicate": 2}, {"ema_half_lives": ()})
    config = replace(config, micro_batch_size=1, data=replace(config.data, lanes=24))  # 3 micro-steps on 8 ranks
    found = rehearse(config, VOCAB, 8, largest_batches_of(config, 8, GRIDS)[:1], cuda=True)
    sent = {(what.name, what.phase, len(what.ranks)): size for what, size in found.collectives.items()}
    whole, blocks = _padded(4, blocks=False), _padded(4, blocks=True)
    assert sent["all_gather", "forward", 4] == 2 * (whole + 2 * blocks)
    assert sent["all_gather", "backward", 4] == 2 * 3 * blocks
    assert sent["reduce_scatter", "backward", 4] == 4 * 3 * whole
    assert sent["all_reduce", "backward", 2] == 4 * whole / 4
    assert {what.ranks for what in found.collectives} >= {(0, 1, 2, 3), (0, 4)}


def test_attention_without_a_mask_keeps_what_flex_attention_keeps() -> None:
    """Queries, keys, values, the result and a float32 log-sum a query: what stands for a GPU in a plan."""
    q, k, v = (torch.zeros(2, heads, 64, 16, dtype=torch.bfloat16, requires_grad=True) for heads in (8, 4, 4))
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        attend(q, k, v, None)
    assert sum(kept.values()) == 2 * (2 * q.numel() + k.numel() + v.numel()) + 4 * 2 * 8 * 64


def _save(ranks: Ranks, config: PretrainConfig, vocab_size: int, folder: str) -> None:
    model, optimizer = _trainee(config, ranks, vocab_size)
    state = checkpoint.training_state(model, optimizer.adamw)
    state |= {name: ema.weights for name, ema in optimizer.emas.items()}
    with RunFolder(folder, ranks) as run:
        checkpoint.save(run, 1, state, {}, ranks)


def test_a_checkpoint_takes_on_disk_what_the_plan_says(tmp_path: Path) -> None:
    """Within a hundredth: its index and checksums are beside the tensors."""
    trunk = TransformerConfig(width=256, layers=3, heads=4)
    config = replace(CONFIG, model=replace(CONFIG.model, transformer=trunk))
    run_ranks(_save, 2, config, 4000, str(tmp_path))
    written = sum(file.stat().st_size for file in (tmp_path / "checkpoints").rglob("*") if file.is_file())
    planned = rehearse(config, 4000, 2, largest_batches_of(config, 2, GRIDS)[:1], cuda=True).checkpoint
    assert written == pytest.approx(planned, rel=0.01)
