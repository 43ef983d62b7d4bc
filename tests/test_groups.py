"""Parts that are frozen or trained in another way: what is updated, what is stored, and where the rest comes from."""

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.step import sharded_model
from data.tokenizer import Tokenizer
from model.transformer import TransformerConfig
from model.transfusion import Transfusion, TransfusionConfig
from tests.one_by_one import batch_of, handmade, step_on
from tests.ranks import run_ranks
from tests.runs import finish, numbers, settings
from train.checkpoints import checkpoint
from train.distributed.parallelize import gather_weights
from train.distributed.ranks import Ranks, alone
from train.inference.saved_model import LoadedModel
from train.optim.groups import GroupConfig, resolve
from train.optim.guard import GuardConfig
from train.optim.optimizer import OptimConfig, Optimizer

TINY = TransfusionConfig(
    transformer=TransformerConfig(width=16, layers=2, heads=2, ffn_hidden=24), latent_channels=2, untied="all"
)
LMFUSION = {
    "images": GroupConfig(parameters=("*.image.*", "*.image_norm.*", "patches.*")),
    "text": GroupConfig(parameters=("*",), frozen=True),
}
FROZEN_TEXT = (
    "optim.groups={images: {parameters: ['*.image.*', '*.image_norm.*', 'patches.*']}, "
    "text: {parameters: ['*'], frozen: true}}"
)


def names() -> list[str]:
    with torch.device("meta"):
        return [name for name, _ in Transfusion(TINY, 9).named_parameters()]


def test_the_first_group_that_matches_takes_a_parameter() -> None:
    groups = {"head": GroupConfig(parameters=("text_head.*",), lr_scale=0.5), **LMFUSION}
    found = {name: group.name for name, group in resolve(names(), groups).items()}
    assert found["text_head.weight"] == "head" and found["text_embedding.weight"] == "text"
    assert found["transformer.blocks.1.image.ffn.down.weight"] == found["patches.to_patch.weight"] == "images"
    assert found["transformer.blocks.1.ffn.down.weight"] == found["transformer.norm.weight"] == "text"


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        ({"a": GroupConfig(parameters=("transformer.block.*",))}, 'optim.groups.a.parameters: "transformer.block.*"'),
        ({**LMFUSION, "late": GroupConfig(parameters=("patches.*",))}, "optim.groups.late: earlier groups (images)"),
        ({"all": GroupConfig(parameters=("*",), frozen=True)}, "every parameter is frozen"),
        ({"(others)": GroupConfig(parameters=("text_*",))}, "optim.groups: (others) stands for what no group matches"),
    ],
)
def test_senseless_groups_are_refused(groups: dict[str, GroupConfig], words: str) -> None:
    with pytest.raises(ValueError) as refusal:
        resolve(names(), groups)
    assert words in str(refusal.value)


def _updates(ranks: Ranks, optimizer: str) -> tuple[dict[str, torch.Tensor], ...]:
    """Return the weights before and after two updates with made-up gradients, and those gradients."""
    groups = {
        "slow": GroupConfig(parameters=("*.ffn.*",), lr_scale=0.25, weight_decay=0.3),
        "still": GroupConfig(parameters=("*.attention.*", "text_embedding.*"), frozen=True),
    }
    model = sharded_model(TINY, 9, ranks, groups=groups)
    config = OptimConfig(optimizer=optimizer, groups=groups, warmup_steps=0, clip_norm=1e9)
    of_run = Optimizer(model, config, GuardConfig())
    before = gather_weights(dict(model.named_parameters()))
    for step in (1, 2):
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.grad = torch.full_like(parameter, 0.1 * step + len(name) / 100)
        of_run.update(step)
    return before, gather_weights(dict(model.named_parameters()))


