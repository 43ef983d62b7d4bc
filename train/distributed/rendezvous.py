"""How ranks meet before they form groups: over the store, which is no collective, so that even those that do not fit
together can say so.

Rank 0 leaves what it is about to do under `first`; each other rank compares, leaves its own beside it, and waits for
the verdict that rank 0 makes of all. A rank that refused before it came here leaves its reason instead. So a refusal of
one rank is the last line of every rank within seconds, whoever started them. Rejected: gathering through gloo, whose
groups must be there first, and which other sizes or devices may keep from forming.
"""

import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from train.distributed import launcher
from train.distributed.agreement import difference
from train.distributed.launcher import Place

T = TypeVar("T")

# What gloo and NCCL say when the fault is a peer's; matched on RuntimeErrors only.
LOST_PEER = re.compile(r"closed by peer|reset by peer|broken pipe|timed? ?out|no route to host", re.IGNORECASE)
ANSWER_S = 20.0  # in which a store that accepts connections has to answer
GRACE_S = 5.0  # that rank 0 gives the others once one has objected
TELL_S = 20.0  # that a rank that refused before the meeting takes to tell the others, who may still be starting
POLL_S = 0.05
REFUSED = "refused"  # in place of facts: why a rank will not come; as a key: why one left after the meeting


class RefusedTogether(ValueError):
    """A refusal that every rank knows of, or that cannot be told to the others."""


def meet(place: Place, facts: Mapping[str, str], timeout_s: float) -> dist.Store:
    """Return the store of all ranks once all are there and have the same `facts`.

    Raises RefusedTogether, with the same words on each rank, where they differ, where one refused to start or is
    absent; and for an address that is not theirs.
    """
    if place.world_size == 1:
        return dist.HashStore()
    store = _join(place, timeout_s)
    meeting = _Meeting(store, place)
    meeting.hold({**facts, "WORLD_SIZE": str(place.world_size)}, timeout_s)
    store.set_timeout(timedelta(seconds=timeout_s))
    return store


def tell_peers(refusal: Exception) -> None:
    """Tell the ranks that wait for this one in `meet`, or in a collective since, why it leaves."""
    if isinstance(refusal, RefusedTogether):
        return
    try:
        place = launcher.place()
        if place.world_size > 1 and dist.is_initialized():
            c10d._get_default_store().set(REFUSED, f"rank {place.rank} refused: {refusal}")
            time.sleep(1.0 if place.rank == 0 and not launcher.has_agent() else 0.0)  # the store goes with this process
        elif place.world_size > 1:
            _Meeting(_join(place, TELL_S), place).excuse(str(refusal))
    except (ValueError, RuntimeError):  # nobody to be told, or the very variables that say where are the refusal
        return


def refusal_of_peer(error: Exception) -> str | None:
    """Return why the peer left that a collective has lost, as it said itself; None where none said anything."""
    if not (isinstance(error, RuntimeError) and LOST_PEER.search(str(error)) and dist.is_initialized()):
        return None
    try:
        store = c10d._get_default_store()
        return store.get(REFUSED).decode() if store.check([REFUSED]) else None
    except RuntimeError:  # the store went with the one that kept it
        return None


