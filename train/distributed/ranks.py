"""Ranks: which one this process is, the process groups it communicates on, and how a failing rank ends.

Besides the default group there are three gloo groups, because two threads that share a group mis-order its collectives.
The main thread votes on `vote_group` (vote.py) and gathers, loads and saves on `checkpoint_group`; a background save
has its own. Without a launcher a process is one rank with the same groups, so no other code asks whether it is
distributed (P14).
"""

import os
import socket
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from train.distributed.agreement import difference, program_facts
from train.distributed.cpu_settings import settle_cpu
from train.distributed.launcher import has_agent, place, refuse_lone_task, report_to_torchrun
from train.distributed.process import allow_open_files, set_allocator
from train.distributed.rendezvous import LOST_PEER, meet
from train.distributed.roll_call import RollCall

T = TypeVar("T")

DIED = 1  # exit status
GLOO_GROUPS = 3  # besides the default group; each connects all pairs of ranks


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among its peers. The groups are None for `alone()`."""

    rank: int  # 0 ... world_size - 1
    world_size: int
    device: torch.device
    vote_group: dist.ProcessGroup | None  # gloo, for the main thread
    checkpoint_group: dist.ProcessGroup | None  # gloo, for the main thread, with a timeout that allows for slow disks
    background_group: dist.ProcessGroup | None = None  # gloo, for a background save
    roll_call: RollCall | None = None
    flight_recorder: Path | None = None  # folder for NCCL's last collectives, dumped when a peer is lost; CUDA only

    @property
    def is_first(self) -> bool:
        """Return whether this is rank 0, which writes the files that exist once."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Return every rank's small, picklable `value`, in rank order. Collective on `checkpoint_group`."""
        if self.checkpoint_group is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.checkpoint_group)
        return values

    def on_first(self, work: Callable[[], T]) -> T:
        """Run `work` on rank 0 and return its result on all. Collective on `checkpoint_group`.

        An OSError, ValueError or RuntimeError of `work` is raised on every rank, so none waits for a rank that left.
        """
        outcome: list[Any] = [None, None]  # result, error
        if self.is_first:
            try:
                outcome[0] = work()
            except (OSError, ValueError, RuntimeError) as error:
                outcome[1] = error
        if self.checkpoint_group is not None:
            dist.broadcast_object_list(outcome, src=0, group=self.checkpoint_group)
        result, failure = outcome
        if failure is not None:
            raise failure
        return result

    def require_alike(self, facts: Mapping[str, str]) -> None:
        """Raise ValueError on every rank, naming what differs between ranks. Collective on `checkpoint_group`."""
        if found := difference(dict(enumerate(self.gather(dict(facts))))):
            raise ValueError(found)

    def in_background(self) -> "Ranks":
        """Return the same ranks for a background thread, on a group that no other thread uses."""
        return replace(self, vote_group=None, checkpoint_group=self.background_group, background_group=None)

    def set_timeout(self, seconds: float) -> None:
        """Set how long a collective of the training loop may wait: long for the first step, shorter afterwards.

        Covers the groups of device meshes too. All groups but `vote_group` get a quarter more, so that a lost peer is
        first noticed by the vote, whose error message is readable.
        """
        for group in c10d._world.pg_map:
            if group not in (self.checkpoint_group, self.background_group):
                c10d._set_pg_timeout(timedelta(seconds=seconds * (1 if group is self.vote_group else 1.25)), group)

    def close(self) -> None:
        """Wait for the peers and destroy the process groups. Collective; for the end of a successful run."""
        if self.roll_call is not None:
            self.roll_call.close()
        if dist.is_initialized():
            dist.barrier(group=self.vote_group)
            dist.destroy_process_group()


Device = Literal["auto", "cpu", "cuda"]  # auto: CUDA if available


def own_device(device: Device) -> torch.device:
    """Return this rank's device: the CUDA device numbered by its local rank, or the CPU.

    Raises ValueError if there are fewer devices than ranks on this machine, or LOCAL_RANK is missing.
    """
    local_rank = place().local_rank
    set_allocator()  # here because every program's first question about CUDA is this one
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda, but torch finds no CUDA device; use device=auto or device=cpu")
    if device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"LOCAL_RANK={local_rank}, but {torch.cuda.device_count()} CUDA devices: start at most one rank per "
            "device, or use device=cpu"
        )
    if "LOCAL_RANK" not in os.environ and place().world_size > 1 and torch.cuda.device_count() > 1:
        raise ValueError(
            f"LOCAL_RANK is not set, and this rank sees {torch.cuda.device_count()} CUDA devices: set it to the "
            "rank's number on its machine, or make one device visible to each rank (CUDA_VISIBLE_DEVICES)"
        )
    return torch.device("cuda", local_rank)


