"""Adapters are a low-rank change of frozen weights: the same function as merged ones, on any trunk and any ranks."""

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.distributed.tensor import distribute_tensor

from bench.step import backward, sharded_model
from model.lora import LoraConfig, add_adapters, is_adapter, merged
from model.transfusion import Transfusion
from tests.one_by_one import MODEL, SEED, VOCAB, assert_close, batch_of, handmade, plain_model, step_on
from tests.ranks import run_ranks
from train.distributed.parallelize import ParallelConfig, gather_weights, plain_name
from train.distributed.ranks import Ranks
from train.optim.groups import GroupConfig, freeze
from train.optim.guard import GuardConfig
from train.optim.optimizer import OptimConfig, Optimizer

LORA = LoraConfig(rank=3, alpha=6.0)
EVERY = ("attention.qkv", "attention.out", "ffn.gate_up", "ffn.down")


def adapted_model(lora: LoraConfig = LORA, **changes: Any) -> Transfusion:
    """Return a model with a frozen base and adapters that add something."""
    model, generator = plain_model(lora=lora, **changes), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_b"):
                parameter.normal_(std=0.1, generator=generator)
            parameter.requires_grad_(is_adapter(name))
    return model


def small_batch(length: int = 96):  # type: ignore[no-untyped-def]
    documents, pictures = handmade()
    return batch_of(documents, pictures, [[0, 1, 2], [3, 4, 5]], length)


def test_a_model_starts_as_its_base_exactly_and_is_built_on_meta() -> None:
    base, model = plain_model(), plain_model(lora=LORA)
    added = dict(model.named_parameters()).keys() - dict(base.named_parameters()).keys()
    assert added == {f"transformer.blocks.{i}.{at}.lora_{m}" for i in (0, 1) for at in EVERY for m in "ab"}
    for name, parameter in base.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name
    assert torch.equal(step_on(model, small_batch()).total, step_on(base, small_batch()).total)
    down = model.get_parameter("transformer.blocks.1.ffn.down.lora_a")
    assert down.shape == (3, 96) and down.std().item() == pytest.approx(96**-0.5, rel=0.1)
    with torch.device("meta"):
        built = Transfusion(replace(MODEL, lora=LORA), VOCAB)
    assert all(parameter.is_meta for parameter in built.parameters())


@pytest.mark.parametrize("untied", ["none", "ffn", "all"])
@pytest.mark.parametrize("which", ["*", "transformer.blocks.?.[!i]*", "transformer.blocks.?.image.*"])
def test_adapters_are_the_same_function_as_merged_weights(untied: str, which: str) -> None:
    """Outputs, and gradients by the chain rule: of W + scale B A they are scale B^T dW and scale dW A^T."""
    if untied == "none" and "image" in which:
        return
    model = adapted_model(replace(LORA, parameters=(which,)), untied=untied)
    plain = plain_model(untied=untied)
    weights = merged(dict(model.named_parameters()), LORA)
    plain.load_state_dict(weights)
    losses = [step_on(of, small_batch()).total for of in (model, plain)]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-6)
    assert abs(losses[1].item() - step_on(plain_model(untied=untied), small_batch()).total.item()) > 1e-3
    for loss in losses:
        loss.backward()
    adapters = [name for name, _ in model.named_parameters() if name.endswith("lora_a")]
    assert (
        adapters
        and {".image." in name for name in adapters}
        == {
            "*": {False} if untied == "none" else {False, True},
            "transformer.blocks.?.[!i]*": {False},
            "transformer.blocks.?.image.*": {True},
        }[which]
    )
    found, expected = {}, {}
    for name in adapters:
        base = name.removesuffix("lora_a")
        a, b = model.get_parameter(name), model.get_parameter(f"{base}lora_b")
        found |= {name: a.grad, f"{base}lora_b": b.grad}
        of_weight = LORA.scale * plain.get_parameter(f"{base}weight").grad
        expected |= {name: b.detach().T @ of_weight, f"{base}lora_b": of_weight @ a.detach().T}
    assert_close(found, expected)
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if not is_adapter(name))