class _Meeting:
    """The keys of one meeting in the store."""

    def __init__(self, store: dist.Store, place: Place) -> None:
        self.store = dist.PrefixStore(f"meeting-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        self.place, self.keeps_store = place, place.rank == 0 and not launcher.has_agent()

    def hold(self, facts: dict[str, str], timeout_s: float) -> None:
        """Compare; see `meet`."""
        verdict = self._judge(facts, timeout_s) if self.place.rank == 0 else self._answer(facts, timeout_s)
        if verdict:
            self._leave()
            raise RefusedTogether(verdict)

    def excuse(self, reason: str) -> None:
        """Leave a reason in place of facts."""
        self._post({REFUSED: reason})
        self._leave(TELL_S)

    def _answer(self, facts: dict[str, str], timeout_s: float) -> str:
        """Leave this rank's facts and return rank 0's verdict."""
        if not launcher.has_agent() and self.store.add(f"here/{self.place.rank}", 1) > 1:
            host, port = launcher.address()
            raise RefusedTogether(
                f"another process is rank {self.place.rank} at {host}:{port} already: two have the same RANK, or "
                f"another run uses MASTER_PORT={port}"
            )
        # Who keeps the store sets the key at once; torchrun's agent keeps one before rank 0 is there.
        first = json.loads(self._get("0", timeout_s if launcher.has_agent() else ANSWER_S))
        self._post(facts, first)
        if REFUSED in first:
            return f"rank 0 refused to start: {first[REFUSED]}"
        return self._get("verdict", timeout_s).decode()

    def _judge(self, facts: dict[str, str], timeout_s: float) -> str:
        """Return what all have to do, as rank 0: "" to go on, or why not."""
        self._post(facts)
        others = range(1, self.place.world_size)
        deadline, objected = time.monotonic() + timeout_s, False
        while self.store.add("arrived", 0) < len(others) and time.monotonic() < deadline:
            if not objected and self.store.check(["objection"]):
                deadline, objected = time.monotonic() + GRACE_S, True
            time.sleep(POLL_S)
        present = {rank: json.loads(self.store.get(str(rank))) for rank in others if self.store.check([str(rank)])}
        refused = [
            f"rank {rank} refused to start: {said[REFUSED]}" for rank, said in present.items() if REFUSED in said
        ]
        verdict = refused[0] if refused else difference({0: facts, **present}) or ""
        if not verdict and (absent := [rank for rank in others if rank not in present]):
            verdict = f"ranks {absent[:8]} of {self.place.world_size} did not come within {timeout_s / 60:.3g} minutes"
        self.store.set("verdict", verdict)
        return verdict

    def _post(self, facts: dict[str, str], first: dict[str, str] | None = None) -> None:
        self.store.set(str(self.place.rank), json.dumps(facts))
        if REFUSED in facts or (first is not None and first != facts):
            self.store.set("objection", "")
        if self.place.rank:
            self.store.add("arrived", 1)

    def _leave(self, seconds: float = GRACE_S) -> None:
        """Say that this rank has read the verdict; who keeps the store waits for the others to."""
        if self.place.rank:
            self.store.add("left", 1)
        deadline = time.monotonic() + seconds
        while self.keeps_store and self.store.add("left", 0) < self.place.world_size - 1:
            if time.monotonic() > deadline:
                return
            time.sleep(POLL_S)

    def _get(self, key: str, timeout_s: float) -> bytes:
        host, port = launcher.address()
        try:
            self.store.wait([key], timedelta(seconds=timeout_s))
            return self.store.get(key)
        except RuntimeError as error:
            raise RefusedTogether(
                f"what answers at MASTER_ADDR={host} MASTER_PORT={port} says nothing of rank 0 of this run, or rank 0 "
                f"is gone ({str(error).splitlines()[0]}): if another run uses the port, choose another one on all ranks"
            ) from None


def _join(place: Place, timeout_s: float) -> dist.Store:
    """Return the store at MASTER_ADDR:MASTER_PORT, which rank 0 opens unless torchrun has; see `meet` for refusals."""
    host, port = launcher.address()
    keeps = place.rank == 0 and not launcher.has_agent()
    if not keeps:
        _wait_for_port(host, port, timeout_s)

    def open_store() -> dist.Store:
        limit = timedelta(seconds=ANSWER_S)
        return dist.TCPStore(host, port, is_master=keeps, wait_for_workers=False, timeout=limit)

    try:
        return _within(ANSWER_S, open_store)
    except (RuntimeError, TimeoutError) as error:
        what = str(error).splitlines()[0]
        if keeps and "EADDRINUSE" in str(error):
            user = _listener(port)
            raise RefusedTogether(
                f"MASTER_PORT={port} on {socket.gethostname()} is in use{f' by {user}' if user else ''}: choose a free "
                "port, the same on all ranks"
            ) from None
        who = "rank 0 cannot open the store there" if keeps else "what listens there is not rank 0 of this run"
        raise RefusedTogether(
            f"MASTER_ADDR={host} MASTER_PORT={port}: {who} ({what}); choose rank 0's host and a free port on it, the "
            "same on all ranks"
        ) from None


def _wait_for_port(host: str, port: int, timeout_s: float) -> None:
    """Wait until somebody listens: rank 0 may be slower to start than this rank."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            socket.create_connection((host, port), timeout=5.0).close()
            return
        except OSError as error:  # nobody yet, or a name that is not known yet
            if time.monotonic() > deadline:
                raise RefusedTogether(
                    f"rank 0 did not open MASTER_ADDR={host} MASTER_PORT={port} within {timeout_s / 60:.3g} minutes "
                    f"({error}): start it, or correct the address"
                ) from None
            time.sleep(4 * POLL_S)


def _within(seconds: float, work: Callable[[], T]) -> T:
    """Return what `work` returns, or raise TimeoutError: a store's handshake with a stranger may never end."""
    outcome: list[T | Exception] = []

    def run() -> None:
        try:
            outcome.append(work())
        except RuntimeError as error:
            outcome.append(error)

    thread = threading.Thread(target=run, name="rendezvous", daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise TimeoutError(f"no answer in {seconds:.0f} seconds")
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return outcome[0]


def _listener(port: int) -> str | None:
    """Return the process that listens on a port of this machine, as far as this user may see it."""
    inodes = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text(encoding="utf-8").splitlines()[1:] if Path(table).exists() else ():
            local, state, inode = (line.split()[column] for column in (1, 3, 9))
            if state == "0A" and int(local.rpartition(":")[2], 16) == port:
                inodes.add(f"socket:[{inode}]")
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if any(os.readlink(link) in inodes for link in (folder / "fd").iterdir()):
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                return f"pid {folder.name} ({command[:80]})"
        except OSError:  # another user's, or gone meanwhile
            continue
    return None
