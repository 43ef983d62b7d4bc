"""The report says whether a run is healthy and since when not, compares several runs, and is quick."""

import json
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.logged_runs import START, STEP_S, logged_run, read_rows, write_rows
from tests.pages import Page
from tests.test_imports import ROOT
from train import report
from train.config import _resolved
from train.config_layers import read_yaml
from train.pages.metric_columns import CHUNK, Columns
from train.pages.reference_band import settings_of
from train.pages.report_inputs import ReportConfig, RunInputs, gather
from train.pages.run_health import findings
from train.pages.run_timeline import timeline
from train.pages.time_shares import COMPUTING, OUTSIDE, TimeShares, spoken
from train.report import main

ROWS = 200


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return logged_run(tmp_path / "run", ROWS)


def read(folder: Path) -> RunInputs:
    return gather(ReportConfig(run=[str(folder)]), "").runs[0]


def unhealthy(folder: Path, now: float | None = None) -> dict[str, str]:
    """Return what to look at: the sentence by topic."""
    return {found.topic: found.words for found in findings(read(folder), now) if found.healthy is False}


def change(folder: Path, how: Callable[[int, dict], object]) -> None:
    """Change the rows of training; `how` gets a row's number and the row."""
    rows = read_rows(folder / "metrics.jsonl")
    of_training = [row for row in rows if "text_loss" in row]
    for i, row in enumerate(of_training):
        how(i, row)
    write_rows(folder / "metrics.jsonl", rows)


def test_a_healthy_run_is_healthy_in_every_topic(run: Path) -> None:
    found = findings(read(run))
    assert len(found) == 12 and all(finding.healthy and finding.words.endswith(".") for finding in found), found
    assert len({finding.topic for finding in found}) == len(found)


