"""A language model's folder: read by rows on any number of ranks, or refused by name (P3, P10)."""

import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.transfusion import Transfusion, TransfusionConfig, initial_value, parameter_generator
from tests.ranks import run_ranks
from tests.test_language_model import KINDS, VOCAB, imported, llm_config, logits, save_llm, some_ids
from train import llm_folder, pretrain
from train.config import _resolved, load_config
from train.distributed.parallelize import ParallelConfig, gather_weights, parallelize, plain_name
from train.distributed.ranks import Ranks
from train.llm_folder import LLMFolder, with_llm
from train.pretrain_config import PretrainConfig, read_config

MORE = 3  # token ids that a tokenizer has beyond the language model's


def weights_of(folder: Path, **changes: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in imported(folder, MORE, **changes).named_parameters()}


def _read_sharded(ranks: Ranks, models: list[tuple[Path, TransfusionConfig]]) -> list[tuple[dict, int]]:
    llm_folder.CHUNK, found = 500, []
    for folder, config in models:
        with torch.device("meta"):
            model = Transfusion(config, VOCAB + MORE)
        parallelize(model, ParallelConfig(activation_checkpointing="full", dtype="float32"), ranks)
        model.to_empty(device="cpu")
        parameters = {plain_name(name): parameter for name, parameter in model.named_parameters()}
        LLMFolder(folder).read(parameters, config, VOCAB + MORE, seed=0)
        found.append((gather_weights(parameters), sum(p.to_local().numel() for p in parameters.values())))
    return found


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_any_number_of_ranks_reads_the_same_bits(world_size: int, tmp_path: Path) -> None:
    """P3: from files of many shards, in pieces with arbitrary borders, each rank its own rows."""
    models, expected = [], []
    for kind in ("qwen3", "qwen2.5-7b"):
        save_llm(tmp_path / kind, kind, torch.bfloat16, shard="30KB")
        assert len(list((tmp_path / kind).glob("*.safetensors"))) > 3
        plain = imported(tmp_path / kind, MORE, vocab_multiple_of=5)
        models.append((tmp_path / kind, plain.config))
        expected.append(dict(plain.named_parameters()))
    for results in run_ranks(_read_sharded, world_size, models):
        for (weights, held), plain in zip(results, expected, strict=True):
            assert weights.keys() == plain.keys()
            assert all(torch.equal(weights[name], p) for name, p in plain.items())
            assert held < 1.1 * sum(p.numel() for p in plain.values()) / world_size


def _peak_memory(ranks: Ranks, folder: Path) -> tuple[int, int]:
    """Return (bytes that reading needs beside what was there before, bytes of this rank's shards)."""

    def anonymous() -> int:  # without the file's mapped pages, which the kernel takes back at will
        return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) * 1024

    def watch() -> None:
        while not done.wait(0.005):
            seen.append(anonymous())

    llm = LLMFolder(folder)
    config = TransfusionConfig(transformer=llm.model.transformer, tied_embeddings=True)
    with torch.device("meta"):
        model = Transfusion(config, llm.model.vocab_size + MORE)
    parallelize(model, ParallelConfig(activation_checkpointing="none", dtype="float32"), ranks)
    seen, done = [anonymous()], threading.Event()
    watcher = threading.Thread(target=watch)
    watcher.start()
    model.to_empty(device="cpu")
    parameters = {plain_name(name): parameter for name, parameter in model.named_parameters()}
    llm.read(parameters, config, model.vocab_size, seed=0)
    done.set()
    watcher.join()
    return max(seen) - seen[0], sum(p.to_local().numel() * 4 for p in parameters.values())


