"""How ranks meet before any process group exists: through the key-value store, which needs no agreement to work.

Rank 0 posts its facts (agreement.py); each other rank compares, posts its own, and waits for rank 0's verdict on all. A
rank that refused before it got here posts its reason instead. So if one rank refuses, every rank ends within seconds
with the same last line, however the ranks were started (P10). Rejected: gathering the facts through gloo, whose groups
may fail to form if world sizes or devices differ.
"""

import json
import os
import re
import socket
import time
from collections.abc import Mapping
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from data.strict_json import dumps
from train.distributed import launcher
from train.distributed.agreement import difference
from train.distributed.launcher import Place
from train.distributed.roll_call import within

# What gloo and NCCL say when a peer has failed; matched on RuntimeErrors only.
LOST_PEER = re.compile(r"closed by peer|reset by peer|broken pipe|timed? ?out|no route to host", re.IGNORECASE)
ANSWER_S = 20.0  # within which a store that accepts connections must answer
GRACE_S = 5.0  # that rank 0 waits for the other ranks once one has objected
REFUSAL_S = 20.0  # that a rank which refuses before the meeting waits for peers that may still be starting
POLL_S = 0.05
REFUSED = "refused"  # in place of facts: why a rank will not come; as a key: why one left after the meeting


class RefusedTogether(ValueError):
    """A refusal that every rank already knows of, or that cannot be sent to the others."""


def meet(place: Place, facts: Mapping[str, str], timeout_s: float) -> dist.Store:
    """Return the store of all ranks once all are present with the same `facts`.

    Raises RefusedTogether, with the same message on each rank, if facts differ or a rank refused to start or is absent;
    also if the address does not lead to rank 0 of this run.
    """
    if place.world_size == 1:
        return dist.HashStore()
    store = _join(place, timeout_s)
    meeting = _Meeting(store, place)
    facts = {**facts, "WORLD_SIZE": str(place.world_size)}
    verdict = meeting.judge(facts, timeout_s) if place.rank == 0 else meeting.answer(facts, timeout_s)
    if verdict:
        meeting.leave(GRACE_S)
        raise RefusedTogether(verdict)
    store.set_timeout(timedelta(seconds=timeout_s))
    return store


def tell_peers(refusal: Exception) -> None:
    """Send the reason this rank leaves to the ranks that wait for it in `meet` or in a later collective."""
    if isinstance(refusal, RefusedTogether):
        return
    try:
        place = launcher.place()
        if place.world_size > 1 and dist.is_initialized():
            c10d._get_default_store().set(REFUSED, f"rank {place.rank} refused: {refusal}")
            time.sleep(1.0 if _hosts_store(place) else 0.0)  # the store ends with this process
        elif place.world_size > 1:
            meeting = _Meeting(_join(place, REFUSAL_S), place)
            meeting.post({REFUSED: str(refusal)})
            meeting.leave(REFUSAL_S)
    except (ValueError, RuntimeError):  # no peer can be reached, or the environment variables are what was refused
        return


def refusal_of_peer(error: Exception) -> str | None:
    """Return the reason that a lost peer gave before it left; None if it gave none or no peer was lost."""
    if not (isinstance(error, RuntimeError) and LOST_PEER.search(str(error)) and dist.is_initialized()):
        return None
    try:
        store = c10d._get_default_store()
        return store.get(REFUSED).decode() if store.check([REFUSED]) else None
    except RuntimeError:  # the rank that hosted the store is gone
        return None


def _hosts_store(place: Place) -> bool:
    return place.rank == 0 and not launcher.has_agent()


