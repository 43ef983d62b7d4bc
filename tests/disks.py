"""A disk that is small enough to fill."""

import ctypes
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(path: Path, kib: int) -> Iterator[Path]:
    """Mount an empty tmpfs of `kib` KiB at `path`; skips the test where mounting is not allowed."""
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", path], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small disk: {mounted.stderr.decode().strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", path], check=True)


def fill(path: Path) -> None:
    """Write zeros to a file until the disk is full."""
    with pytest.raises(OSError), path.open("wb", buffering=0) as file:
        while file.write(bytes(1 << 16)):
            pass


def own_mounts() -> None:
    """Give this process mounts of its own, like a node's; call it in a process forked for this. Needs root."""
    clone_newns, private = 0x00020000, ["mount", "--make-rprivate", "/"]
    if ctypes.CDLL(None, use_errno=True).unshare(clone_newns) or subprocess.run(private, check=False).returncode:
        raise PermissionError("no mounts of its own for this process")


def can_mount() -> bool:
    """Return whether a process may have mounts of its own here."""
    return subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode == 0
