"""Stop signals: what asked this process to stop, as a flag that the ranks agree on at a step boundary (P6).

A handler only sets a flag. It cannot save: a save is a collective, and the signal may reach one rank, or all of
them inside different steps. The mapping, decided here:

    SIGTERM, SIGUSR1, SIGUSR2   StopKind.REQUEUE   save, exit 75: saved, start me again with the same command
    SIGINT (Ctrl-C)             StopKind.CANCEL    save, exit 130: a person stopped it, nobody should requeue it
    torchrun is gone            StopKind.REQUEUE   the same: its ranks would train on, where nobody could stop them
    SIGINT a second time        die at once, by the default action, which also works inside a blocked collective

SIGTERM counts as a requeue because preemption, a node's drain and scancel look alike from inside; requeueing a job
that was cancelled is the scheduler's to refuse. 130 rather than 0, so that `a && b` and make stop after Ctrl-C.
"""

import ctypes
import enum
import os
import signal
from types import FrameType

from train.distributed.launcher import watched_parent

REQUEUE_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
PR_SET_PDEATHSIG = 1  # linux/prctl.h


class StopKind(enum.IntEnum):
    """Why to stop; of several, the greatest wins."""

    NONE = 0
    REQUEUE = 1
    CANCEL = 2

    @property
    def exit_code(self) -> int:
        """Return the exit status of a program that saved and stopped for this reason."""
        return {StopKind.NONE: 0, StopKind.REQUEUE: 75, StopKind.CANCEL: 130}[self]


class StopSignal:
    """Collect stop signals while open (`with StopSignal() as stop`); the handlers of before come back on leaving.

    Poll `stop.kind` wherever time is spent. Open it in the main thread, before loader workers start.
    """

    def __init__(self) -> None:
        self._kind = StopKind.NONE
        self._name: str | None = None
        self._parent: int | None = None  # whose end is a request to stop
        self._previous = {}

    @property
    def kind(self) -> StopKind:
        """Return the gravest stop that was asked for so far."""
        if self._parent is not None and not self._kind and os.getppid() != self._parent:
            self._kind, self._name = StopKind.REQUEUE, f"the end of torchrun (pid {self._parent})"
        return self._kind

    @property
    def name(self) -> str | None:
        """Return the name of the signal that decided `kind`, for the log; None while nothing came."""
        return self._name

    def finish(self) -> None:
        """From here on a request to stop is ignored, to the end of the process: all is done that it could ask for.

        Without this a second SIGTERM, as schedulers send it, would turn an orderly exit status into a death.
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
            self._kind, self._name = kind, signal.Signals(number).name


def shield_worker(_worker_id: int = 0, *, parent_pid: int | None = None) -> None:
    """Make a loader worker ignore stop signals and die with its parent `parent_pid`; for `worker_init_fn`.

    torchrun signals a rank's whole process group and Slurm a step's every process; a worker that died of it would
    turn an orderly stop into a loader error. SIGKILL on the parent's death replaces what SIGTERM was good for.
    """
    for number in (*REQUEUE_SIGNALS, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent_pid is not None and os.getppid() != parent_pid:
        os._exit(1)  # the parent died before its death was watched
