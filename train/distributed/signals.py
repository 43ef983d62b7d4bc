"""Stop signals: a flag that says what asked this process to stop; the ranks agree on it at a step boundary (P6).

A handler only sets the flag. It cannot save: a save is a collective, and a signal may reach one rank only, or each rank
in a different step.

    SIGTERM, SIGUSR1, SIGUSR2   StopKind.REQUEUE   save, exit 75: saved, run the same command again
    torchrun is gone            StopKind.REQUEUE   the same: nothing else could stop its ranks any more
    SIGINT (Ctrl-C)             StopKind.CANCEL    save, exit 130: a person stopped it, do not requeue
    a second SIGINT             the default action: die at once, even inside a blocked collective

SIGTERM means requeue because preemption, a draining node and scancel look the same from inside; the scheduler does not
requeue a cancelled job anyway. 130 rather than 0, so that `a && b` and make stop after Ctrl-C.
"""

import ctypes
import enum
import os
import signal
from types import FrameType
from typing import Any

from train.distributed.launcher import watched_parent

REQUEUE_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
PR_SET_PDEATHSIG = 1  # linux/prctl.h


class StopKind(enum.IntEnum):
    """Why to stop; the greatest of several wins."""

    NONE = 0
    REQUEUE = 1
    CANCEL = 2

    @property
    def exit_code(self) -> int:
        """Return the exit status after saving and stopping for this reason."""
        return {StopKind.NONE: 0, StopKind.REQUEUE: 75, StopKind.CANCEL: 130}[self]


class StopSignal:
    """Collects stop signals in a context (`with StopSignal() as stop`), which restores the previous handlers on exit.

    Poll `stop.kind` wherever time is spent. Enter it in the main thread, before loader workers start. `name` is the
    signal that decided `kind`, for the log; None before any.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._kind = StopKind.NONE
        self._parent: int | None = None  # its end is a request to stop
        self._previous: dict[int, Any] = {}  # handlers

    @property
    def kind(self) -> StopKind:
        """Return the greatest kind of stop requested so far."""
        if self._parent is not None and not self._kind and os.getppid() != self._parent:
            self._kind, self.name = StopKind.REQUEUE, f"the end of torchrun (pid {self._parent})"
        return self._kind

    def finish(self) -> None:
        """Ignore further requests to stop until the process ends: everything they ask for is done.

        Otherwise the second SIGTERM that schedulers send would turn an orderly exit into death by signal.
        """
        for number in REQUEUE_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
            self._previous.pop(number, None)

    def __enter__(self) -> "StopSignal":
        self._parent = watched_parent()
        for number in (*REQUEUE_SIGNALS, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        kind = StopKind.CANCEL if number == signal.SIGINT else StopKind.REQUEUE
        if kind > self._kind:
            self._kind, self.name = kind, signal.Signals(number).name


def shield_worker(_worker_id: int = 0, *, parent_pid: int | None = None) -> None:
    """Make a loader worker ignore stop signals and die with its parent `parent_pid`; for `worker_init_fn`.

    torchrun signals a rank's whole process group and Slurm every process of a step; if a worker died of that, an
    orderly stop would become a loader error. Instead the kernel kills it when its parent dies.
    """
    for number in (*REQUEUE_SIGNALS, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent_pid is not None and os.getppid() != parent_pid:
        os._exit(1)  # the parent died before prctl
