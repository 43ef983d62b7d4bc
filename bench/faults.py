"""The faults: what each kind does to a running job, when, and what must hold afterwards.

A fault is drawn beforehand from (seed, number) alone: its kind, the phase it strikes in, how far into the phase, on
which ranks. It strikes one attempt of a job and always ends it; bench/trajectory.py then starts the same command again
and checks that the job continues. A broken guarantee raises NotSurvived.
"""

import random
import re
import signal
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from bench.harms import flip_bit, full_disk, read_only, remove, truncate, vanished_shard
from bench.job import Job
from bench.ranks import ProgramRanks

POLL_S = 0.001  # a save of the small model takes 0.1 s, its commit a few milliseconds
GRACE_S = 8.0  # beyond a timeout, for a busy machine to end processes
NO_WANDB = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40, "WANDB_SILENT": "true"}


class NotSurvived(Exception):
    """A guarantee that a fault has broken."""


@dataclass(frozen=True)
class Fault:
    number: int  # counts from 1 in its run of the program
    kind: str
    phase: str  # start, step, save, commit, evaluation or exit
    place: float  # where in this fault's share of the steps, in [0, 1)
    moment: float  # how far into the phase, in [0, 1)
    world_size: int
    workers: int  # loader processes per rank
    seed: int  # of everything else that is drawn

    @property
    def luck(self) -> random.Random:
        return random.Random(self.seed)


@dataclass
class Scene:
    """One fault and the attempt it strikes."""

    fault: Fault
    job: Job
    attempt: ProgramRanks
    target: int  # the step it waits for
    steps: int  # of the whole training
    paces: dict[str, float]  # seconds that each phase takes undisturbed
    luck: random.Random
    has_trained: Callable[[], bool]  # the attempt has logged a row of its own
    seconds_to_end: float | None = None  # from a rank's death to the end of its peers
    outwaited: bool = False  # the peers of a frozen rank were still running after the timeout

    @property
    def timeout_s(self) -> float:
        return KINDS[self.fault.kind].timeout_s

    def others_than(self, victim: int) -> list[int]:
        return [rank for rank in range(self.fault.world_size) if rank != victim]

    def end(self, allowed: set[int], *, within_s: float | None = None, ranks: list[int] | None = None) -> None:
        """Wait for the ranks to end, each with one of the `allowed` statuses."""
        within_s = within_s or self.timeout_s + GRACE_S
        statuses = self.attempt.wait(within_s, ranks)
        statuses = statuses if ranks is None else [statuses[rank] for rank in ranks]
        if None in statuses:
            raise NotSurvived(f"statuses {statuses} {within_s:.0f} s after the fault: ranks hang")
        if not set(statuses) <= allowed:
            raise NotSurvived(f"statuses {statuses}, expected {sorted(allowed)}")


@dataclass(frozen=True)
class Kind:
    """`strike` causes the fault and waits for the end of the attempt; a `harm` lasts until then and is undone."""

    phases: tuple[str, ...]
    strike: Callable[[Scene], None]
    harm: Callable[[Job, random.Random], AbstractContextManager] | None = None
    changes: dict[str, Any] = field(default_factory=dict)  # of the struck attempt's settings
    environment: dict[str, str] = field(default_factory=dict)
    timeout_s: float = 12.0  # of the struck attempt's collectives
    least_ranks: int = 1
    needs_mount: bool = False


