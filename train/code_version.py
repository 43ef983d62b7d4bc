"""Which code runs: the commit, or the hash of the copy that a Slurm job runs (slurm/snapshot.py)."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def code_version() -> str | None:
    """Return the commit, with -dirty after changes, or the snapshot's name code-HASH; None: neither is known."""
    if ROOT.name.startswith("code-"):
        return ROOT.name
    if not (ROOT / ".git").exists():  # else a repository that holds an installed copy would be named
        return None
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None
