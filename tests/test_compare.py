"""The comparison with peers runs end to end, and its contestants do the same work."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.peers import environment, plain
from bench.peers.ours import _document
from bench.peers.works import PATCH, Work, rows_of
from data.layout import lay_out
from data.packing import pack
from data.tokenizer import SpecialIds
from model.attention import dense_mask

ROOT = Path(__file__).parents[1]
QUICK = ("--quick", "--rounds", "1", "--threads", "1", "--works", "varied")


def compare(*options: str, status: int = 0, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench.compare", *QUICK, *options]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **variables}, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == status, done.stderr
    return done


@pytest.mark.slow
def test_ours_and_plain_take_turns_and_end_with_one_json_object() -> None:
    done = compare("--only", "plain", "--pictures", "1", "--forwards", "2")
    record = json.loads(done.stdout)
    work = record["works"]["varied"]
    assert work["ours"]["all"] == work["plain"]["all"] and work["ours"]["trunk"] == work["plain"]["trunk"]
    assert work["useful_gflop"] > 0 and work["gemm_gflop_per_s"] > 0
    for name in ("ours", "plain"):
        assert work[name]["step_s"] > 0 and work[name]["share_of_gemm"] > 0
        assert 0 < work[name]["peak_less_imports_mib"] < work[name]["peak_mib"]
        assert record["sampling"][name]["seconds_a_picture"] > 0
    # One round, so the median of ratios is the ratio of medians.
    expected = work["plain"]["step_s"] / work["ours"]["step_s"]
    assert work["speed_of_ours_over"]["plain"] == pytest.approx(expected, rel=0.05)
    assert "varied  plain" in done.stderr


@pytest.mark.slow
def test_the_peer_of_the_registry_does_the_same_works(tmp_path: Path) -> None:
    """Makes its environment if there is none; skipped where the registry is out of reach."""
    folder = environment.default_folder()
    try:
        environment.make(folder)
    except RuntimeError as error:
        pytest.skip(str(error))
    record = json.loads(compare("--pictures", "1", "--forwards", "2", "--env", str(folder)).stdout)
    peer = record["works"]["varied"]["transfusion_pytorch"]
    assert peer["step_s"] > 0 and record["sampling"]["transfusion_pytorch"]["seconds_a_picture"] > 0


@pytest.mark.slow
def test_without_a_registry_it_says_what_can_be_measured(tmp_path: Path) -> None:
    done = compare("--env", str(tmp_path / "env"), status=2, PIP_NO_INDEX="1", PIP_FIND_LINKS=str(tmp_path))
    assert "--only plain" in done.stderr and "transfusion-pytorch==0.19.4" in done.stderr
    assert "Traceback" not in done.stderr


def test_rows_hold_every_document_once_and_none_too_many() -> None:
    lengths = [sample.useful_tokens for sample in Work(kind="varied").samples]
    rows = rows_of(lengths, 2 * max(lengths))
    assert sorted(i for row in rows for i in row) == list(range(16))
    assert max(sum(lengths[i] for i in row) for row in rows) <= 2 * max(lengths)
    assert len(rows) == -(-sum(lengths) // (2 * max(lengths)))  # as few as can be


@pytest.mark.parametrize("kind", ["fixed", "varied"])
def test_the_baseline_attends_as_ours_and_predicts_as_many_tokens(kind: str) -> None:
    ids = SpecialIds(bos=plain.BOS, eos=plain.EOS, boi=plain.BOI, eoi=plain.EOI, pad=plain.PAD)
    samples = Work(kind=kind, number=4).samples
    pieces = [lay_out(_document(sample), ids, PATCH) for sample in samples]
    length = max(len(piece) for piece in pieces)
    rows = [pack([piece], length, plain.PAD) for piece in pieces]
    documents, images, until = (
        torch.tensor([getattr(row, name).tolist() for row in rows])
        for name in ("document_ids", "image_ids", "visible_until")
    )
    theirs = plain.attention_mask(images >= 0, (documents > 0).sum(1))
    real = (documents > 0)[:, None, :, None]
    assert torch.equal(theirs & real, dense_mask(documents, images, until) & real)
    for sample, row in zip(samples, rows, strict=True):
        laid_out, first = plain.lay_out(sample)
        assert laid_out.tolist() == row.input_ids[: len(laid_out)].tolist() and row.image_ids[first] == 0