def init_ranks(
    *,
    timeout_s: float,
    checkpoint_timeout_s: float = 1800.0,
    device: Device = "auto",
    flight_recorder: Path | None = None,
    facts: Mapping[str, str] | None = None,
) -> Ranks:
    """Join the process groups that the launcher's environment describes; without one, create groups of one rank.

    `facts` must be the same on all ranks, like the program's version and the kind of device (agreement.py). Collectives
    raise after `timeout_s`; on `checkpoint_group` and `background_group`, where the slowest disk decides, after
    `checkpoint_timeout_s`. Also settles CPU threads and memory (cpu_settings.py) and the limit on open files. Raises
    ValueError for a missing device, an inconsistent environment, a machine that allows too few files, and ranks that
    disagree.
    """
    refuse_lone_task()
    mine, own = place(), own_device(device)
    on_cuda = own.type == "cuda"
    if on_cuda:
        torch.cuda.set_device(own)
    hosts_store = mine.rank == 0 and not has_agent()
    allow_open_files(mine.world_size, GLOO_GROUPS + (not on_cuda) + hosts_store)
    settle_cpu(mine.local_world_size, computes=not on_cuda)
    store = meet(mine, {**(facts or {}), "kind of device": own.type, **program_facts()}, timeout_s)
    timeout, checkpoint_timeout = timedelta(seconds=timeout_s), timedelta(seconds=checkpoint_timeout_s)
    if on_cuda:
        os.environ.setdefault("TORCH_NCCL_TRACE_BUFFER_SIZE", "2000")  # collectives that the flight recorder keeps
    # NCCL alone on CUDA: tensors on the CPU have groups of their own, and a gloo group takes a file for each peer.
    backend = "nccl" if on_cuda else "gloo"
    dist.init_process_group(backend, timeout=timeout, store=store, rank=mine.rank, world_size=mine.world_size)
    ranks = Ranks(
        rank=mine.rank,
        world_size=mine.world_size,
        device=own,
        vote_group=dist.new_group(backend="gloo", timeout=timeout),
        checkpoint_group=dist.new_group(backend="gloo", timeout=checkpoint_timeout),
        background_group=dist.new_group(backend="gloo", timeout=checkpoint_timeout),
        roll_call=RollCall(c10d._get_default_store(), mine.rank, mine.world_size, kept_by_first=not has_agent()),
        flight_recorder=flight_recorder if on_cuda else None,
    )
    ranks.gather(None)  # if a rank has failed already, this fails with a clearer message than the next collective's
    return ranks


def alone(device: str | torch.device = "cpu") -> Ranks:
    """Return the only rank of a program that needs no process group, such as a viewer."""
    return Ranks(rank=0, world_size=1, device=torch.device(device), vote_group=None, checkpoint_group=None)


@contextmanager
def last_words(ranks: Ranks, where: Callable[[], str]) -> Iterator[None]:
    """Around the training loop: on an exception, print which rank died, where and why, and end the process at once.

    Exiting closes the connections, so the peers' collectives fail within milliseconds instead of at the timeout. A
    rank that only lost a peer names it in one line, so that the culprit's traceback stands alone. `where` names the
    place, for example `lambda: f"step {step}"`. Refusals belong before this context.
    """
    try:
        yield
    except Exception as error:  # not swallowed: the process ends here
        name = f"rank {ranks.rank} of {ranks.world_size} ({socket.gethostname()}, pid {os.getpid()})"
        reason = f"{type(error).__name__}: {str(error).strip()}"
        if isinstance(error, RuntimeError) and LOST_PEER.search(str(error)):
            _dump_flight_recorder(ranks)
            missing = ranks.roll_call.missing() if ranks.roll_call is not None else []
            lost = ", ".join(f"rank {peer}" for peer in missing) or "a peer"
            words = f"{name} lost {lost} at {where()}; its own message says why ({reason.splitlines()[0]})\n"
        else:
            words = f"{''.join(traceback.format_exception(error))}{name} died at {where()}: {reason}\n"
        report_to_torchrun(words)
        sys.stdout.flush()
        sys.stderr.flush()
        os.write(sys.stderr.fileno(), words.encode())  # one write, so that the ranks' lines do not interleave
        os._exit(DIED)


def _dump_flight_recorder(ranks: Ranks) -> None:
    """Write NCCL's flight recorder, a pickle for `torchfrtrace`, before the process ends."""
    dump = getattr(torch._C._distributed_c10d, "_dump_nccl_trace", None)
    if ranks.flight_recorder is None or dump is None:
        return
    try:
        ranks.flight_recorder.mkdir(parents=True, exist_ok=True)
        (ranks.flight_recorder / f"rank-{ranks.rank}.pickle").write_bytes(dump())
    except OSError as error:  # a full disk must not hide why the run ended
        print(f"flight recorder: {error}", file=sys.stderr)
