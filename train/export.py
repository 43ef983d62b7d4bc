"""Turn a checkpoint into a self-contained folder: one safetensors file, config, tokenizer, VAE, trained records.

`train.sample` and `train.evaluate` accept the folder as their `checkpoint`. format=hf writes only the text side, in
transformers' layout: AutoModelForCausalLM.from_pretrained opens it. format=peft writes only the text side's LoRA
adapters, in PEFT's layout, for the language model that the run started from.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file

from data.storage import Location
from data.strict_json import dumps
from model.language_model import LanguageModel, adapter_weights, pieces, to_settings, to_weights
from model.lora import LoraConfig, merged
from model.modalities import text_name
from train.checkpoints.trained_records import TRAINED_FILE
from train.config import load_config, run_program, to_yaml
from train.distributed.ranks import alone
from train.inference.saved_model import EXPORT_MARK, VAE_FOLDER, WEIGHTS_FILE, LoadedModel, load_matching_space
from train.llm_folder import LLMFolder
from train.optim.groups import frozen_among
from train.output_folder import OutputFolder


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    checkpoint: Location = "runs/pretrain"  # a checkpoint, or a run folder: its newest checkpoint that verifies
    output: Location = "runs/export"  # folder to write; must not exist, be empty or hold an earlier export
    weights: str = "auto"  # model, ema-N (half-life N), ema (the first); auto: the first EMA, or model if there is none
    # transfusion: the whole model; hf: its text side for transformers, in the family that it started from or that fits;
    # peft: the text side's LoRA adapters.
    format: Literal["transfusion", "hf", "peft"] = "transfusion"
    merge: bool = False  # add LoRA's adapters to the weights; hf always does
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the written weights
    vae: Location | None = None  # autoencoder to copy; null: the one the run names, none for pixels
    tokenizer: Location | None = None  # to copy, a file or folder; null: the copy in the run, else the one it names
    base: Location | None = None  # where frozen parameters come from; null: what the run was started from

    def __post_init__(self) -> None:
        if self.merge and self.format == "peft":
            raise ValueError("merge=true with format=peft: expected format=transfusion or hf, which hold whole weights")


CONFIG = ExportConfig


def main(argv: list[str]) -> None:
    config = load_config(CONFIG, argv)
    loaded = LoadedModel.load(config.checkpoint, alone(), config.weights, config.tokenizer, config.base)
    vae, dtype = config.vae or loaded.config.vae, getattr(torch, config.dtype)
    settings = {
        "checkpoint": config.checkpoint,
        "identity": loaded.saved.identity,
        "weights": loaded.weights,
        "format": config.format,
        "merge": config.merge,
        "dtype": config.dtype,
        "vae": vae,
    }
    output = OutputFolder(config.output, "train.export", EXPORT_MARK, settings)
    if output.is_complete():
        print(f"train.export: {output.path} is complete for these settings; reusing it")
        return
    summary = {"weights": loaded.weights, "progress": {"step": loaded.saved.step}}
    if config.format == "hf":
        write_text_side(loaded, output, dtype)
    elif config.format == "peft":
        write_adapters(loaded, output, dtype)
    else:
        summary |= write_transfusion(loaded, output, dtype, vae, config.merge)
    output.commit(summary)
    size = sum(file.stat().st_size for file in output.path.rglob("*") if file.is_file())
    print(f"train.export: step {loaded.saved.step}, {loaded.weights} weights, {size / 2**20:,.1f} MiB in {output.path}")


def write_transfusion(
    loaded: LoadedModel, output: OutputFolder, dtype: torch.dtype, vae_path: str | None, merge: bool
) -> dict[str, Any]:
    """Write the whole model; return what export.json says about its training data."""
    spec, model = loaded.saved.latent_spec, loaded.config.model
    space = None if spec is None else load_matching_space(vae_path, spec)
    folder = output.open_partial()
    weights = {name: parameter.detach() for name, parameter in loaded.model.named_parameters()}
    if merge:
        weights, model = merged(weights, model.lora), replace(model, lora=LoraConfig())
    save_file({name: weight.to(dtype).contiguous() for name, weight in weights.items()}, folder / WEIGHTS_FILE)
    (folder / loaded.tokenizer.file_name).write_bytes(loaded.tokenizer.content)
    has_vae = space is not None and space.save(folder / VAE_FOLDER)
    data = replace(loaded.config.data, tokenizer=loaded.tokenizer.file_name)
    config = replace(loaded.config, data=data, vae=VAE_FOLDER if has_vae else None, model=model)
    (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    if loaded.saved.trained_records is not None:
        (folder / TRAINED_FILE).write_bytes(loaded.saved.trained_records.to_bytes())
    return {
        "fingerprint": loaded.saved.meta["fingerprint"],
        "latent_spec": None if spec is None else spec.fields(),
        "grids": loaded.saved.grids,
    }


def write_text_side(loaded: LoadedModel, output: OutputFolder, dtype: torch.dtype) -> None:
    """Write the text side in transformers' layout; raise ValueError for switches that no family of it has."""
    model, ids, origin = loaded.config.model, loaded.tokenizer.special, _language_model(loaded)
    contents = to_settings(model, loaded.tokenizer.vocab_size, origin.family if origin else None)
    contents |= {"torch_dtype": str(dtype).removeprefix("torch."), "bos_token_id": ids.bos, "eos_token_id": ids.eos}
    lengths = [loaded.config.data.sequence_length, *([origin.context] if origin else [])]
    contents["max_position_embeddings"] = max(lengths)
    folder = output.open_partial()
    weights = merged(dict(loaded.model.named_parameters()), model.lora)
    text = to_weights(weights, model.transformer, loaded.tokenizer.vocab_size)
    save_file({name: weight.to(dtype) for name, weight in text.items()}, folder / WEIGHTS_FILE, {"format": "pt"})
    files = {"config.json": dumps(contents, indent=1).encode(), **loaded.tokenizer.files()}
    for name, content in files.items():
        (folder / name).write_bytes(content)
    left_out = ["patchers", *(["images' own weights"] if model.untied != "none" else [])]
    print(f"train.export: text side as {contents['architectures'][0]}, without {' and '.join(left_out)}")


