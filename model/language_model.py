"""Language models in transformers' layout as the text side of ours, and back: settings, and names of weights.

Two things differ besides names. transformers keeps queries, keys and values apart, and gate and up. Its rotary
embedding rotates pairs (i, i + K/2) where ours, like Meta's own code, rotates (2i, 2i + 1), so the rows of queries and
keys are permuted, and with them their biases and norms.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from model.attention import RopeScaling
from model.modalities import text_name
from model.transformer import TransformerConfig
from model.transfusion import TransfusionConfig

Kind = Literal["plain", "rotary"]  # rotary: rows are permuted within each head

# By model_type in config.json: the class in transformers.
FAMILIES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Whole numbers that a config.json must state; transformers' defaults for them differ from version to version.
NEEDED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
LIMIT = 1 << 24  # they are below it in every model
ROPE_NEEDED = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")  # of type llama3


@dataclass(frozen=True)
class LanguageModel:
    """What a config.json says."""

    family: str  # a key of FAMILIES
    transformer: TransformerConfig
    tied_embeddings: bool
    vocab_size: int  # rows of its embedding
    window: int | None  # tokens that a token sees at most, itself included; None: all before it
    context: int  # tokens of the longest text that it was made for


def read_settings(contents: dict[str, Any], name: str) -> LanguageModel:
    """Return what the config.json of `name` says; raise ValueError for what the trunk does not have.

    Both forms of transformers are read: version 4's rope_theta and rope_scaling, version 5's rope_parameters.
    """
    family = contents.get("model_type")
    if family not in FAMILIES or (contents.get("architectures") or [FAMILIES[family]]) != [FAMILIES[family]]:
        known = ", ".join(f"{key} ({kind})" for key, kind in FAMILIES.items())
        raise ValueError(
            f"{name}: model_type={family!r}, architectures={contents.get('architectures')}: expected one of {known}; "
            "start from a model of such a family"
        )
    needed = NEEDED if family == "llama" else (*NEEDED, "num_key_value_heads")
    if missing := [key for key in needed if type(contents.get(key)) is not int or not 0 < contents[key] < LIMIT]:
        raise ValueError(
            f"{name}: {', '.join(missing)} missing or no possible number: expected as transformers writes them"
        )
    _refuse_unknown(contents, family, name)
    heads, width = contents["num_attention_heads"], contents["hidden_size"]
    head_dim = contents.get("head_dim") or (128 if family == "qwen3" else width // heads)
    theta, scaling = _rope(contents, name)
    try:
        transformer = TransformerConfig(
            width=width,
            layers=contents["num_hidden_layers"],
            heads=heads,
            head_dim=None if head_dim * heads == width else head_dim,
            kv_heads=contents.get("num_key_value_heads") or heads,
            ffn_hidden=contents["intermediate_size"],
            rope_theta=theta,
            rope_scaling=scaling,
            norm_eps=float(contents.get("rms_norm_eps", 1e-6)),
            qkv_bias=family == "qwen2",
            qk_norm=family == "qwen3",
        )
        context = int(contents.get("max_position_embeddings") or 0)
        if not (transformer.head_width < LIMIT and math.isfinite(theta) and math.isfinite(transformer.norm_eps)):
            raise ValueError(f"head_dim={head_dim}, rope_theta={theta}, rms_norm_eps={transformer.norm_eps}")
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{name}: config.json: {error}; fetch it again") from None
    tied = bool(contents.get("tie_word_embeddings", False))
    window = _window(contents, family)
    return LanguageModel(family, transformer, tied, contents["vocab_size"], window, context)


def _refuse_unknown(contents: dict[str, Any], family: str, name: str) -> None:
    """Raise ValueError for settings of a family that the trunk does not compute."""
    activation = contents.get("hidden_act", "silu")
    kinds = set(contents.get("layer_types") or ()) - {"full_attention", "sliding_attention"}
    problems = {
        f"hidden_act={activation!r}": activation != "silu",
        "attention_bias=true": contents.get("attention_bias"),
        "mlp_bias=true": contents.get("mlp_bias"),
        "quantization_config": contents.get("quantization_config") or contents.get("compression_config"),
        f"layer_types={sorted(kinds)}": kinds,
        "layers without rotary positions": not all(contents.get("no_rope_layers") or ()),
        f"pretraining_tp={contents.get('pretraining_tp')}": contents.get("pretraining_tp", 1) not in (None, 1),
    }
    if found := [what for what, is_there in problems.items() if is_there]:
        raise ValueError(f"{name}: {', '.join(found)}: the trunk has no such thing; start from a model without it")


def _rope(contents: dict[str, Any], name: str) -> tuple[float, RopeScaling]:
    """Return the base of the rotary frequencies and their scaling."""
    given = contents.get("rope_parameters") or contents.get("rope_scaling") or {}
    theta = float(given.get("rope_theta") or contents.get("rope_theta") or 10000.0)
    kind = given.get("rope_type") or given.get("type") or "default"
    if kind not in ("default", "llama3") or any(isinstance(value, dict) for value in given.values()):
        kind = kind if kind != "default" else f"{sorted(given)}"
        raise ValueError(f"{name}: rope_type={kind!r}, expected default or llama3; start from a model without it")
    if (share := given.get("partial_rotary_factor") or contents.get("partial_rotary_factor") or 1) != 1:
        raise ValueError(f"{name}: partial_rotary_factor={share}, expected 1; start from a model without it")
    if kind == "default":
        return theta, RopeScaling()
    if missing := [key for key in ROPE_NEEDED if not isinstance(given.get(key), int | float)]:
        raise ValueError(f"{name}: rope_type=llama3 without {', '.join(missing)}; fetch config.json again")
    factor, low, high, length = (given[key] for key in ROPE_NEEDED)
    return theta, RopeScaling(
        factor=float(factor), low_freq_factor=float(low), high_freq_factor=float(high), original_length=int(length)
    )


def _window(contents: dict[str, Any], family: str) -> int | None:
    """Return the length of the windows that some layer sees, None if all of them see everything."""
    window = contents.get("sliding_window", 4096)  # transformers' default
    if family == "mistral":
        return window
    if not contents.get("use_sliding_window", False):  # Qwen's; Llama has neither
        return None
    slides = contents.get("max_window_layers", 28) < contents["num_hidden_layers"]
    if "layer_types" in contents:
        slides = "sliding_attention" in contents["layer_types"]
    return window if slides else None


def to_settings(config: TransfusionConfig, vocab_size: int, family: str | None) -> dict[str, Any]:
    """Return the contents of a config.json for the text side; of `family`, or without one of the first that fits.

    Raises ValueError for switches that no family has.
    """
    trunk = config.transformer
    fitting = {(False, False): ("llama", "mistral"), (True, False): ("qwen2",), (False, True): ("qwen3",)}
    families = fitting.get((trunk.qkv_bias, trunk.qk_norm), ())
    if not families:
        raise ValueError(
            "model.transformer.qkv_bias=true and qk_norm=true: expected at most one of them; no family has both"
        )
    family = family if family in families else families[0]
    scaling = trunk.rope_scaling
    if scaling.factor > 1:
        rope = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_length,
        }
    return {
        "architectures": [FAMILIES[family]],
        "model_type": family,
        "vocab_size": vocab_size,
        "hidden_size": trunk.width,
        "intermediate_size": trunk.hidden,
        "num_hidden_layers": trunk.layers,
        "num_attention_heads": trunk.heads,
        "num_key_value_heads": trunk.num_kv_heads,
        "head_dim": trunk.head_width,
        "rms_norm_eps": trunk.norm_eps,
        "rope_theta": trunk.rope_theta,
        **({"rope_scaling": rope} if scaling.factor > 1 else {}),
        "hidden_act": "silu",
        **({} if family == "qwen2" else {"attention_bias": False}),
        **({"mlp_bias": False} if family == "llama" else {}),
        **({"sliding_window": None} if family == "mistral" else {}),
        "tie_word_embeddings": config.tied_embeddings,
    }


@dataclass(frozen=True)
class Piece:
    """Rows of one of our parameters that are a whole tensor of theirs."""

    name: str  # theirs
    rows: int
    kind: Kind = "plain"


def pieces(name: str, trunk: TransformerConfig) -> list[Piece]:
    """Return which tensors of theirs make our parameter `name`, in the order of its rows; none for what they lack.

    `rows` of embedding and head, which the vocabulary decides, are 0. Images' own parts are made of the same tensors.
    """
    heads, kv = trunk.heads * trunk.head_width, trunk.num_kv_heads * trunk.head_width
    width, hidden = trunk.width, trunk.hidden
    whole = {
        "text_embedding.weight": Piece(EMBEDDING, 0),
        "text_head.weight": Piece(HEAD, 0),
        "transformer.norm.weight": Piece("model.norm.weight", width),
    }
    name = text_name(name)
    if name in whole:
        return [whole[name]]
    start, _, rest = name.partition("transformer.blocks.")
    number, _, part = rest.partition(".")
    if start or not part:
        return []
    layer, attention, mlp = (f"model.layers.{number}.{of}" for of in ("", "self_attn.", "mlp."))
    if part in ("attention.qkv.weight", "attention.qkv.bias"):
        kind = part.rpartition(".")[2]
        return [
            Piece(f"{attention}q_proj.{kind}", heads, "rotary"),
            Piece(f"{attention}k_proj.{kind}", kv, "rotary"),
            Piece(f"{attention}v_proj.{kind}", kv),
        ]
    found = {
        "attention_norm.weight": [Piece(f"{layer}input_layernorm.weight", width)],
        "attention.q_norm.weight": [Piece(f"{attention}q_norm.weight", trunk.head_width, "rotary")],
        "attention.k_norm.weight": [Piece(f"{attention}k_norm.weight", trunk.head_width, "rotary")],
        "attention.out.weight": [Piece(f"{attention}o_proj.weight", width)],
        "ffn_norm.weight": [Piece(f"{layer}post_attention_layernorm.weight", width)],
        "ffn.gate_up.weight": [Piece(f"{mlp}gate_proj.weight", hidden), Piece(f"{mlp}up_proj.weight", hidden)],
        "ffn.down.weight": [Piece(f"{mlp}down_proj.weight", width)],
    }
    return found.get(part, [])


def to_pairs(rows: Tensor, head_dim: int) -> Tensor:
    """Move each head's rows 0, K/2, 1, K/2 + 1, ... of [heads * K, ...] to 0, 1, 2, 3, ...: theirs as ours."""
    halves = rows.unflatten(0, (-1, 2, head_dim // 2))
    return torch.stack((halves[:, 0], halves[:, 1]), dim=2).flatten(0, 2)


def to_halves(rows: Tensor, head_dim: int) -> Tensor:
    """Move them back: ours as theirs."""
    pairs = rows.unflatten(0, (-1, head_dim // 2, 2))
    return torch.cat((pairs[:, :, 0], pairs[:, :, 1]), dim=1).flatten(0, 1)


def to_weights(parameters: dict[str, Tensor], trunk: TransformerConfig, vocab_size: int) -> dict[str, Tensor]:
    """Return transformers' state dict of the text side of our `parameters`, unsharded, by plain name."""
    weights = {}
    for name, parameter in parameters.items():
        if text_name(name) != name:
            continue
        rows = 0
        for piece in pieces(name, trunk):
            count = piece.rows or vocab_size
            part = parameter.detach()[rows : rows + count]
            part = to_halves(part, trunk.head_width) if piece.kind == "rotary" else part
            weights[piece.name], rows = part.contiguous().clone(), rows + count
    return weights


def adapter_weights(parameters: Mapping[str, Tensor], trunk: TransformerConfig) -> dict[str, Tensor]:
    """Return the text side's adapters by transformers' names of the layers: NAME.lora_A.weight and NAME.lora_B.weight.

    Layers that are stacked here share an A, which each of theirs gets a copy of.
    """
    weights = {}
    for name, down in parameters.items():
        layer = name.removesuffix(".lora_a")
        if layer == name or text_name(name) != name:
            continue
        rows, up = 0, parameters[f"{layer}.lora_b"].detach()
        for piece in pieces(f"{layer}.weight", trunk):
            part = up[rows : rows + piece.rows]
            theirs = piece.name.removesuffix(".weight")
            weights[f"{theirs}.lora_A.weight"] = down.detach().clone()
            halves = to_halves(part, trunk.head_width) if piece.kind == "rotary" else part
            weights[f"{theirs}.lora_B.weight"], rows = halves.contiguous().clone(), rows + piece.rows
    return weights
