"""Adapters are a low-rank change of frozen weights: the same function as merged ones, on any trunk and any ranks."""

import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from model.lora import LoraConfig, add_adapters, is_adapter, merged
from model.transfusion import Transfusion, TransfusionConfig
from tests.one_by_one import MODEL, VOCAB, assert_close, batch_of, handmade, plain_model, step_on

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
    assert TransfusionConfig().lora.rank == 0