def wait_for_instant(scene: Scene) -> None:
    """Return at the fault's instant, or once the attempt has ended; what earlier attempts left does not count."""
    job, target, fault = scene.job, scene.target, scene.fault

    def identities() -> set[tuple[int, int]]:
        """Return (step, inode) of the checkpoints: a replacement has the same name."""
        return {(step, job.folder_of(step).stat().st_ino) for step in job.saved()}

    left_unfinished, left_saved = set(job.being_written().values()), identities()

    def being_written(pattern: str) -> list[Path]:
        writing = [path for step, path in job.being_written().items() if step >= target and path not in left_unfinished]
        return [file for path in writing for file in path.glob(pattern)]

    def reached() -> bool:
        return scene.has_trained() and job.last_step() >= target

    every = job.settings["evaluation.interval_steps"]
    if fault.phase == "evaluation":  # which follows the row of its step
        target = min(-(-target // every), scene.steps // every) * every
    conditions = {
        "start": lambda: True,
        "save": lambda: any(file.stat().st_size for file in being_written("__*")),
        "commit": lambda: being_written("checksums.json") or any(s >= target for s, _ in identities() - left_saved),
    }
    condition = conditions.get(fault.phase, reached)
    while scene.attempt.running:
        with suppress(FileNotFoundError):  # renamed, or removed by retention, just now
            if condition():
                break
        time.sleep(POLL_S)
    if fault.kind in DAMAGES:
        while len(job.saved()) < 2 and scene.attempt.running:  # one remains to resume from
            time.sleep(POLL_S)
    if fault.phase == "exit" and target < scene.steps:  # a signal ends it early
        scene.attempt.signal(signal.SIGTERM)
    time.sleep(scene.paces[fault.phase] * fault.moment)


def kill_rank(scene: Scene) -> None:
    """`kill -9` of one rank; its peers must notice, report it and end."""
    victim, since = scene.luck.randrange(scene.fault.world_size), _now_if_running(scene)
    scene.attempt.signal(signal.SIGKILL, victim)
    _expect_end_of_others(scene, victim, since)


def kill_all(scene: Scene) -> None:
    scene.attempt.signal(signal.SIGKILL)
    scene.end({-signal.SIGKILL, *_at_exit(scene)})


def freeze_rank(scene: Scene) -> None:
    """SIGSTOP of one rank for longer than the timeout, then SIGCONT or `kill -9`. Peers in a save wait longer, by
    design."""
    victim, since = scene.luck.randrange(scene.fault.world_size), _now_if_running(scene)
    scene.attempt.signal(signal.SIGSTOP, victim)
    others = scene.others_than(victim)
    scene.attempt.wait(scene.timeout_s + GRACE_S / 2, others)
    scene.outwaited = any(scene.attempt.statuses[rank] is None for rank in others)
    if scene.luck.random() < 0.5:
        scene.attempt.signal(signal.SIGKILL, victim)
    else:
        scene.attempt.signal(signal.SIGCONT, victim)
        if scene.outwaited:
            time.sleep(1.0)  # no rank was waiting for it: training continues, and is stopped in an orderly way
            scene.attempt.signal(signal.SIGTERM)
            scene.end({0, 1, 75, *_at_start(scene, signal.SIGTERM)})
            return
    _expect_end_of_others(scene, victim, since)


def _now_if_running(scene: Scene) -> float | None:
    return time.monotonic() if scene.attempt.running else None


def _expect_end_of_others(scene: Scene, victim: int, since: float | None) -> None:
    others = scene.others_than(victim)
    early, late = _at_start(scene), _at_exit(scene)
    scene.end({1, *early, *late}, ranks=others)
    if others and since is not None:
        scene.seconds_to_end = time.monotonic() - since
    scene.end({1, -signal.SIGKILL, *early, *late})
    if early or late:
        return
    for rank in others:
        said = scene.attempt.logs[rank].read_text(encoding="utf-8", errors="replace")
        line = rf"^rank {rank} of {scene.fault.world_size} .* lost .*\brank {victim}\b.* at step \d+"
        if not re.search(line, said, re.MULTILINE):
            raise NotSurvived(f"rank {rank} does not say which rank was lost at which step: {said[-300:]!r}")
        if "Traceback" in said:
            raise NotSurvived(f"rank {rank} lost a peer and printed a traceback of its own: {said[-600:]!r}")


def stop_in_order(scene: Scene, number: int) -> None:
    """A stop signal to one rank, or to all: the run saves and exits 75."""
    one = scene.luck.randrange(scene.fault.world_size)
    scene.attempt.signal(number, scene.luck.choice([None, one]))
    scene.end({75, *_at_start(scene, number), *_at_exit(scene)})
    if not _at_start(scene) and "Traceback" in scene.attempt.output:
        raise NotSurvived("an orderly stop printed a traceback")


def _at_start(scene: Scene, number: int = signal.SIGKILL) -> set[int]:
    """Return the further statuses allowed before training starts: there are no handlers and groups yet."""
    return {1, 2, -number} if scene.fault.phase == "start" else set()


def _at_exit(scene: Scene) -> set[int]:
    """Return the further statuses allowed once the training has finished or was asked to stop."""
    finished = scene.job.last_step() >= scene.steps
    return {0, 1, 75} if scene.fault.phase == "exit" or finished else set()


def damage(scene: Scene) -> None:
    """All ranks are killed, and then a file of the newest checkpoint is damaged."""
    kill_all(scene)
    folder = scene.job.folder_of(max(scene.job.saved()))
    files = sorted(path for path in folder.iterdir() if path.stat().st_size)
    DAMAGES[scene.fault.kind](scene.luck.choice(files), scene.luck)
    if not scene.job.problems()[max(scene.job.saved())]:
        raise NotSurvived(f"{folder} was damaged and still verifies")


def suffer(scene: Scene) -> None:
    """The run may stop by itself or continue; then it is stopped while the harm still lasts. It must not hang."""
    deadline, until = time.monotonic() + scene.timeout_s, scene.job.last_step() + scene.luck.randrange(4, 20)
    while scene.attempt.running and scene.job.last_step() < until and time.monotonic() < deadline:
        time.sleep(0.02)
    scene.attempt.signal(signal.SIGTERM)
    scene.end({0, 1, 2, 75, *_at_start(scene, signal.SIGTERM)})
    if "Traceback" in scene.attempt.output:
        raise NotSurvived("it printed a traceback")


def unreachable_logger(scene: Scene) -> None:
    """It costs no time until the end; the attempt is stopped in an orderly way."""
    if not scene.attempt.running or scene.job.last_step() < scene.target:
        raise NotSurvived(f"without wandb it ended with {scene.attempt.statuses} before step {scene.target}")
    scene.attempt.signal(signal.SIGTERM)
    scene.end({75})


def second_copy(scene: Scene) -> None:
    """Another start of the same command is refused at once, and the first continues."""
    while scene.attempt.running and not scene.job.claimed():
        time.sleep(0.01)
    with scene.job.start(scene.luck.choice([1, 2]), {"timeout_minutes": scene.timeout_s / 60}) as second:
        second.wait(scene.timeout_s + GRACE_S)
        took = time.monotonic() - second.started
        since = scene.job.last_step()
        if set(second.statuses) != {2} and since < scene.steps:
            raise NotSurvived(f"a second copy ended with {second.statuses} after {took:.1f} s, expected 2")
        if "is in use by" not in second.output or "Traceback" in second.output:
            raise NotSurvived(f"a second copy was refused with {second.output[-300:]!r}")
    deadline = time.monotonic() + scene.timeout_s
    while scene.job.last_step() < min(since + 2, scene.steps):
        if not scene.attempt.running or time.monotonic() > deadline:
            raise NotSurvived("the first copy did not continue while a second was started")
        time.sleep(0.01)
    number = scene.luck.choice([signal.SIGTERM, signal.SIGKILL])
    scene.attempt.signal(number)
    scene.end({75, -signal.SIGKILL, *_at_exit(scene)})


TRAINING = ("step", "save", "save", "commit", "commit", "evaluation", "exit")  # a save has the most to lose
ANY = ("start", *TRAINING)
OUTSIDE = ("start", "step")
DAMAGES = {"bit_flipped": flip_bit, "file_truncated": truncate, "file_removed": remove}
KINDS = {
    "kill_rank": Kind(ANY, kill_rank, least_ranks=2),
    "kill_all": Kind(ANY, kill_all),
    "sigterm": Kind(ANY, partial(stop_in_order, number=signal.SIGTERM)),
    "sigusr2": Kind(ANY, partial(stop_in_order, number=signal.SIGUSR2)),
    "sigstop": Kind(ANY, freeze_rank, timeout_s=6.0, least_ranks=2),
    **dict.fromkeys(DAMAGES, Kind(TRAINING, damage)),
    "disk_full": Kind(OUTSIDE, suffer, full_disk, needs_mount=True),
    "read_only": Kind(OUTSIDE, suffer, read_only, needs_mount=True),
    # Nothing waits for wandb but the end, 20 s after a stop signal.
    "wandb_unreachable": Kind(("step",), unreachable_logger, None, {"log.wandb": "online"}, NO_WANDB, timeout_s=36.0),
    "shard_vanishes": Kind(OUTSIDE, suffer, vanished_shard, {"data.max_bad_documents": 0}),
    "second_copy": Kind(OUTSIDE, second_copy),
}
