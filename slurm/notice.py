"""Is there time to save? What a stop takes against the notice that Slurm gives."""

import json
import os
from pathlib import Path
from typing import Any

from slurm import scheduler
from slurm.options import LaunchConfig
from slurm.scheduler import SlurmError

ROWS = 200  # of metrics.jsonl, the last ones, that count
GIB_PER_S = 1.0  # that a checkpoint is written with, before one has been


def stop_seconds(run_dir: Path, plan: dict[str, Any] | None) -> tuple[float, str] | None:
    """Return how long a run may take to stop, a step and two saves, and whence that is known; None: it is not."""
    measured = []
    path = run_dir / "metrics.jsonl"
    for line in path.read_text(errors="replace", encoding="utf-8").splitlines()[-ROWS:] if path.is_file() else []:
        try:
            row = json.loads(line)
        except ValueError:  # a kill in the middle of a write
            continue
        measured += [row["stop_s"]] if row.get("stop_s") else []
    if measured:
        return max(measured), "measured"
    if plan is not None and "step_s" in plan:
        return plan["step_s"] + 2 * plan["checkpoint_gib"] / GIB_PER_S, f"planned, at {GIB_PER_S:g} GiB/s"
    return None


def warnings(config: dict[str, Any], plan: dict[str, Any] | None, launch: LaunchConfig) -> list[str]:
    """Return what to say where a run would be ended before it has saved."""
    found = stop_seconds(Path(config["run_dir"]), plan)
    if found is None:
        return []
    seconds, whence = found
    told = f"a step and two saves take {seconds:.0f} s ({whence})"
    lines = []
    if seconds > launch.signal_delay:
        lines.append(
            f"warning: {told}, signal_delay={launch.signal_delay} is less: give signal_delay={round(1.5 * seconds)}"
        )
    partition = launch.sbatch.get("partition", os.environ.get("SBATCH_PARTITION"))
    grace_s = _grace_seconds(partition)
    if grace_s is not None and seconds > grace_s:
        lines.append(
            f"warning: {told}, and partition {partition} gives GraceTime={grace_s} s when it preempts: "
            "a small checkpoint.interval_steps bounds what is lost"
        )
    return lines


def _grace_seconds(partition: str | None) -> int | None:
    """Return the notice of preemption that a partition gives; None: it does not preempt, or cannot be asked."""
    if partition is None:
        return None
    try:
        found = scheduler.describe("partition", partition)
    except SlurmError:
        return None
    return int(found.get("GraceTime", "0")) if found.get("PreemptMode") in ("REQUEUE", "CANCEL") else None
