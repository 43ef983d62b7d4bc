"""Roll call: who still answers once a collective has failed.

A collective that breaks says neither which rank is gone nor whether it died or froze, and ranks that are merely blocked
behind it look as dead as the culprit. So each rank has a thread that answers for it, whatever its main thread waits
in; a killed or stopped process answers nothing. It goes through the rendezvous store, the one channel that is not a
collective. Rejected: a heartbeat every step, which costs a message a step and still misses those that are blocked.
"""

import threading
import time

from torch.distributed import Store

CALLED = "roll-call"  # the key that asks everybody to answer


class RollCall:
    """Answer for this rank in a daemon thread until `close()`; `missing()` asks for the others."""

    def __init__(self, store: Store, rank: int, world_size: int) -> None:
        self._store, self._rank, self._world_size = store, rank, world_size
        self._period_s = max(0.5, world_size / 2000)  # at most 2,000 questions a second to one store
        self._closed = threading.Event()
        if world_size > 1:
            threading.Thread(target=self._answer, name="roll-call", daemon=True).start()

    def missing(self) -> list[int]:
        """Return the ranks that do not answer in about two seconds; empty where the store is gone as well."""
        try:
            self._store.set(CALLED, "")
            self._store.set(f"{CALLED}/{self._rank}", "")
            time.sleep(1.0 + 2 * self._period_s)
            return [rank for rank in range(self._world_size) if not self._store.check([f"{CALLED}/{rank}"])]
        except RuntimeError:  # torch's DistError: the store went with the rank that kept it
            return []

    def close(self) -> None:
        self._closed.set()

    def _answer(self) -> None:
        try:
            while not self._closed.wait(self._period_s):
                if self._store.check([CALLED]):
                    self._store.set(f"{CALLED}/{self._rank}", "")
                    return
        except RuntimeError:  # as above; the collectives will say so too
            return
