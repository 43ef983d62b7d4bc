"""A run's page at wandb: a copy of its metrics, which may fail, hang or be absent without a say in the training (P13).

wandb writes from a process of its own, and Slurm and systemd may stop that by the same signal as the ranks: it drops
what it still holds. Once it is found gone it is started again and told what metrics.jsonl has of this attempt, so that
the page is whole. Rejected: to keep the signals from it. It handles them whatever it inherits, in a session of its own.

    <run>/wandb-page.json   id of the page, wherever the folder is moved; without it the next start begins another page
"""

import hashlib
import json
import logging
import os
import re
import shutil
import uuid
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from data.durable import write_durably

ID_FILE = "wandb-page.json"
RESTARTS = 3  # of its process, in one attempt of the run

log = logging.getLogger(__name__)


class WandbPage:
    """The page of the run in `folder`; `mode` and `project` None: what WANDB_MODE and WANDB_PROJECT say."""

    def __init__(self, mode: str | None, project: str | None, folder: Path, recipe: dict[str, Any]) -> None:
        self._mode = mode or os.environ.get("WANDB_MODE") or "disabled"
        self._project = project or os.environ.get("WANDB_PROJECT") or "transfusion"
        self._folder, self._recipe = folder, recipe
        self._run: Any = None  # None: there is no page, or not any more
        self._lost = False  # its process is gone
        self._restarts_left = RESTARTS
        self._sent: list[int] = []  # the step of each row and picture, in order
        self._pictures: dict[int, str] = {}  # sent, by step
        if self._mode == "disabled":
            return
        try:
            self._run = self._start()
            self._begun = self._run.starting_step  # rows that the page had before this attempt
        except Exception as error:  # a logger may fail in any way
            log.warning("wandb is off: %s; metrics.jsonl has everything", error)

    @property
    def place(self) -> str | None:
        """Return where the page is, in words; None where there is none."""
        if self._run is None:
            return None
        return f"offline, in {Path(self._run.dir).parent}" if self._run.offline else str(self._run.url)

    def log(self, row: dict[str, Any]) -> None:
        """Send a row that metrics.jsonl has already."""
        self._sent.append(row["step"])
        self._send(lambda run: run.log(row))

    def picture(self, path: os.PathLike, step: int) -> None:
        """Show a saved picture."""
        self._sent.append(step)
        self._pictures[step] = str(path)
        self._send(lambda run: _show(run, str(path), step))

    def close(self) -> None:
        """Wait until all is written or sent, a minute at most."""
        while self._run is not None:
            self._send(_finish, last=True)

    def _send(self, send: Callable[[Any], object], last: bool = False) -> None:
        if self._run is None:
            return
        try:
            if self._lost:
                self._tell_again()
                send = send if last else lambda run: None  # it was told this too
            send(self._run)
            self._run = None if last else self._run
        except Exception as error:  # a logger may fail in any way; the run goes on without its page
            self._lost = True
            self._restarts_left -= 1
            if self._restarts_left < 0:
                log.warning("wandb is off from here on: %s", error)
                self._run = None
                _forget()

    def _start(self) -> Any:
        import wandb

        settings = wandb.Settings(init_timeout=20, finish_timeout=60, console="off", silent=True, x_disable_stats=True)
        wandb.setup(settings)  # or it would ask a terminal for a key, and wait
        given = {
            "project": self._project,
            "dir": os.environ.get("WANDB_DIR") or str(self._folder),
            "id": self._id(),
            "name": self._folder.resolve().name,
            "resume": "allow",
            "config": self._recipe,
            "settings": settings,
        }
        try:
            run = wandb.init(mode=self._mode, **given)
        except Exception as error:  # no key, no network
            if self._mode != "online":
                raise
            log.warning("wandb: %s; the page is kept offline, for `wandb sync`", " ".join(str(error).split()))
            _forget()  # its process has the id still in use
            wandb.setup(settings)
            run = wandb.init(mode="offline", **given)
        run.define_metric("*", step_metric="step")
        return run

    def _tell_again(self) -> None:
        """Start wandb's process again and send what it may have dropped."""
        dead = self._run
        _forget()
        self._run, self._lost = self._start(), False
        reached = self._run.starting_step - self._begun if self._run.resumed else 0  # the server says
        missing, told = Counter(self._sent[reached:]), self._sent[:reached]
        items: dict[int, list[Callable[[], None]]] = {}
        with (self._folder / "metrics.jsonl").open("rb") as rows:
            for row in map(json.loads, rows):
                if row["step"] in missing:
                    items.setdefault(row["step"], []).append(partial(self._run.log, row))
        for step, path in self._pictures.items():
            items.setdefault(step, []).append(partial(_show, self._run, path, step))
        for step, count in missing.items():
            for send in items.get(step, [])[-count:]:
                send()
                told.append(step)
        self._sent = told
        if dead.offline and dead.dir != self._run.dir:
            shutil.rmtree(Path(dead.dir).parent, ignore_errors=True)  # a part of what was told again

    def _id(self) -> str:
        """Return the page's id: the same after a resume and a move, never that of another run."""
        kept = self._folder / ID_FILE
        if kept.is_file():
            return json.loads(kept.read_bytes())["id"]
        path = self._folder.resolve()
        name = re.sub(r"[^A-Za-z0-9_.-]", "-", path.name)
        page = f"{name}-{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"  # of a run that kept no id
        if not any(self._folder.glob(f"wandb/*run-*-{page}")):
            page = f"{name}-{uuid.uuid4().hex[:8]}"
        write_durably(kept, json.dumps({"id": page}).encode())
        return page


def _finish(run: Any) -> None:
    import wandb

    run.finish()
    wandb.teardown()  # its process holds a page that was finished for a moment longer


def _forget() -> None:
    """Let go of wandb's process, which would be asked again."""
    with suppress(Exception):
        import wandb

        wandb.teardown()


def _show(run: Any, path: str, step: int) -> None:
    import wandb

    run.log({"preview": wandb.Image(path), "step": step})
