"""Files that hold all of their old bytes or all of the new ones, whatever stops the writer."""

import contextlib
import os
import re
import secrets
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

TEMPORARY_NAME = re.compile(r"(.+)\.tmp-\d+-[0-9a-f]{8}")  # left by a killed writer: NAME.tmp-PID-RANDOM


class atomic_write:
    """Open `<path>.tmp-...` for writing; on success fsync and rename to `path`, else leave nothing.

    `exclusive`: there is no other writer, so the temporary name is fixed and a killed writer's file is overwritten.
    """

    def __init__(self, path: Path, *, exclusive: bool = False) -> None:
        self.path = Path(path)
        suffix = "new" if exclusive else f"tmp-{os.getpid()}-{secrets.token_hex(4)}"
        self.temporary = self.path.with_name(f"{'.' * exclusive}{self.path.name}.{suffix}")

    def __enter__(self) -> BinaryIO:
        self.file = open(self.temporary, "wb")
        return self.file

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.file.flush()
                os.fsync(self.file.fileno())
                os.replace(self.temporary, self.path)
                sync_folder(self.path.parent)
        finally:
            if isinstance(error, OSError) and error.filename is None:
                error.filename = str(self.path)
            with contextlib.suppress(OSError):  # of a full disk; a successful write is flushed already
                self.file.close()
            self.temporary.unlink(missing_ok=True)  # there only if something failed


def write_durably(path: Path, content: bytes) -> None:
    """Replace the contents of `path`, which has no other writer."""
    with atomic_write(path, exclusive=True) as file:
        file.write(content)


def sync_folder(folder: Path) -> None:
    """Make the names inside `folder` durable, as fsync does the bytes of a file."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
