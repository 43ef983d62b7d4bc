"""What all ranks of a run must have in common, as names and short values, and the words for where they differ.

Common are every setting, the code, the versions of torch and numpy, and the contents of what is read. Each rank or host
may have its own device number, paths (of the same contents), and settings that decide how its data is read but not
what it holds: a program lists those. Rejected: a digest alone, which says that ranks differ and not in what.
"""

import dataclasses
import hashlib
from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import torch

from train.nested import leaves

Facts = Mapping[str, str]
ABSENT = "nothing"
MOST_NAMED, MOST_SHOWN = 8, 100  # differences in a message; characters of a value


def facts_of(config: Any, own: Collection[str] = ()) -> dict[str, str]:
    """Return a config dataclass as names and values, without the keys (or patterns of them) that a rank may have of its
    own.
    """
    settings = leaves(dataclasses.asdict(config))
    return {key: str(value) for key, value in settings if not any(fnmatchcase(key, pattern) for pattern in own)}


def program_facts() -> dict[str, str]:
    """Return what tells this program's version from another: a digest of the sources, and what it computes with."""
    root, digest = Path(__file__).parents[2], hashlib.sha256()
    for path in sorted(path for package in ("data", "model", "train") for path in (root / package).rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    versions = {"torch": torch.__version__.partition("+")[0], "numpy": np.__version__}
    return {"code of data/, model/, train/": digest.hexdigest()[:12], **versions}


def difference(of_ranks: Mapping[int, Facts]) -> str | None:
    """Return one sentence that names what differs, the values and the ranks; None where all are alike."""
    names = list(dict.fromkeys(name for facts in of_ranks.values() for name in facts))
    found = []
    for name in names:
        by_value: dict[str, list[int]] = {}
        for rank, facts in of_ranks.items():
            by_value.setdefault(facts.get(name, ABSENT), []).append(rank)
        if len(by_value) > 1:
            values = (f"{_shown(value)} on {_ranks(ranks)}" for value, ranks in by_value.items())
            found.append(f"{name} is {', '.join(values)}")
    if not found:
        return None
    more = f"; and {len(found) - MOST_NAMED} more" if len(found) > MOST_NAMED else ""
    return (
        f"the ranks were not started alike: {'; '.join(found[:MOST_NAMED])}{more}. Start all of them with the same "
        "command, code and data"
    )


def _shown(value: str) -> str:
    return (
        value
        if len(value) <= MOST_SHOWN
        else f"{value[:MOST_SHOWN]}... ({hashlib.sha256(value.encode()).hexdigest()[:8]})"
    )


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks[:8]))}{' ...' * (len(ranks) > 8)}"
