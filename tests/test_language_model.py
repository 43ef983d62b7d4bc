"""The text side against transformers' Llama, Mistral, Qwen2 and Qwen3, code that nobody here wrote, in and out."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from model.attention import dense_mask
from model.language_model import to_settings, to_weights
from model.transformer import TransformerConfig
from model.transfusion import Transfusion, TransfusionConfig, init_weights
from train.llm_folder import LLMFolder

VOCAB = 101
SCALED = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def llm_config(kind: str, **changes: Any) -> PretrainedConfig:
    """Return the config of a tiny model."""
    given = {
        "vocab_size": VOCAB,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "attn_implementation": "eager",
    }
    classes = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
    return classes[kind](**(given | changes))


# With what models of each family have: grouped queries, tied embeddings, heads wider than width / heads.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-2": ("llama", {"num_key_value_heads": 4, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    "llama-3.2": ("llama", {"tie_word_embeddings": True, "rope_parameters": SCALED}),
    "smollm2": ("llama", {"num_attention_heads": 6, "num_key_value_heads": 2, "tie_word_embeddings": True}),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 16, "rms_norm_eps": 1e-3}),
    "qwen2.5": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2.5-7b": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen3-8b": ("qwen3", {"head_dim": 16}),
}


def save_llm(folder: Path, kind: str, dtype: torch.dtype = torch.float32, shard: str = "5GB", **changes: Any) -> Any:
    """Write a random model in transformers' own way and return it; no weight of it is at a neutral value."""
    family, settings = KINDS[kind]
    with torch.random.fork_rng():
        torch.manual_seed(3)
        llm = AutoModelForCausalLM.from_config(llm_config(family, **(settings | changes)))
        with torch.no_grad():
            for name, parameter in llm.named_parameters():
                if name.endswith("norm.weight"):
                    parameter.uniform_(0.5, 1.5)
                elif name.endswith("bias"):
                    parameter.normal_(std=0.3)
                else:
                    parameter.normal_(std=parameter.shape[1] ** -0.5)
    llm.to(dtype).save_pretrained(folder, max_shard_size=shard)
    # As read back: `to` has rounded the rotary frequencies too, which no file holds.
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def imported(folder: Path, more: int = 0, **changes: Any) -> Transfusion:
    """Return our model with the weights of a folder, and `more` token ids than it has."""
    llm = LLMFolder(folder)
    settings = {"transformer": llm.model.transformer, "tied_embeddings": llm.model.tied_embeddings}
    config = TransfusionConfig(**({**settings, "latent_channels": 2} | changes))
    with torch.device("meta"):
        model = Transfusion(config, llm.model.vocab_size + more)
    model.to_empty(device="cpu")
    llm.read(dict(model.named_parameters()), config, model.vocab_size, seed=0)
    return model


def logits(model: Transfusion, ids: Tensor) -> Tensor:
    document, image = torch.ones_like(ids), torch.full_like(ids, -1)
    mask = dense_mask(document, image, torch.full_like(ids, ids.shape[1]))
    no_grid = torch.full((*ids.shape, 2), -1)
    positions = torch.arange(ids.shape[1]).expand(len(ids), -1)
    hidden = model.trunk(model.embed_text(ids), positions, no_grid, mask, modalities="text")
    return model.text_logits(hidden)


def some_ids(vocab_size: int = VOCAB, length: int = 150) -> Tensor:
    return torch.randint(0, vocab_size, (2, length), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_logits_equal_transformers_before_and_after_an_export(kind: str, tmp_path: Path) -> None:
    """Llama 3's at positions beyond those of its first training. An export gives back the very weights."""
    llm = save_llm(tmp_path / "llm", kind)
    model, ids = imported(tmp_path / "llm", vocab_multiple_of=64), some_ids()
    theirs = llm(ids).logits
    assert theirs.std() > 0.3  # not two heaps of zeros
    assert (logits(model, ids) - theirs).abs().max() <= 1e-4

    family = json.loads((tmp_path / "llm" / "config.json").read_text())["model_type"]
    (tmp_path / "export").mkdir()
    settings = to_settings(model.config, VOCAB, family) | {"max_position_embeddings": 256}
    (tmp_path / "export" / "config.json").write_text(json.dumps(settings))
    weights = to_weights(dict(model.named_parameters()), model.config.transformer, VOCAB)
    save_file(weights, tmp_path / "export" / "model.safetensors", metadata={"format": "pt"})
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "export", attn_implementation="eager").eval()
    assert type(again) is type(llm) and torch.equal(again(ids).logits, theirs)


@pytest.mark.parametrize(
    ("changes", "family"),
    [({}, "LlamaForCausalLM"), ({"qkv_bias": True}, "Qwen2ForCausalLM"), ({"qk_norm": True}, "Qwen3ForCausalLM"),
     ({"head_dim": 24, "kv_heads": 2, "rope_2d": True}, "LlamaForCausalLM")],
)  # fmt: skip
@torch.no_grad()
def test_a_model_trained_from_scratch_is_of_the_family_that_fits(changes: dict, family: str, tmp_path: Path) -> None:
    trunk = TransformerConfig(**{"width": 64, "layers": 2, "heads": 4, "ffn_hidden": 96} | changes)
    model = Transfusion(TransfusionConfig(transformer=trunk), VOCAB)
    init_weights(model, 0)
    (tmp_path / "config.json").write_text(json.dumps(to_settings(model.config, VOCAB, None)))
    save_file(
        to_weights(dict(model.named_parameters()), trunk, VOCAB), tmp_path / "model.safetensors", {"format": "pt"}
    )
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert type(theirs).__name__ == family
    assert (theirs(some_ids()).logits - logits(model, some_ids())).abs().max() <= 1e-4


def test_what_no_family_has_is_refused_by_name() -> None:
    both = TransfusionConfig(transformer=TransformerConfig(qk_norm=True, qkv_bias=True))
    with pytest.raises(ValueError, match="qkv_bias=true and qk_norm=true"):
        to_settings(both, VOCAB, None)
