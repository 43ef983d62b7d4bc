"""A plan says whether a run fits, what would make it fit, and how long it takes; nonsense is refused (P10)."""

import json
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data.arrangement import OrderConfig
from data.dataset import DataConfig, open_data
from data.loader import Loader
from data.tokenizer import Tokenizer
from model.diffusion import DiffusionConfig
from tests.damage import garble
from tests.sources import data_config, make_source, pairs
from train.distributed.parallelize import ParallelConfig
from train.flops import Flops
from train.hardware import GPUS, find
from train.plan import main as plan
from train.planning.average_sequence import average_sequence
from train.planning.estimate import (
    GIB,
    communication_seconds,
    rows_per_rank,
)
from train.planning.rehearsal import Collective
from train.planning.suggestions import cheapest_fit
from train.pretrain_config import PretrainConfig

PAPER = Path(__file__).parents[1] / "configs" / "paper"
SMALL = [
    *("vocab_size=2000", "model.transformer.width=128", "model.transformer.layers=3", "model.transformer.heads=4"),
    *("world_size=2", "data.lanes=16", "data.sequence_length=1024", "micro_batch_size=4"),
]


def planned(capsys: pytest.CaptureFixture, *argv: str) -> dict:
    plan([*argv, "json=true"])
    return json.loads(capsys.readouterr().out)


def test_the_7b_model_fits_256_gpus_and_the_numbers_agree_with_common_sense(capsys: pytest.CaptureFixture) -> None:
    """16 bytes a parameter over all ranks, 6 FLOPs a weight and token, days as GPU-hours / GPUs / 24."""
    found = planned(capsys, f"config={PAPER / '7b.yaml'}", "world_size=256", "gpu=h200")
    total = found["parameters"]["total"]
    assert found["fits"] and 30 < found["peak_memory_gib"] < 60 and found["activation_checkpointing"] == "none"
    assert sum(found["states_gib"].values()) == pytest.approx(16 * total / 256 / GIB, rel=0.01)
    assert found["checkpoint_gib"] == pytest.approx(12 * total / GIB, rel=0.001)
    weights = total - found["parameters"]["embeddings"]
    assert found["step_tflop"] * 1e12 / found["tokens_a_step"] == pytest.approx(6 * weights, rel=0.1)
    assert found["days"] == pytest.approx(found["gpu_hours"] / 256 / 24)
    assert found["tokens"] == pytest.approx(found["tokens_per_s"] * 86_400 * found["days"])
    assert 0.05 < found["communication_share_of_compute"] < 0.5


def test_what_is_recomputed_takes_time_and_is_no_model_flop(capsys: pytest.CaptureFixture) -> None:
    """Of four products of a block, forward once and backward twice, `full` repeats all but the last, and attention."""
    once, again = (planned(capsys, *SMALL, f"parallel.activation_checkpointing={level}") for level in ("none", "full"))
    assert again["step_tflop"] == once["step_tflop"] and not once["recomputed_tflop"]
    longer = again["compute_s_a_step"] / once["compute_s_a_step"]
    assert longer == pytest.approx(1 + again["recomputed_tflop"] / again["step_tflop"]) and 1.1 < longer < 4 / 3


def test_the_plan_in_words_reads_at_a_glance(capsys: pytest.CaptureFixture) -> None:
    plan([*SMALL, "gpu=a100"])
    printed = capsys.readouterr().out
    for words in (
        *("total", "embeddings", "blocks", "patches", "heads", "activations", "█", "in all: fits", "host memory"),
        *("16,384 tokens: 16 sequences of 1024; micro-steps per rank: 2", "MFU", "tokens/s", "GPU-hours"),
        "4.1B tokens",
    ):
        assert words in printed, words
    assert max(map(len, printed.splitlines())) < 200


def test_a_plan_of_pixels_counts_their_bytes(
    tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture
) -> None:
    """By the data or, without it, for the paper's pictures."""
    with pytest.raises(ValueError, match=r"vae=pixels and model\.latent_channels=8: expected 3 channels"):
        planned(capsys, *SMALL, "model.latent_channels=8", "vae=pixels")
    changes = ["model.latent_channels=3", "model.patch_size=16", "vae=pixels"]
    found = planned(capsys, *SMALL, *changes)
    assert found["data_from"].endswith("the paper's mix of text and pictures of 256x256 pixels is assumed")
    loaders = {}
    for kind in ("latents", "pixels"):
        images = pairs(40, grids=[(64, 64)], channels=3, kind=kind)
        folder = make_source(tmp_path / kind, tokenizer, images, kind=kind)
        named = [f"data.sources.images.path={folder}", f"data.tokenizer={tokenizer.path}", "vocab_size=null"]
        of = planned(capsys, *SMALL, *changes, *named)
        assert of["data_from"] == "as in the first sequences of the data"
        loaders[kind] = of["host_memory_gib"]["loader"]
    assert 0.6 < loaders["pixels"] / loaders["latents"] < 0.85  # 1 byte and 4 of noise, against 2 and 4


