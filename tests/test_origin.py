"""Where a run starts: auto, none, back to a step, from another run; the same command again goes on (P4, P10)."""

import json
import shutil
from pathlib import Path

import pytest

from data.tokenizer import Tokenizer
from tests.runs import (
    SAVE_EVERY,
    STEPS,
    assert_refused,
    assert_same_end,
    finish,
    numbers,
    rows,
    saved_steps,
    settings,
)
from train.distributed import alone
from train.origin import find_origin
from train.run_folder import RunFolder


@pytest.fixture
def twin(tmp_path: Path, undisturbed: Path) -> Path:
    """A copy of the finished run, with checkpoints of two steps."""
    return Path(shutil.copytree(undisturbed, tmp_path / "twin"))


def test_a_run_goes_back_to_a_step_once_and_what_it_leaves_is_put_aside(
    twin: Path, tokenizer: Tokenizer, sources: dict[str, Path], undisturbed: Path
) -> None:
    """Back from 24 to 20 and again to 24, by path or by number; a second start of the same command goes on instead."""
    first = saved_steps(twin)[0]
    path = twin / "checkpoints" / f"step-{first:08d}"
    argv = [*settings(twin, tokenizer, sources), f"resume={path}", "checkpoint.keep_last=5"]
    said = finish(argv, 2)
    assert f"from {path}, where it was told to go back to" in said
    assert numbers(twin) == numbers(undisturbed)
    assert saved_steps(twin) == [first, STEPS]
    (aside,) = twin.glob("abandoned-*")
    assert {path.name for path in aside.iterdir()} == {f"step-{STEPS:08d}", "metrics.jsonl"}
    assert len(rows(aside)) == STEPS
    again = finish([*argv, f"resume={first}", f"optim.steps={STEPS + 2}"], 2)
    assert "going on from there" in again and "told to go back" not in again
    assert saved_steps(twin) == [first, STEPS, STEPS + 1, STEPS + 2] and len(list(twin.glob("abandoned-*"))) == 1


def test_what_resume_asks_for_and_is_not_there_is_refused(
    twin: Path, tmp_path: Path, tokenizer: Tokenizer, sources: dict[str, Path]
) -> None:
    """P10: one message with what is there; and nothing is touched."""
    steps = saved_steps(twin)
    (twin / "checkpoints" / f"step-{steps[0]:08d}" / "meta.json").write_text("{}")
    argv = settings(twin, tokenizer, sources)
    assert_refused(
        [([*argv, "resume=7"], ["resume=7", "it has 20, 24"])],
    )
    assert_refused([([*argv, f"resume={steps[0]}"], [f"resume={steps[0]}", "is damaged", "meta.json"])])
    assert_refused([([*argv, "resume=none"], ["resume=none", "holds 2 checkpoints", "give another run_dir"])])
    fresh = settings(tmp_path / "fresh", tokenizer, sources)
    assert_refused([([*fresh, f"resume={tmp_path}/nowhere"], [f"resume={tmp_path}/nowhere", "neither a checkpoint"])])


def test_a_run_begun_from_another_runs_checkpoint_ends_with_the_same_bits(
    tmp_path: Path, tokenizer: Tokenizer, sources: dict[str, Path], undisturbed: Path
) -> None:
    """And started again it goes on from its own, wherever the other has gone."""
    run_dir, other = tmp_path / "fork", Path(shutil.copytree(undisturbed, tmp_path / "other"))
    path = other / "checkpoints" / f"step-{STEPS // SAVE_EVERY * SAVE_EVERY:08d}"
    argv = [*settings(run_dir, tokenizer, sources), f"resume={path}"]
    assert f"from {path}" in finish(argv, 2)
    assert_same_end(run_dir, undisturbed)
    assert [row["step"] for row in rows(run_dir)] == list(range(STEPS // SAVE_EVERY * SAVE_EVERY + 1, STEPS + 1))
    shutil.rmtree(other)
    assert "done after step 24" in finish(argv, 2)


def test_a_continuation_is_known_by_what_its_checkpoints_say(twin: Path) -> None:
    """Not by their number: later checkpoints of the abandoned course do not count as having gone back."""
    with RunFolder(twin, alone()) as folder:
        first, last = saved_steps(twin)
        meta = json.loads((twin / "checkpoints" / f"step-{last:08d}" / "meta.json").read_text())
        assert meta["back_to"] is None
        assert find_origin("auto", folder, alone()).checkpoint.name == f"step-{last:08d}"
        assert find_origin(str(last), folder, alone()).back_to == last
        origin = find_origin(str(first), folder, alone())
        assert (origin.back_to, origin.checkpoint.name) == (first, f"step-{first:08d}")