@pytest.mark.parametrize("world_size", [1, 2])
def test_rates_and_decays_are_adamws_by_hand(world_size: int) -> None:
    before, after = run_ranks(_updates, world_size, "adamw")[0]
    rate, config = 3e-4, OptimConfig(warmup_steps=0)
    for name, weight in before.items():
        frozen = ".attention." in name or name.startswith("text_embedding")
        scale, decay = (0.25, 0.3) if ".ffn." in name else (1.0, 0.1)
        expected, m, v = weight.clone(), 0.0, 0.0
        for step in (1, 2):
            grad = 0.1 * step + len(name) / 100
            m, v = 0.9 * m + 0.1 * grad, 0.95 * v + 0.05 * grad**2
            if weight.ndim > 1:
                expected *= 1 - rate * scale * decay
            expected -= rate * scale * (m / (1 - 0.9**step)) / ((v / (1 - 0.95**step)) ** 0.5 + config.eps)
        assert torch.allclose(after[name], weight if frozen else expected, rtol=0, atol=1e-7), name
        assert torch.equal(after[name], weight) == frozen, name


def test_muon_knows_groups_on_any_number_of_ranks() -> None:
    (before, alone_), (_, of_two) = (run_ranks(_updates, ranks, "muon")[0] for ranks in (1, 2))
    for name, weight in alone_.items():
        assert torch.allclose(weight, of_two[name], atol=1e-6), name
        frozen = ".attention." in name or name.startswith("text_embedding")
        assert torch.equal(weight, before[name]) == frozen, name


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer, sources: dict[str, Path]) -> Path:
    """A dense run of two steps."""
    folder = tmp_path_factory.mktemp("base") / "run"
    finish(settings(folder, tokenizer, sources, optim__steps=2), None)
    return folder


@pytest.fixture
def frozen_run(base: Path, tokenizer: Tokenizer, sources: dict[str, Path]) -> Callable[..., list[str]]:
    def arguments(run_dir: Path, **changes: object) -> list[str]:
        given = {"init_from": base, "model__untied": "all", "optim__ema_half_lives": "[3]", "optim__steps": 6}
        return [*settings(run_dir, tokenizer, sources, **{**given, **changes}), FROZEN_TEXT]

    return arguments


def text_logits(loaded: LoadedModel) -> torch.Tensor:
    ids = torch.arange(5, 25)[None]
    mask = torch.ones(1, 1, 20, 20).tril().bool()
    no_grid = torch.full((1, 20, 2), -1)
    with torch.no_grad():
        h = loaded.model.embed_text(ids)
        return loaded.model.text_logits(loaded.model.trunk(h, torch.arange(20)[None], no_grid, mask, None, "text"))


def test_pictures_learn_beside_a_frozen_text_side(
    frozen_run: Callable[..., list[str]], base: Path, tmp_path: Path
) -> None:
    """LMFusion's recipe: text logits keep their bits, checkpoints hold what is trained, exports hold all of it."""
    finish(frozen_run(tmp_path / "run"), 2)
    start, end = LoadedModel.load(base, alone()), LoadedModel.load(tmp_path / "run", alone(), "model")
    assert torch.equal(text_logits(start), text_logits(end))
    before, after = (dict(loaded.model.named_parameters()) for loaded in (start, end))
    for name, weight in after.items():
        of_text = name.replace(".image.", ".").replace(".image_norm.", ".norm.")
        is_images = of_text != name or name.startswith("patches.")
        assert torch.equal(weight, before[of_text]) != is_images, name  # images began as copies, and have learnt
    newest = checkpoint.saved(tmp_path / "run" / "checkpoints")[-1]
    stored = checkpoint.tensors(newest, "model")
    assert stored == {name for name in after if ".image" in name or name.startswith("patches.")}
    assert checkpoint.tensors(newest, "ema-3") == stored
    groups = {row["group"]: (row["frozen"], row["tensors"]) for row in checkpoint.meta_of(newest)["groups"]}
    assert groups == {"images": (False, len(stored)), "text": (True, len(after) - len(stored))}
    averaged = LoadedModel.load(tmp_path / "run", alone(), "ema-3")
    assert torch.equal(text_logits(start), text_logits(averaged))
    assert not torch.equal(averaged.model.patches.to_patch.weight, after["patches.to_patch.weight"])


