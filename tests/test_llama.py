"""The text side against transformers' LlamaForCausalLM, code that nobody here wrote."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from model.attention import dense_mask
from model.llama import llama_config, llama_weights
from model.transformer import TransformerConfig
from model.transfusion import Transfusion, TransfusionConfig, init_weights

VOCAB = 101


def model_and_llama(multiple: int, **changes) -> tuple[Transfusion, LlamaForCausalLM]:
    trunk = TransformerConfig(**{"width": 64, "layers": 3, "heads": 4, "ffn_hidden": 96} | changes)
    model = Transfusion(TransfusionConfig(transformer=trunk, vocab_multiple_of=multiple), VOCAB)
    init_weights(model, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5, generator=generator)
    llama = LlamaForCausalLM(LlamaConfig(**llama_config(model.config, VOCAB), attn_implementation="eager")).eval()
    missing, unexpected = llama.load_state_dict(llama_weights(model), strict=False)
    assert not missing and not unexpected
    return model, llama


@pytest.mark.parametrize(
    ("multiple", "changes"),
    [(1, {}), (64, {"kv_heads": 2}), (1, {"rope_theta": 500.0, "norm_eps": 1e-3}), (1, {"rope_2d": True})],
)
@torch.no_grad()
def test_logits_equal_llamas_with_the_same_weights(multiple, changes) -> None:
    """Rows that pad the vocabulary are not exported, and no logits are made for them."""
    model, llama = model_and_llama(multiple, **changes)
    ids = torch.randint(0, VOCAB, (2, 150), generator=torch.Generator().manual_seed(2))
    document, image = torch.ones_like(ids), torch.full_like(ids, -1)
    mask = dense_mask(document, image, torch.full_like(ids, ids.shape[1]))
    no_grid = torch.full((*ids.shape, 2), -1)
    hidden = model.trunk(model.embed_text(ids), torch.arange(ids.shape[1]).expand(2, -1), no_grid, mask)
    theirs = llama(ids).logits
    assert theirs.std() > 0.3  # not two heaps of zeros
    assert (model.text_logits(hidden) - theirs).abs().max() <= 1e-4


def test_what_llama_does_not_have_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="qk_norm=true"):
        llama_config(TransfusionConfig(transformer=TransformerConfig(qk_norm=True)), VOCAB)