@pytest.mark.slow
def test_no_rank_holds_a_full_copy(tmp_path: Path) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 24, "head_dim": 128}
    save_llm(tmp_path, "qwen3", torch.bfloat16, shard="30MB", vocab_size=30_000, **sizes)
    for peak, held in run_ranks(_peak_memory, 4, tmp_path):
        assert 60 << 20 < held < peak < 2 * held, (peak, held)  # the model is four times that


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_new_rows_are_the_mean_and_padding_is_zero(dtype: torch.dtype, tmp_path: Path) -> None:
    llm = save_llm(tmp_path, "llama-2", dtype)
    model = imported(tmp_path, MORE, vocab_multiple_of=64)
    for ours, theirs in ((model.text_embedding, llm.model.embed_tokens), (model.text_head, llm.lm_head)):
        assert ours is not None
        rows, mean = ours.weight.detach(), theirs.weight.double().mean(0).float()
        assert rows.shape[0] == 128 and torch.equal(rows[:VOCAB], theirs.weight)
        assert torch.equal(rows[VOCAB : VOCAB + MORE], mean.expand(MORE, -1)) and not rows[VOCAB + MORE :].any()


def test_any_subset_is_filled_in_any_dtype_and_the_rest_is_drawn(tmp_path: Path) -> None:
    """What frozen parameters need: bfloat16 that equals the float32 that training would round."""
    save_llm(tmp_path, "llama-3.2")
    whole, config = weights_of(tmp_path), imported(tmp_path, MORE).config
    for name in ("transformer.blocks.1.attention.qkv.weight", "text_embedding.weight", "patches.to_patch.weight"):
        some = torch.full_like(whole[name], torch.nan, dtype=torch.bfloat16)
        LLMFolder(tmp_path).read({name: some}, config, VOCAB + MORE, seed=0)
        assert torch.equal(some, whole[name].bfloat16())
    drawn = initial_value(name, tuple(some.shape), config, parameter_generator(0, name))
    assert torch.equal(whole[name], drawn)


@pytest.mark.parametrize(("kind", "each"), [("qwen3", 8), ("qwen2.5", 7), ("mistral", 6)])
def test_images_own_weights_start_as_the_texts(kind: str, each: int, tmp_path: Path) -> None:
    """And the text side is the language model's still."""
    llm, ids = save_llm(tmp_path, kind), some_ids()
    model = imported(tmp_path, untied="all")
    with torch.no_grad():
        assert (logits(model, ids) - llm(ids).logits).abs().max() <= 1e-4
    weights = dict(model.named_parameters())
    own = {name for name in weights if ".image" in name}
    assert len(own) == 2 * each + 1
    for name in own:
        assert torch.equal(weights[name], weights[name.replace(".image_norm", ".norm").replace(".image", "")]), name


def test_a_tied_head_in_the_files_must_be_the_embedding(tmp_path: Path) -> None:
    """Some files hold it, and some rotary frequencies, as transformers wrote them once."""
    save_llm(tmp_path, "qwen3")
    expected = weights_of(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    stored |= {"lm_head.weight": stored["model.embed_tokens.weight"].clone()}
    stored |= {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)}
    save_file(stored, tmp_path / "model.safetensors")
    assert all(torch.equal(p, expected[name]) for name, p in weights_of(tmp_path).items())
    stored["lm_head.weight"][7, 7] += 1
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"tie_word_embeddings=true, but lm_head\.weight is not model\.embed_tokens"):
        weights_of(tmp_path)