@pytest.mark.parametrize(("ranks", "replicas"), [(2, 1), pytest.param(4, 2, marks=pytest.mark.slow)])
def test_p4_a_partly_frozen_run_resumes_to_the_bit_and_on_other_meshes(
    ranks: int, replicas: int, frozen_run: Callable[..., list[str]], tmp_path: Path
) -> None:
    finish(frozen_run(tmp_path / "run", checkpoint__interval_steps=3), 2)
    whole = numbers(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000006")
    finish(frozen_run(tmp_path / "run", parallel__dp_replicate=replicas), ranks)
    for ours, theirs in zip(numbers(tmp_path / "run"), whole, strict=True):
        assert ours == (theirs if ranks == 2 else pytest.approx(theirs, rel=1e-5))


def test_where_frozen_parameters_come_from_is_pinned(
    frozen_run: Callable[..., list[str]], base: Path, tmp_path: Path
) -> None:
    moved, run = tmp_path / "moved", tmp_path / "run"
    shutil.copytree(base, tmp_path / "base")
    finish(frozen_run(run, init_from=tmp_path / "base", optim__steps=2), None)
    (tmp_path / "base").rename(moved)
    with pytest.raises(FileNotFoundError, match="say where it is now: base=PATH"):
        LoadedModel.load(run, alone())
    assert LoadedModel.load(run, alone(), base=str(moved)).saved.step == 2
    assert "from" in finish(frozen_run(run, init_from=moved, optim__steps=3), None)
    with pytest.raises(ValueError, match="frozen parameters came from"):
        LoadedModel.load(run, alone(), base=str(run))
    all_free = [argument for argument in frozen_run(run, optim__steps=4) if not argument.startswith("optim.groups")]
    output = finish(all_free, None, status=2)
    assert "optim.frozen was" in output and "Restore optim.groups" in output


def _reductions(ranks: Ranks) -> dict[str, int]:
    """Return how often FSDP reduces gradients in a backward pass, with all blocks trained and with frozen ones."""
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group

    reduce, calls = _fsdp_param_group.foreach_reduce, Counter[str]()
    for name, frozen in (("trained", False), ("frozen", True)):
        groups = {"still": GroupConfig(parameters=("transformer.blocks.*",), frozen=frozen)}
        of = TransfusionConfig(transformer=TINY.transformer, latent_channels=2)
        model = sharded_model(of, 300, ranks, groups=groups)

        def counted(*args: Any, name: str = name, **settings: Any) -> Any:
            calls[name] += 1
            return reduce(*args, **settings)

        _fsdp_param_group.foreach_reduce = counted
        step_on(model, batch_of(*handmade(), [[0, 1, 2], [3, 4, 5]], length=96)).total.backward()
    return dict(calls)


def test_a_frozen_block_reduces_nothing() -> None:
    found = run_ranks(_reductions, 2)[0]
    assert found == {"trained": 3, "frozen": 1}  # two blocks and the rest; the rest


def test_a_run_goes_back_although_the_run_that_it_started_from_has_gone_on(
    frozen_run: Callable[..., list[str]], base: Path, tmp_path: Path, tokenizer: Tokenizer, sources: dict[str, Path]
) -> None:
    """Its frozen parameters are those of the checkpoint that it started from, while that is kept."""
    shutil.copytree(base, tmp_path / "base")
    first = frozen_run(tmp_path / "run", init_from=tmp_path / "base", optim__steps=2, checkpoint__interval_steps=1)
    finish(first, None)
    before = LoadedModel.load(tmp_path / "run", alone(), "model")
    finish(settings(tmp_path / "base", tokenizer, sources, optim__steps=3), None)
    assert "going back" in finish([*first, "resume=1"], None)
    after = LoadedModel.load(tmp_path / "run", alone(), "model")
    found = dict(after.model.named_parameters())
    assert all(torch.equal(found[name], weight) for name, weight in before.model.named_parameters())