def write_adapters(loaded: LoadedModel, output: OutputFolder, dtype: torch.dtype) -> None:
    """Write the text side's adapters in PEFT's layout.

    Raises ValueError for a model without any, and if more of the text side was trained, which the layout cannot hold.
    """
    lora, trunk = loaded.config.model.lora, loaded.config.model.transformer
    parameters, groups = dict(loaded.model.named_parameters()), loaded.config.optim.groups
    weights = adapter_weights(parameters, trunk)
    if not weights:
        raise ValueError("format=peft: the text side has no LoRA adapters; expected a run with model.lora.rank > 0")
    of_text = [name for name in parameters if pieces(name, trunk) and text_name(name) == name]
    frozen = frozen_among(of_text, groups, adapted=True)
    if trained := [name for name in of_text if name not in frozen]:
        raise ValueError(
            f"format=peft: beside adapters, {len(trained)} parameters of the text side were trained, such as "
            f"{trained[0]}: expected adapters alone; use format=hf, which writes all of the text side"
        )
    adapted = {name.rpartition(".lora_")[0] for name in weights}
    kinds = {name.rpartition(".")[2] for name in adapted}
    if len(adapted) == trunk.layers * len(kinds):
        adapted = kinds
    contents = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": loaded.saved.config.init_from_llm,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": sorted(adapted),
    }
    folder = output.open_partial()
    file = folder / "adapter_model.safetensors"
    save_file({f"base_model.model.{name}": w.to(dtype) for name, w in weights.items()}, file, {"format": "pt"})
    (folder / "adapter_config.json").write_text(dumps(contents, indent=1), encoding="utf-8")


def _language_model(loaded: LoadedModel) -> LanguageModel | None:
    """Return the language model that the run started from, if that is still there."""
    path = loaded.saved.config.init_from_llm
    return LLMFolder(path).model if path and (Path(path) / "config.json").is_file() else None


if __name__ == "__main__":
    run_program(main)
