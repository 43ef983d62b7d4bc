"""A training that faults strike, from its first start to its end, compared with an undisturbed one.

After every fault: each checkpoint with its final name verifies except one that we damaged, nothing saved is lost, the
next start resumes from the newest intact checkpoint, and no process is left. At the end: the same rows, lanes and
weights as the undisturbed run, and the same documents, read again from the lanes that each resume started with.
"""

import itertools
import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from bench.faults import DAMAGES, GRACE_S, KINDS, Fault, NotSurvived, Scene, wait_for_instant
from bench.job import NUMBERS, Job, read_checkpoint
from bench.ranks import ProgramRanks
from data.dataset import DataSet, open_data
from data.lane_state import LaneState
from data.lanes import Lane
from data.packing import PADDING_DOCUMENT
from data.source import Source
from train.checkpoints import checkpoint
from train.config import load_config
from train.pretrain_config import PretrainConfig

WORLD_SIZE = 2  # of the undisturbed run
# Another number of ranks sums gradients in another order, and Adam's first steps amplify the last bits.
TOLERANCE = 1e-3  # of rows, relative; of weights, absolute
LATE_S = 40.0  # limit for the first step, in addition to its fault's own delay
END_S = 120.0  # an undisturbed attempt that takes longer is considered hung
POLL_S = 0.003

Lanes = dict[int, LaneState]  # states by lane
Documents = Counter[tuple[int, ...]]  # (source, epoch, shard, record) -> how often its first token was trained


@dataclass
class Entry:
    """The outcome of one fault."""

    fault: Fault
    target: int
    resumed: bool = False  # a later start resumed from where it had to
    half_written: bool = False  # a save was in progress
    seconds_to_first_step: float | None = None  # of the struck attempt, from its start
    seconds_to_end: float | None = None  # of the other ranks
    outwaited: bool = False  # the peers of a frozen rank were still running after the timeout
    what: str | None = None  # why it was not survived


@dataclass(frozen=True)
class End:
    """What a finished run leaves behind."""

    rows: list[dict[str, Any]]  # of training steps
    evaluations: list[dict[str, Any]]
    tensors: dict[str, torch.Tensor]
    lanes: Lanes
    progress: dict[str, Any]

    @classmethod
    def of(cls, job: Job) -> "End":
        folder = job.folder_of(job.newest_intact())
        tensors, _, meta = read_checkpoint(folder)
        lanes = saved_lanes(job, checkpoint.step_of(folder))
        return cls(job.rows(), job.evaluations(), tensors, lanes, meta["progress"])


