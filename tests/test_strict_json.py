"""What the product writes as JSON any reader reads, and our own readers see the numbers that were not finite."""

import ast
import json
import math
from pathlib import Path
from typing import Any

import pytest

from data.strict_json import dumps, finite, loads
from train.checkpoints.metrics_file import MetricsFile
from train.evaluation.scores import Score, lines_of
from train.pages.metric_columns import Columns

ROOT = Path(__file__).parent.parent
LOST = {"step": 3, "loss": math.nan, "norm": math.inf, "by": {"a": -math.inf, "b": 1.5}, "none": None, "text": "NaN"}


def strictly(text: str | bytes) -> Any:
    """Read JSON as other languages do."""

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_numbers_that_are_not_finite_are_null_for_others_and_themselves_for_us() -> None:
    for value in (LOST, [LOST, {"x": 1}], {"deep": [{"y": (math.nan, 2.0)}]}):
        read = strictly(dumps(value))
        assert read == strictly(dumps(value, indent=1)) == finite(value)
    written = strictly(dumps(LOST))
    assert (written["loss"], written["norm"], written["not_finite"]) == (None, None, {"loss": "nan", "norm": "inf"})
    assert str(loads(dumps(LOST))) == str(LOST), "equal but for nan, which equals nothing"
    assert loads(dumps([1.0, math.nan])) == [1.0, None]
    plain = {"a": 1.5, "b": [None, "x"], "c": {"not_finite": "a word"}, "d": {"not_finite": {"e": "large"}}}
    assert loads(dumps(plain)) == plain and dumps(plain) == json.dumps(plain)


def test_a_lost_loss_is_a_row_that_the_report_counts_and_a_score_that_is_shown(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path)
    for step, loss in ((1, 2.0), (2, math.nan), (3, None)):
        file.append({"step": step, "text_loss": loss})
    for line in file.path.read_bytes().splitlines():
        strictly(line)
    series = Columns(file.path)["text_loss"]
    assert series.steps.tolist() == [1, 2] and math.isnan(series.values[1]), "lost is not unmeasured"
    score = Score(**loads(dumps(vars(Score(math.nan, None, None, 4)))))
    assert [*lines_of({"fid": score})] == ["fid  nan  of 4"]


@pytest.mark.parametrize("room", ["data", "train"])
def test_nothing_of_the_product_writes_json_in_another_way(room: str) -> None:
    for path in (ROOT / room).rglob("*.py"):
        calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        written = [ast.unparse(call) for call in calls if ast.unparse(call) in ("json.dumps", "json.dump")]
        assert not written or path.name == "strict_json.py", path
