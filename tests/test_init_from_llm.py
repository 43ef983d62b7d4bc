"""Runs that start from a language model: its loss at once, exact resume, and everything else as from scratch."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from data.dataset import open_data
from data.layout import IGNORE
from data.loader import Loader
from data.packing import PackedBatch
from data.tokenizer import Tokenizer
from model.draws import SeededDraws
from model.transfusion import Transfusion
from tests import runs
from tests.one_by_one import step_on
from tests.sources import data_config, make_source, texts
from tests.test_language_model import imported, logits, save_llm, some_ids
from tests.test_sampler import CHANNELS, MIXED, Slow, assert_same, run
from tests.test_sampler import VOCAB as SAMPLED_VOCAB
from tests.test_sampler import settings as sampler_settings
from tests.test_tokenizer import foreign_model
from train import export
from train.config import load_config
from train.distributed.ranks import alone
from train.inference.saved_model import LoadedModel
from train.initial_weights import read_llm
from train.llm_folder import with_llm
from train.pretrain_config import PretrainConfig

VOCAB = 300  # of the fixture `tokenizer`, its BOI, EOI and PAD included


def held_out(folder: Path, tokenizer: Tokenizer, vocab_size: int = 270) -> PackedBatch:
    """Return a batch of the real loader: 40 texts, several a row, some of them cut."""
    data = make_source(folder, tokenizer, texts(40, lengths=(1, 60), seed=9, vocab_size=vocab_size))
    config = data_config(tokenizer, {"texts": data}, lanes=8)
    loader = Loader(open_data(config, 0, 2), config, rank=0, world_size=1, micro_batch_size=8)
    (batch,) = loader.next(30).micro_batches
    loader.close()
    assert (batch.document_ids.amax(1) >= 2).any()
    return batch


@torch.no_grad()
def text_loss(model: Transfusion, batch: PackedBatch) -> float:
    return step_on(model, batch).text_nll.item() / batch.num_text_targets


@torch.no_grad()
def loss_of_transformers(llm: Any, batch: PackedBatch) -> float:
    """Return the mean NLL of the batch's targets, one document at a time."""
    total = 0.0
    for ids, labels, documents in zip(batch.input_ids, batch.labels, batch.document_ids, strict=True):
        for document in range(1, int(documents.max()) + 1):
            logits = llm(ids[documents == document][None]).logits[0].double()
            total += F.cross_entropy(logits, labels[documents == document], ignore_index=IGNORE, reduction="sum")
    return float(total) / batch.num_text_targets


