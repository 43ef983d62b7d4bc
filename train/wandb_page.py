"""A run's page at wandb: a copy of its metrics that may fail, hang or be absent without affecting training (P13).

A thread makes the page out of the run folder: it follows metrics.jsonl and the sheets in previews/ from the first row
that the page lacks. So the page is complete whatever became of wandb's own process, which Slurm and systemd may stop
with the same signal as the ranks, and which buffers: once it is found dead it is restarted, and what died with an
attempt is sent by the next. Training only wakes the thread. Rejected: shielding wandb's process from signals, for which
it installs handlers whatever it inherits, in a session of its own.

A run keeps one page over all its attempts. Steps that a killed attempt logged after its last checkpoint are run and
logged again, to the same numbers (P4), so the page keeps the rows that it has and skips them until it is overtaken.
Only where a run goes back on purpose (the guard, or `resume=STEP`), or a row turns out to contradict the page (other
tokens or another learning rate at the same step), does it get a new page: the old one keeps what was abandoned, the
new one gets the rows up to the fork again, and both are in one group. Rejected: wandb's own forks and rewinds, which
need a server that offers them, and erase what was abandoned or do not work offline.

    <run>/wandb-page.json   id of the page, which moves with the folder; without it the next start creates a new page
"""

import json
import logging
import os
import queue
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from data.durable import write_durably
from data.pictures import read_sheet
from data.strict_json import dumps, loads
from train.code_version import code_version
from train.console import say
from train.metric_sections import page_name
from train.wandb_file import records, row_of

ID_FILE = "wandb-page.json"
RESTARTS = 3  # of its process, in one attempt of the run
INIT_S, FINISH_S, STOP_S = 20, 60, 20  # the longest to wait for a server: at the start, at the end, after a stop signal
STATISTICS_S = 30.0  # between samples of this machine's statistics
LAST_BLOCKS = 128  # of an offline page, 4 MiB: its last step's rows
SHARE = 0.1  # of a core, at most, for rows of the past while training runs
TOKENS_SEEN = "progress/tokens_seen"
REQUEUE = 75  # the exit status after a stop signal

log = logging.getLogger(__name__)


