"""Proof that all ranks see the same folder, for folders in which several ranks read or write (P5, P10).

If each node has its own disk, every rank finds a folder of the given name, but only its own files in it.
"""

import socket
import time
import uuid
from pathlib import Path

from train.distributed.agreement import first_few
from train.distributed.ranks import Ranks

SEE_S = 10.0  # that a network file system may take to show a file written by another host


def require_shared(folder: Path, key: str, ranks: Ranks) -> None:
    """Raise OSError on every rank unless all see what rank 0 writes to `folder`; `key` is the option that names it.

    Collective. The folder must exist on rank 0.
    """
    if ranks.world_size == 1:
        return
    token = ranks.on_first(lambda: _write(folder))  # a new name, so that no host has cached its absence
    deadline = time.monotonic() + SEE_S
    while not (seen := (folder / token).exists()) and time.monotonic() < deadline:
        time.sleep(0.1)
    places = ranks.gather((seen, f"{socket.gethostname()}:{folder.absolute()}"))
    ranks.on_first(lambda: (folder / token).unlink(missing_ok=True))
    if blind := [f"rank {rank} ({place})" for rank, (seen, place) in enumerate(places) if not seen]:
        raise OSError(
            f"{key}={folder}: {first_few(blind, ', ', 4)} cannot see there what rank 0 ({places[0][1]}) wrote: "
            "expected a folder that all ranks share; across machines, one on a network file system"
        )


def _write(folder: Path) -> str:
    token = f".seen-by-all-{uuid.uuid4().hex}"
    try:
        (folder / token).touch()
    except OSError as error:
        raise OSError(f"{folder}: cannot write there ({error.strerror}); choose a writable folder") from None
    return token
