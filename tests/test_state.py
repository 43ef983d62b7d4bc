"""What a run carries goes into a checkpoint and comes back, on any world size, or is refused by name (P4, P10)."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from data.dataset import open_data
from data.lane_state import LaneState
from data.loader import Loader
from data.tokenizer import Tokenizer
from model.diffusion import DiffusionConfig
from model.transfusion import Transfusion
from tests.ranks import run_ranks
from tests.runs import settings
from train.checkpoints.run_folder import RunFolder
from train.checkpoints.saver import Saver
from train.config import load_config
from train.distributed.parallelize import gather_weights, initialize, parallelize
from train.distributed.ranks import Ranks
from train.nested import leaves
from train.optim.optimizer import Optimizer
from train.pretrain_config import PretrainConfig, read_config
from train.state import Progress, TrainState, differences, fingerprint, meaning


def _state(ranks: Ranks, config: PretrainConfig, seed: int) -> tuple[TrainState, Any]:
    data = open_data(config.data, config.seed, config.model.patch_size)
    with torch.device("meta"):
        model = Transfusion(config.model, data.tokenizer.vocab_size)
    parallelize(model, config.parallel, ranks)
    initialize(model, seed, ranks.device)
    return TrainState.begin(model, Optimizer(model, config.optim, config.guard), config, data), data


def _everything(state: TrainState) -> dict[str, torch.Tensor]:
    return gather_weights(dict(leaves(state._tensors())))


def _save(ranks: Ranks, config: PretrainConfig) -> tuple[dict[str, torch.Tensor], dict[int, LaneState]]:
    state, data = _state(ranks, config, seed=1)
    loader = Loader(data, config.data, rank=ranks.rank, world_size=ranks.world_size, micro_batch_size=1)
    state.lane_states = loader.next(30).lane_states
    loader.close()
    for step in (1, 2, 3):
        for number, parameter in enumerate(state.model.parameters()):
            parameter.grad = torch.full_like(parameter, torch.inf if step == 2 else 0.01 * number)
        state.optimizer.update(step)
    state.progress = Progress(step=3, tokens_seen=2**40, images_seen=77)
    with RunFolder(config.run_dir, ranks) as folder:
        saver = Saver(folder, config.checkpoint, ranks)
        saver.start(state.snapshot(ranks))
        saver.settle(tolerate=False)
    return _everything(state), state.lane_states


def _load(ranks: Ranks, config: PretrainConfig) -> tuple[dict[str, torch.Tensor], dict[int, LaneState], Progress, list]:
    state, _ = _state(ranks, config, seed=2)
    state.load(Path(config.run_dir) / "checkpoints" / "step-00000003", ranks)
    return _everything(state), state.lane_states, state.progress, state.optimizer.guard.counts.tolist()


@pytest.fixture
def config(tmp_path: Path, tokenizer: Tokenizer, pairs_folder: Path, texts_folder: Path) -> PretrainConfig:
    sources = {"pairs": pairs_folder, "texts": texts_folder}
    return load_config(PretrainConfig, settings(tmp_path / "run", tokenizer, sources))


def test_everything_a_run_carries_comes_back_on_any_world_size(config: PretrainConfig) -> None:
    """P4: weights, moments, averages, every lane, counters beyond 32 bits, skipped updates; extras are plain JSON.

    Embedding and head have rows that pad the vocabulary."""
    config = replace(config, model=replace(config.model, vocab_multiple_of=64))
    saved = run_ranks(_save, 2, config)
    expected, lanes = saved[0][0], saved[0][1] | saved[1][1]
    assert set(lanes) == set(range(5)) and {name.split(".")[0] for name in expected} == {"model", "optimizer", "ema-7"}
    assert not torch.equal(expected["model.text_head.weight"], expected["ema-7.text_head.weight"])
    for world_size in (1, 3):
        for tensors, lane_states, progress, nonfinite in run_ranks(_load, world_size, config):
            assert tensors.keys() == expected.keys()
            assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())
            assert lane_states == lanes
            assert progress == Progress(step=3, tokens_seen=2**40, images_seen=77) and nonfinite[:3] == [1, 0, 2]
    folder = Path(config.run_dir) / "checkpoints" / "step-00000003"
    assert json.loads((folder / "meta.json").read_text())["progress"]["step"] == 3
    assert load_config(PretrainConfig, [f"config={folder / 'config.yaml'}"]) == config


def test_an_ema_may_be_added_or_dropped_on_resume_and_a_new_one_begins_at_the_weights(config: PretrainConfig) -> None:
    run_ranks(_save, 1, config)
    both, other = (replace(config, optim=replace(config.optim, ema_half_lives=kept)) for kept in ((7, 50), (50,)))
    (as_saved, *_), (extended, *_), (exchanged, *_) = (run_ranks(_load, 1, c)[0] for c in (config, both, other))
    kept = {name: tensor for name, tensor in as_saved.items() if not name.startswith("ema-7.")}
    weights = {name.removeprefix("model."): tensor for name, tensor in kept.items() if name.startswith("model.")}
    begun = {f"ema-50.{name}": tensor for name, tensor in weights.items()}
    for found, expected in ((extended, as_saved | begun), (exchanged, kept | begun)):
        assert found.keys() == expected.keys()
        assert [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)] == []


def test_what_a_resume_compares_is_spelled_as_it_always_was(config: PretrainConfig) -> None:
    """P4: as text, with what another version of the trainer or of Python wrote; some of it is a dataclass's repr."""
    expected = {
        "seed": "0",
        "order": "OrderConfig(caption_first=0.8, caption_dropout=0.1)",
        "special": "SpecialIds(bos=1, eos=2, boi=4, eoi=5, pad=3)",
        "model.transformer.kv_heads": "None",
        "model.transformer.norm_eps": "1e-05",
        "model.transformer.qk_norm": "False",
        "model.transformer.rope_theta": "10000.0",
    }
    data = open_data(config.data, config.seed, config.model.patch_size)
    found = fingerprint(config, data, 9)
    assert {name: found.get(name) for name in expected} == expected
    padded = fingerprint(replace(config, model=replace(config.model, vocab_multiple_of=64)), data, 9)
    assert padded == found | {"model.vocab_multiple_of": "64"}
    assert {name for name in found if name.startswith("diffusion.")} == {
        "diffusion.num_timesteps",
        "diffusion.prediction",
    }


