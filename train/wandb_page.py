"""A run's page at wandb: a copy of its metrics that may fail, hang or be absent without affecting training (P13).

wandb writes from a separate process, which Slurm and systemd may stop with the same signal as the ranks; it then drops
what it has not written. Once that process is found dead, it is restarted and sent the rows of this attempt from
metrics.jsonl again, so that the page is complete. Rejected: shielding it from signals, for which it installs handlers
whatever it inherits, in a session of its own.

    <run>/wandb-page.json   id of the page, which moves with the folder; without it the next start creates a new page
"""

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
    """The page of the run in `folder`. A `mode` or `project` of None means WANDB_MODE or WANDB_PROJECT."""

    def __init__(self, mode: str | None, project: str | None, folder: Path, recipe: dict[str, Any]) -> None:
        self._mode = mode or os.environ.get("WANDB_MODE") or "disabled"
        self._project = project or os.environ.get("WANDB_PROJECT") or "transfusion"
        self._folder, self._recipe = folder, recipe
        self._run: Any = None  # None: no page, or no longer
        self._lost = False  # wandb's process is gone
        self._restarts_left = RESTARTS
        self._sent: list[int] = []  # the step of each row and picture, in order
        self._pictures: dict[int, str] = {}  # paths of those sent, by step
        if self._mode == "disabled":
            return
        try:
            self._run = self._start()
            self._begun = self._run.starting_step  # rows on the page before this attempt
        except Exception as error:  # a logger may fail in any way
            log.warning("wandb is off: %s; metrics.jsonl has everything", error)

    @property
    def place(self) -> str | None:
        """Return where the page is, in words; None if there is none."""
        if self._run is None:
            return None
        return f"offline, in {Path(self._run.dir).parent}" if self._run.offline else str(self._run.url)

    def log(self, row: dict[str, Any]) -> None:
        """Send a row that is already in metrics.jsonl."""
        self._sent.append(row["step"])
        self._send(lambda run: run.log(row))

    def picture(self, path: os.PathLike, step: int) -> None:
        """Send a saved picture."""
        self._sent.append(step)
        self._pictures[step] = str(path)
        self._send(lambda run: _show(run, str(path), step))

    def close(self) -> None:
        """Wait until everything is written or sent, one minute at most."""
        while self._run is not None:
            self._send(_finish, last=True)

    def _send(self, send: Callable[[Any], object], last: bool = False) -> None:
        if self._run is None:
            return
        try:
            if self._lost:
                self._resend()
                send = send if last else lambda run: None  # `_resend` included this
            send(self._run)
            self._run = None if last else self._run
        except Exception as error:  # a logger may fail in any way; training continues without it
            self._lost = True
            self._restarts_left -= 1
            if self._restarts_left < 0:
                log.warning("wandb is off from here on: %s", error)
                self._run = None
                _forget()

    def _start(self) -> Any:
        import wandb

        settings = wandb.Settings(init_timeout=20, finish_timeout=60, console="off", silent=True, x_disable_stats=True)
        wandb.setup(settings)  # without this it would ask for a key on the terminal, and wait
        mode: Any = self._mode
        given: dict[str, Any] = {
            "project": self._project,
            "dir": os.environ.get("WANDB_DIR") or str(self._folder),
            "id": self._id(),
            "name": self._folder.resolve().name,
            "resume": "allow",
            "config": self._recipe,
            "settings": settings,
        }
        try:
            run = wandb.init(mode=mode, **given)
        except Exception as error:  # no key, no network
            if mode != "online":
                raise
            log.warning(
                "wandb: %s; the page is kept offline, for `wandb sync`", " ".join(str(error).split()).rstrip(".")
            )
            _forget()  # its process still holds the id
            wandb.setup(settings)
            run = wandb.init(mode="offline", **given)
        run.define_metric("*", step_metric="step")
        return run

    def _resend(self) -> None:
        """Start wandb's process again and send what it may have dropped."""
        dead = self._run
        _forget()
        self._run, self._lost = self._start(), False
        received = self._run.starting_step - self._begun if self._run.resumed else 0  # by the server
        missing, resent = Counter(self._sent[received:]), self._sent[:received]
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
                resent.append(step)
        self._sent = resent
        if dead.offline and dead.dir != self._run.dir:
            shutil.rmtree(Path(dead.dir).parent, ignore_errors=True)  # its rows were sent again

    def _id(self) -> str:
        """Return the page's id: the same after a resume or a move of the folder, never that of another run."""
        kept = self._folder / ID_FILE
        if kept.is_file():
            return json.loads(kept.read_bytes())["id"]
        name = re.sub(r"[^A-Za-z0-9_.-]", "-", self._folder.resolve().name)
        page = f"{name}-{uuid.uuid4().hex[:8]}"
        write_durably(kept, json.dumps({"id": page}).encode())
        return page


def _finish(run: Any) -> None:
    import wandb

    run.finish()
    wandb.teardown()  # ends its process, which would hold the finished page for a moment longer


def _forget() -> None:
    """End wandb's process, which would otherwise be used again."""
    with suppress(Exception):
        import wandb

        wandb.teardown()


def _show(run: Any, path: str, step: int) -> None:
    import wandb

    run.log({"preview": wandb.Image(path), "step": step})
