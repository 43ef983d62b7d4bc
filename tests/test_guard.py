"""Bad updates are skipped on all ranks alike and their documents named; a run can go back and omit them (P8)."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from data.dataset import open_data
from data.loader import Loader
from data.tokenizer import Tokenizer
from tests.ranks import run_ranks
from tests.runs import assert_same_end, finish, launch, numbers, rows, saved_state, saved_steps, settings, wait_for
from tests.sources import make_source, pairs
from tests.test_wandb_page import page, steps_of
from train.config import load_config
from train.distributed.ranks import Ranks
from train.optim.guard import Guard, GuardConfig
from train.pretrain_config import PretrainConfig
from train.step import StepLoss

NORMS = [1.0, 2.0, math.nan, 3.0, 100.0, math.inf, 2.0, 5.9, 6.1, 2.0]


def test_norms_that_are_not_finite_or_far_above_the_mean_of_good_ones_are_skipped() -> None:
    """Against the rule in plain Python; the mean is of good updates only, and applies once there are enough."""
    guard = Guard(GuardConfig(spike_factor=3.0, spike_after=3), torch.device("cpu"))
    mean, good, skipped, in_a_row = 0.0, 0, 0, 0
    for norm in NORMS:
        bad = not math.isfinite(norm) or (good >= 3 and norm > 3.0 * mean)
        assert guard.judge(torch.tensor(norm)).item() == bad, norm
        if not bad:
            mean, good = mean + (norm - mean) / (good + 1), good + 1
        skipped, in_a_row = skipped + bad, (in_a_row + 1) * bad
        assert guard.counts.tolist() == pytest.approx([skipped, in_a_row, good, mean])
    assert skipped == 3 and good == 7
    plain = Guard(GuardConfig(), torch.device("cpu"))
    assert [plain.judge(torch.tensor(norm)).item() for norm in NORMS] == [not math.isfinite(norm) for norm in NORMS]


def test_impossible_settings_are_refused() -> None:
    """P10."""
    for changes in ({"spike_factor": 1.0}, {"spike_factor": math.nan}, {"max_bad_in_a_row": 0}, {"max_rollbacks": -1}):
        with pytest.raises(ValueError, match=next(iter(changes))):
            GuardConfig(**changes)


def _blame(ranks: Ranks) -> list[str]:
    """Three steps, two micro-batches of two lanes on each of two ranks: good, not finite on rank 1, high on rank 0."""
    guard = Guard(GuardConfig(spike_factor=2.0, spike_after=1, max_bad_in_a_row=2), ranks.device)
    first = 4 * ranks.rank
    for step, norm, text in [(1, 1.0, [1.0, 1.0]), (2, math.nan, [1.0, math.nan]), (3, 9.0, [50.0, 40.0])]:
        if step != 1 and ranks.rank != (step == 2):
            text = [2.0, 2.0]
        guard.judge(torch.tensor(norm))
        micro_batch = SimpleNamespace(input_ids=torch.zeros(2, 8), num_text_targets=10, num_images=0)
        documents = {lane: [(0, lane, step)] for lane in range(first, first + 4)}
        none = torch.zeros(3, 6), torch.zeros(2, 1), torch.zeros(2)
        losses = [StepLoss(*torch.tensor([0.0, 10 * value, 0.0]), *none) for value in text]
        batch: Any = SimpleNamespace(step=step, micro_batches=[micro_batch] * 2, documents=documents)
        guard.note(batch, losses, torch.tensor(norm))
    found, too_many = guard.review(lambda position: "{}/{}#{}".format(*position), ranks)
    assert too_many == found and guard.review(str, ranks) == ([], []), "two in a row, and both are enough"
    return [str(update) for update in found]


def test_blame_goes_to_the_micro_batch_that_is_not_finite_or_highest_on_any_rank() -> None:
    expected = [
        "step 2 (gradient norm nan; lanes [6, 7]; documents 0/6#2, 0/7#2)",
        "step 3 (gradient norm 9; lanes [0, 1]; documents 0/0#3, 0/1#3)",
    ]
    assert run_ranks(_blame, 2) == [expected] * 2


BAD_STEPS, END = (8, 13), 16


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> dict[int, str]:
    """Pairs; one in the batch of each bad step has latents that are finite but 10,000 times too large.

    Returns those pairs' names by step.
    """
    folder, documents = tmp_path_factory.mktemp("data"), pairs(500)
    argv = settings(folder, tokenizer, {"pairs": make_source(folder / "clean", tokenizer, documents)})
    config = load_config(PretrainConfig, argv)
    data = open_data(config.data, config.seed, config.model.patch_size)
    loader = Loader(data, config.data, rank=0, world_size=1, micro_batch_size=1)
    batches = {step: loader.next(30) for step in range(1, max(BAD_STEPS) + 1)}
    loader.close()
    names = {}
    for step in BAD_STEPS:
        _, _, record = batches[step].documents[4][0]
        documents[record][1][:2] = 3e4  # the means
        names[step] = f"{folder / 'pairs' / '00000.tar'}#{record}"
    make_source(folder / "pairs", tokenizer, documents)
    return names


def _argv(run_dir: Path, tokenizer: Tokenizer, poisoned: dict[int, str], **changes: Any) -> list[str]:
    data = Path(poisoned[BAD_STEPS[0]]).parent
    defaults: dict[str, Any] = {"guard__spike_factor": 50.0, "guard__spike_after": 2, "guard__max_bad_in_a_row": 1}
    defaults |= {"optim__steps": END, "diffusion__prediction": "v", "micro_batch_size": 1, "checkpoint__keep_last": 100}
    return settings(run_dir, tokenizer, {"pairs": data}, **{**defaults, **changes})


def test_a_poisoned_image_is_skipped_counted_and_named_or_stops_the_run(
    tmp_path: Path, tokenizer: Tokenizer, poisoned: dict[int, str]
) -> None:
    """Its document is named on whichever rank it is; the skipped update changed no weight; the count is saved."""
    run_dir = tmp_path / "skip"
    said = finish(_argv(run_dir, tokenizer, poisoned, guard__max_bad_in_a_row=3), 2)
    for step, name in poisoned.items():
        (line,) = [line for line in said.splitlines() if f"skipped the update of step {step} " in line]
        assert "lanes [4]" in line and name in line
    assert rows(run_dir)[-1]["skipped_updates"] == saved_state(run_dir)[2]["guard"][0] == len(BAD_STEPS)

    run_dir = tmp_path / "stop"
    with launch(_argv(run_dir, tokenizer, poisoned), 2) as run:
        assert run.wait() == [1, 1], run.output
    (end,) = [line for line in run.output.splitlines() if "train.pretrain: stopped" in line]
    first = BAD_STEPS[0]
    assert f"stopped after step {first}: the updates of steps {first} to {first} were skipped" in end
    assert poisoned[first] in end and poisoned[first] in (run_dir / "bad_updates.jsonl").read_text()
    assert saved_steps(run_dir)[-1] == first


def test_a_run_goes_back_and_omits_the_bad_batches_and_so_does_its_resume(
    tmp_path: Path, tokenizer: Tokenizer, poisoned: dict[int, str]
) -> None:
    """P4, P8: as often as configured; excluded batches have no rows, and a kill afterwards changes nothing."""
    back = {"guard__max_rollbacks": 2, "guard__exclude_before": 1}
    argv = _argv(tmp_path / "back", tokenizer, poisoned, **back)
    said = finish(argv, 2)
    assert [f"the batches of steps {step - 1} to {step} are left out" in said for step in BAD_STEPS] == [True, True]
    left_out = {step - before for step in BAD_STEPS for before in (0, 1)}
    assert [row["step"] for row in rows(tmp_path / "back")] == [
        step for step in range(1, END + 1) if step not in left_out
    ]
    last = rows(tmp_path / "back")[-1]
    assert last["rollbacks"] == 2 and last["skipped_updates"] == 0
    assert saved_state(tmp_path / "back")[2]["progress"]["excluded"] == [[step - 1, step] for step in BAD_STEPS]

    argv = _argv(tmp_path / "killed", tokenizer, poisoned, **back)
    with launch(argv, 2) as run:
        wait_for(lambda: "pretrain: back to" in run.output, run)
        run.signal(9)
        run.wait()
    finish(argv, 2)
    assert numbers(tmp_path / "killed") == numbers(tmp_path / "back")
    assert_same_end(tmp_path / "killed", tmp_path / "back")


def test_without_a_checkpoint_to_go_back_to_the_run_stops(
    tmp_path: Path, tokenizer: Tokenizer, poisoned: dict[int, str]
) -> None:
    argv = _argv(tmp_path / "run", tokenizer, poisoned, guard__max_rollbacks=1, checkpoint__interval_steps=1000)
    with launch(argv, None) as run:
        assert run.wait() == [1], run.output
    assert "there is no checkpoint before them" in run.output and "Traceback" not in run.output
    assert saved_steps(tmp_path / "run") == [BAD_STEPS[0]], "what was trained is kept"


@pytest.mark.slow  # each way back has its own test here and in test_resume, its page in test_wandb_page
def test_going_back_on_request_and_by_itself_happens_once_and_abandoned_rows_are_kept(
    tmp_path: Path, tokenizer: Tokenizer, poisoned: dict[int, str]
) -> None:
    """P4: the same command again, as a requeue gives it, continues."""
    run_dir = tmp_path / "run"
    common: dict[str, Any] = {"checkpoint__interval_steps": 2, "log__wandb": "offline"}
    finish(_argv(run_dir, tokenizer, poisoned, guard__max_bad_in_a_row=5, **common), 1)
    first_page = page(run_dir)[0]
    changes = {"guard__max_rollbacks": 2, "guard__exclude_before": 3, "resume": 4, **common}
    argv = _argv(run_dir, tokenizer, poisoned, **changes)
    assert "going back as resume= says" in finish(argv, 1)
    kept = {aside.name: len(rows(aside)) for aside in run_dir.glob("abandoned-*")}
    assert kept["abandoned-1"] == END and len(kept) == 3, kept
    again = finish(argv, 1)
    assert "going back as resume= says" not in again and f"done after step {END}" in again
    assert len(list(run_dir.glob("abandoned-*"))) == 3
    assert steps_of(first_page) == list(range(1, END + 1))
    assert steps_of(page(run_dir)[0]) == [row["step"] for row in rows(run_dir)] != steps_of(first_page)
    ids = {path.stem for path in run_dir.glob("wandb/offline-run-*/*.wandb")}
    assert len(ids) == 1 + len(kept), "a page for what the run was, one for each time that it went back"
