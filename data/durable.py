"""Files that hold all of their old bytes or all of the new ones, whatever stops the writer."""

import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

TEMPORARY_NAME = re.compile(r"(.+)\.tmp-\d+-[0-9a-f]{8}")  # left by a killed writer: NAME.tmp-PID-RANDOM


@contextmanager
def atomic_write(path: Path, *, exclusive: bool = False) -> Iterator[BinaryIO]:
    """Open `<path>.tmp-...` for writing; on success fsync and rename to `path`, else leave nothing.

    `exclusive`: there is no other writer, so the temporary name is fixed and a killed writer's file is overwritten.
    """
    path = Path(path)
    suffix = "new" if exclusive else f"tmp-{os.getpid()}-{secrets.token_hex(4)}"
    temporary = path.with_name(f"{'.' * exclusive}{path.name}.{suffix}")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)  # there only if something failed


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
