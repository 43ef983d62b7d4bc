"""Turn a checkpoint into a folder that stands alone: one safetensors file, config, tokenizer, VAE, trained records.

`train.sample` and `train.evaluate` take the folder as their `checkpoint`. With format=llama, the text side alone in the
layout that transformers' LlamaForCausalLM.from_pretrained opens.
"""

import json
import shutil
from dataclasses import dataclass, replace
from typing import Literal

import torch
from safetensors.torch import save_file

from data.storage import Location
from data.tokenizer import Tokenizer
from model.llama import llama_config, llama_weights
from train.checkpoints.run_folder import TOKENIZER_FILE
from train.checkpoints.trained_records import TRAINED_FILE
from train.config import load_config, run_program, to_yaml
from train.distributed.ranks import alone
from train.inference.saved_model import EXPORT_MARK, VAE_FOLDER, WEIGHTS_FILE, LoadedModel, load_matching_vae
from train.output_folder import OutputFolder


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    checkpoint: Location = "runs/pretrain"  # a checkpoint, or a run folder: its newest checkpoint that verifies
    output: Location = "runs/export"  # folder to write; must be absent, empty or made by this program
    weights: str = "auto"  # auto: the first EMA if the run kept one; ema: the first; ema-N: of half-life N; model
    format: Literal["transfusion", "llama"] = "transfusion"  # the whole model, or its text side for transformers
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the written weights
    vae: Location | None = None  # AutoencoderKL to copy; null: the one the run names
    tokenizer: Location | None = None  # SentencePiece model to copy; null: the copy in the run, else the one it names


CONFIG = ExportConfig


def main(argv: list[str]) -> None:
    config = load_config(CONFIG, argv)
    trained = LoadedModel.load(config.checkpoint, alone(), config.weights, config.tokenizer)
    settings = {"checkpoint": config.checkpoint, "identity": trained.stored.identity, "weights": trained.weights}
    settings |= {"format": config.format, "dtype": config.dtype, "vae": config.vae or trained.recipe.vae}
    output = OutputFolder(config.output, "train.export", EXPORT_MARK, settings)
    if output.is_complete():
        print(f"train.export: {output.path} is complete for these settings; reusing it")
        return
    write = write_llama if config.format == "llama" else write_transfusion
    mark = write(trained, output, getattr(torch, config.dtype), config.vae or trained.recipe.vae)
    output.commit(mark)
    size = sum(file.stat().st_size for file in output.path.rglob("*") if file.is_file())
    print(f"train.export: step {trained.step}, {trained.weights} weights, {size / 2**20:,.1f} MiB in {output.path}")


def write_transfusion(trained: LoadedModel, output: OutputFolder, dtype: torch.dtype, vae: str | None) -> dict:
    """Fill the folder and return what its mark says."""
    spec, codec = trained.latent_spec, None
    if spec is not None:
        codec = load_matching_vae(vae, spec)
    folder = output.open_partial()
    weights = {name: parameter.detach().to(dtype) for name, parameter in trained.model.named_parameters()}
    save_file(weights, folder / WEIGHTS_FILE)
    shutil.copyfile(trained.tokenizer.path, folder / TOKENIZER_FILE)
    if codec is not None:
        codec.save_pretrained(folder / VAE_FOLDER, safe_serialization=True)
    data = replace(trained.recipe.data, tokenizer=TOKENIZER_FILE)
    recipe = replace(trained.recipe, data=data, vae=VAE_FOLDER if codec is not None else None)
    (folder / "config.yaml").write_text(to_yaml(recipe), encoding="utf-8")
    if trained.stored.trained is not None:
        (folder / TRAINED_FILE).write_bytes(trained.stored.trained.to_bytes())
    return {
        "weights": trained.weights,
        "progress": {"step": trained.step},
        "fingerprint": trained.stored.meta["fingerprint"],
        "latent_spec": None if spec is None else vars(spec),
        "grids": trained.grids,
    }


def write_llama(trained: LoadedModel, output: OutputFolder, dtype: torch.dtype, vae: str | None) -> dict:
    """Fill the folder with the text side; refuse, by name, what Llama does not have. `vae` is not needed."""
    name = str(dtype).removeprefix("torch.")
    ids = trained.tokenizer.special
    contents = llama_config(trained.recipe.model, trained.tokenizer.vocab_size)
    contents |= {"torch_dtype": name, "bos_token_id": ids.bos, "eos_token_id": ids.eos}
    contents["max_position_embeddings"] = trained.recipe.data.sequence_length
    folder = output.open_partial()
    weights = {key: tensor.to(dtype) for key, tensor in llama_weights(trained.model).items()}
    save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(contents, indent=1), encoding="utf-8")
    (folder / TOKENIZER_FILE).write_bytes(trained.tokenizer.model)
    of_tokenizer = json.dumps(tokenizer_config(trained.tokenizer), indent=1)
    (folder / "tokenizer_config.json").write_text(of_tokenizer, encoding="utf-8")
    return {"weights": trained.weights, "progress": {"step": trained.step}}


def tokenizer_config(tokenizer: Tokenizer) -> dict:
    """Return what makes transformers' AutoTokenizer begin and spell a text as training did."""
    ids = {"bos": tokenizer.special.bos, "eos": tokenizer.special.eos, "unk": tokenizer.unknown}
    if tokenizer.special.pad != tokenizer.unknown:
        ids["pad"] = tokenizer.special.pad
    return {
        # Not LlamaTokenizer, which takes spaces before a text and line breaks in its own way.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": True,
        "add_eos_token": False,
        "split_special_tokens": True,  # no text spells them
        "clean_up_tokenization_spaces": False,
        **{f"{name}_token": tokenizer.piece(token_id) for name, token_id in ids.items()},
    }


if __name__ == "__main__":
    run_program(main)
