"""Going back to an earlier checkpoint after too many bad updates in a row (P8).

train/optim/guard.py judges each update and skips bad ones; here they are reported, and the run stops or goes back to
before them. The steps between are then counted again but train nothing: their batches, and some before, are left out.
"""

from dataclasses import asdict

from train.checkpoints.checkpoint import step_of, verify
from train.checkpoints.resume import go_back_before
from train.console import say
from train.next_batch import CannotContinue
from train.optim.guard import BadUpdate
from train.run import Run


class GoBack(Exception):
    """Too many updates in a row were bad: continue from an earlier checkpoint, without their batches."""

    def __init__(self, bad_updates: list[BadUpdate]) -> None:
        super().__init__(bad_updates)
        self.bad_updates = bad_updates


def review_updates(run: Run) -> None:
    """Report the updates skipped since the last review. Collective.

    After too many in a row, raises GoBack, or CannotContinue once `guard.max_rollbacks` are used up.
    """
    bad_updates, too_many = run.state.optimizer.guard.review(run.data.name_of, run.ranks)
    run.folder.append("bad_updates.jsonl", map(asdict, bad_updates))
    for update in bad_updates:
        run.log.event("skipped_update", update.step, str(update))
    if run.ranks.is_first:
        for update in bad_updates:
            say(f"pretrain: skipped the update of {update}")
    if not too_many:
        return
    guard = run.config.guard
    if run.state.progress.rollbacks < guard.max_rollbacks:
        raise GoBack(too_many)
    raise CannotContinue(
        f"the updates of steps {too_many[0].step} to {too_many[-1].step} were skipped for their gradients "
        f"(guard.max_bad_in_a_row={guard.max_bad_in_a_row}): {'; '.join(map(str, too_many[-3:]))}; all of them in "
        f"{run.folder.path / 'bad_updates.jsonl'}. Look at these documents, lower optim.learning_rate, or set "
        "guard.max_rollbacks to continue without these batches"
    )


def go_back(run: Run, bad_updates: list[BadUpdate]) -> None:
    """Load a checkpoint before the bad updates, and exclude their batches and those that led to them. Collective.

    Raises CannotContinue, with the state unchanged, if there is no such checkpoint.
    """
    last = bad_updates[-1].step
    bad = last - bad_updates[-1].in_a_row + 1  # the first bad step, perhaps of an earlier start of the run
    run.saver.settle()
    first = max(1, bad - run.config.guard.exclude_before)
    path = go_back_before(first, run.folder, run.ranks) or go_back_before(bad, run.folder, run.ranks)
    origin = run.origin.checkpoint  # perhaps another run's
    if path is None and origin is not None and step_of(origin) < bad and not verify(origin, run.ranks):
        path = origin
    if path is None:
        raise CannotContinue(f"the updates of steps {bad} to {last} were bad, and there is no checkpoint before them")
    first = max(first, step_of(path) + 1)
    state, before, back_to = run.state, run.state.progress, run.state.back_to
    state.load(path, run.ranks)
    state.progress.rollbacks, state.back_to = before.rollbacks + 1, back_to
    state.progress.excluded = [*before.excluded, (first, last)]
    run.saver.saved_step = state.progress.step if path.parent == run.folder.checkpoints else 0
    run.ranks.on_first(lambda: run.folder.metrics.cut(state.progress.step, evaluated=bool(state.metrics)))
    words = (
        f"back to {path}; the batches of steps {first} to {last} are left out: they count as steps and train nothing "
        f"(guard.exclude_before={run.config.guard.exclude_before})"
    )
    run.log.event("went_back", state.progress.step, words, to=state.progress.step, left_out=[first, last])
    if run.ranks.is_first:
        say(f"pretrain: {words}")
