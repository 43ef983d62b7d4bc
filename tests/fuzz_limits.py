"""What no reader may do, take or spend, whatever becomes of a file."""

import os
import resource
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CPU_S = 2.0  # a case may take, in all readers together
MEMORY_MIB = 512  # of address space a case may take beyond what the process has
# What no reader may do: Python's audit events of writing (besides opening to write), running and unpickling.
FORBIDDEN = (
    *("os.mkdir", "os.rename", "os.remove", "os.link", "os.symlink", "os.truncate", "shutil.", "os.system", "os.exec"),
    *("os.fork", "os.posix_spawn", "subprocess.Popen", "pickle.find_class", "socket.connect"),
)


def check(condition: Any, what: str) -> None:
    """Raise an error if a reader did what it must not."""
    if not condition:
        raise AssertionError(what)


@dataclass
class Watch:
    """Notes, while it is on, what no reader may do."""

    is_on: bool = False
    seen: list[str] = field(default_factory=list)

    def audit(self, event: str, arguments: tuple) -> None:
        if not self.is_on:
            return
        flags = arguments[2] if event == "open" else 0
        if (isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)) or event.startswith(FORBIDDEN):
            self.seen.append(f"{event} {str(arguments)[:200]}")

    @contextmanager
    def off(self) -> Iterator[None]:
        """Let the harness itself write."""
        was_on, self.is_on = self.is_on, False
        try:
            yield
        finally:
            self.is_on = was_on


@contextmanager
def limits() -> Iterator[None]:
    """Bound memory and time; more than CPU_S of CPU time fails, much more or a minute of waiting kills the process."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    begun = time.process_time()
    resource.setrlimit(resource.RLIMIT_AS, (used + (MEMORY_MIB << 20), resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CPU, (int(begun + 3 * CPU_S), resource.RLIM_INFINITY))
    signal.alarm(60)
    try:
        yield
    finally:
        signal.alarm(0)
        for limit in (resource.RLIMIT_AS, resource.RLIMIT_CPU):
            resource.setrlimit(limit, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    check(time.process_time() - begun < CPU_S, f"{time.process_time() - begun:.1f} s of CPU time")
