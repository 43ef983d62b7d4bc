"""The roll call when the process that hosts the store does not answer."""

import os
import signal
import subprocess
import sys

import pytest
from torch.distributed import TCPStore

from train.distributed import roll_call
from train.distributed.roll_call import RollCall

KEEPER = """
from torch.distributed import TCPStore
store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
print(store.port, flush=True)
input()
"""


@pytest.mark.parametrize("stop", [signal.SIGSTOP, signal.SIGKILL])
def test_a_frozen_or_dead_rank_0_that_hosts_the_store_is_named_and_blocks_nobody(
    stop: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roll_call, "STORE_S", 2.0)
    with subprocess.Popen([sys.executable, "-c", KEEPER], stdin=-1, stdout=-1, text=True) as keeper:
        store = TCPStore("127.0.0.1", int(keeper.stdout.readline()), is_master=False)
        asker = RollCall(store, 1, 2, kept_by_first=True)
        os.kill(keeper.pid, stop)
        try:
            assert asker.missing() == [0]
        finally:
            keeper.kill()
            asker.close()
