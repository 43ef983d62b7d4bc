"""The profiler over a range of steps: a trace of what CPU and GPU did, and CUDA's memory history.

    <run>/profile/step-100-104-rank-0.trace.json.gz   for perfetto.dev or chrome://tracing
    <run>/profile/step-100-104-rank-0.memory.pickle   for pytorch.org/memory_viz (CUDA only)

A step lasts from the request for its batch to its update; logs, previews and checkpoints are not recorded. A trace
that cannot be written is a warning and does not stop the run.
"""

import logging
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from train.distributed.ranks import Ranks

log = logging.getLogger(__name__)

MEMORY_EVENTS = 200_000  # newest allocations and frees kept with their stacks, about 1 KB each on the host


@dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    steps: list[int] | None = None  # [first, last] to record, inclusive, 1 <= first <= last; null: none
    ranks: list[int] = field(default_factory=lambda: [0])  # that record, each 0 ... number of ranks - 1
    shapes: bool = False  # also the shapes of operators' inputs
    memory: bool = False  # also allocations; on CUDA also their history with call stacks, a snapshot

    def __post_init__(self) -> None:
        if self.steps is not None and not (len(self.steps) == 2 and 1 <= self.steps[0] <= self.steps[1]):
            raise ValueError(f"profile.steps={self.steps}: expected [first, last] with 1 <= first <= last, or null")


class Profiler:
    """Records the configured steps that a run passes, on the configured ranks."""

    def __init__(self, config: ProfileConfig, run_dir: Path, ranks: Ranks) -> None:
        """Raise ValueError, on every rank, for a rank that does not exist."""
        if config.steps is not None and not set(config.ranks) <= set(range(ranks.world_size)):
            raise ValueError(
                f"profile.ranks={config.ranks} on {ranks.world_size} ranks: expected some of 0 ... "
                f"{ranks.world_size - 1}"
            )
        self._config, self._folder, self._rank = config, run_dir / "profile", ranks.rank
        first, last = config.steps if config.steps and ranks.rank in config.ranks else (1, 0)
        self._steps = range(first, last + 1)
        self._on_cuda = ranks.device.type == "cuda"
        self._records_cuda_memory = self._on_cuda and config.memory
        self._profile: profile | None = None
        self._span: record_function | None = None  # of the current step, which names it in the trace
        self._first = self._last = 0  # steps recorded

    def before(self, step: int) -> None:
        """Start recording `step`, if it is in the range."""
        if step not in self._steps:
            return
        if self._profile is None:
            self._first = step
            if self._records_cuda_memory:
                torch.cuda.memory._record_memory_history(max_entries=MEMORY_EVENTS)
            self._profile = profile(
                activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._on_cuda else [])],
                record_shapes=self._config.shapes,
                profile_memory=self._config.memory,
            )
            self._profile.start()
        self._last = step
        self._span = record_function(f"step {step}")
        self._span.__enter__()

    def after(self, step: int) -> None:
        """Stop recording `step`; write the files after the last one."""
        if self._span is not None:
            self._span.__exit__(None, None, None)
            self._span = None
            if step == self._steps[-1]:
                self.close()

    def close(self) -> None:
        """Write what was recorded so far, if the run ends within the range."""
        if self._profile is None:
            return
        if self._span is not None:  # the run ended before its batch came
            self._span.__exit__(None, None, None)
        finished, self._profile = self._profile, None
        finished.stop()
        try:
            self._write(finished)
        except (OSError, RuntimeError) as error:
            log.warning("no profile of steps %d to %d: %s", self._first, self._last, error)
        if self._records_cuda_memory:
            torch.cuda.memory._record_memory_history(enabled=None)

    def _write(self, finished: profile) -> None:
        self._folder.mkdir(exist_ok=True)
        name = f"step-{self._first}-{self._last}-rank-{self._rank}"
        hidden = self._folder / f".{name}.json.gz"  # until complete; torch compresses by this suffix
        try:
            finished.export_chrome_trace(str(hidden))
            hidden.rename(self._folder / f"{name}.trace.json.gz")
            if self._records_cuda_memory:
                torch.cuda.memory._dump_snapshot(str(hidden))
                hidden.rename(self._folder / f"{name}.memory.pickle")
        finally:
            hidden.unlink(missing_ok=True)
