"""The state of a lane reads back from JSON, is small, and is refused when damaged."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from data.lane_state import Cursor, LaneState, Pending
from data.tokenizer import Tokenizer
from tests.sources import data_config, make_source, pairs, texts
from tests.test_lanes import open_lanes, stream


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda state: 7, "TypeError"),
        (lambda state: {**state, "rows": "3"}, "'3', expected a whole number"),
        (lambda state: {**state, "skipped": {"checksum": None}}, "None, expected a whole number"),
        (lambda state: {**state, "pending": [[0, 0, 0, 0.5, 0]]}, "0.5, expected a whole number"),
        (lambda state: {**state, "cursors": [[0, 0, 0, 0]]}, "TypeError"),
        (lambda state: {**state, "skipped_names": [1]}, "expected strings"),
        (lambda state: {**state, "skipped_documents": [[0, 1]]}, "ValueError"),
        (lambda state: {k: v for k, v in state.items() if k != "pending"}, "KeyError: 'pending'"),
    ],
)
def test_a_damaged_state_is_refused(damage: Callable[[dict], object], message: str) -> None:
    whole = LaneState(3, [Cursor(1, 2, -3)], [Pending(0, 1, 2, 3, 4)], {"checksum": 1}, ["a#1"], [(0, 2, 3)]).to_json()
    assert LaneState.from_json(json.loads(json.dumps(whole))).to_json() == whole
    with pytest.raises(ValueError, match=r"not the state of a lane \(.*it is damaged") as caught:
        LaneState.from_json(damage(whole))
    assert message in str(caught.value)


def test_the_states_of_1024_lanes_are_small(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Less than 1 MiB as JSON, with the default look-ahead; positions as large as those of a billion documents."""
    make_source(tmp_path / "a", tokenizer, texts(1100, lengths=(1, 30)))
    make_source(tmp_path / "b", tokenizer, pairs(64))
    config = data_config(tokenizer, {"a": tmp_path / "a", "b": tmp_path / "b"}, lanes=64, look_ahead=16)
    _, readers = open_lanes(config)
    stream(readers, 2)
    states = {}
    for lane in range(1024):
        state = readers[lane % 64].state().to_json()
        state["pending"] = [[*p[:2], p[2] + 99_000, p[3] + 9_000, p[4]] for p in state["pending"]]
        state["cursors"] = [[*c[:2], c[2] + 10**9] for c in state["cursors"]]
        states[lane] = state
    size = len(json.dumps(states))
    print(f"state of 1,024 lanes: {size} bytes")
    assert size < 1 << 20
