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
STORE_S = 60.0  # that asking may take; a store whose process is frozen never answers, nor says so


class RollCall:
    """Answer for this rank in a daemon thread until `close()`; `missing()` asks for the others.

    `kept_by_first`: the store lives in rank 0, as under srun; torchrun's agent keeps it for its ranks.
    """

    def __init__(self, store: Store, rank: int, world_size: int, *, kept_by_first: bool = False) -> None:
        self._store, self._rank, self._world_size = store, rank, world_size
        self._kept_by_first = kept_by_first
        self._period_s = max(0.5, world_size / 2000)  # at most 2,000 questions a second to one store
        self._closed = threading.Event()
        if world_size > 1:
            threading.Thread(target=self._answer, name="roll-call", daemon=True).start()

    def missing(self) -> list[int]:
        """Return the ranks that do not answer in about two seconds; empty where nobody can be asked."""
        found = [0] if self._kept_by_first else []
        asking = threading.Thread(target=lambda: found.__setitem__(slice(None), self._ask()), daemon=True)
        asking.start()
        asking.join(STORE_S)
        return found

    def _ask(self) -> list[int]:
        try:
            self._store.set(CALLED, "")
            self._store.set(f"{CALLED}/{self._rank}", "")
            time.sleep(1.0 + 2 * self._period_s)
            found = [rank for rank in range(self._world_size) if not self._store.check([f"{CALLED}/{rank}"])]
        except RuntimeError:  # torch's DistError: the store went with the one that kept it
            return [0] if self._kept_by_first else []
        if self._kept_by_first and self._rank == 0:
            time.sleep(1.0)  # the others may have begun to ask a little later
        return found

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