class _Meeting:
    """The keys of one meeting in the store."""

    def __init__(self, store: dist.Store, place: Place) -> None:
        self.store = dist.PrefixStore(f"meeting-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        self.place = place

    def answer(self, facts: dict[str, str], timeout_s: float) -> str:
        """Post this rank's facts and return rank 0's verdict."""
        if not launcher.has_agent() and self.store.add(f"here/{self.place.rank}", 1) > 1:
            host, port = launcher.address()
            raise RefusedTogether(
                f"another process is rank {self.place.rank} at {host}:{port} already: either two processes have the "
                f"same RANK, or another run uses MASTER_PORT={port}"
            )
        # A rank 0 that hosts the store posts at once; torchrun's agent has the store ready before rank 0 starts.
        first = json.loads(self._get("0", timeout_s if launcher.has_agent() else ANSWER_S))
        self.post(facts, first)
        if REFUSED in first:
            return f"rank 0 refused to start: {first[REFUSED]}"
        return self._get("verdict", timeout_s).decode()

    def judge(self, facts: dict[str, str], timeout_s: float) -> str:
        """As rank 0, collect all facts; post and return the verdict: "" to start, or why not."""
        self.post(facts)
        others = range(1, self.place.world_size)
        deadline, objected = time.monotonic() + timeout_s, False
        while self.store.add("arrived", 0) < len(others) and time.monotonic() < deadline:
            if not objected and self.store.check(["objection"]):
                deadline, objected = time.monotonic() + GRACE_S, True
            time.sleep(POLL_S)
        present = {rank: json.loads(self.store.get(str(rank))) for rank in others if self.store.check([str(rank)])}
        refused = (f"rank {rank} refused to start: {its[REFUSED]}" for rank, its in present.items() if REFUSED in its)
        verdict = next(refused, None) or difference({0: facts, **present}) or ""
        if not verdict and (absent := [rank for rank in others if rank not in present]):
            verdict = f"ranks {absent[:8]} of {self.place.world_size} did not come within {timeout_s / 60:.3g} minutes"
        self.store.set("verdict", verdict)
        return verdict

    def post(self, facts: dict[str, str], first: dict[str, str] | None = None) -> None:
        """Post this rank's facts, and an objection if they are a refusal or unlike those of rank 0, `first`."""
        self.store.set(str(self.place.rank), dumps(facts))
        if REFUSED in facts or (first is not None and first != facts):
            self.store.set("objection", "")
        if self.place.rank:
            self.store.add("arrived", 1)

    def leave(self, seconds: float) -> None:
        """Mark the verdict as read; the rank that hosts the store waits until all have, `seconds` at most."""
        if self.place.rank:
            self.store.add("left", 1)
        deadline, others = time.monotonic() + seconds, self.place.world_size - 1
        while _hosts_store(self.place) and self.store.add("left", 0) < others and time.monotonic() < deadline:
            time.sleep(POLL_S)

    def _get(self, key: str, timeout_s: float) -> bytes:
        host, port = launcher.address()
        try:
            self.store.wait([key], timedelta(seconds=timeout_s))
            return self.store.get(key)
        except RuntimeError as error:
            raise RefusedTogether(
                f"the store at MASTER_ADDR={host} MASTER_PORT={port} has nothing from rank 0 of this run "
                f"({str(error).splitlines()[0]}): rank 0 is gone, or another run uses the port; then choose another "
                "one on all ranks"
            ) from None


def _join(place: Place, timeout_s: float) -> dist.Store:
    """Return the store at MASTER_ADDR:MASTER_PORT, which rank 0 opens unless torchrun has; raises as `meet` does."""
    host, port = launcher.address()
    hosts = _hosts_store(place)
    if not hosts:
        _wait_for_port(host, port, timeout_s)
    limit = timedelta(seconds=ANSWER_S)
    open_store = partial(dist.TCPStore, host, port, is_master=hosts, wait_for_workers=False, timeout=limit)
    try:
        return within(ANSWER_S, open_store)
    except (RuntimeError, TimeoutError) as error:
        what = str(error).splitlines()[0]
        if hosts and "EADDRINUSE" in str(error):
            user = _listener(port)
            raise RefusedTogether(
                f"MASTER_PORT={port} on {socket.gethostname()} is in use{f' by {user}' if user else ''}: choose a free "
                "port, the same on all ranks"
            ) from None
        who = "rank 0 cannot open the store there" if hosts else "what listens there is not rank 0 of this run"
        raise RefusedTogether(
            f"MASTER_ADDR={host} MASTER_PORT={port}: {who} ({what}); choose rank 0's host and a free port on it, the "
            "same on all ranks"
        ) from None


def _wait_for_port(host: str, port: int, timeout_s: float) -> None:
    """Wait until a process listens there: rank 0 may start later than this rank."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            socket.create_connection((host, port), timeout=5.0).close()
            return
        except OSError as error:  # nothing listens yet, or the host's name does not resolve yet
            if time.monotonic() > deadline:
                raise RefusedTogether(
                    f"rank 0 did not open MASTER_ADDR={host} MASTER_PORT={port} within {timeout_s / 60:.3g} minutes "
                    f"({error}): start it, or correct the address"
                ) from None
            time.sleep(4 * POLL_S)


def _listener(port: int) -> str | None:
    """Return the process that listens on a port of this machine; None if this user may not see it."""
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
        except OSError:  # another user's process, or one that has just ended
            continue
    return None
