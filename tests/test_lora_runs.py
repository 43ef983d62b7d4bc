"""Runs that train adapters alone: what their checkpoints hold, how they resume, and what is exported from them."""

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from data.tokenizer import Tokenizer
from model.attention import dense_mask
from model.autoencoders import load_latent_space
from model.transfusion import Transfusion
from tests import runs
from tests.sources import make_source, pairs
from tests.test_language_model import save_llm
from train import export
from train.distributed.ranks import alone
from train.inference.saved_model import LoadedModel

LLM_VOCAB = 296  # four rows fewer than the tokenizer's


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llm") / "model"
    save_llm(folder, "qwen2.5-7b", vocab_size=LLM_VOCAB)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer, vae_folder: Path) -> dict[str, Path]:
    """Pictures and captions that claim to be encoded by `vae_folder`."""
    folder, hashed = tmp_path_factory.mktemp("pictures"), load_latent_space(vae_folder).hash
    return {"pairs": make_source(folder / "data", tokenizer, pairs(40, grids=[(4, 4)]), vae_hash=hashed)}


def lora_run(run_dir: Path, llm: Path, tokenizer: Tokenizer, pictures: dict[str, Path], *more: str) -> list[str]:
    """Return the arguments of a run whose adapters and patchers learn fast enough to matter after six steps."""
    settings = {"init_from_llm": llm, "model__lora__rank": 4, "optim__steps": 6, "checkpoint__interval_steps": 3}
    argv = runs.settings(run_dir, tokenizer, pictures, **settings, optim__learning_rate=3e-2)
    return [*(argument for argument in argv if "model.transformer" not in argument), *more]


@pytest.fixture(scope="module")
def adapted(
    tmp_path_factory: pytest.TempPathFactory, llm: Path, tokenizer: Tokenizer, pictures: dict[str, Path]
) -> Path:
    """A finished run on two ranks, of images' weights untied from text's."""
    run_dir = tmp_path_factory.mktemp("lora") / "run"
    runs.finish(lora_run(run_dir, llm, tokenizer, pictures, "model.untied=ffn"), 2)
    return run_dir


def test_a_checkpoint_holds_what_is_trained_and_a_killed_run_ends_with_the_same_bits(
    run_dir: Path, llm: Path, tokenizer: Tokenizer, pictures: dict[str, Path], adapted: Path
) -> None:
    """P4, P5; the base is read again from the language model, and only from that one."""
    argv = lora_run(run_dir, llm, tokenizer, pictures, "model.untied=ffn")
    with runs.launch(argv, 2) as run:
        runs.wait_for(runs.reached(run_dir, 4), run)
        run.signal(signal.SIGKILL)
        run.wait()
    runs.finish(argv, 2)
    runs.assert_same_end(run_dir, adapted)
    tensors, _, _ = runs.saved_state(adapted)
    names = {name.removeprefix("model.") for name in tensors if name.startswith("model.")}
    layers = ["attention.qkv", "attention.out", "ffn.gate_up", "ffn.down", "image.ffn.gate_up", "image.ffn.down"]
    assert {name for name in names if not name.startswith("patches.")} == {
        f"transformer.blocks.{block}.{layer}.lora_{matrix}" for block in (0, 1) for layer in layers for matrix in "ab"
    }
    text_losses = [row["text_loss"] for row in runs.rows(adapted)]
    assert text_losses[-1] < text_losses[0]


@pytest.mark.parametrize("fresh", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("ranks", [1, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)])
def test_other_numbers_of_ranks_train_the_same_adapters(
    ranks: int, fresh: bool, run_dir: Path, llm: Path, tokenizer: Tokenizer, pictures: dict[str, Path], adapted: Path
) -> None:
    """P3: from the start, and from the middle of the run of two ranks; with four on another mesh."""
    mesh = ["parallel.dp_replicate=2"] if ranks == 4 else []
    argv = lora_run(run_dir, llm, tokenizer, pictures, "model.untied=ffn", *mesh)
    runs.finish([*argv, *([] if fresh else [f"resume={adapted / 'checkpoints' / 'step-00000003'}"])], ranks)
    expected, found = ({row["step"]: row for row in runs.rows(of)} for of in (adapted, run_dir))
    assert sorted(found) == list(range(1 if fresh else 4, 7))
    for row in found.values():
        for name in ("text_loss", "image_loss", "grad_norm"):
            assert row[name] == pytest.approx(expected[row["step"]][name], rel=1e-3), (row["step"], name)


