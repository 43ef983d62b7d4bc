"""A watch over reads: logs the one that has not returned, while it has not.

A read that hangs in a network file system cannot be interrupted, but it can be named, so that it is clear why a run of
hundreds of ranks stands still.
"""

import logging
import os
import threading
import time

log = logging.getLogger(__name__)


class ReadWatch:
    """Watches one reading thread of this process; `begin` and `end` cost half a microsecond."""

    def __init__(self, warn_after_s: float):
        self.warn_after_s = warn_after_s
        self._reading: tuple[float, str, object] | None = None
        self._pid = 0

    def begin(self, words: str, *what: object) -> None:
        """Note that a read begins; `words % what` names it in a warning."""
        if self._pid != os.getpid():  # threads do not survive a fork
            self._pid = os.getpid()
            threading.Thread(target=self._look, name="read-watch", daemon=True).start()
        self._reading = (time.monotonic(), words, what)

    def end(self) -> None:
        self._reading = None

    def _look(self) -> None:
        warned, wait_s = None, self.warn_after_s
        while True:
            time.sleep(self.warn_after_s / 4)
            if (reading := self._reading) is None:
                continue
            start, words, what = reading
            if reading is not warned:
                wait_s = self.warn_after_s
            if time.monotonic() - start >= wait_s:
                warned, wait_s = reading, 2 * wait_s
                log.warning("%s: no answer for %.0f s", words % what, time.monotonic() - start)
