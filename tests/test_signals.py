"""Signals only set a flag, on which the ranks agree in the vote (P6)."""

import os
import signal
import subprocess
import sys

import pytest

from tests.ranks import is_running
from tests.servers import until
from train.distributed.signals import StopKind, StopSignal, shield_worker


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_a_termination_signal_asks_for_save_and_requeue(number: int) -> None:
    """P6: exit status 75 means saved, requeue me."""
    with StopSignal() as stop:
        assert stop.kind == StopKind.NONE and stop.name is None
        os.kill(os.getpid(), number)
        assert stop.kind == StopKind.REQUEUE and stop.kind.exit_code == 75
        assert stop.name == signal.Signals(number).name


def test_ctrl_c_wins_over_a_requeue_in_either_order() -> None:
    for numbers in ([signal.SIGINT, signal.SIGTERM], [signal.SIGTERM, signal.SIGINT]):
        with StopSignal() as stop:
            for number in numbers:
                os.kill(os.getpid(), number)
            assert stop.kind == StopKind.CANCEL and stop.kind.exit_code == 130


def test_the_previous_handlers_are_restored() -> None:
    numbers = [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT]
    before = [signal.getsignal(number) for number in numbers]
    with StopSignal():
        os.kill(os.getpid(), signal.SIGINT)
    assert [signal.getsignal(number) for number in numbers] == before


def test_a_second_ctrl_c_kills_at_once_and_a_shielded_worker_outlives_signals_but_not_its_parent() -> None:
    program = """
import os, signal, time
from train.distributed.signals import StopSignal, shield_worker
with StopSignal() as stop:
    worker = os.fork()
    if worker == 0:
        shield_worker()
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT):
            os.kill(os.getpid(), number)
        print(os.getpid(), flush=True)
        time.sleep(60)
    while not stop.kind:
        time.sleep(0.01)
    print("asked", flush=True)
    time.sleep(60)
"""
    child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    worker = int(child.stdout.readline())
    child.send_signal(signal.SIGINT)
    assert child.stdout.readline() == "asked\n"
    child.send_signal(signal.SIGINT)
    assert child.wait(timeout=30) == -signal.SIGINT
    until(lambda: not is_running(worker))


def test_a_worker_whose_parent_died_before_it_was_watched_ends_at_once() -> None:
    """Otherwise a `kill -9` between fork and prctl would orphan it for ever."""
    worker = os.fork()
    if worker == 0:
        shield_worker(0, parent_pid=os.getppid() + 1)  # not the parent it has now
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]) == 1
