"""What people see of a run: in a real terminal one line that changes in place and is never garbled; elsewhere lines."""

import logging
import os
import re
import termios
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from bench.ranks import Processes
from train.config import SIGNAL_DELAY
from train.console import Console, heldout_table, say
from train.distributed.ranks import alone
from train.streams import open_streams

YELLOW = "\x1b[1;33m"


def row(step: int) -> dict[str, Any]:
    speeds = {"tokens_per_s": 98765.4, "images_per_s": 321.0, "mfu": 0.456, "slowest_lag_share": 0.0, "stop_s": 400.0}
    return {"step": step, "text_loss": 1 / step, "image_loss": None, "grad_norm": 2.0, "learning_rate": 1e-4, **speeds}


def talk(terminal: str, resized: Path) -> None:
    """Run as a program whose standard streams are a terminal; all that a run prints, in turn."""
    with open(terminal, "wb", buffering=0) as stream:
        for descriptor in (1, 2):
            os.dup2(stream.fileno(), descriptor)
    open_streams()
    say("pretrain: source pairs: 60 documents")
    with Console(300, 0, alone()) as console:
        console.show(row(100))  # with a warning: a stop takes longer than Slurm grants
        console.show(row(101))
        say("saved step-00000101: 1.0 MB in 0.1 s")
        logging.getLogger("train").warning("no preview of step 101: %s", "the disk is full")
        console.show(row(102))
        warnings.warn("a library's", stacklevel=1)
        print("printed")
        console.show(row(103))
        resized.with_name("ready").touch()
        while not resized.exists():
            time.sleep(0.01)
        say("after the window got narrow")
        console.show(row(104))
        console.show(row(105))
    say("pretrain: done after step 105; saved")


@contextmanager
def terminal(columns: int) -> Iterator[tuple[int, str]]:
    """Yield a terminal's own end and the name of the end for programs."""
    master, slave = os.openpty()
    termios.tcsetwinsize(slave, (40, columns))
    yield master, os.ttyname(slave)
    os.close(master)
    os.close(slave)


def screen_of(output: str, columns: int) -> list[str]:
    """Return the lines that a terminal with `columns` shows, as far as this output needs one."""
    lines, at, column = [""], 0, 0
    for part in re.findall(r"\x1b\[\d*[AJ]|\x1b\[[\d;]*m|[\r\n]|[^\x1b\r\n]", output):
        if part == "\r":
            column = 0
        elif part == "\n":
            at += 1
        elif part.endswith("A") and len(part) > 1:
            at -= int(part[2:-1])
        elif part == "\x1b[J":
            lines = [*lines[:at], lines[at][:column]]
        elif not part.startswith("\x1b"):
            if column == columns:
                at, column = at + 1, 0
            lines += [""] * (at + 1 - len(lines))
            lines[at] = lines[at][:column].ljust(column) + part + lines[at][column + 1 :]
            column += 1
        lines += [""] * (at + 1 - len(lines))
    return lines


def converse(tmp_path: Path, columns: int, **environment: str) -> tuple[str, str]:
    """Return what the program wrote until its window was halved, and after."""
    parts = [b"", b""]
    with terminal(columns) as (master, name):
        os.set_blocking(master, False)
        variables = {SIGNAL_DELAY: "300", "TERM": "xterm", **environment}
        arguments = [(name, tmp_path / "resized")]
        with Processes(talk, arguments, None, torchrun=False, environment=variables) as program:
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:
                running, resized = program.running, (tmp_path / "resized").exists()
                try:
                    parts[resized] += os.read(master, 65536)
                    continue
                except BlockingIOError:
                    pass
                if not running:
                    break
                if not resized and (tmp_path / "ready").exists():
                    termios.tcsetwinsize(master, (40, columns // 2))
                    (tmp_path / "resized").touch()
                time.sleep(0.01)
            assert program.statuses == [0]
    return parts[0].decode(), parts[1].decode()


def test_in_a_terminal_one_line_changes_in_place_and_nothing_garbles_it(tmp_path: Path) -> None:
    before, after = converse(tmp_path, 72)
    shown = screen_of(before, 72)
    assert shown[0] == "pretrain: source pairs: 60 documents" and shown[1].startswith("pretrain: warning: a stop takes")
    text = "\n".join(shown)
    for words in ("saved step-00000101: 1.0 MB in 0.1 s", "no preview of step 101: the disk is full", "printed"):
        assert words in shown, (words, text)
    assert "a library's" in text
    assert [line for line in shown if line.startswith("step ")] == [shown[-1]], text
    assert shown[-1] == "step 103/300  text 0.0097  98,765 tokens/s  MFU 45.6%  0:00:00 left  32", "cut to the width"
    for words in ("pretrain: warning: a stop takes", "no preview of step 101"):
        assert YELLOW + words in before
    assert YELLOW + "saved" not in before and YELLOW + "step" not in before

    # The window is half as wide: the line was wrapped onto two rows, which both go.
    narrow = screen_of(shown[-1] + after, 36)
    assert narrow[0] == "after the window got narrow" and narrow[-1] == ""
    assert "".join(narrow[1:4]).startswith("step 105/300  text 0.0095  98,765 tokens/s"), "the last line stays, whole"
    assert [line for line in narrow if line.startswith("step 10")] == [narrow[1]]
    assert narrow[-2] == "pretrain: done after step 105; saved"


def test_without_colour_or_control_sequences_where_they_are_not_wanted(tmp_path: Path) -> None:
    before, after = converse(tmp_path, 72, NO_COLOR="1")
    assert YELLOW not in before + after and "\x1b[J" in before
    for folder in ("1", "2"):
        (tmp_path / folder).mkdir()
    before, after = converse(tmp_path / "1", 72, TERM="dumb")
    assert "\x1b" not in before + after and "step 101/300  text 0.0099  norm 2.00  lr 1.0e-04" in before


def test_elsewhere_there_are_plain_lines(capsys: pytest.CaptureFixture) -> None:
    with Console(300, 0, alone()) as console:
        console.show(row(100))
        console.show(row(101))
    assert capsys.readouterr().out.splitlines() == [
        f"step {step}/300  text {loss}  norm 2.00  lr 1.0e-04  98,765 tokens/s  321.0 images/s  MFU 45.6%  0:00:00 left"
        for step, loss in ((100, "0.0100"), (101, "0.0099"))
    ]


def test_heldout_losses_are_a_table_of_sources_and_kinds() -> None:
    losses = {"heldout/pairs/text_loss": 1.23456, "heldout/pairs/image_loss": 0.5, "heldout/pairs/x0_error/-6..-4": 0.1}
    losses |= {"heldout/texts/text_loss": 2.0, "heldout_ema/pairs/captioning_loss": 3.0}
    assert heldout_table(200, losses).splitlines() == [
        "step 200  held out  text_loss  image_loss  captioning_loss",
        "pairs                  1.2346      0.5000                -",
        "texts                  2.0000           -                -",
        "pairs (EMA)                 -           -           3.0000",
    ]
