"""docs/metrics.md and what runs log, held against each other both ways (P9), and the sums between metrics."""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from data.tokenizer import Tokenizer
from tests import runs
from tests.damage import garble
from tests.ranks import run_ranks
from tests.sources import make_source, pairs
from train.distributed.ranks import Ranks
from train.distributed.signals import StopSignal
from train.heldout import KINDS, Heldout, HeldoutConfig
from train.inference.saved_model import LoadedModel
from train.metric_sections import section_of
from train.metrics_log import EVENTS
from train.step import latent_stats

PAGE = Path(__file__).parent.parent / "docs/metrics.md"
ANY = {"SOURCE": r"\w+", "NAME": r"\w+", "BIN": r"-?\d\.\.-?\d", "PART": r"[a-z_]+", "REASON": r".+"}


def documented() -> Iterator[tuple[str, str]]:
    """Yield the section's heading and the pattern of each name in the tables of metrics."""
    heading = ""
    for line in PAGE.read_text(encoding="utf-8").partition("## Events")[0].splitlines():
        heading = line[3:] if line.startswith("## ") else heading
        if line.startswith("| `"):
            for name in re.findall(r"`([^`]+)`", line.split("|")[1]):
                pattern = re.escape(name)
                for word, stands_for in ANY.items():
                    pattern = re.sub(rf"\b{word}\b", lambda _, found=stands_for: found, pattern)
                yield heading, pattern


@pytest.fixture(scope="module")
def run_dirs(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer, sources: dict[str, Path]) -> list[Path]:
    """Run the same few steps on one rank and on two, with a held-out source and a broken record."""
    folder = tmp_path_factory.mktemp("names")
    heldout = make_source(folder / "heldout", tokenizer, pairs(60, seed=77))
    broken = make_source(folder / "broken", tokenizer, pairs(60, seed=7))
    garble(broken, {0: list(range(0, 60, 4))})
    given = {**sources, "pairs": broken}
    found = []
    for world_size in (1, 2):
        path = folder / f"run-{world_size}"
        argv = runs.settings(
            *(path, tokenizer, given),
            evaluation__interval_steps=6,
            evaluation__heldout__pairs=heldout,
            data__order__caption_first=0.5,
            data__max_bad_documents=99,
            log__interval_steps=3,
            optim__steps=6,
        )
        runs.finish(argv, world_size)
        found.append(path)
    return found


def test_every_logged_name_is_documented_and_every_documented_name_is_logged(run_dirs: list[Path]) -> None:
    logged = {name for row in runs.rows(run_dirs[0]) for name in row}
    patterns = [pattern for _, pattern in documented()]
    assert len(patterns) == len(set(patterns)) > 60
    assert [name for name in logged if sum(bool(re.fullmatch(p, name)) for p in patterns) != 1] == []
    assert [p for p in patterns if not any(re.fullmatch(p, name) for name in logged)] == []
    page = PAGE.read_text(encoding="utf-8").partition("## Events")[2]
    assert set(re.findall(r"^\| `(\w+)`", page, re.MULTILINE)) == EVENTS.keys()


def test_the_page_of_a_run_has_the_sections_of_the_documentation() -> None:
    headings = {"Losses": "loss", "Gradients and updates": "gradients", "Held-out": "heldout"}
    for heading, pattern in documented():
        assert section_of(re.sub(r"\\.*", "", pattern)) in (None, headings.get(heading, heading.lower())), pattern


def test_the_parts_of_a_metric_add_up_to_it(run_dirs: list[Path]) -> None:
    """Losses by source and order, gradients by part, tokens by source and modality."""
    for row in [row for row in runs.rows(run_dirs[1]) if "text_loss" in row]:
        squares = [row[name] ** 2 for name in row if name.startswith("grad_norm/")]
        assert len(squares) == 4 and math.sqrt(sum(squares)) == pytest.approx(row["grad_norm"], rel=1e-4)
        assert all(1e-6 < row[name] < 1 for name in row if name.startswith("update_ratio/")), row
        tokens = [row[name] for name in row if name.startswith("tokens/")]
        assert len(tokens) == 2 and sum(tokens) == row["text_tokens"] + row["image_tokens"]
        losses = [row[name] for name in row if name.startswith("text_loss/")]
        assert min(losses) < row["text_loss"] < max(losses)
        assert row["image_loss/pairs"] == pytest.approx(row["image_loss"], rel=1e-6)
        orders = [row[f"image_loss_by_order/{order}"] for order in ("caption_first", "image_first")]
        assert min(orders) < row["image_loss"] < max(orders)


def test_metrics_of_what_was_trained_do_not_depend_on_the_ranks(run_dirs: list[Path]) -> None:
    """P3: also by source, order and part, raw and averaged."""
    stems = ("text_loss", "image_loss", "grad_norm", "tokens/", "images/", "documents/", "epoch/", "heldout")
    one, two = ([{k: v for k, v in row.items() if k.startswith(stems)} for row in runs.rows(d)] for d in run_dirs)
    assert len(one) == len(two) == 3
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=2e-4)
    assert one[-1]["heldout_ema/pairs/text_loss"] != one[-1]["heldout/pairs/text_loss"]


def test_events_tell_of_starts_and_stops(run_dirs: list[Path]) -> None:
    events = [json.loads(line) for line in (run_dirs[1] / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(event["kind"], event["step"], event["attempt"]) for event in events] == [("start", 0, 1), ("stop", 6, 1)]
    assert events[0]["ranks"] == 2 and len(events[0]["hosts"]) == 1 and events[1]["status"] == 0


def _measured(ranks: Ranks, run_dir: Path, weights: str) -> dict[str, float]:
    loaded = LoadedModel.load(run_dir, ranks, weights)
    config, spec = HeldoutConfig(heldout={"pairs": str(run_dir.parent / "heldout")}), loaded.saved.latent_spec
    stats = latent_stats(spec, 2, ranks.device)
    losses = Heldout(config, loaded.config, spec, ranks).losses(loaded.model, stats, StopSignal())
    assert isinstance(losses, dict)
    return {kind: losses["pairs"][kind] for kind in (*KINDS, "perplexity")}


def test_held_out_losses_of_a_run_are_those_of_its_checkpoint(run_dirs: list[Path]) -> None:
    """Of the weights and of their average; so each pass saw the weights that its name says."""
    row = runs.rows(run_dirs[0])[-1]
    for prefix, weights in (("heldout", "model"), ("heldout_ema", "ema")):
        (losses,) = run_ranks(_measured, 1, run_dirs[0], weights)
        assert losses == pytest.approx({kind: row[f"{prefix}/pairs/{kind}"] for kind in losses}, rel=1e-4), prefix
