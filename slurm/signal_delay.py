"""Is `signal_delay` long enough? Compare the time a run takes to stop with the warning that Slurm gives it."""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from slurm import scheduler
from slurm.options import LaunchConfig
from slurm.scheduler import SlurmError

ROWS = 200  # the last rows of metrics.jsonl that count
GIB_PER_S = 1.0  # assumed checkpoint write speed, until one has been measured


def stop_seconds(run_dir: Path, plan: dict[str, Any] | None) -> tuple[float, str] | None:
    """Return how many seconds a run may take to stop (a step and two saves) and the source; None if unknown."""
    measured = []
    path = run_dir / "metrics.jsonl"
    for line in path.read_text(errors="replace", encoding="utf-8").splitlines()[-ROWS:] if path.is_file() else []:
        with suppress(ValueError):  # killed in the middle of a write
            measured.append(json.loads(line).get("stop_s") or 0.0)
    if any(measured):
        return max(measured), "measured"
    if plan is not None and "step_s" in plan:
        return plan["step_s"] + 2 * plan["checkpoint_gib"] / GIB_PER_S, f"planned, at {GIB_PER_S:g} GiB/s"
    return None


def warnings(config: dict[str, Any], plan: dict[str, Any] | None, launch: LaunchConfig) -> list[str]:
    """Return a warning for each way in which Slurm would end the run before it has saved."""
    found = stop_seconds(Path(config["run_dir"]), plan)
    if found is None:
        return []
    seconds, source = found
    needed = f"a step and two saves take {seconds:.0f} s ({source})"
    lines = []
    if seconds > launch.signal_delay:
        lines.append(
            f"warning: {needed}, signal_delay={launch.signal_delay} is less: give signal_delay={round(1.5 * seconds)}"
        )
    partition = launch.sbatch.get("partition", os.environ.get("SBATCH_PARTITION"))
    grace_s = _grace_seconds(partition) if partition is not None else None
    if grace_s is not None and seconds > grace_s:
        lines.append(
            f"warning: {needed}, and partition {partition} gives GraceTime={grace_s} s when it preempts: "
            "a small checkpoint.interval_steps bounds what is lost"
        )
    return lines


def _grace_seconds(partition: str) -> int | None:
    """Return the seconds from a partition's preemption signal to the kill; None if it never preempts or is unknown."""
    try:
        found = scheduler.describe("partition", partition)
    except SlurmError:
        return None
    return int(found.get("GraceTime", "0")) if found.get("PreemptMode") in ("REQUEUE", "CANCEL") else None
