"""bench.programs: what ended well is not repeated, and CPU-seconds of failed attempts are kept."""

import sys
from pathlib import Path

import pytest

from bench.programs import cpu_seconds, run, run_once

BURN = "import time\nwhile time.process_time() < 0.15: pass\n"


def test_cpu_seconds_add_up_over_attempts_that_failed(tmp_path: Path) -> None:
    account, log = tmp_path / "run.cpu-seconds", tmp_path / "logs" / "run.log"
    assert cpu_seconds(account) == 0
    with pytest.raises(RuntimeError, match=r"status 3, no room \(see .*run.log\)"):
        run((sys.executable, "-c", f"{BURN}print('no room')\nraise SystemExit(3)"), log, account)
    failed = cpu_seconds(account)
    run((sys.executable, "-c", BURN), log, account)
    assert failed >= 0.1 and cpu_seconds(account) >= failed + 0.1
    assert log.read_text().count("$ ") == 2  # each command stands before its output


def test_what_ended_well_is_not_run_again(tmp_path: Path) -> None:
    once, fails = (("sh", "-c", f"echo x >> {tmp_path}/{name}; exit {status}") for name, status in (("a", 0), ("b", 1)))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="status 1"):
            run_once({"part a": once, "b": fails}, tmp_path / "logs")
    assert [(tmp_path / name).read_text().split() for name in "ab"] == [["x"], ["x", "x"]]