HOSTILE = [float("nan"), float("inf"), 10**400, -1, 1e308, "<img src=x>", "\ud800", [], [1], {}, True]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_no_number_and_no_text_costs_more_than_its_section_or_becomes_html(run: Path, tmp_path: Path) -> None:
    """In each field of rows, events and examples in turn, and of a whole column; clocks and steps that go backwards."""
    rows = read_rows(run / "metrics.jsonl")
    evaluation = tmp_path / "evaluation"
    evaluation.mkdir()
    example = {"split": "seen", "prompt": "a", "drawn": "x.png", "drawn_verdict": {"shape": True}, "score": 0.5}
    event = {"time": START, "step": 3, "kind": "skipped_update", "words": "w", "to": 2}
    for i, value in enumerate(HOSTILE):
        names = list(rows[-1])[i :: len(HOSTILE)]
        newest = [{**row, **dict.fromkeys(names, value)} for row in rows[-40:]]
        write_rows(run / "metrics.jsonl", rows[:-40] + newest)
        write_rows(run / "events.jsonl", [{**event, name: value} for name in event])
        write_rows(evaluation / "examples.jsonl", [{**example, name: value} for name in example])
        facts = {"scores": {"x": {"value": value, "low": value, "high": 1}}, "heldout": {"y": value}, "settings": value}
        write_rows(evaluation / "evaluation.json", [facts])
        main([f"run={run}", f"evaluation={evaluation}", f"output={tmp_path / 'page.html'}"])
        page = (tmp_path / "page.html").read_text()
        assert "<img src=x" not in page and 'id="health"' in page and 'id="making"' in page, (value, names)
    for other in (rows[::-1], [{**row, "time": START - row["step"]} for row in rows], [{**rows[0], "step": 5}] * 9):
        write_rows(run / "metrics.jsonl", other)
        main([f"run={run}", f"output={tmp_path / 'page.html'}"])
        assert 'id="health"' in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    ("topic", "how", "words"),
    [
        ("Losses", lambda i, row: row.update(text_loss=float("nan") if i in (90, 91) else row["text_loss"]),
         "text loss is not finite in 2 rows, first at step 910"),
        ("Losses", lambda i, row: row.update(image_loss=row["image_loss"] * (3 if i == 150 else 1)),
         r"1 spike, the highest [23]\.\d times \(image, step 1,510\)"),
        ("Learning", lambda i, row: row.update(text_loss=2 + 0.01 * (i % 2) + 1e-3 * i), r"The text loss rises by \d"),
        ("Updates", lambda i, row: row.update(skipped_updates=int(i > 5), rollbacks=2),
         "1 of 2,000 updates were skipped; the run went back 2 times"),
        ("Clipping", lambda i, row: row.update(grad_norm=5.5), "100% of the newer half's rows .* the median is 5.5"),
        ("Data", lambda i, row: row.update({"skipped_documents": 7, "skips/corrupt": 4, "skips/too large": 3,
         "padding_share": 0.3}), r"7 documents skipped \(4 corrupt, 3 too large\); 30.0% .* padding"),
        ("Stalls", lambda i, row: row.update(data_stall_share=0.9 if i == 40 else 0.0),
         "Up to step 410 it waited for data for 90% of an interval"),
        ("Slowest rank", lambda i, row: row.update(slowest_lag_share=0.2, slowest_rank=5, slowest_host="node9"),
         "20.0% of the time for the slowest; rank 5 .* on node9"),
        ("Speed", lambda i, row: row.update(mfu=0.4 if i < 150 else 0.3), "MFU is 30.0%; 25% less than around step"),
        ("Memory", lambda i, row: row.update(host_memory_gib=20 + 0.1 * i), r"growing by 1\d%"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_with_its_numbers_and_nothing_else_is(run: Path, topic: str, how, words: str) -> None:
    change(run, how)
    found = unhealthy(run)
    assert found.keys() == {topic} and re.search(words, found[topic]), found


def test_a_held_out_loss_that_rises_from_its_best_is_seen(run: Path) -> None:
    rows = read_rows(run / "metrics.jsonl")
    for row in rows:
        if "heldout/pairs/text_loss" in row and row["step"] > 1000:
            row["heldout/pairs/text_loss"] *= 1 + (row["step"] - 1000) / 5000
    write_rows(run / "metrics.jsonl", rows)
    assert re.fullmatch(
        r"The best heldout/pairs/text_loss was at step 1,000; now it is 1\d\.\d% higher\.", unhealthy(run)["Held-out"]
    )


def test_silence_is_seen_only_where_a_row_was_to_be_expected(run: Path) -> None:
    (run / "config.yaml").write_text("optim: {steps: 9000}\n")
    end = START + ROWS * 10 * STEP_S
    assert unhealthy(run, end + 60) == {}
    assert "2\u00a0h" in unhealthy(run, end + 7200)["Progress"]
    stop = {"time": end, "attempt": 1, "step": 2000, "kind": "stop", "words": "saved after SIGTERM", "status": 75}
    write_rows(run / "events.jsonl", [stop])
    assert unhealthy(run, end + 7200) == {}


def test_the_timeline_tells_starts_deaths_gaps_and_stalls_in_their_order(run: Path) -> None:
    at = [START + 10 * STEP_S * row for row in range(ROWS + 1)]
    events = [("start", 0, at[0] - 5, 4), ("skipped_update", 300, at[30], 0), ("start", 995, at[100] + 3590, 3)]
    keys = ("kind", "step", "time", "ranks")
    write_rows(run / "events.jsonl", [{**dict(zip(keys, event, strict=True)), "words": "w"} for event in events])

    def later(i: int, row: dict) -> None:
        row["time"] += 3600 * (i >= 100)
        row["data_stall_share"] = 0.4 if 150 <= i < 160 else 0.0

    change(run, later)
    moments, number = timeline(read(run))
    assert [moment.kind for moment in moments] == ["start", "skipped", "gap", "died", "start", "stall"] and number == 6
    assert moments[2].words == "no row for 1\u00a0h after step 1,000"
    assert moments[5].words == "waited for data 40% of the time, steps 1,510 to 1,600"
    found = unhealthy(run)
    assert found["Restarts"] == "2 starts, 1 of them after an attempt that died without saying so, on 4, then 3 ranks."
    stop = {"kind": "stop", "step": 1000, "time": at[100] + 7, "words": "w"}
    write_rows(run / "events.jsonl", [*read_rows(run / "events.jsonl"), stop])
    assert "gap" not in [moment.kind for moment in timeline(read(run))[0]]


def test_a_run_of_an_earlier_version_has_its_skipped_updates_and_gaps_in_the_timeline(run: Path) -> None:
    write_rows(
        run / "bad_updates.jsonl", [{"step": s, "grad_norm": float("inf"), "documents": ["a", "b"]} for s in (7, 8)]
    )
    change(run, lambda i, row: row.update(time=row["time"] + 86400 * (i >= 50)))
    moments, _ = timeline(read(run))
    assert [(moment.kind, moment.step) for moment in moments] == [("skipped", 7), ("skipped", 8), ("gap", 500)]
    assert moments[0].words == "gradient norm inf; a, b"


def test_every_second_is_of_one_kind(run: Path) -> None:
    change(run, lambda i, row: row.update(time=row["time"] + 7200 * (i >= 100)))
    shares = TimeShares.of(read(run).columns)
    assert shares is not None and np.allclose(shares.shares.sum(0), 1)
    hours = ROWS * 10 * STEP_S / 3600
    assert shares.hours[OUTSIDE] == pytest.approx(2) and shares.hours[COMPUTING] == pytest.approx(hours * 0.993)
    assert [spoken(s).replace("\u00a0", " ") for s in (0.25, 59, 3600, 90061)] == ["0.2 s", "59 s", "1 h", "1 d 1 h"]


def test_columns_are_the_rows_whatever_lines_are_broken(tmp_path: Path) -> None:
    """A null and a missing name are no value; nan is one. Broken and foreign lines are counted."""
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": i, "loss": i / 7, "host": "h"}) for i in range(CHUNK + 5)]
    lines[3], lines[5], lines[6] = '{"step": 3, "loss": null}', '{"step": 5, "loss": NaN}', '{"step": 6}'
    lines += [
        '{"step": 9',
        "[1]",
        '{"no": 1}',
        '{"step": 2000, "loss": "x", "nested": {"a": 1}, "huge": 1' + "0" * 400 + "}",
    ]
    path.write_text("\n".join(lines))
    columns = Columns(path)
    assert columns.unreadable == 2 and columns.num_rows == CHUNK + 6
    steps, values = columns["loss"]
    assert len(steps) == CHUNK + 3 and not {3, 6} & set(steps.tolist()) and np.isnan(values[steps == 5])
    assert values[-1] == (CHUNK + 4) / 7 and columns["absent"].steps.shape == (0,)
    assert columns.rows(["loss"])[3] == {"step": 4, "loss": 4 / 7}


def test_several_runs_share_charts_and_only_their_differences_are_listed(tmp_path: Path) -> None:
    a, b = logged_run(tmp_path / "x/run", ROWS), logged_run(tmp_path / "y/run", ROWS // 2, seed=1, rate=1e-4)
    (b / "config.yaml").write_text((b / "config.yaml").read_text() + "extra: <b>\n")
    outputs = [tmp_path / name for name in ("1.html", "2.html")]
    main([f"run={a}", f"run={b}", f"output={outputs[0]}"])
    main([f"run=[{a},{b}]", f"output={outputs[1]}"])
    assert f"run:\n- {a}\n- {b}\n" in _resolved(report, [f"run={a}", "num_best=3", f"run={b}"], check=False)
    page, other = (Page(path.read_text()) for path in outputs)
    assert page.section("curves").html == other.section("curves").html and not page.unbalanced
    differences = page.section("differences").text
    assert differences.startswith("Differences of config3 of 5 settings differ")
    assert "optim.learning_rate0.00030.0001" in differences and "extra—<b>" in differences
    assert "clip_norm" not in differences
    curves = page.section("curves")
    assert curves.classes()["end"] == 2 * curves.classes()["chart log"] + 2 * curves.classes()["chart "] + 2 * (
        curves.classes()["chart linear"])  # fmt: skip
    assert "A x/run" in curves.text and "B y/run" in curves.text
    assert page.section("health").classes()["verdict ok"] == 2


def evaluation(folder: Path, value: float, sampler: str) -> Path:
    folder.mkdir()
    score = {"value": value, "low": value - 1, "high": value + 1, "items": 500}
    facts = {"step": 9, "seed": 1, "weights": "ema-9", "settings": {"sampler": sampler}}
    accuracy = {"value": 0.5, "low": None, "high": None, "items": 4}
    scores = {"pictures/cmmd": score, "choices/hellaswag/accuracy_per_character": accuracy}
    (folder / "evaluation.json").write_text(json.dumps(facts | {"scores": scores}))
    return folder


def test_evaluations_stand_side_by_side_with_intervals_and_differences(run: Path, tmp_path: Path) -> None:
    named = [evaluation(tmp_path / name, value, name) for name, value in (("ddim", 10.0), ("euler", 12.5))]
    main([f"run={run}", f"evaluation=[{named[0]},{named[1]}]"])
    text = Page((run / "report.html").read_text()).section("scores").text
    assert "pictures/cmmd10 9–11 50012.5 11.5–13.5 500apart" in text
    assert "choices/hellaswag/accuracy_per_character50.0\u00a0%  450.0\u00a0%  4" in text
    assert "settings.samplerddimeuler" in text and "weightsema" in text


def test_the_reference_band_is_drawn_and_its_verdict_is_a_topic(run: Path, tmp_path: Path) -> None:
    rows = [row for row in read_rows(run / "metrics.jsonl") if "text_loss" in row]
    losses = [row["text_loss"] for row in rows]
    curve = {"median": losses, "low": [0.9 * v for v in losses], "high": [1.1 * v for v in losses]}
    band = {"name": "mine", "steps": [row["step"] for row in rows], "smoothed_rows": 1, "made_from": "2 runs"}
    band |= {
        "settings": settings_of(read_yaml(str(run / "config.yaml"))),
        "per_step": {"tokens_seen": 10_000},
        "curves": {"text_loss": curve},
    }
    (tmp_path / "band.json").write_text(json.dumps(band))
    main([f"run={run}", f"reference={tmp_path / 'band.json'}"])
    page = Page((run / "report.html").read_text())
    assert "Within the band of mine" in page.section("health").text
    assert page.section("curves").classes()["band"] == 2  # both scales
    change(run, lambda i, row: row.update(text_loss=2 * row["text_loss"]))
    main([f"run={run}", f"reference={tmp_path / 'band.json'}"])
    assert page.section("health").classes()["verdict ok"] == 1
    assert "Outside the band of mine" in Page((run / "report.html").read_text()).section("health").text
    (tmp_path / "band.json").write_text(json.dumps({**band, "settings": {**band["settings"], "optim.steps": 7}}))
    main([f"run={run}", f"reference={tmp_path / 'band.json'}"])
    page = Page((run / "report.html").read_text())
    assert "Not comparable with the band of mine" in page.section("health").text
    assert "band" not in page.section("curves").classes()


def test_a_config_that_is_no_mapping_is_refused(run: Path) -> None:
    (run / "config.yaml").write_text("- a\n")
    with pytest.raises(ValueError, match=r"config=.*config.yaml: expected a mapping"):
        main([f"run={run}"])


def test_a_run_of_a_hundred_thousand_steps_takes_less_than_two_seconds(tmp_path: Path) -> None:
    """CPU time of the whole process, whatever else the machine does; 0.9 s on one of 2026."""
    folder = logged_run(tmp_path / "run", 10_000)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-X", "importtime", "-m", "train.report", f"run={folder}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2.0
    assert not re.search(r"\| +(torch|matplotlib|pandas)\n", done.stderr)
    assert (folder / "report.html").stat().st_size < 1e6
