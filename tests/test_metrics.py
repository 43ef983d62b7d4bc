"""Numbers that mean what their names say (P9), and a logger that cannot stop training (P13)."""

import math
import socket
import time
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from data.lane_state import Cursor, LaneState
from data.packing import PackedBatch
from model.log_snr_bins import BINS
from tests.ranks import run_ranks
from train import hardware, metrics
from train.checkpoints.checkpoint import CheckpointConfig
from train.checkpoints.run_folder import RunFolder
from train.checkpoints.saver import Saver
from train.console import Console
from train.distributed.ranks import Ranks, alone
from train.distributed.signals import StopKind
from train.distributed.vote import Vote
from train.flops import Flops
from train.metrics import Interval
from train.next_batch import AgreedBatch
from train.run import Run
from train.state import Progress
from train.step import StepLoss


def _loss(text: float, image: float) -> StepLoss:
    x0_errors = torch.zeros(3, len(BINS), dtype=torch.float64)
    x0_errors[:2, 1:3] = torch.tensor([[2.0, 6.0], [1.0, 4.0]]) * image  # sums, counts
    by_group = torch.tensor([[0.75 * text, 0.25 * text], [0.0, image]], dtype=torch.float64)
    by_order = torch.tensor([0.25 * image, 0.75 * image], dtype=torch.float64)
    return StepLoss(torch.tensor(0.0), torch.tensor(text), torch.tensor(image), x0_errors, by_group, by_order)


def _vote(**counts: int) -> Vote:
    names = ("text_targets", "images", "tokens", "documents_skipped", "ranks_with_batch", "ranks_ended")
    names += ("ranks_write_failed", "ranks_data_failed")
    return Vote(**{**dict.fromkeys(names, 0), **counts}, stop=StopKind.NONE)


def _batch(slots: int, pairs: int) -> Any:
    """Two micro-batches of five rows, one of them idle, with 20 tokens, 5 text targets and 3 images of a patch, and one
    that is context.

    The rows shown are 2 tokens long, the second documents are of source b; the other 13 tokens are not shown.
    """
    document_ids = torch.tensor([[1, 2], [1, 0], [0, 0], [1, 1], [1, 1]])
    images = SimpleNamespace(
        num_valid=4,
        u=torch.zeros(4),
        before_caption=torch.tensor([False, True, True, False]),
        is_target=torch.tensor([True, True, True, False]),
    )
    micro_batch = PackedBatch.__new__(PackedBatch)
    vars(micro_batch).update(
        input_ids=torch.zeros(slots),
        document_ids=document_ids,
        group_ids=(document_ids == 2).long(),
        text_target_index=torch.tensor([0, 1, 2, 6, 7, 0]),
        image_token_index=torch.tensor([1, 6, 8, 0]),
        num_padding=slots - 20,
        num_attention_pairs=pairs,
        num_text_targets=5,
        num_images=3,
        images={(2, 2): images},
    )
    documents = {0: [(0, 0, 1), (1, 0, 1)], 3: [(1, 2, 3)]}
    return SimpleNamespace(micro_batches=[micro_batch, micro_batch], documents=documents)


def _two_rows(ranks: Ranks) -> list[dict]:
    """Two steps and a row, one step and a row, with other numbers on each rank."""
    flops = Flops(per_token=10.0, per_pair=1.0, per_text_target=100.0, per_latent_cell=1000.0, again_per_token=5.0)
    flops = replace(flops, bagel_per_token=20.0, bagel_per_square=3.0, per_encoded_cell=400.0)
    interval = Interval(flops, ranks, ["a", "b"], {"trunk": 100})
    interval.peak_flops = 1e6  # of a device that is not here
    mine = ranks.rank + 1
    states = {ranks.rank: LaneState(7, [Cursor(ranks.rank, 5, 0), Cursor(3, 0, 0)], [], {"not a tar": mine}, [], [])}
    rows = []
    for steps in (2, 1):
        for _ in range(steps):
            vote = _vote(text_targets=30, images=6, tokens=120, documents_skipped=4)
            losses = [_loss(10.0 * mine, 1.0 * mine), _loss(5.0, 0.0)]
            batch, lag = _batch(slots=50, pairs=7 * mine), abs(ranks.rank - 1)
            agreed = AgreedBatch(batch, vote, data_wait_s=0.0, peers_wait_s=lag)
            parts = {"trunk": torch.tensor([mine, 20.0, 0.01 * mine, 1.0 * mine], dtype=torch.float64)}
            interval.add(agreed, losses, torch.tensor(2.5), parts if steps == 2 else None)
        interval.checkpoint_s = interval.evaluation_s = 0.0
        rows.append(interval.row(states))
    return rows