@pytest.mark.parametrize("kind", ["llama-3.2", "mistral", "qwen2.5", "qwen3"])
def test_the_text_loss_at_step_0_is_the_language_models(kind: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    """BOI, EOI and PAD are ids of its vocabulary here."""
    llm = save_llm(tmp_path / "llm", kind, torch.bfloat16, vocab_size=VOCAB)
    batch = held_out(tmp_path / "texts", tokenizer)
    theirs = loss_of_transformers(llm, batch)
    assert theirs > 5  # nats: a random model's logits matter
    assert abs(text_loss(imported(tmp_path / "llm"), batch) - theirs) <= 1e-5


@pytest.mark.parametrize("kind", ["llama-2", "qwen3"])
def test_appended_ids_raise_the_text_loss_by_their_share_at_most(
    kind: str, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    """A row at the mean has the mean logit, which is at most the log of the mean of exp(logit) (Jensen).

    So n new ones raise log sum exp by at most log(1 + n / V) < n / V.
    """
    llm = save_llm(tmp_path / "llm", kind, vocab_size=270)
    batch = held_out(tmp_path / "texts", tokenizer)
    rise = text_loss(imported(tmp_path / "llm", more=30), batch) - loss_of_transformers(llm, batch)
    assert 0 < rise <= 30 / 270


def test_decoding_of_a_qwen3_equals_a_full_forward(tmp_path: Path) -> None:
    """P12: with pictures, norms of heads wider than width / heads, grouped queries and a tied head."""
    save_llm(tmp_path, "qwen3", vocab_size=SAMPLED_VOCAB)
    model = imported(tmp_path, latent_channels=CHANNELS)
    with torch.no_grad():
        model.patches.to_patch.weight.mul_(10)  # predictions that matter
    config = sampler_settings()
    outputs = run(model, MIXED, config, 0, "v")
    for prompt, ours in zip(MIXED, outputs, strict=True):
        assert_same(ours, Slow(model).generate(prompt, config, SeededDraws(0), "v"))


def _arguments(run_dir: Path, tokenizer: Tokenizer, sources: dict[str, Path], llm: Path) -> list[str]:
    argv = runs.settings(run_dir, tokenizer, sources, init_from_llm=llm, optim__steps=4, checkpoint__interval_steps=2)
    return [argument for argument in argv if not argument.startswith("model.transformer.")]


def test_a_run_from_a_language_model_resumes_exactly_without_it_and_is_exported_in_its_family(
    tmp_path: Path, tokenizer: Tokenizer, sources: dict[str, Path], capsys: pytest.CaptureFixture
) -> None:
    """P3, P4: with Muon, whose parts of stacked queries, keys and values are of this head dimension. And exported."""
    save_llm(tmp_path / "llm", "qwen3", torch.bfloat16, shard="30KB", vocab_size=VOCAB - 5)
    argv = [*_arguments(tmp_path / "run", tokenizer, sources, tmp_path / "llm"), "optim.optimizer=muon"]
    output = runs.finish(argv, 2)
    assert f"from the qwen3 in {tmp_path / 'llm'} (295 token ids, 5 new ones at the mean)" in output
    expected = runs.numbers(tmp_path / "run")
    config = load_config(PretrainConfig, [f"config={tmp_path / 'run' / 'config.yaml'}"])
    assert config.model.transformer.head_dim == 32 and config.model.tied_embeddings

    (tmp_path / "llm").rename(tmp_path / "elsewhere")
    for name, ranks in (("twin", 2), ("other", 3)):
        shutil.copytree(tmp_path / "run", tmp_path / name)
        shutil.rmtree(tmp_path / name / "checkpoints" / "step-00000004")
        runs.finish([*argv, f"run_dir={tmp_path / name}"], ranks)
        for found, wanted in zip(runs.numbers(tmp_path / name), expected, strict=True):
            assert found == (wanted if ranks == 2 else pytest.approx(wanted, rel=1e-5))
    runs.assert_same_end(tmp_path / "twin", tmp_path / "run")

    (tmp_path / "elsewhere").rename(tmp_path / "llm")
    export.main([f"checkpoint={tmp_path / 'run'}", f"output={tmp_path / 'hf'}", "format=hf", "weights=model"])
    assert "text side as Qwen3ForCausalLM, without patchers" in capsys.readouterr().out
    llm = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", attn_implementation="eager").eval()
    ids, model = some_ids(VOCAB, 60), LoadedModel.load(tmp_path / "run", alone(), "model").model
    with torch.no_grad():
        assert (llm(ids).logits - logits(model, ids)).abs().max() <= 1e-4
    assert (llm.config.max_position_embeddings, llm.config.tie_word_embeddings) == (256, True)


def test_a_tokenizer_that_is_not_the_models_is_refused(
    tmp_path: Path, tokenizer: Tokenizer, sources: dict[str, Path]
) -> None:
    for name, vocab_size in (("large", VOCAB + 1), ("other", 60)):
        save_llm(tmp_path / name, "llama-2", vocab_size=vocab_size)
        config = load_config(PretrainConfig, _arguments(tmp_path / "run", tokenizer, sources, tmp_path / name))
        with torch.device("meta"):
            model = Transfusion(with_llm(config).model, VOCAB)
        model.to_empty(device="cpu")
        data = open_data(config.data, 0, 2)
        if name == "other":
            read_llm(model, config, data, alone())  # without a tokenizer there is nothing to compare
            foreign_model(tmp_path / name / "tokenizer.model")
        with pytest.raises(ValueError, match=r"was encoded with data\.tokenizer=.*expected the model's own"):
            read_llm(model, config, data, alone())