@dataclass(frozen=True)
class Undisturbed:
    """The undisturbed run, and how long its phases took."""

    end: End
    documents: Documents
    data: Callable[[], DataSet]  # opens it again: a data set that has read a vanished shard would keep reading it
    steps: int
    paces: dict[str, float]  # seconds by phase

    @classmethod
    def run(cls, job: Job) -> "Undisturbed":
        """Train without a fault."""
        steps = job.settings["optim.steps"]
        with job.start(WORLD_SIZE) as attempt, FirstStep(job, attempt, 0) as first:
            statuses = attempt.wait(END_S)
        if set(statuses) != {0} or first.seconds is None:
            raise RuntimeError(f"the undisturbed run ended with {statuses}:\n{attempt.output}")
        config = load_config(PretrainConfig, job.argv())
        data, end = partial(open_data, config.data, config.seed, config.model.patch_size), End.of(job)
        step_s = sorted(row["step_s"] for row in end.rows)
        paces = {
            "start": first.seconds,
            "step": step_s[len(step_s) // 2],
            "save": step_s[len(step_s) // 2],
            "commit": step_s[0] / 4,
            "evaluation": max(row["evaluation_share"] * row["step_s"] for row in end.rows),
            "exit": 4 * step_s[-1],
        }
        documents, _ = read_again(data(), {}, 0, steps)
        return cls(end, documents, data, steps, paces)


class FirstStep:
    """Watches, while open, for the first row that an attempt adds to the metrics of a job resuming from a step.

    It reads the folder only: if two threads ask for a process's exit status, one of them gets a wrong answer.
    """

    def __init__(self, job: Job, attempt: ProgramRanks, resume: int) -> None:
        self.job, self.started, self.resume = job, attempt.started, resume
        self.seconds: float | None = None  # from the attempt's start; None: no row so far
        self._inode, self._closed = job.inode(), False
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def has_come(self) -> bool:
        return self.seconds is not None

    def __enter__(self) -> "FirstStep":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed = True
        self._thread.join()

    def _watch(self) -> None:
        ended = False
        while not ended and self.seconds is None:
            ended = self._closed  # read first: a last row may come in between
            if self.job.inode() != self._inode and self.job.last_step() > self.resume:
                self.seconds = time.monotonic() - self.started
            time.sleep(POLL_S)


class Trajectory:
    """One training from scratch that faults strike one after another."""

    def __init__(self, job: Job, undisturbed: Undisturbed) -> None:
        self.job, self.undisturbed = job, undisturbed
        self.entries: list[Entry] = []
        self.world_sizes: set[int] = set()
        self._resumes: list[tuple[int, Lanes]] = []  # (step, lanes) that each part of the final trajectory started from
        self._harmed: set[int] = set()  # steps whose checkpoint we damaged

    @property
    def same_world_size(self) -> bool:
        return self.world_sizes == {WORLD_SIZE}

    def strike(self, fault: Fault, target: int) -> Entry:
        """Start the command, let the fault strike it and check what is left."""
        entry = Entry(fault, target)
        self.entries.append(entry)
        try:
            self._attempt(fault.world_size, entry)
        except NotSurvived as error:
            entry.what = str(error)
        return entry

    def finish(self) -> tuple[list[str], Documents, Documents]:
        """Start the command once more; return how its end differs from the undisturbed run's, and the documents lost
        and repeated."""
        self._attempt(max(self.world_sizes, default=WORLD_SIZE), None)
        end, expected = End.of(self.job), self.undisturbed.end
        differences = compare(end, expected, 0.0 if self.same_world_size else TOLERANCE)
        documents: Documents = Counter()
        data, spans = self.undisturbed.data(), [*self._resumes, (self.undisturbed.steps, {})]
        for (first, lanes), (last, _) in itertools.pairwise(spans):
            part, tokens = read_again(data, lanes, first, last)
            documents += part
            for step, count in enumerate(tokens, first + 1):
                trained = end.rows[step - 1]["tokens_seen"] - (end.rows[step - 2]["tokens_seen"] if step > 1 else 0)
                if count != trained:
                    differences.append(f"step {step} trained {trained} tokens, its documents have {count}")
        return differences, self.undisturbed.documents - documents, documents - self.undisturbed.documents

    def _attempt(self, world_size: int, entry: Entry | None) -> None:
        """Run one attempt, with a fault or without; raise NotSurvived for whatever must not happen."""
        job, resume, before = self.job, self.job.newest_intact(), self.job.rows()
        self.world_sizes.add(world_size)
        while self._resumes and self._resumes[-1][0] >= resume:
            self._resumes.pop()
        self._resumes.append((resume, saved_lanes(job, resume) if resume else {}))
        with ExitStack() as stack:
            if entry is None:
                attempt = stack.enter_context(job.start(world_size))
                first = stack.enter_context(FirstStep(job, attempt, resume))
                if set(attempt.wait(END_S)) != {0}:
                    raise NotSurvived(f"started again: statuses {attempt.statuses}: {attempt.output[-600:]!r}")
            else:
                attempt, first = self._struck(entry, resume, stack)
        self._settle(attempt, resume, entry)
        check_rows(job.rows(), before, resume, first.has_come())
        if entry is not None:
            entry.seconds_to_first_step = first.seconds
            if first.seconds is not None and first.seconds > LATE_S:
                raise NotSurvived(f"its first step came after {first.seconds:.0f} s")
        if first.has_come() or entry is None:
            for earlier in self.entries:
                earlier.resumed |= earlier is not entry and earlier.what is None

    def _struck(self, entry: Entry, resume: int, stack: ExitStack) -> tuple[ProgramRanks, FirstStep]:
        fault, job, undisturbed = entry.fault, self.job, self.undisturbed
        kind, luck = KINDS[fault.kind], fault.luck
        timeouts = dict.fromkeys(("timeout_minutes", "startup_timeout_minutes"), kind.timeout_s / 60)
        changes = {"data.num_workers": fault.workers, **timeouts, **kind.changes}
        if kind.harm and fault.phase == "start":
            stack.enter_context(kind.harm(job, luck))
        attempt = stack.enter_context(job.start(fault.world_size, changes, kind.environment))
        first = stack.enter_context(FirstStep(job, attempt, resume))
        scene = Scene(fault, job, attempt, entry.target, undisturbed.steps, undisturbed.paces, luck, first.has_come)
        wait_for_instant(scene)
        if kind.harm and fault.phase != "start":
            stack.enter_context(kind.harm(job, luck))
        kind.strike(scene)
        entry.seconds_to_end, entry.outwaited = scene.seconds_to_end, scene.outwaited
        return attempt, first

    def _settle(self, attempt: ProgramRanks, resume: int, entry: Entry | None) -> None:
        """Check processes and checkpoints once an attempt has ended."""
        deadline = time.monotonic() + GRACE_S
        while left := attempt.leftovers():
            if time.monotonic() > deadline:
                raise NotSurvived(f"processes {left} outlived their run")
            time.sleep(0.02)
        job, problems = self.job, self.job.problems()
        harms = entry is not None and entry.fault.kind in DAMAGES
        self._harmed = {step for step in self._harmed if problems.get(step)} | ({max(problems)} if harms else set())
        if damaged := {step: what for step, what in problems.items() if what and step not in self._harmed}:
            raise NotSurvived(f"damaged checkpoints: {damaged}")
        newest = job.newest_intact()
        if newest < resume and not harms:
            raise NotSurvived(f"checkpoint {resume} is lost; the newest is {newest}")
        if entry is not None:
            entry.half_written = bool(job.being_written())
        if set(attempt.statuses) == {75} and newest != job.last_step() and not harms:
            raise NotSurvived(f"exit 75 after step {job.last_step()}, but {newest} is the newest saved")
        if 0 in attempt.statuses and newest != self.undisturbed.steps and not harms:
            raise NotSurvived(f"exit 0, but {newest} is the newest saved")


def check_rows(rows: list[dict], before: list[dict], resume: int, trained: bool) -> None:
    """Raise NotSurvived unless each step has one row, and an attempt that trained resumed from step `resume`.

    `before` are the rows at its start. Rows contain times, so a step that was trained twice shows.
    """
    if (steps := [row["step"] for row in rows]) != list(range(1, len(rows) + 1)):
        raise NotSurvived(f"metrics.jsonl has the steps {steps}")
    kept = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(before, rows, strict=False)))
    if trained and kept != min(resume, len(before)):
        raise NotSurvived(f"resumed from step {kept}, but {resume} is the newest intact checkpoint")