def test_a_row_has_global_means_over_the_steps_since_the_last_and_is_the_same_on_every_rank() -> None:
    """P2, P9: sums over ranks by global counts, although ranks differ; nothing is carried into the next row."""
    of_ranks = run_ranks(_two_rows, 3)
    timed = {"tokens_per_s", "images_per_s", "step_s", "model_tflops_per_s_per_rank", "slowest_lag_share", "mfu", "hfu"}
    timed |= {"mfu_bagel", "slowest_host", "host_memory_gib", "time"}
    for first, second in of_ranks:
        for row, steps in ((first, 2), (second, 1)):
            assert {name: row[name] for name in row.keys() - timed} == pytest.approx(
                {
                    "interval_steps": steps,
                    "text_loss": 2.5,  # (10 + 20 + 30 + 3 * 5) / 30
                    "perplexity": math.exp(2.5),
                    "text_loss/a": 0.75 * 75 / 24,  # 4 of 5 targets, in 6 micro-batches
                    "perplexity/a": math.exp(0.75 * 75 / 24),
                    "text_loss/b": 0.25 * 75 / 6,
                    "perplexity/b": math.exp(0.25 * 75 / 6),
                    "image_loss/b": (1 + 2 + 3) / 6,
                    "image_loss/a": 0.0,
                    "image_loss_by_order/caption_first": 0.25,  # a quarter of 6, on one of 3 images
                    "image_loss_by_order/image_first": 0.375,
                    "image_loss": (1 + 2 + 3) / 6,
                    "x0_error": None,  # bins without images: the mean would be of other levels
                    "x0_error/-4..-2": 2.0,
                    "x0_error/-2..0": 1.5,
                    "padding_share": 1 - 120 / 300,
                    "idle_row_share": 0.2,
                    "data_stall_share": 0.0,
                    "checkpoint_stall_share": 0.0,
                    "evaluation_share": 0.0,
                    "slowest_rank": 1,  # which waited least
                    "device_memory_gib": 0.0,
                    "attention_imbalance": 1.5,
                    "grad_norm": 2.5,
                    **({"grad_norm/trunk": 10**0.5, "update_ratio/trunk": 0.1} if steps == 2 else {}),
                    "skipped_documents": 4,
                    "epoch_min": 0,
                    "epoch_mean": (0 + 1 + 2 + 3 * 3) / 6,
                    "epoch_max": 3,
                    "epoch/a": (0 + 1 + 2) / 3,
                    "epoch/b": 3,
                    "text_tokens": steps * (120 - 24),
                    "image_tokens": steps * 24,
                    "text_targets": steps * 30,
                    "clean_images": steps * 6,
                    "tokens/a": steps * 6 * 6,
                    "tokens/b": steps * 6,
                    "images/a": steps * 6 * 2,
                    "images/b": steps * 6,
                    "skips/not a tar": 1 + 2 + 3,
                    "documents/a": 3 * steps,
                    "documents/b": 2 * 3 * steps,
                }
            )
            flops = steps * (10 * 120 + 2 * 7 * (1 + 2 + 3) + 100 * 30 + 1000 * 3 * 2 * 12 + 400 * 6 * 4)
            per_s = steps * row["step_s"]
            assert row["slowest_lag_share"] == pytest.approx(steps / per_s, rel=1e-6)
            assert row["slowest_host"] == socket.gethostname() and 0.01 < row["host_memory_gib"] < 10
            assert row["model_tflops_per_s_per_rank"] == pytest.approx(flops / per_s / 3 / 1e12, rel=1e-6)
            assert row["mfu"] == pytest.approx(row["model_tflops_per_s_per_rank"] * 1e6, rel=1e-6)
            assert row["hfu"] / row["mfu"] == pytest.approx(1 + steps * 5 * 120 / flops, rel=1e-6)
            by_bagel = steps * 2 * 3 * (20 * 20 + 3 * (1 + 1 + 1 + 4 + 4))
            assert row["mfu_bagel"] / row["mfu"] == pytest.approx(by_bagel / flops, rel=1e-6)
            assert row["tokens_per_s"] == pytest.approx(120 * steps / per_s, rel=1e-6)


def _timed_rows(ranks: Ranks, device_wait_s: float) -> tuple[float, list[dict]]:
    """Return the seconds from the first interval's start to the third's, and two rows of a step each.

    `device_wait_s`: how long a GPU, which is not here, still works when the host has launched all.
    """
    fetch = torch.Tensor.cpu

    def slow_fetch(tensor: torch.Tensor) -> torch.Tensor:
        time.sleep(device_wait_s)
        return fetch(tensor)

    torch.Tensor.cpu = slow_fetch  # in this process alone
    interval, rows = Interval(Flops(10.0, 1.0, 100.0, 1000.0), ranks, ["a", "b"]), []
    start = interval._start
    for _ in range(2):
        batch = AgreedBatch(_batch(slots=50, pairs=7), _vote(tokens=120), data_wait_s=0.0, peers_wait_s=0.0)
        interval.add(batch, [_loss(1.0, 1.0)], grad_norm=torch.tensor(2.5))
        rows.append(interval.row({0: LaneState(7, [Cursor(0, 5, 0), Cursor(3, 0, 0)], [], {}, [], [])}))
    return interval._start - start, rows