def test_files_that_do_not_hold_the_model_are_refused_by_name(tmp_path: Path) -> None:
    save_llm(tmp_path, "mistral")
    file = tmp_path / "model.safetensors"
    whole = {name: tensor.clone() for name, tensor in load_file(file).items()}
    norm = "model.layers.1.input_layernorm.weight"
    for change, words in (
        ({norm: None}, f"{norm} is missing"),
        ({"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}, r"q_proj\.bias is not in a mistral"),
        ({norm: torch.ones(47)}, r"is \[47\], expected \[48\]"),
        ({norm: torch.ones(48, dtype=torch.int8)}, "is I8, expected one of F32, BF16, F16"),
    ):
        save_file({name: tensor for name, tensor in (whole | change).items() if tensor is not None}, file)
        with pytest.raises(ValueError, match=words):
            weights_of(tmp_path)
    save_file(whole, file)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged"):
        weights_of(tmp_path)
    for damage in (b"", b"\xff" * 16, (9).to_bytes(8, "little") + b"{'a': 1}\n"):
        file.write_bytes(damage)
        with pytest.raises(ValueError, match=r"init_from_llm=.*damaged.*fetch it again"):
            _ = LLMFolder(tmp_path).hash
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors missing; expected safetensors"):
        weights_of(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../x.safetensors"}}))
    with pytest.raises(FileNotFoundError, match=r"x\.safetensors missing"):
        weights_of(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no config\.json there"):
        LLMFolder(tmp_path / "nowhere")


def test_the_hash_notices_a_change_of_any_tensor(tmp_path: Path) -> None:
    save_llm(tmp_path, "qwen2.5")
    before, file = LLMFolder(tmp_path).hash, tmp_path / "model.safetensors"
    assert LLMFolder(tmp_path).hash == before
    stored = {name: tensor.clone() for name, tensor in load_file(file).items()}
    for name in stored:
        save_file(stored | {name: stored[name] * 1.01}, file)
        assert LLMFolder(tmp_path).hash != before, name
    save_file(stored, file, {"format": "pt"})
    assert LLMFolder(tmp_path).hash == before


CONFIGS = {
    "mixture": ({"model_type": "qwen3_moe"}, "model_type='qwen3_moe', .* expected one of llama .*mistral .*qwen2"),
    "gemma": ({"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"]}, "model_type='gemma2'"),
    "classifier": ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
    "yarn": ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "rope_type='yarn'"),
    "old linear": ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type='linear'"),
    "layers' own rope": ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "full_attention"),
    "part of a head": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    "half of llama3": ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "llama3 without low_freq_factor"),
    "attention bias": ({"attention_bias": True}, "attention_bias=true"),
    "ffn bias": ({"mlp_bias": True}, "mlp_bias=true"),
    "gelu": ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
    "quantized": ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
    "split": ({"pretraining_tp": 2}, "pretraining_tp=2"),
    "no rope": ({"no_rope_layers": [1, 0]}, "layers without rotary positions"),
    "linear attention": ({"layer_types": ["linear_attention", "full_attention"]}, "linear_attention"),
    "no width": ({"hidden_size": None}, "hidden_size missing"),
    "many layers": ({"num_hidden_layers": 10**30}, "num_hidden_layers missing or no possible number"),
    "wide heads": ({"head_dim": 10**30}, "head_dim=1000"),
    "no number": ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan"),
    "infinite": ({"max_position_embeddings": float("inf")}, "config.json: cannot convert float infinity"),
    "layer types": ({"layer_types": 3}, "config.json: 'int' object is not iterable"),
    "list": ({"model_type": []}, "config.json: unhashable"),
    "odd heads": ({"num_attention_heads": 5, "num_key_value_heads": 5, "head_dim": 7}, "head_dim=7"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_what_the_trunk_does_not_compute_is_refused_by_name(case: str, tmp_path: Path) -> None:
    change, words = CONFIGS[case]
    contents = llm_config("llama").to_dict() | {"architectures": ["LlamaForCausalLM"]} | change
    (tmp_path / "config.json").write_text(json.dumps(contents))
    with pytest.raises(ValueError, match=words):
        LLMFolder(tmp_path)


WINDOWS = {
    "mistral-7b-v0.1": ("mistral", {"sliding_window": 32}, 32),
    "mistral-7b-v0.3": ("mistral", {"sliding_window": None}, None),
    "qwen2, unused": ("qwen2", {"sliding_window": 32, "use_sliding_window": False}, None),
    "qwen2, below": ("qwen2", {"sliding_window": 32, "use_sliding_window": True, "max_window_layers": 2}, None),
    "qwen2, above": ("qwen2", {"sliding_window": 32, "use_sliding_window": True, "max_window_layers": 1}, 32),
    "qwen3, by layer": (
        "qwen3",
        {"sliding_window": 32, "use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"]},
        32,
    ),
}


@pytest.mark.parametrize("case", WINDOWS)
def test_sequences_longer_than_a_window_are_refused(case: str, tmp_path: Path) -> None:
    family, settings, window = WINDOWS[case]
    llm_config(family, **settings).save_pretrained(tmp_path)
    assert LLMFolder(tmp_path).model.window == window
    short = _config(tmp_path, "data.sequence_length=32")
    assert with_llm(short).model.transformer.width == 48
    long = _config(tmp_path, "data.sequence_length=33")
    if window is None:
        with_llm(long)
    else:
        with pytest.raises(ValueError, match=r"sequence_length=33: .* windows of 32"):
            with_llm(long)


def _config(folder: Path, *more: str, run_dir: str = "/nowhere") -> PretrainConfig:
    given = [f"run_dir={run_dir}", "data.tokenizer=x", f"init_from_llm={folder}", "data.sources.a.path=x", *more]
    return load_config(PretrainConfig, given)


@pytest.mark.parametrize("kind", KINDS)
def test_the_config_is_filled_from_either_form_of_config_json(kind: str, tmp_path: Path) -> None:
    family, settings = KINDS[kind]
    new = llm_config(family, **settings)
    new.save_pretrained(tmp_path)
    filled = with_llm(_config(tmp_path, "model.transformer.ffn_multiple_of=64"))
    trunk = filled.model.transformer
    assert (trunk.width, trunk.layers, trunk.hidden, trunk.ffn_multiple_of) == (48, 2, 96, 64)
    assert (trunk.heads, trunk.num_kv_heads) == (new.num_attention_heads, new.num_key_value_heads)
    assert (trunk.qkv_bias, trunk.qk_norm) == (family == "qwen2", family == "qwen3")
    assert filled.model.tied_embeddings is new.tie_word_embeddings
    assert with_llm(filled) == filled, "a run's own config.yaml, given again"

    old = json.loads((tmp_path / "config.json").read_text())
    rope = old.pop("rope_parameters")
    old["rope_theta"] = rope.pop("rope_theta")
    old["rope_scaling"] = rope if rope["rope_type"] != "default" else None
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert with_llm(_config(tmp_path, "model.transformer.ffn_multiple_of=64")) == filled


def test_what_contradicts_config_json_is_refused(tmp_path: Path) -> None:
    llm_config("qwen3", head_dim=16).save_pretrained(tmp_path)
    for change, words in {
        "model.transformer.width=96": r"model\.transformer\.width=96, but it has 48",
        "model.transformer.rope_theta=500": r"rope_theta=500\.0, but it has 10000\.0",
        "model.transformer.head_dim=12": r"head_dim=12, but it has 16",
        "model.transformer.rope_scaling.factor=8": "rope_scaling=",
        "model.tied_embeddings=true": r"model\.tied_embeddings=True, but it has False; leave these settings out",
    }.items():
        with pytest.raises(ValueError, match=words):
            with_llm(_config(tmp_path, change))
    agreeing = _config(tmp_path, "model.transformer.layers=2", "model.transformer.head_dim=16")
    assert with_llm(agreeing).model.transformer == LLMFolder(tmp_path).model.transformer
    with pytest.raises(ValueError, match=r"init_from=a and init_from_llm=.*expected only one"):
        _config(tmp_path, "init_from=a")


def test_the_resolved_config_is_the_filled_one_and_a_run_that_has_begun_needs_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm_config("qwen3", head_dim=16).save_pretrained(tmp_path / "llm")
    monkeypatch.setenv("MODELS", str(tmp_path))
    argv = [f"run_dir={tmp_path}", "data.tokenizer=x", "init_from_llm=$MODELS/llm", "data.sources.a.path=x"]
    resolved = _resolved(pretrain, argv, check=False)
    (tmp_path / "config.yaml").write_text(resolved.replace("$MODELS", str(tmp_path)))
    filled = read_config(tmp_path / "config.yaml")
    assert filled.model.transformer == LLMFolder(tmp_path / "llm").model.transformer
    (tmp_path / "llm" / "config.json").unlink()
    (tmp_path / "llm").rmdir()
    config = load_config(PretrainConfig, argv)
    assert with_llm(config).model == filled.model
    with pytest.raises(FileNotFoundError, match=r"no config\.json there"):
        with_llm(replace(config, run_dir=str(tmp_path / "new")))