def compare(end: End, expected: End, tolerance: float) -> list[str]:
    """Return how the ends of two runs differ; a tolerance of 0 compares bits."""
    differences: list[str] = []
    for mine, theirs in ((end.rows, expected.rows), (end.evaluations, expected.evaluations)):
        if [row["step"] for row in mine] != [row["step"] for row in theirs]:
            differences.append(f"rows of steps {[row['step'] for row in mine]}")
        for row, as_expected in zip(mine, theirs, strict=False):
            names = [name for name in as_expected if name in NUMBERS or name.startswith("heldout/")]
            differences += [
                f"step {row['step']}: {name} is {row[name]}, was {as_expected[name]}"
                for name in names
                if row[name] != as_expected[name] and not _close(row[name], as_expected[name], tolerance)
            ]
    if end.tensors.keys() != expected.tensors.keys():
        differences.append("other tensors")
    for name in end.tensors.keys() & expected.tensors.keys():
        one, other = end.tensors[name], expected.tensors[name]
        same = torch.allclose(one, other, rtol=0, atol=tolerance) if tolerance else torch.equal(one, other)
        if not same:
            differences.append(f"{name} differs by up to {(one - other).abs().max():.2g}")
    if (end.lanes, end.progress) != (expected.lanes, expected.progress):
        differences.append("other lanes or counters")
    return differences


def _close(number: float | None, other: float | None, tolerance: float) -> bool:
    return number is not None and other is not None and abs(number - other) <= tolerance * abs(other)


def saved_lanes(job: Job, step: int) -> Lanes:
    """Return the lanes' states in a checkpoint."""
    lanes = json.loads(checkpoint.read_extra(job.folder_of(step), "lanes.json"))
    return {int(lane): LaneState.from_json(state) for lane, state in lanes.items()}


def read_again(data: DataSet, lanes: Lanes, first: int, last: int) -> tuple[Documents, list[int]]:
    """Return the documents begun in steps `first` + 1 to `last`, from the lanes' states after `first`, and the tokens
    of each step."""
    documents: Documents = Counter()
    tokens = [0] * (last - first)
    for number in range(data.settings.lanes):
        lane = Lane(number, data.sources, data.settings, lanes.get(number))
        before = begun(data.sources, number, lane.state())
        for step in range(last - first):
            row = lane.next_row()
            tokens[step] += int((row.document_ids != PADDING_DOCUMENT).sum()) if row is not None else 0
        documents += begun(data.sources, number, lane.state()) - before
    return documents, tokens


def begun(sources: list[Source], lane: int, state: LaneState) -> Documents:
    """Return the documents that a lane has begun to train: all that it drew, except those still pending uncut."""
    counts: Documents = Counter()
    for number, cursor in enumerate(state.cursors):
        for each in range(cursor.epoch + 1):
            for place in range(cursor.ordinal) if each == cursor.epoch else itertools.count():
                if (position := sources[number].position(each, lane, place)) is None:
                    break
                counts[number, each, *position] += 1
    for pending in state.pending:
        counts[pending.source, pending.epoch, pending.shard, pending.record] -= not pending.cut
    return counts
