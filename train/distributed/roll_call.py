"""Roll call: which ranks still answer once a collective has failed.

A failed collective does not say which rank is gone, and ranks merely blocked behind the culprit look as dead as it is.
So each rank has a thread that answers for it whatever its main thread waits in; a killed or frozen process does not
answer. Messages go through the rendezvous store, the only channel that is not a collective. Rejected: a heartbeat per
step, which costs a message per step and cannot tell a blocked rank from a dead one.
"""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from torch.distributed import Store

CALLED = "roll-call"  # the key that asks all ranks to answer
STORE_S = 60.0  # that a roll call may take

T = TypeVar("T")


class RollCall:
    """Answer for this rank in a daemon thread until `close()`; `missing()` calls the others.

    `kept_by_first`: rank 0 hosts the store, as under srun; under torchrun its agent does.
    """

    def __init__(self, store: Store, rank: int, world_size: int, *, kept_by_first: bool = False) -> None:
        self._store, self._rank, self._world_size = store, rank, world_size
        self._kept_by_first = kept_by_first
        self._period_s = max(0.5, world_size / 2000)  # at most 2,000 queries a second to one store
        self._closed = threading.Event()
        if world_size > 1:
            threading.Thread(target=self._answer, name="roll-call", daemon=True).start()

    def missing(self) -> list[int]:
        """Return the ranks that do not answer within about two seconds; empty if the store cannot be reached."""
        try:
            return within(STORE_S, self._ask)
        except (RuntimeError, TimeoutError):  # torch's DistError: the rank that hosted the store is gone; or frozen
            return [0] if self._kept_by_first else []

    def _ask(self) -> list[int]:
        self._store.set(CALLED, "")
        self._store.set(f"{CALLED}/{self._rank}", "")
        time.sleep(1.0 + 2 * self._period_s)
        found = [rank for rank in range(self._world_size) if not self._store.check([f"{CALLED}/{rank}"])]
        if self._kept_by_first and self._rank == 0:
            time.sleep(1.0)  # other ranks may have started their roll call a little later
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


def within(seconds: float, ask: Callable[[], T]) -> T:
    """Return `ask()`, or raise TimeoutError: a store in a frozen process or a foreign server may never answer."""
    answer: Future[T] = Future()

    def run() -> None:
        try:
            answer.set_result(ask())
        except RuntimeError as error:
            answer.set_exception(error)

    threading.Thread(target=run, name="store", daemon=True).start()  # unlike an executor, holds nothing up
    try:
        return answer.result(seconds)
    except TimeoutError:
        raise TimeoutError(f"no answer in {seconds:.0f} seconds") from None