def test_what_would_make_it_fit_does(capsys: pytest.CaptureFixture) -> None:
    """The switches it names are arguments of its own."""
    shallow = [*SMALL, "model.transformer.layers=1", "data.lanes=8", "parallel.activation_checkpointing=none"]
    small = planned(capsys, *shallow)["peak_memory_gib"] * 0.8 + 1.5 / (1 - 0.05)
    found = planned(capsys, *shallow, f"memory_gib={small}")
    assert not found["fits"] and found["would_fit_with"]
    again = planned(capsys, *shallow, f"memory_gib={small}", *found["would_fit_with"])
    assert again["fits"] and again["peak_memory_gib"] <= found["usable_memory_gib"]


def test_auto_is_the_cheapest_recomputation_that_fits_and_says_why(capsys: pytest.CaptureFixture) -> None:
    """In JSON and in words; a kind that is set stays, though a cheaper one fits. (tests/test_fit.py has the rule.)"""
    one = [*SMALL, "model.transformer.layers=1", "data.lanes=8"]
    none, full = planned(capsys, *one), planned(capsys, *one, "parallel.activation_checkpointing=full")
    assert [(plan["activation_checkpointing"], plan["fits"]) for plan in (none, full)] == [
        ("none", True),
        ("full", True),
    ]
    assert full["activation_checkpointing_because"] == "as set"
    plan([*one, f"memory_gib={(full['peak_memory_gib'] + 1e-3 + 1.5) / 0.95}"])
    chosen = f"recomputed in backward: full (the largest step takes {full['peak_memory_gib']:.2f} of "
    printed = capsys.readouterr().out
    assert chosen in printed and f"; none {none['peak_memory_gib']:.2f}, selective " in printed and "fits" in printed


def test_switches_are_tried_in_the_order_of_what_they_cost() -> None:
    """A smaller micro-batch before recomputation, both before more ranks; nothing where nothing helps."""
    config = PretrainConfig(run_dir="", micro_batch_size=4, parallel=ParallelConfig(activation_checkpointing="none"))

    def selective_or_small(config: PretrainConfig, _: int) -> bool:
        return config.parallel.activation_checkpointing != "none" or config.micro_batch_size == 1

    def both(config: PretrainConfig, _: int) -> bool:
        return config.parallel.activation_checkpointing != "none" and config.micro_batch_size <= 2

    assert cheapest_fit(config, 8, selective_or_small) == ["micro_batch_size=1"]
    assert cheapest_fit(config, 8, both) == ["micro_batch_size=2", "parallel.activation_checkpointing=selective"]
    assert cheapest_fit(config, 8, lambda _, ranks: ranks >= 32) == ["world_size=32"]
    assert cheapest_fit(config, 8, lambda *_: False) is None
    kept = replace(config, parallel=replace(config.parallel, reshard_after_forward=False))
    resharded = ["parallel.reshard_after_forward=true"]
    assert cheapest_fit(kept, 8, lambda c, _: c.parallel.reshard_after_forward is True) == resharded


