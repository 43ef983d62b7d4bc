"""An export stands alone: it draws what its checkpoint draws, and its text side opens in transformers."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaForCausalLM

from data.tokenizer import Tokenizer
from model.attention import dense_mask
from model.sampler_config import SamplerConfig
from model.vae import VaeConfig, build_vae
from tests.runs import PROMPTS, DrawingRun
from tests.test_pipeline import load
from tests.test_tokenizer import foreign_model
from train.checkpoints import checkpoint
from train.distributed.ranks import alone
from train.export import main
from train.inference.saved_model import LoadedModel

SAMPLER = SamplerConfig(sampler="ddim", steps=2, max_new_tokens=4)


def export(drawn: DrawingRun, output: Path, *more: str) -> Path:
    main([f"checkpoint={drawn.run_dir}", f"output={output}", *more])
    return output


def test_an_export_draws_the_same_bits_and_needs_nothing_else(drawn: DrawingRun, tmp_path: Path, capsys) -> None:
    folder = export(drawn, tmp_path / "export")
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.yaml", "export.json", "model.safetensors", "tokenizer.model", "trained.keys", "vae"
    ]  # fmt: skip
    moved = shutil.move(folder, tmp_path / "elsewhere")
    pipeline, original = load(moved), load(drawn.run_dir)
    assert str(pipeline.tokenizer.path).startswith(str(moved))
    for ours, theirs in zip(pipeline.draw(PROMPTS, SAMPLER, 3), original.draw(PROMPTS, SAMPLER, 3), strict=True):
        assert np.array_equal(ours, theirs)
    assert pipeline.saved.step == 6 and pipeline.weights == "ema-7"
    export(drawn, tmp_path / "elsewhere")
    assert "reusing it" in capsys.readouterr().out
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "elsewhere").rglob("*") if path.is_file()}
    assert len(modes) == 1, "some files are for their owner alone"


def test_another_run_under_the_same_path_is_exported_anew(drawn: DrawingRun, tmp_path: Path, capsys) -> None:
    run_dir = Path(shutil.copytree(drawn.run_dir, tmp_path / "run"))
    main([f"checkpoint={run_dir}", f"output={tmp_path / 'export'}"])
    newest = checkpoint.saved(run_dir / "checkpoints")[-1]
    shutil.rmtree(newest)
    shutil.copytree(checkpoint.saved(run_dir / "checkpoints")[-1], newest)  # of the same name, with other contents
    main([f"checkpoint={run_dir}", f"output={tmp_path / 'export'}"])
    assert "was made with another identity; making it again" in capsys.readouterr().out
    assert LoadedModel.load(tmp_path / "export", alone()).saved.step == 3


def test_weights_and_dtype_are_those_asked_for(drawn: DrawingRun, tmp_path: Path) -> None:
    folder = export(drawn, tmp_path / "export", "weights=model", "dtype=bfloat16")
    live = LoadedModel.load(drawn.run_dir, alone(), "model").model.state_dict()
    written = load_file(folder / "model.safetensors")
    assert written.keys() == live.keys()
    assert all(torch.equal(written[name], live[name].bfloat16()) for name in live)
    with pytest.raises(ValueError, match=r"weights=ema: .* holds model; use weights=model"):
        LoadedModel.load(folder, alone(), "ema")
    picture = load(folder, dtype="bfloat16").draw(PROMPTS[:1], SAMPLER, 0)[0]
    assert picture.shape == (32, 32, 3) and picture.std() > 0


@torch.no_grad()
def test_the_text_side_opens_in_transformers(drawn: DrawingRun, tmp_path: Path) -> None:
    folder = export(drawn, tmp_path / "llama", "format=hf")
    llama = LlamaForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    bos, *_ = AutoTokenizer.from_pretrained(folder)("a red").input_ids
    assert bos == llama.config.bos_token_id
    loaded = LoadedModel.load(drawn.run_dir, alone())
    ids = torch.randint(4, loaded.tokenizer.vocab_size, (2, 40), generator=torch.Generator().manual_seed(0))
    text = torch.full_like(ids, -1)
    mask = dense_mask(torch.ones_like(ids), text, torch.full_like(ids, 40))
    no_grid = text[..., None].expand(-1, -1, 2)
    hidden = loaded.model.trunk(loaded.model.embed_text(ids), torch.arange(40).expand(2, -1), no_grid, mask)
    assert (llama(ids).logits - loaded.model.text_logits(hidden)).abs().max() <= 1e-4


@pytest.mark.parametrize("symbols", [None, [], ["<boi>", "<eoi>"]])
def test_autotokenizer_begins_and_spells_a_text_as_training_does(
    tokenizer: Tokenizer, tmp_path: Path, symbols: list[str] | None
) -> None:
    """With our own tokenizer, with a foreign one, and with one whose text holds our special pieces."""
    if symbols is not None:
        options = {"user_defined_symbols": symbols, "byte_fallback": True, "vocab_size": 330}
        tokenizer = Tokenizer(foreign_model(tmp_path / "foreign.model", **options))
    for name, content in tokenizer.files().items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in ["a red", "  two  spaces", "two\nlines\n\n  more", "ümlaut 中 🎉", "</s> <boi>", "a <eoi> <s>", ""]:
        assert theirs(text).input_ids == [tokenizer.special.bos, *tokenizer.encode(text)], text
    assert (theirs.bos_token_id, theirs.eos_token_id) == (tokenizer.special.bos, tokenizer.special.eos)


def test_the_manuals_snippet_runs_on_an_export(drawn: DrawingRun, tmp_path: Path) -> None:
    page = (Path(__file__).parents[1] / "docs" / "sampling.md").read_text()
    (snippet,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(snippet.strip().splitlines()) <= 10
    snippet = snippet.replace("runs/mine/export", str(export(drawn, tmp_path / "export")))
    snippet = snippet.replace("steps=50", "steps=2")
    done = subprocess.run(
        [sys.executable, "-c", snippet],
        cwd=tmp_path,
        env={"PYTHONPATH": str(Path(__file__).parents[1]), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.glob("*.png"))


def test_damage_and_what_does_not_fit_are_refused_by_name(drawn: DrawingRun, tmp_path: Path) -> None:
    """P10, P11: nothing is unpickled, and a file that is cut or of another model is named."""
    folder = export(drawn, tmp_path / "export")
    whole = (folder / "model.safetensors").read_bytes()
    weights = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}  # not mapped
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="is damaged"):
        LoadedModel.load(folder, alone())
    first = next(iter(weights))
    save_file({name: tensor for name, tensor in weights.items() if name != first}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=re.escape(f"{first} is missing")):
        LoadedModel.load(folder, alone())
    mark = json.loads((folder / "export.json").read_text())
    for change in ({"latent_spec": {"foo": 1}}, {"progress": 3}, {"grids": [["a", 3]]}, {"weights": "x"}):
        (folder / "export.json").write_text(json.dumps(mark | change))
        with pytest.raises(ValueError, match=r"export\.json: not readable"):
            LoadedModel.load(folder, alone())
    (folder / "export.json").write_text(json.dumps(mark))
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(config.replace("device: cpu", "device: ${oc.env:HOME}"))
    with pytest.raises(ValueError, match="holds an interpolation"):
        LoadedModel.load(folder, alone())
    with pytest.raises(ValueError, match="it has format=hf; export with format=transfusion"):
        LoadedModel.load(export(drawn, tmp_path / "hf", "format=hf"), alone())
    other = VaeConfig(latent_channels=2, block_channels=(8, 8, 8), layers_per_block=1, norm_groups=2)
    build_vae(other).save_pretrained(tmp_path / "vae")
    with pytest.raises(ValueError, match="has hash"):
        export(drawn, tmp_path / "other", f"vae={tmp_path / 'vae'}")
    assert not (tmp_path / "other").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(ValueError, match=r"was not made by train\.export"):
        export(drawn, tmp_path / "mine")