def test_the_wait_for_the_device_is_part_of_the_interval() -> None:
    """P9: a row's clock is read when the device has finished, and the next interval starts there."""
    ((whole, rows),) = run_ranks(_timed_rows, 1, 0.5)
    assert [row["tokens_per_s"] * row["step_s"] for row in rows] == pytest.approx([120, 120])
    assert all(row["step_s"] >= 0.5 for row in rows)
    assert sum(row["step_s"] for row in rows) == pytest.approx(whole), "no time is lost between two rows"


def test_a_save_is_not_charged_for_the_steps_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first copy to the host waits for the GPU, which may still be at the last step: here for 100 seconds."""
    now = 0.0

    def synchronize(_: torch.device) -> None:
        nonlocal now
        now += 100

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr("train.run.time", SimpleNamespace(monotonic=lambda: now))
    ranks = replace(alone(), device=torch.device("cuda"))
    with RunFolder(tmp_path, ranks) as folder:
        parts: dict[str, Any] = dict.fromkeys(field.name for field in fields(Run))
        parts |= {"ranks": ranks, "saver": Saver(folder, CheckpointConfig(), ranks)}
        run = Run(**parts | {"state": SimpleNamespace(progress=Progress())})
        assert run.save() == 0 and now == 100  # nothing to save before the first step


def test_the_slowest_rank_is_that_of_the_slower_host_or_the_slower_gpu() -> None:
    """Of 20 s: others wait 1 s for rank 1's host, and a quarter of the time for rank 2's GPU."""
    wait_s = [1.0, 0.0, 1.0]
    assert metrics._slowest(wait_s, [0.0, 0.0, 0.0], 20.0) == (1, 0.05)
    assert metrics._slowest(wait_s, [0.003, 0.003, 0.004], 20.0) == (2, pytest.approx(0.25))
    assert metrics._slowest(wait_s, [0.00300, 0.00301, 0.00305], 20.0) == (1, 0.05)


def _probed_row(ranks: Ranks) -> dict:
    metrics.probe_seconds = lambda device: 0.002 * (1 + ranks.rank)  # of a GPU that is not here; in this process alone
    return _timed_rows(ranks, 0.0)[1][0]


def test_every_rank_names_the_rank_of_the_slowest_gpu() -> None:
    for row in run_ranks(_probed_row, 2):
        assert row["slowest_rank"] == 1 and row["slowest_lag_share"] == pytest.approx(0.5)


def test_the_probe_times_the_products_between_two_events(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = len(done)

        def synchronize(self) -> None:
            assert self.at == len(done)

        def elapsed_time(self, end: "Event") -> float:
            return float(end.at - self.at)  # ms: one a product

    assert hardware.probe_seconds(torch.device("cpu")) == 0
    linspace = torch.linspace
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch, "mm", lambda a, b, out: done.append("mm"))
    monkeypatch.setattr(torch, "linspace", lambda *limits, device: linspace(*limits))
    assert hardware.probe_seconds(torch.device("cuda")) == pytest.approx(hardware.PROBE_PRODUCTS / 1000)


def console_row() -> dict[str, Any]:
    """Return what the console shows of step 60."""
    names = ("text_loss", "image_loss", "grad_norm", "learning_rate", "tokens_per_s", "images_per_s")
    return {
        "step": 60,
        **dict.fromkeys(names, 1.0),
        "mfu": 0.456,
        "slowest_lag_share": 0.25,
        "slowest_rank": 3,
        "slowest_host": "n7",
        "stop_s": None,
    }


def test_the_time_left_counts_only_the_steps_of_this_start(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """A run resumed at step 50 that took 10 s for 10 steps has 40 s to go to step 100."""
    clock = [1000.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: clock[0])
    console = Console(100, 50, alone())
    clock[0] += 10
    console.show(console_row() | {"image_loss": None})
    assert "step 60/100" in (line := capsys.readouterr().out) and "0:00:40 left" in line
    assert "MFU 45.6%" in line and "image" not in line.split("norm")[0] and "waits 25% for rank 3 on n7" in line


def test_the_console_warns_once_of_a_stop_that_would_come_too_late(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """P6: a step and its saves must fit into the notice that the scheduler gives; no scheduler, no warning."""
    for notice, stops, warned in (("60", (None, 59.0, 61.0, 62.0), 1), ("60", (None, 59.0), 0), (None, (1e6,), 0)):
        monkeypatch.delenv("TRANSFUSION_SIGNAL_DELAY_S", raising=False)
        if notice is not None:
            monkeypatch.setenv("TRANSFUSION_SIGNAL_DELAY_S", notice)
        console = Console(100, 50, alone())
        for stop_s in stops:
            console.show(console_row() | {"stop_s": stop_s})
        words = capsys.readouterr().out
        assert words.count("two saves, 61 s, and the signal comes 60 s before the end") == warned, words
        assert words.count("warning") == warned