def test_with_the_data_at_hand_its_grids_and_lengths_count(
    capsys: pytest.CaptureFixture, tokenizer: Tokenizer, pairs_folder: Path
) -> None:
    arguments = [
        *(f"data.tokenizer={tokenizer.path}", f"data.sources.pairs.path={pairs_folder}", "device=cpu"),
        *("data.lanes=4", "data.sequence_length=64", "model.latent_channels=2", "world_size=2"),
        *("model.transformer.width=32", "model.transformer.layers=2", "model.transformer.heads=2"),
    ]
    found = planned(capsys, *arguments)
    assert found["data_from"].startswith("as in the first sequences") and found["vocab_size"] == tokenizer.vocab_size
    assert found["host_memory_gib"]["loader"] > 0
    assert "days" not in found  # of a CPU no speed is known
    assert found["usable_memory_gib"] == found["device_memory_gib"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["gpu=h9000"], "gpu=h9000: expected one of .*h200"),
        (["world_size=600"], "world_size=600 is more than data.lanes=512"),
        (["world_size=0"], "world_size=0: expected more than 0"),
        (["mfu=1.5"], "mfu=1.5"),
        (["memory_gib=0"], "memory_gib=0"),
        (["parallel.dp_replicate=3"], "dp_replicate=3 on 8 ranks"),
    ],
)
def test_nonsense_is_refused(arguments: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        plan(["model.transformer.layers=1", *arguments])


def test_gpus_are_found_by_short_names_and_by_what_torch_calls_them() -> None:
    for name, expected in {
        "h200": "h200",
        "NVIDIA H200": "h200",
        "NVIDIA H100 80GB HBM3": "h100",
        "NVIDIA H100 PCIe": "h100 pcie",
        "NVIDIA GH200 480GB": "gh200",
        "a100-40g": "a100 40g",
        "NVIDIA A100-SXM4-40GB": "a100 40g",
        "NVIDIA A100 80GB PCIe": "a100",
        "NVIDIA B200": "b200",
        "NVIDIA L40S": "l40s",
        "NVIDIA GeForce RTX 4090": "4090",
    }.items():
        assert find(name).name == expected
    assert find("cpu") is None
    assert all(find(gpu.name) is gpu for gpu in GPUS)


def test_communication_takes_the_slower_of_links_and_network() -> None:
    """Closed forms: a ring in one machine; two whole machines; one rank of each of two machines."""

    def taken(name: str, ranks: tuple[int, ...]) -> float:
        return communication_seconds(Collective("forward", name, ranks), 8e9, 4, 100.0, 10.0)

    assert taken("all_gather", (0, 1, 2, 3)) == pytest.approx(8 * 3 / 4 / 100)
    assert taken("reduce_scatter", tuple(range(8))) == pytest.approx(max(8 * 7 / 8 / 100, 8 / 2 / (4 * 10)))
    assert taken("all_reduce", (0, 4)) == pytest.approx(2 * 8 / 2 / 10)


def test_an_average_sequence_is_that_of_the_steps_which_the_data_makes(
    tmp_path: Path, tokenizer: Tokenizer, pairs_folder: Path, texts_folder: Path
) -> None:
    """P9: the very counts and FLOPs of the first steps, with context and its dropout, copies, cuts, bad documents."""
    edits = [(image, words, image) for words, image in pairs(40, lengths=(2, 6))]
    folder = make_source(tmp_path / "edits", tokenizer, edits, roles=["context", "context", "target"])
    garble(folder, {0: [3]})
    order = OrderConfig(caption_first=0.4, text_dropout=0.2, image_dropout=0.2)
    sources = {"edits": folder, "pairs": pairs_folder, "texts": texts_folder}
    of = data_config(tokenizer, sources, clean_copies=True, order=order)
    config = PretrainConfig(run_dir="", data=of)
    data, model = open_data(of, 0, config.model.patch_size), config.model
    with closing(Loader(data, of, rank=0, world_size=1, micro_batch_size=2)) as loader:
        batches = [batch for _ in range(16) for batch in loader.next(30).micro_batches]
    found = average_sequence(config, data).times(64)
    assert found.tokens == sum(batch.input_ids.numel() - batch.num_padding for batch in batches)
    assert found.text_targets == sum(batch.num_text_targets for batch in batches)
    assert found.images == sum(batch.num_images for batch in batches)
    assert found.clean_images == sum(batch.num_clean_images for batch in batches) > found.images / 2
    for of_model in (model, replace(model, image_attention="causal")):
        flops = Flops.of(of_model, tokenizer.vocab_size, "full")
        expected = [sum(parts) for parts in zip(*map(flops.of_batch, batches), strict=True)]
        assert flops.of_counts(found) == pytest.approx(expected, rel=1e-12)


def test_without_the_data_the_papers_mix_is_laid_out_as_a_run_would(tokenizer: Tokenizer) -> None:
    """Closed forms: 0.5 of all tokens are patches; a fifth of the captions follow their picture and its copy."""
    of = DataConfig(tokenizer="", order=OrderConfig(caption_dropout=0.0))
    config = PretrainConfig(run_dir="", data=of)
    plain, copied = (average_sequence(replace(config, data=replace(of, clean_copies=x)), None) for x in (False, True))
    images = 0.5 * 4096 / 256
    assert plain.tokens == pytest.approx(4096) and plain.patches == pytest.approx(0.5 * 4096)
    assert (plain.images, plain.clean_images) == pytest.approx((images, 0))
    texts = (1 - images * (256 + 68) / 4096) * 4096 / 4096
    assert plain.text_targets == pytest.approx(images * 66 + texts * 4095)  # captions, BOI and EOS
    more = 1 + 0.2 * images * 256 / 4096
    assert copied.tokens == pytest.approx(4096) and copied.clean_images == pytest.approx(0.2 * images / more)


def test_rows_and_micro_steps_are_the_loaders(tokenizer: Tokenizer, pairs_folder: Path) -> None:
    for lanes, world_size, size in ((4, 1, 3), (4, 3, 8), (6, 2, 2)):
        config = data_config(tokenizer, {"pairs": pairs_folder}, lanes=lanes)
        loader = Loader(open_data(config, 0, 2), config, rank=0, world_size=world_size, micro_batch_size=size)
        planned = rows_per_rank(PretrainConfig(run_dir="", data=config, micro_batch_size=size), world_size)
        assert planned == (loader.micro_batch_size, loader.micro_steps)
        loader.close()


def test_a_plan_leaves_no_process_group_and_no_fake_tensor_behind(capsys: pytest.CaptureFixture) -> None:
    from train.step import noise_schedule

    planned(capsys, *SMALL)
    assert not torch.distributed.is_initialized()
    assert type(noise_schedule(DiffusionConfig(), 1, torch.device("cpu")).alphas) is torch.Tensor
