"""The proof that all ranks see one folder, where several of them write or read in it.

On disks of each node's own every rank would find the folder it was told of, and each only its own files in it.
"""

import socket
import time
import uuid
from pathlib import Path

from train.distributed.ranks import Ranks

SEE_S = 10.0  # that a network file system may take to show what another host wrote


def require_shared(folder: Path, key: str, ranks: Ranks) -> None:
    """Raise OSError, on every rank, unless all see in `folder` what rank 0 writes there; `key` names its option.

    Collective. The folder is there on rank 0.
    """
    if ranks.world_size == 1:
        return
    token = ranks.on_first(lambda: _write(folder))  # a name that no host can have looked for before
    deadline = time.monotonic() + SEE_S
    while not (seen := (folder / token).exists()) and time.monotonic() < deadline:
        time.sleep(0.1)
    places = ranks.gather((seen, f"{socket.gethostname()}:{folder.absolute()}"))
    ranks.on_first(lambda: (folder / token).unlink(missing_ok=True))
    blind = [f"rank {rank} ({place})" for rank, (seen, place) in enumerate(places) if not seen]
    if blind:
        more = f" and {len(blind) - 4} more ranks" if len(blind) > 4 else ""
        raise OSError(
            f"{key}={folder}: {', '.join(blind[:4])}{more} cannot see there what rank 0 ({places[0][1]}) wrote: "
            "expected one folder that all ranks share, on a network file system where they run on several machines"
        )


def _write(folder: Path) -> str:
    token = f".seen-by-all-{uuid.uuid4().hex}"
    try:
        (folder / token).touch()
    except OSError as error:
        raise OSError(f"{folder}: cannot write there ({error.strerror}); choose a writable folder") from None
    return token