@torch.no_grad()
def logits(model: Transfusion, ids: torch.Tensor) -> torch.Tensor:
    """Return [B, S, V] of a text alone."""
    text, positions = torch.full_like(ids, -1), torch.arange(ids.shape[1]).expand_as(ids)
    mask = dense_mask(torch.ones_like(ids), text, torch.full_like(ids, ids.shape[1]))
    h = model.embed_text(ids)
    return model.text_logits(model.trunk(h, positions, text[..., None].expand(-1, -1, 2), mask, None, "text"))


@torch.no_grad()
def test_adapters_open_in_peft_and_merged_weights_in_transformers(
    adapted: Path, llm: Path, tmp_path: Path, vae_folder: Path
) -> None:
    loaded = LoadedModel.load(adapted, alone(), "model")
    ids = torch.randint(4, LLM_VOCAB, (2, 40), generator=torch.Generator().manual_seed(0))
    ours = logits(loaded.model, ids)
    argv = [f"checkpoint={adapted}", "weights=model"]
    export.main([*argv, f"output={tmp_path / 'peft'}", "format=peft"])
    base = AutoModelForCausalLM.from_pretrained(llm, attn_implementation="eager").eval()
    before = base(ids).logits
    assert (before - ours[..., :LLM_VOCAB]).abs().max() > 0.01, "the adapters have learnt nothing"
    settings = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(llm)
    assert settings["target_modules"] == [f"{n}_proj" for n in ("down", "gate", "k", "o", "q", "up", "v")]
    theirs = PeftModel.from_pretrained(base, tmp_path / "peft")
    assert (theirs(ids).logits - ours[..., :LLM_VOCAB]).abs().max() <= 1e-4
    export.main([*argv, f"output={tmp_path / 'hf'}", "format=hf"])
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", attn_implementation="eager").eval()
    assert (whole(ids).logits - ours).abs().max() <= 1e-4
    for number, merge in enumerate(("merge=false", "merge=true")):
        export.main([*argv, f"output={tmp_path / merge}", merge, f"vae={vae_folder}"])
        names = load_file(tmp_path / merge / "model.safetensors").keys()
        again = LoadedModel.load(tmp_path / merge, alone())
        assert any(".lora_" in name for name in names) == (number == 0) == (again.config.model.lora.rank == 4)
        assert (logits(again.model, ids) - ours).abs().max() <= 1e-4 * number


def test_what_cannot_be_exported_or_made_again_is_refused_with_the_remedy(
    adapted: Path, llm: Path, run_dir: Path, tokenizer: Tokenizer, pictures: dict[str, Path], tmp_path: Path
) -> None:
    argv = [f"checkpoint={adapted}", f"output={tmp_path / 'out'}", "format=peft"]
    with pytest.raises(ValueError, match=r"expected format=transfusion or hf"):
        export.main([*argv, "merge=true"])
    thawed = 'optim.groups={norms: {parameters: ["transformer.blocks.*_norm.weight"], lr_scale: 0.1}}'
    runs.finish(lora_run(run_dir, llm, tokenizer, pictures, "optim.steps=1", thawed), 1)
    with pytest.raises(ValueError, match=r"4 parameters of the text side were trained, such as .*norm.*format=hf"):
        export.main([f"checkpoint={run_dir}", *argv[1:]])
    elsewhere = Path(shutil.move(llm, tmp_path / "llm"))
    with pytest.raises(FileNotFoundError, match="base=PATH"):
        export.main(argv)
    export.main([*argv, f"base={elsewhere}"])
    shutil.move(elsewhere, llm)


@pytest.mark.slow
def test_an_export_of_ours_gets_adapters_of_its_own(
    adapted: Path, run_dir: Path, tokenizer: Tokenizer, pictures: dict[str, Path], vae_folder: Path, tmp_path: Path
) -> None:
    """Its weights are the frozen base, read again when the new run's checkpoint is opened."""
    folder = tmp_path / "merged"
    export.main([f"checkpoint={adapted}", f"output={folder}", "merge=true", f"vae={vae_folder}"])
    base = LoadedModel.load(folder, alone())
    argv = runs.settings(
        run_dir, tokenizer, pictures, init_from=folder, optim__steps=1, model__lora__rank=2, model__untied="ffn"
    )
    trunk = {name: value for name, value in vars(base.config.model.transformer).items() if name != "rope_scaling"}
    argv = [argument for argument in argv if "model.transformer" not in argument]
    argv += [f"model.transformer.{name}={'null' if value is None else value}" for name, value in trunk.items()]
    assert f"of {folder}, step 6" in runs.finish(argv, 1)
    opened = LoadedModel.load(run_dir, alone(), "model").model
    for name, parameter in base.model.named_parameters():
        assert name.startswith("patches.") != torch.equal(parameter, opened.get_parameter(name)), name
