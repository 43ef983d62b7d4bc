"""`make bench` finds what has become worse than the committed results, and is not misled by noise."""

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench import regressions, scaling

COMMITTED = regressions.read_results(regressions.RESULTS)


def change(record: dict[str, Any], figure: str, factor: float) -> dict[str, Any]:
    """Return the record with one figure multiplied."""
    changed = copy.deepcopy(record)
    *path, last = figure.split(".")
    inner = changed
    for key in path:
        inner = inner[key]
    inner[last] *= factor
    return changed


@pytest.mark.parametrize("name", COMMITTED)
def test_a_fall_of_an_eighth_is_found_by_name_and_noise_of_a_twelfth_is_not(name: str) -> None:
    """Of every figure of the committed results, in both directions."""
    known, bench = COMMITTED[name], regressions.BENCHES[name]
    assert regressions.regressions(name, known, known) == []
    for figure, is_more in [*((f, True) for f in bench.more), *((f, False) for f in bench.less)]:
        then, worse, better = regressions.value(known, figure), 7 / 8 if is_more else 8 / 7, 8 / 7 if is_more else 7 / 8
        (found,) = regressions.regressions(name, known, change(known, figure, worse))
        assert found == regressions.Regression(name, figure, then, then * worse)
        assert f"{name} {figure}" in str(found) and f"{then * worse:.4g}, committed {then:.4g}" in str(found)
        for harmless in (better, 11 / 12, 12 / 11):
            assert regressions.regressions(name, known, change(known, figure, harmless)) == []


def test_the_results_are_of_the_commands_that_run() -> None:
    """Else a changed bench would be compared with what another one measured."""
    assert {name: record["command"] for name, record in COMMITTED.items()} == {
        name: regressions.command_of(name) for name in COMMITTED
    }
    assert COMMITTED.keys() <= regressions.BENCHES.keys()


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture) -> Callable[..., Any]:
    """Run `bench.regressions` on a tiny scaling bench; return its status and lines."""
    tiny = "--width 32 --layers 1 --rows 2 --length 64 --ranks 1 --steps 2 --rounds 1"
    figure = regressions.Bench(tiny, less=("cpu_over_plain.1",))
    monkeypatch.setattr(regressions, "BENCHES", {"scaling": figure})

    def run(*options: str) -> tuple[int, list[str], str]:
        argv = ["bench.regressions", "--results", str(tmp_path / "cpu.jsonl"), *options]
        monkeypatch.setattr(sys, "argv", argv)
        status, (out, err) = regressions.main(), capsys.readouterr()
        return status, out.splitlines(), err

    return run


@pytest.mark.slow
def test_benches_run_and_are_compared_with_what_was_kept(bench: Callable[..., Any], tmp_path: Path) -> None:
    """A real bench in processes of its own, against a figure that no noise reaches: a tenth of what it was."""
    status, _, err = bench()
    assert status == 2 and "--keep adds it" in err
    assert bench("--keep")[0] == 0
    results = tmp_path / "cpu.jsonl"
    kept = json.loads(results.read_text())
    assert kept["bench"] == "scaling" and kept["command"].startswith("python -m bench.scaling --width 32")
    assert set(kept["cpu_us_per_token"]) == {"plain", "1"} and kept["efficiency"] == {"1": 1.0}
    results.write_text(json.dumps(change(kept, "cpu_over_plain.1", 0.1)) + "\n")
    status, (row, regression, record), err = bench()
    assert status == 1 and err.count("bench.regressions: python -m bench.scaling") == 2, "it runs once more"
    assert row.startswith("scaling") and regression.startswith("REGRESSION scaling cpu_over_plain.1: ")
    assert [found["figure"] for found in json.loads(record)["regressions"]] == ["cpu_over_plain.1"]


def test_the_time_of_overlapping_collectives_counts_once() -> None:
    assert scaling.covered([(0, 2), (1, 3), (5, 6), (5.5, 5.7)]) == 4
