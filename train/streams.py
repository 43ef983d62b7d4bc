"""Standard output and error as programs use them: any locale can print, and a reader may leave.

Where the locale is not UTF-8, Python would read and write files, and name them, in the locale's encoding: a folder
called `été` in a YAML file would be another one, or none. The program starts itself anew in Python's UTF-8 mode, and
what the terminal cannot show is printed as escapes.

A program whose reader is gone (`| head`) ends at once with 141, the status of a process that died of SIGPIPE. The
signal itself stays ignored: it would also end a process whose peer closes a socket. A lasting program (a training, an
encoding job) goes on instead, as it does where standard output is a full disk: its record is in files (P13).
"""

import errno
import io
import os
import sys
from typing import TextIO

BROKEN_PIPE = 141  # 128 + SIGPIPE, as shells report it


class _Standard(io.FileIO):
    """The descriptor of standard output or error."""

    def __init__(self, descriptor: int, lasting: bool) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self._lasting = lasting

    def write(self, data: bytes) -> int | None:
        try:
            return super().write(data)
        except OSError as error:
            if self._lasting:
                return len(data)
            if error.errno == errno.EPIPE:
                os._exit(BROKEN_PIPE)
            self._lasting = True  # said once; what is still held is written at the end, or not
            raise


def open_streams(*, lasting: bool = False) -> None:
    """Replace sys.stdout and sys.stderr; where the locale is not UTF-8, start the process anew in UTF-8 mode."""
    if sys.getfilesystemencoding() != "utf-8" and not sys.flags.ignore_environment:
        os.environ["PYTHONUTF8"] = "1"  # our subprocesses too
        os.environ.setdefault("PYTHONIOENCODING", f"{sys.stdout.encoding}:backslashreplace")
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    sys.stdout, sys.stderr = _reopened(sys.stdout, 1, lasting), _reopened(sys.stderr, 2, lasting)


def _reopened(stream: TextIO | None, descriptor: int, lasting: bool) -> TextIO | None:
    if stream not in (sys.__stdout__, sys.__stderr__) or stream is None:  # closed, or somebody listens in
        return stream
    by_line = stream.line_buffering or stream.write_through
    raw = io.BufferedWriter(_Standard(descriptor, lasting))
    return io.TextIOWrapper(raw, stream.encoding, "backslashreplace", line_buffering=by_line)
