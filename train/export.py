"""Turn a checkpoint into a self-contained folder: one safetensors file, config, tokenizer, VAE, trained records.

`train.sample` and `train.evaluate` accept the folder as their `checkpoint`. format=llama writes only the text side, in
the layout that transformers' LlamaForCausalLM.from_pretrained opens.
"""

import json
import shutil
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from safetensors.torch import save_file

from data.storage import Location
from data.tokenizer import Tokenizer
from model.llama import llama_config, llama_weights
from train.checkpoints.run_folder import TOKENIZER_FILE
from train.checkpoints.trained_records import TRAINED_FILE
from train.config import load_config, run_program, to_yaml
from train.distributed.ranks import alone
from train.inference.saved_model import EXPORT_MARK, VAE_FOLDER, WEIGHTS_FILE, LoadedModel, load_matching_space
from train.output_folder import OutputFolder


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    checkpoint: Location = "runs/pretrain"  # a checkpoint, or a run folder: its newest checkpoint that verifies
    output: Location = "runs/export"  # folder to write; must not exist, be empty or hold an earlier export
    weights: str = "auto"  # model, ema-N (half-life N), ema (the first); auto: the first EMA, or model if there is none
    format: Literal["transfusion", "llama"] = "transfusion"  # the whole model, or its text side for transformers
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the written weights
    vae: Location | None = None  # autoencoder to copy; null: the one the run names, none for pixels
    tokenizer: Location | None = None  # SentencePiece model to copy; null: the copy in the run, else the one it names


CONFIG = ExportConfig


def main(argv: list[str]) -> None:
    config = load_config(CONFIG, argv)
    loaded = LoadedModel.load(config.checkpoint, alone(), config.weights, config.tokenizer)
    vae, dtype = config.vae or loaded.config.vae, getattr(torch, config.dtype)
    settings = {
        "checkpoint": config.checkpoint,
        "identity": loaded.saved.identity,
        "weights": loaded.weights,
        "format": config.format,
        "dtype": config.dtype,
        "vae": vae,
    }
    output = OutputFolder(config.output, "train.export", EXPORT_MARK, settings)
    if output.is_complete():
        print(f"train.export: {output.path} is complete for these settings; reusing it")
        return
    summary = {"weights": loaded.weights, "progress": {"step": loaded.saved.step}}
    if config.format == "llama":
        write_llama(loaded, output, dtype)
    else:
        summary |= write_transfusion(loaded, output, dtype, vae)
    output.commit(summary)
    size = sum(file.stat().st_size for file in output.path.rglob("*") if file.is_file())
    print(f"train.export: step {loaded.saved.step}, {loaded.weights} weights, {size / 2**20:,.1f} MiB in {output.path}")


def write_transfusion(
    loaded: LoadedModel, output: OutputFolder, dtype: torch.dtype, vae_path: str | None
) -> dict[str, Any]:
    """Write the whole model; return what export.json says about its training data."""
    spec = loaded.saved.latent_spec
    space = None if spec is None else load_matching_space(vae_path, spec)
    folder = output.open_partial()
    weights = {name: parameter.detach().to(dtype) for name, parameter in loaded.model.named_parameters()}
    save_file(weights, folder / WEIGHTS_FILE)
    shutil.copyfile(loaded.tokenizer.path, folder / TOKENIZER_FILE)
    has_vae = space is not None and space.save(folder / VAE_FOLDER)
    data = replace(loaded.config.data, tokenizer=TOKENIZER_FILE)
    config = replace(loaded.config, data=data, vae=VAE_FOLDER if has_vae else None)
    (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    if loaded.saved.trained_records is not None:
        (folder / TRAINED_FILE).write_bytes(loaded.saved.trained_records.to_bytes())
    return {
        "fingerprint": loaded.saved.meta["fingerprint"],
        "latent_spec": None if spec is None else spec.fields(),
        "grids": loaded.saved.grids,
    }


def write_llama(loaded: LoadedModel, output: OutputFolder, dtype: torch.dtype) -> None:
    """Write the text side in transformers' layout; raise ValueError for switches that Llama does not have."""
    contents = llama_config(loaded.config.model, loaded.tokenizer.vocab_size)
    ids = loaded.tokenizer.special
    contents |= {"torch_dtype": str(dtype).removeprefix("torch."), "bos_token_id": ids.bos, "eos_token_id": ids.eos}
    contents["max_position_embeddings"] = loaded.config.data.sequence_length
    folder = output.open_partial()
    weights = {key: tensor.to(dtype) for key, tensor in llama_weights(loaded.model).items()}
    save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    (folder / TOKENIZER_FILE).write_bytes(loaded.tokenizer.model)
    for name, config in {"config.json": contents, "tokenizer_config.json": tokenizer_config(loaded.tokenizer)}.items():
        (folder / name).write_text(json.dumps(config, indent=1), encoding="utf-8")


def tokenizer_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the config with which transformers' AutoTokenizer begins and spells a text as in training."""
    ids = {"bos": tokenizer.special.bos, "eos": tokenizer.special.eos, "unk": tokenizer.unknown}
    if tokenizer.special.pad != tokenizer.unknown:
        ids["pad"] = tokenizer.special.pad
    return {
        # Not LlamaTokenizer, which treats leading spaces and line breaks differently.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": True,
        "add_eos_token": False,
        "split_special_tokens": True,  # text that spells them stays text
        "clean_up_tokenization_spaces": False,
        **{f"{name}_token": tokenizer.piece(token_id) for name, token_id in ids.items()},
    }


if __name__ == "__main__":
    run_program(main)