def test_another_meaning_of_timesteps_is_found_but_not_another_loss(config: PretrainConfig) -> None:
    v = replace(config, diffusion=DiffusionConfig(prediction="v"))
    flow = replace(config, diffusion=DiffusionConfig(prediction="v", schedule="flow", shift=3.0, loss="x0"))
    said = differences(meaning(v), meaning(flow))
    assert sorted(said.values()) == [
        "diffusion.schedule was cosine, is flow",
        "diffusion.shift was 1.0, is 3.0",
    ]


def test_a_checkpoint_older_than_padding_and_auto_loads_as_it_is(config: PretrainConfig) -> None:
    """P4: neither its config nor what a resume compares knows `vocab_multiple_of`; its weights have no such rows."""
    ((expected, *_),) = run_ranks(_save, 1, config)
    folder = Path(config.run_dir) / "checkpoints" / "step-00000003"
    assert "vocab_multiple_of" not in json.loads((folder / "meta.json").read_text())["fingerprint"]
    text = (folder / "config.yaml").read_text()
    old = "".join(line for line in text.splitlines(True) if "vocab_multiple_of" not in line)
    assert len(old) < len(text)
    (Path(config.run_dir) / "old.yaml").write_text(
        old.replace("activation_checkpointing: auto", "activation_checkpointing: none")
    )
    again = read_config(Path(config.run_dir) / "old.yaml")
    ((tensors, *_),) = run_ranks(_load, 1, again)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())


def _refusals(ranks: Ranks, config: PretrainConfig, changed: list[PretrainConfig]) -> list[str]:
    _save(ranks, config)
    messages = []
    for other in changed:
        with pytest.raises(ValueError) as refusal:
            _load(ranks, other)
        messages.append(str(refusal.value))
    return messages


def test_a_checkpoint_of_another_recipe_is_refused_by_name_on_every_rank(config: PretrainConfig) -> None:
    """P10: all that changed in one message; what only costs memory or speed may change."""
    model = config.model
    wide = replace(model, transformer=replace(model.transformer, width=64, qk_norm=True), latent_channels=4)
    wide = replace(wide, vocab_multiple_of=8)
    changed = {
        ("seed was 0, is 9", "or start another run with these weights: init_from="): replace(config, seed=9),
        (
            "Restore what it was, or start another run: another run_dir. (Learning rate",
            "width was 32, is 64",
            "qk_norm was False, is True",
            "model.vocab_multiple_of was 1, is 8",
            "latent_channels was 2, is 4",
        ): replace(config, model=wide),
        ("optim.optimizer was adamw, is muon", "optim.state_dtype was float32, is bfloat16"): replace(
            config, optim=replace(config.optim, optimizer="muon", state_dtype="bfloat16")
        ),
    }
    for of_rank in run_ranks(_refusals, 2, config, list(changed.values())):
        for message, words in zip(of_rank, changed, strict=True):
            assert [word for word in words if word not in message] == [], message
    data = open_data(config.data, config.seed, model.patch_size)
    free = replace(
        config,
        model=replace(model, text_loss_chunk=7),
        micro_batch_size=1,
        data=replace(config.data, num_workers=3, prefetch_steps=5, max_bad_documents=1),
    )
    assert fingerprint(free, open_data(free.data, free.seed, model.patch_size), 9) == fingerprint(config, data, 9)
