"""The line at the bottom of a terminal that is written again and again, and what makes room for other output.

train/streams.py calls `clear` before anything else is written to a terminal, and `restore` after standard output has
been, so that neither is garbled. After standard error it stays away until the next change: those may be last words.
Without a terminal there is no such line.
"""

import os
import sys
import threading

CLEAR = "\r\x1b[J"  # to the line's start; from there to the end of the screen


class LiveLine:
    """At most one a process, `LINE`. Any thread may write."""

    def __init__(self) -> None:
        self._text = ""  # what is to be shown, empty: nothing
        self._shown = ""  # what is on the screen now
        self._lock = threading.RLock()

    def show(self, text: str) -> None:
        """Write the line in place, cut to the terminal's width; empty: no line any more."""
        with self._lock:
            self.clear()
            self._text = text
            self.restore()

    def clear(self) -> None:
        """Take the line off the screen, also where a narrower window has wrapped it."""
        with self._lock:
            if self._shown:
                above = (len(self._shown) - 1) // _columns()
                self._write((f"\x1b[{above}A" if above else "") + CLEAR)
                self._shown = ""

    def restore(self) -> None:
        """Show the line again."""
        with self._lock:
            if self._text and not self._shown:
                self._shown = self._text[: _columns() - 1]  # a full line would wrap
                self._write(self._shown)

    def _write(self, text: str) -> None:
        stream = sys.__stdout__
        try:
            assert stream is not None
            os.write(1, text.encode(stream.encoding or "ascii", "backslashreplace"))
        except OSError:  # the terminal is gone; output stops no training (P13)
            self._text = self._shown = ""


def is_terminal(stream: object) -> bool:
    """Return whether `stream` is a terminal that understands control sequences."""
    return bool(getattr(stream, "isatty", bool)()) and os.environ.get("TERM", "dumb") != "dumb"


def stand_out(words: str, stream: object) -> str:
    """Return words as they are printed to `stream`: coloured in a terminal, unless NO_COLOR is set."""
    return f"\x1b[1;33m{words}\x1b[0m" if is_terminal(stream) and not os.environ.get("NO_COLOR") else words


def _columns() -> int:
    try:
        return max(2, os.get_terminal_size(1).columns or 80)
    except OSError:
        return 80


LINE = LiveLine()
