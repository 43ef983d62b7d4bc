"""Standard output and error that work in any locale and survive a reader that leaves (P13).

In a locale that is not UTF-8 Python would use the locale's encoding for files and their names: a folder called `été`
in a YAML file would be a different one, or none. So the program restarts itself in Python's UTF-8 mode, and prints
escapes for what the terminal cannot show.

A program whose reader is gone (`| head`) exits at once with 141, like a process killed by SIGPIPE. The signal itself
stays ignored: it would also kill a process whose peer closes a socket. A lasting program (training, encoding) continues
instead, also when standard output is a full disk: its results are in files.
"""

import errno
import io
import logging
import os
import sys
from typing import Any, TextIO

from train.live_line import LINE, stand_out

BROKEN_PIPE = 141  # 128 + SIGPIPE, as shells report it


class _Standard(io.FileIO):
    """The descriptor of standard output or error."""

    def __init__(self, descriptor: int, lasting: bool) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self._descriptor, self._lasting, self._is_terminal = descriptor, lasting, self.isatty()

    def write(self, data: Any, /) -> int:
        if self._is_terminal:
            LINE.clear()
        try:
            written = super().write(data)
            if self._is_terminal and self._descriptor == 1 and bytes(data[-1:]) == b"\n":
                LINE.restore()
            return written
        except OSError as error:
            if self._lasting:
                return len(data)
            if error.errno == errno.EPIPE:
                os._exit(BROKEN_PIPE)
            self._lasting = True  # raised once; what is still buffered may be lost
            raise


def open_streams(*, lasting: bool = False) -> None:
    """Replace sys.stdout and sys.stderr; in a locale that is not UTF-8, restart the process in UTF-8 mode."""
    if sys.getfilesystemencoding() != "utf-8" and not sys.flags.ignore_environment:
        os.environ["PYTHONUTF8"] = "1"  # also for subprocesses
        os.environ.setdefault("PYTHONIOENCODING", f"{sys.stdout.encoding}:backslashreplace")
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    sys.stdout, sys.stderr = _reopened(sys.stdout, 1, lasting), _reopened(sys.stderr, 2, lasting)
    if logging.lastResort is not None:  # prints warnings where nothing else is set up
        logging.lastResort.setFormatter(logging.Formatter(stand_out("%(message)s", sys.stderr)))


def _reopened(stream: TextIO | None, descriptor: int, lasting: bool) -> TextIO | None:
    if stream not in (sys.__stdout__, sys.__stderr__) or stream is None:  # closed, or replaced, as pytest does
        return stream
    by_line = stream.line_buffering or stream.write_through
    raw = io.BufferedWriter(_Standard(descriptor, lasting))
    return io.TextIOWrapper(raw, stream.encoding, "backslashreplace", line_buffering=by_line)
