"""The text side of the model as transformers' Llama: the same function of token ids under other names.

Two things differ besides names. Llama keeps queries, keys and values apart, and gate and up. Its rotary embedding
rotates pairs (i, i + K/2) where ours, like Meta's own code, rotates (2i, 2i + 1), so the rows of q and k are permuted.
"""

from typing import Any

import torch
from torch import Tensor

from model.transformer import Block
from model.transfusion import Transfusion, TransfusionConfig


def llama_config(config: TransfusionConfig, vocab_size: int) -> dict[str, Any]:
    """Return the contents of config.json; raise ValueError for switches that Llama does not have."""
    trunk = config.transformer
    if trunk.qk_norm:
        raise ValueError("model.transformer.qk_norm=true: expected false; transformers' Llama has no such norms")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": trunk.width,
        "intermediate_size": trunk.hidden,
        "num_hidden_layers": trunk.layers,
        "num_attention_heads": trunk.heads,
        "num_key_value_heads": trunk.num_kv_heads,
        "rms_norm_eps": trunk.norm_eps,
        "rope_theta": trunk.rope_theta,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
    }


def llama_weights(model: Transfusion) -> dict[str, Tensor]:
    """Return LlamaForCausalLM's state dict for the text embedding, trunk and text head of an unsharded model."""
    trunk = model.config.transformer
    weights = {
        "model.embed_tokens.weight": model.text_embedding.weight[: model.vocab_size],
        "model.norm.weight": model.transformer.norm.weight,
        "lm_head.weight": model.head_weight[: model.vocab_size],
    }
    sizes = [heads * trunk.head_width for heads in (trunk.heads, trunk.num_kv_heads, trunk.num_kv_heads)]
    for number, block in enumerate(model.transformer.blocks):
        assert isinstance(block, Block)
        q, k, v = block.attention.qkv.weight.split(sizes)
        gate, up = block.ffn.gate_up.weight.chunk(2)
        weights |= {
            f"model.layers.{number}.{name}.weight": weight
            for name, weight in {
                "input_layernorm": block.attention_norm.weight,
                "self_attn.q_proj": _halves(q, trunk.head_width),
                "self_attn.k_proj": _halves(k, trunk.head_width),
                "self_attn.v_proj": v,
                "self_attn.o_proj": block.attention.out.weight,
                "post_attention_layernorm": block.ffn_norm.weight,
                "mlp.gate_proj": gate,
                "mlp.up_proj": up,
                "mlp.down_proj": block.ffn.down.weight,
            }.items()
        }
    return {name: weight.detach().contiguous().clone() for name, weight in weights.items()}


def _halves(weight: Tensor, head_dim: int) -> Tensor:
    """Move each head's rows 0, 1, 2, 3, ... [heads * K, D] to 0, 2, ..., 1, 3, ..."""
    pairs = weight.unflatten(0, (-1, head_dim // 2, 2))  # [heads, K/2, 2, D]
    return torch.cat((pairs[:, :, 0], pairs[:, :, 1]), dim=1).flatten(0, 1)