class WandbPage:
    """The page of the run in `folder`. A `mode` or `project` of None means WANDB_MODE or WANDB_PROJECT.

    `dropped`: the rows of metrics.jsonl after the step that this attempt starts from, by step. `went_back`: on purpose.
    """

    def __init__(
        self,
        mode: str | None,
        project: str | None,
        folder: Path,
        recipe: dict[str, Any],
        dropped: Iterable[dict[str, Any]] = (),
        went_back: int | None = None,
    ) -> None:
        self._mode = mode or os.environ.get("WANDB_MODE") or "disabled"
        self._project = project or os.environ.get("WANDB_PROJECT") or "transfusion"
        self._folder, self._recipe = folder, recipe
        self._dropped = {row["step"]: meaning(row) for row in dropped if "learning_rate" in row}
        self._run: Any = None  # None: not yet, or no longer
        self._restarts_left = 0
        self._pictures: list[Path] = []  # not yet sent, in order of their steps
        self._newest_picture = 0  # the step of the last that is known; a later sheet may be of an abandoned past
        self._forks_waiting = 0
        self._begun = False  # the page was open in this attempt
        self._todo: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        if self._mode == "disabled":
            return
        # Its error reports would go to a server of its own, for which an exit without a network waits 10 s.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        self._dir = os.environ.get("WANDB_DIR") or str(folder)
        # Where the pictures of tables wait to be sent; by default in the home folder.
        os.environ.setdefault("WANDB_DATA_DIR", str(Path(self._dir, "wandb").absolute()))
        try:
            # Not in the thread: a loader worker, forked meanwhile, would wait for ever for what is half imported.
            import wandb  # noqa: F401

            _disable_telemetry()
            self._identity = self._read_identity()
            if went_back is not None and self._dropped:
                self._identity = self._forked(went_back)
                self._dropped.clear()  # rows of the page before: other rates are no reason to fork again
        except Exception as error:  # a logger may fail in any way
            log.warning("wandb is off: %s; metrics.jsonl has everything", error)
            return
        self._thread = threading.Thread(target=self._serve, name="wandb page", daemon=True)
        self._thread.start()
        self.wake()

    def wake(self) -> None:
        """Send what is new in metrics.jsonl, soon."""
        self._ask(lambda: None)

    def picture(self, path: Path) -> None:
        """Send a saved sheet of pictures."""

        def note() -> None:
            if _step_of(path) > self._newest_picture:
                self._pictures.append(path)
                self._newest_picture = _step_of(path)
                self._catch_up()

        self._ask(note)

    def alert(self, kind: str, words: str) -> None:
        """Tell people who watch the page."""
        title = f"{self._folder.resolve().name[:40]}: {kind.replace('_', ' ')}"
        self._ask(lambda: self._run.alert(title, words, "WARN" if kind == "skipped_update" else "ERROR"))

    def fork(self, step: int) -> None:
        """Continue on a new page: the run went back to `step`, and metrics.jsonl has been cut."""
        self._forks_waiting += 1  # from now on, as rows of the new past may follow before the thread gets there
        self._ask(partial(self._fork, step))

    def close(self, status: int = 0) -> None:
        """Wait until everything is written or sent: one minute at most, less after a stop signal or an error."""
        if self._thread is None:
            return
        self._closing.set()
        self._ask(partial(self._finish, status))
        self._todo.put(None)
        self._thread.join(STOP_S if status else FINISH_S)
        if self._thread.is_alive():
            log.warning("wandb does not answer; the next start completes the page from metrics.jsonl")

    def _ask(self, work: Callable[[], object]) -> None:
        if self._thread is not None and self._thread.is_alive():
            self._todo.put(work)

    def _serve(self) -> None:
        """Do what is asked for until closed; the page's thread."""
        for work in iter(self._todo.get, None):
            while True:
                try:
                    if self._run is None:
                        self._open()
                    self._catch_up()
                    work()
                    break
                except Exception as error:  # a logger may fail in any way; training continues without it
                    self._run = None
                    _forget()
                    if not self._restarts_left:
                        log.warning("wandb is off: %s; metrics.jsonl has everything", error)
                        return
                    self._restarts_left -= 1

    def _open(self) -> None:
        """Start wandb's process; find out what the page has."""
        self._run = run = self._start()
        run.define_metric("*", step_metric="step")
        if not self._begun:
            self._begun, self._restarts_left = True, RESTARTS
            say(f"wandb: {f'offline, in {Path(run.dir).parent}' if run.offline else run.url}")
        self._offset = 0
        self._told: dict[str, Any] = {}  # in the summary: the best held-out losses and which rank is slowest
        self._shown: dict[str, Any] = dict(run.summary) if run.resumed else {}  # last values, of the step `step`
        if run.offline:  # each attempt writes a file of its own, and `wandb sync` appends one to the other
            mine = Path(run.dir).parent
            files = mine.parent.glob(f"*run-*-{run.id}*/run-{run.id}.wandb")  # -1, -2 follow in the same second
            for path in sorted(files, key=lambda path: path.stat().st_mtime_ns):
                if path.parent != mine:
                    for record in records(path, LAST_BLOCKS):
                        self._shown.update(row_of(record))
        last = max((row["step"] for row in self._rows()), default=0)
        self._offset = 0
        sheets = sorted((self._folder / "previews").glob("step-*.png"))
        self._pictures = [path for path in sheets if _step_of(path) <= max(last, self._newest_picture)]
        self._newest_picture = max([_step_of(path) for path in self._pictures], default=0)

    def _start(self) -> Any:
        import wandb

        settings = wandb.Settings(
            init_timeout=INIT_S,
            finish_timeout=FINISH_S,
            console="off",
            silent=True,
            x_stats_sampling_interval=STATISTICS_S,
        )
        wandb.setup(settings)  # without this it would ask for a key on the terminal, and wait
        mode: Any = self._mode
        name, identity = self._folder.resolve().name, self._identity
        forked = identity.get("forked_from")
        given: dict[str, Any] = {
            "project": self._project,
            "dir": self._dir,
            "id": identity["id"],
            "name": f"{name} from step {forked['step']}" if forked else name,
            "group": identity.get("group", identity["id"]),
            "resume": "allow",
            "config": {**self._recipe, "code": code_version(), "forked_from": forked},
            "settings": settings,
        }
        try:
            return wandb.init(mode=mode, **given)
        except Exception as error:  # no key, no network
            if mode != "online":
                raise
            log.warning(
                "wandb: %s; the page is kept offline, for `wandb sync`", " ".join(str(error).split()).rstrip(".")
            )
            _forget()  # its process still holds the id
            wandb.setup(settings)
            return wandb.init(mode="offline", **given)

    def _rows(self) -> Iterable[dict[str, Any]]:
        """Yield the rows of metrics.jsonl from the offset, which moves on."""
        path = self._folder / "metrics.jsonl"
        if not path.exists():
            return
        with path.open("rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):  # being written
                    return
                self._offset += len(line)
                with suppress(ValueError):
                    yield loads(line)

    def _catch_up(self) -> None:
        """Send the rows and pictures that the page lacks, those of the past without haste."""
        if self._forks_waiting:
            return
        began, told = time.monotonic(), dict(self._told)
        for count, row in enumerate(self._rows(), start=1):
            if "learning_rate" in row and self._dropped.pop(row["step"], meaning(row)) != meaning(row):
                self._fork(row["step"] - 1)  # which catches up
                return
            self._send_pictures(row["step"])
            self._send_row(row)
            if count % 50 == 0:
                self._closing.wait((time.monotonic() - began) * (1 / SHARE - 1))
                began = time.monotonic()
        self._send_pictures(None)
        if changed := {name: value for name, value in self._told.items() if told.get(name) != value}:
            self._run.summary.update(changed)

    def _send_row(self, row: dict[str, Any]) -> None:
        items = {"step": row["step"]}
        for name, value in row.items():
            if (shown := page_name(name)) is not None and value is not None:
                items[shown] = value
                if shown.startswith("heldout/") and "/x0_error/" not in shown:  # lower is better
                    best = shown.replace("heldout/", "best/")
                    self._told[best] = min(value, self._told.get(best, value))
        self._told |= {name: row[name] for name in ("slowest_rank", "slowest_host") if name in row}
        if not self._has(items):
            self._run.log({**items, "_timestamp": row["time"]} if "time" in row else items)

    def _send_pictures(self, before: int | None) -> None:
        """Send the sheets of the steps before this one, each as a table of pictures with their prompts."""
        import wandb

        while self._pictures and (before is None or _step_of(self._pictures[0]) < before):
            path = self._pictures[0]
            step = _step_of(path)
            if not self._has({"step": step, "previews_step": step}) and path.exists():
                table = wandb.Table(columns=["step", "prompt", "picture"])
                for picture, prompt in read_sheet(path):
                    table.add_data(step, prompt, wandb.Image(picture, caption=prompt))
                self._run.log({"step": step, "previews_step": step, "previews": table})
            del self._pictures[0]

    def _has(self, items: dict[str, Any]) -> bool:
        """Return whether the page had this row, or that of the same step of an earlier attempt, when it was opened."""
        step, last = items["step"], self._shown.get("step", -1)
        if TOKENS_SEEN in items:  # a row of training: what else it has includes times
            items = {TOKENS_SEEN: items[TOKENS_SEEN]}
        return step < last or (step == last and items.items() <= self._shown.items())

    def _fork(self, step: int) -> None:
        """End the page and open another, which gets the rows up to `step` again."""
        self._identity = self._forked(step)
        self._dropped.clear()
        self._forks_waiting = max(0, self._forks_waiting - 1)
        self._newest_picture = min(step, self._newest_picture)
        self._run.summary["continued_as"] = self._identity["id"]
        self._run.finish()
        self._run = None
        self._open()
        self._catch_up()

    def _finish(self, status: int) -> None:
        import wandb

        if status == REQUEUE:
            self._run.mark_preempting()
        self._run.finish(exit_code=status)
        wandb.teardown()  # ends its process, which would hold the finished page for a moment longer

    def _read_identity(self) -> dict[str, Any]:
        """Return the page's id: the same after a resume or a move of the folder, never that of another run."""
        kept = self._folder / ID_FILE
        return json.loads(kept.read_bytes()) if kept.is_file() else self._write_identity({})

    def _forked(self, step: int) -> dict[str, Any]:
        old = self._identity
        return self._write_identity(
            {"group": old.get("group", old["id"]), "forked_from": {"page": old["id"], "step": step}}
        )

    def _write_identity(self, facts: dict[str, Any]) -> dict[str, Any]:
        name = re.sub(r"[^A-Za-z0-9_.-]", "-", self._folder.resolve().name)
        identity = {"id": f"{name}-{uuid.uuid4().hex[:8]}", **facts}
        write_durably(self._folder / ID_FILE, dumps(identity).encode())
        return identity


def meaning(row: dict[str, Any]) -> tuple[Any, ...]:
    """Return what a step has in common with itself run again, on any number of ranks and however sums are rounded."""
    return tuple(row.get(name) for name in ("tokens_seen", "images_seen", "learning_rate"))


def _step_of(path: Path) -> int:
    return int(path.stem.removeprefix("step-"))


def _disable_telemetry() -> None:
    """Turn off what would wait for ever, for a lock of wandb's own, when wandb's process dies while it starts."""
    with suppress(ImportError, AttributeError):  # of other versions
        from wandb.analytics.opentelemetry import opentelemetry_proxy

        opentelemetry_proxy.disable()


def _forget() -> None:
    """End wandb's process, which would otherwise be used again."""
    with suppress(Exception):
        import wandb

        wandb.teardown()
