"""Measured speeds predict a step on many GPUs: closed forms, and refusals of what is not a measurement (P10)."""

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from data.dataset import DataConfig
from model.transformer import TransformerConfig
from model.transfusion import TransfusionConfig
from train.distributed.parallelize import ParallelConfig
from train.flops import Counts, Flops
from train.plan import main as plan
from train.planning.estimate import parameters
from train.planning.kernels import Kernels, Speeds
from train.planning.prediction import GATHERED_BYTES, GRADIENT_BYTES, compute_seconds, exposed_seconds
from train.planning.rehearsal import Collective, planned_model
from train.pretrain_config import PretrainConfig

VOCAB, PARAMETERS = 2000, 7_000_000
TRUNK = TransformerConfig(width=128, layers=3, heads=4)
CONFIG = PretrainConfig(
    run_dir="",
    model=TransfusionConfig(transformer=TRUNK),
    data=DataConfig(tokenizer="", lanes=64, sequence_length=1024),
    micro_batch_size=4,
)
MODEL = planned_model(CONFIG, VOCAB)
TOTAL = parameters(MODEL)["total"]
NOTHING = dict.fromkeys((field.name for field in fields(Speeds)), 0.0)
TEXTS = Counts(tokens=1024, pairs=1024 * 50.5, text_targets=1024 * 0.99)  # of a sequence of documents of 100 tokens
SMALL = [
    *(f"vocab_size={VOCAB}", "model.transformer.width=128", "model.transformer.layers=3", "model.transformer.heads=4"),
    *("world_size=2", "data.lanes=16", "data.sequence_length=1024", "micro_batch_size=4", "gpu=h200"),
]


def case(speeds: Speeds, width: int = 128, **changes: Any) -> dict[str, Any]:
    """Return a measured step of which each part took what `speeds` say."""
    trunk = {"width": width, "layers": 3, "heads": 4}
    flops = Flops.of(TransfusionConfig(transformer=TransformerConfig(**trunk)), VOCAB)
    counts = {"tokens": 4096.0, "text_targets": 3000.0, "latent_cells": 5000.0, "attention_flops": 1e9}
    taken = {
        "gemm": speeds.product * (flops.per_token * 4096 + flops.per_latent_cell * 5000),
        "attention": speeds.attention * 1e9,
        "cross_entropy": speeds.text_head * flops.per_text_target * 3000,
        "convolution": speeds.convolution * 5000,
        "elementwise": speeds.element * 4096 * 3 * width * 0.7,
        "mask": speeds.element * 4096 * 3 * width * 0.1,
        "data": 0.0,
        "copies": speeds.element * 4096 * 3 * width * 0.2,
        "optimizer": speeds.optimizer * PARAMETERS,
        "fsdp": 0.0,
    }
    busy = sum(taken.values())
    return {
        "patches": "linear",
        "text_only": False,
        "transformer": trunk,
        "vocab_size": VOCAB,
        "activation_checkpointing": "none",
        "compiled": True,
        "parameters": PARAMETERS,
        "counts": counts,
        "breakdown_ms": {kind: 1e3 * seconds for kind, seconds in taken.items()} | {"idle": 9e9},
        "step_s": busy / (1 - speeds.idle),
        "ceiling": {"copy_gb_per_s": 1e-9 / speeds.copied_byte},
    } | changes


SPEEDS = Speeds(
    product=2e-12, attention=4e-12, text_head=3e-12, convolution=1e-9, element=1e-9, optimizer=1e-8, copied_byte=5e-13,
    idle=0.1,
)  # fmt: skip


def record(path: Path, *cases: dict[str, Any], **changes: Any) -> Path:
    named = {f"case {number}": one for number, one in enumerate(cases)}
    path.write_text(
        json.dumps({"bench": "gpu", "device": "NVIDIA H200", "device_type": "cuda", "cases": named} | changes)
    )
    return path


def test_a_record_says_what_each_part_of_a_step_costs(tmp_path: Path) -> None:
    text = case(SPEEDS, text_only=True, breakdown_ms={})  # is not read
    found = Kernels.read(record(tmp_path / "a.json", case(SPEEDS), text, {"images_per_s": 3.0}))
    assert found.device == "NVIDIA H200"
    assert vars(found.at("linear", 128)) == pytest.approx(vars(SPEEDS))


def test_speeds_between_two_widths_are_interpolated_and_beyond_them_the_nearest(tmp_path: Path) -> None:
    fast = replace(SPEEDS, product=1e-12)
    found = Kernels.read(record(tmp_path / "a.json", case(fast, width=2048), case(SPEEDS, width=512)))
    assert found.at("linear", 1024).product == pytest.approx(1.5e-12)
    assert found.at("linear", 64).product == pytest.approx(2e-12)
    assert found.at("linear", 9000).product == pytest.approx(1e-12)