def test_patterns_that_match_nothing_are_refused_with_what_there_is() -> None:
    for pattern in ("transformer.blocks.*.attention.q_proj.weight", "transformer.norm.weight", "patches.*"):
        expected = rf"{re.escape(pattern)} matches no weight .* transformer\.blocks\.0\.attention\.qkv\.weight"
        with pytest.raises(ValueError, match=expected):
            add_adapters(plain_model().transformer, LoraConfig(rank=2, parameters=("*.ffn.*", pattern)))
    with pytest.raises(ValueError, match=r"lora\.rank=-1"):
        LoraConfig(rank=-1)


def test_muon_leaves_adapters_to_adamw_and_takes_what_is_thawed() -> None:
    """Orthogonalized updates are for a weight as a whole, not for its factors."""
    model, thawed = plain_model(lora=LORA), "transformer.blocks.0.ffn.down.weight"
    groups = {"down": GroupConfig(parameters=[thawed], lr_scale=0.5)}
    freeze(model, groups, torch.float32, adapted=True)
    optimizer = Optimizer(model, OptimConfig(optimizer="muon", groups=groups), GuardConfig())
    names = {parameter: name for name, parameter in model.named_parameters()}
    adamw, muon = ({names[p] for group in part.param_groups for p in group["params"]} for part in optimizer.parts)
    assert muon == {thawed}
    assert adamw == {name for name in names.values() if ".lora_" in name or name.startswith("patches.")}


def _sharded(ranks: Ranks, variants: list[ParallelConfig], adapters: dict[str, torch.Tensor]) -> list[dict]:
    """Return for each way to wrap the model the gradients of a step, and what frozen weights are held in."""
    torch.set_num_threads(1)
    found = []
    for parallel in variants:
        model = sharded_model(replace(MODEL, lora=LORA), VOCAB, ranks, parallel, SEED)
        of = {plain_name(name): parameter for name, parameter in model.named_parameters()}
        with torch.no_grad():
            for name, value in adapters.items():
                of[name].copy_(distribute_tensor(value, of[name].device_mesh, of[name].placements))
        documents, pictures = handmade()
        share = [[0, 1, 2], [3, 4, 5]][ranks.rank :: ranks.world_size]
        batches = [batch_of(documents, pictures, [row], 96) for row in share]
        counts = {"targets": 100, "images": 10}
        backward(model, batches, ranks, parallel, **counts)
        grads = {name: p.grad for name, p in of.items() if p.grad is not None}
        dtypes = {str(p.dtype) for name, p in of.items() if not p.requires_grad}
        found.append({"grads": gather_weights(grads), "frozen": dtypes})
    return found


def test_adapters_are_sharded_beside_a_frozen_base_held_in_the_compute_dtype() -> None:
    """One unit holds bfloat16 and float32; recomputation changes no bit, and world size nothing but sums (P3)."""
    model = adapted_model()
    adapters = {name: p.detach().clone() for name, p in model.named_parameters() if ".lora_" in name}
    variants = [
        ParallelConfig(dtype=dtype, activation_checkpointing=level)
        for dtype in ("float32", "bfloat16")
        for level in ("none", "selective", "full")
    ]
    one, two = (run_ranks(_sharded, ranks, variants, adapters)[0] for ranks in (1, 2))
    for ranks in (one, two):
        for number, step in enumerate(ranks):
            assert step["frozen"] == {f"torch.{variants[number].dtype}"}
            assert step["grads"].keys() == {n for n, _ in model.named_parameters() if ".lora_" in n or "patches." in n}
            plain = ranks[number - number % 3]["grads"]
            assert [name for name, grad in step["grads"].items() if not torch.equal(grad, plain[name])] == []
    assert_close(two[0]["grads"], one[0]["grads"])
    for name, grad in one[3]["grads"].items():
        assert (grad - one[0]["grads"][name]).norm() <= 0.1 * grad.norm(), name