@pytest.mark.parametrize("name", [field.name for field in fields(Speeds) if field.name != "idle"])
def test_a_step_costs_what_its_parts_cost(name: str) -> None:
    """Closed forms on 8 GPUs: 8 lanes a rank in 2 micro-steps, 50.5 pairs and 0.99 targets a token.

    Clean images are decoded as others are, and padding takes part in all but attention and the text head.
    """
    tokens, flops = 8 * 1024, Flops.of(CONFIG.model, VOCAB)
    cells = replace(TEXTS, tokens=1000, noised_cells=1024 * 0.3, clean_cells=1024 * 0.1)
    expected = {
        "product": tokens * flops.per_token,
        "attention": tokens * flops.per_pair * 50.5,
        "text_head": tokens * flops.per_text_target * 0.99,
        "convolution": tokens * 0.4,
        "element": tokens * 3 * 128,
        "optimizer": TOTAL / 8,
        "copied_byte": (GATHERED_BYTES + GRADIENT_BYTES) * TOTAL * 2,
    }
    sequence = cells if name == "convolution" else TEXTS
    speeds = Speeds(**{**NOTHING, name: 1e-12})
    assert compute_seconds(CONFIG, MODEL, 8, sequence, speeds) == pytest.approx(1e-12 * expected[name])
    half_idle = replace(speeds, idle=0.5)
    assert compute_seconds(CONFIG, MODEL, 8, sequence, half_idle) == pytest.approx(2e-12 * expected[name])


def test_recomputation_and_replicas_cost_more() -> None:
    full = replace(CONFIG, parallel=ParallelConfig(activation_checkpointing="full", dp_replicate=2))
    products, updates = (Speeds(**{**NOTHING, name: 1.0}) for name in ("product", "optimizer"))
    again = compute_seconds(full, MODEL, 8, TEXTS, products)
    assert 1.2 < again / compute_seconds(CONFIG, MODEL, 8, TEXTS, products) <= 4 / 3
    assert compute_seconds(full, MODEL, 8, TEXTS, updates) == pytest.approx(TOTAL * 2 / 8)


def test_communication_is_exposed_at_the_ends_and_where_it_is_longer_than_compute() -> None:
    """8 ranks of one machine at 1 GB/s: 7/8 of the bytes; forward is a third of the compute."""

    def exposed(forward_s: float, backward_s: float, compute_s: float) -> float:
        ranks = tuple(range(8))
        size = {"forward": forward_s, "backward": backward_s}
        sent = {Collective(phase, "all_gather", ranks): 8 / 7 * 1e9 * seconds for phase, seconds in size.items()}
        return exposed_seconds(sent, compute_s, 10, 8, 1.0, 1.0)

    assert exposed(1, 2, 30) == pytest.approx(0.1 + 0.2)  # one block of ten, of each phase
    assert exposed(15, 2, 30) == pytest.approx(15 - 10 + 0.2)
    assert exposed(1, 50, 30) == pytest.approx(0.1 + 50 - 20)


@pytest.mark.slow
def test_a_plan_with_measured_kernels_has_a_row_for_each_number_of_gpus(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    arguments = [*SMALL, f"kernels={record(tmp_path / 'a.json', case(SPEEDS))}"]
    plan([*arguments, "json=true"])
    found = json.loads(capsys.readouterr().out)
    rows = found["predicted"]
    assert [row["gpus"] for row in rows] == [2, 8, 16] and found["kernels_of"] == "NVIDIA H200"  # of 16 lanes
    assert {row["activation_checkpointing"] for row in rows} == {"none"}
    assert [(row["rows"], row["micro_steps"]) for row in rows] == [(4, 2), (2, 1), (1, 1)]
    assert rows[0]["efficiency"] == 1 > rows[2]["efficiency"] and all(row["fits"] for row in rows)
    assert found["step_s"] == rows[0]["step_s"] and found["days"] == rows[0]["days"]
    for row in rows:
        assert row["step_s"] == pytest.approx(row["compute_s"] + row["exposed_communication_s"])
        assert row["tokens_per_s"] == pytest.approx(16 * 1024 / row["step_s"])
        assert row["mfu"] == pytest.approx(found["step_tflop"] / row["step_s"] / row["gpus"] / 989)
    plan([*arguments, "network_gb_per_s=0.1"])  # 16 GPUs are two machines
    printed = capsys.readouterr().out
    assert (
        "predicted from what one NVIDIA H200 reached" in printed and "GPU-hours" in printed and "MFU of" not in printed
    )


@pytest.mark.parametrize(
    ("changes", "arguments", "words"),
    [
        ({"bench": "sampling"}, [], "is a record of 'sampling': expected one of bench/gpu.py"),
        ({"device_type": "cpu"}, [], "smoke run on a CPU"),
        ({}, ["gpu=h100"], "was measured on NVIDIA H200, but gpu=h100 is planned"),
        ({}, ["device=cpu"], "but device=cpu is planned"),
        ({}, ["model.patches=unet"], "nothing was measured with model.patches=unet, only with linear"),
    ],
)
def test_a_record_that_says_nothing_of_the_planned_run_is_refused(
    tmp_path: Path, changes: dict[str, Any], arguments: list[str], words: str
) -> None:
    path = record(tmp_path / "a.json", case(SPEEDS), **changes)
    with pytest.raises(ValueError, match=words):
        plan([*SMALL, f"kernels={path}", *arguments])


def test_a_file_that_is_no_record_is_refused(tmp_path: Path) -> None:
    for content in ("# a table", "[1]"):
        (tmp_path / "a").write_text(content)
        with pytest.raises(ValueError, match=r"expected (a record|one) of bench/gpu\.py"):
            Kernels.read(tmp_path / "a")
    with pytest.raises(ValueError, match=r"kernels=.*none cannot be read \(No such file.*gpu\.sh writes one"):
        Kernels.read(tmp_path / "none")
